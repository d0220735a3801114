"""Sections of a synthetic corpus as vendors' files and slides show them, and what simple methods make of them."""

import csv
import gzip
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import h5py
import numpy as np
import openslide
from scipy import sparse

from storm.evaluate.baselines import ridge_predict

MATRIX = {"visium": "filtered_feature_bc_matrix.h5", "xenium": "cell_feature_matrix.h5"}
OF_GENES = ("gene_id", "gene_class", "symbol", "measured")  # arrays of the truth without a row per profile


def manifest(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def tenx_counts(path: Path) -> tuple[list[str], np.ndarray, h5py.Group]:
    """Barcodes, counts [barcodes, features] and the open matrix group."""
    group = h5py.File(path)["matrix"]
    parts = (group["data"][:], group["indices"][:], group["indptr"][:])
    counts = sparse.csc_matrix(parts, shape=tuple(group["shape"][:])).T.toarray()
    return [b.decode() for b in group["barcodes"][:]], counts, group


def st_counts(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    with gzip.open(path, "rt") as handle:
        head, *rows = [line.rstrip("\n").split("\t") for line in handle]
    return [r[0] for r in rows], head[1:], np.array([r[1:] for r in rows], float)


@dataclass(frozen=True)
class Measured:
    """A section as the gate sees it: truth, lognorm [N, G] (NaN: not measured), patches [N, 112, 112, 3] at 1 um/px."""

    split: str
    donor: str
    truth: dict[str, np.ndarray]
    lognorm: np.ndarray
    patches: np.ndarray
    blood_um: np.ndarray  # [B, 2] places that look like blood


def read_section(folder: Path, row: dict[str, str], every: int = 1) -> Measured:
    """A section of a corpus, or each `every`-th profile of it."""
    with np.load(folder / "truth" / f"{row['slide_id']}.npz") as file:
        truth = dict(file)
    if row["platform"] in MATRIX:
        names, counts, _ = tenx_counts(folder / row["measurement"] / MATRIX[row["platform"]])
        counts = counts[:, : len(truth["gene_id"])].astype(float)
    else:
        names, _, seen = st_counts(folder / row["measurement"])
        counts = np.full((len(names), len(truth["gene_id"])), np.nan)
        counts[:, truth["measured"]] = seen
    line = {name: i for i, name in enumerate(names)}
    counts = counts[[line[p] for p in truth["profile_id"]]][::every]
    truth = {k: v if k in OF_GENES else v[::every] for k, v in truth.items()}
    with openslide.OpenSlide(folder / row["image"]) as slide:
        rgb = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3]
    assert float(row["mpp"]) == 1.0
    padded = np.pad(rgb, ((56, 56), (56, 56), (0, 0)), constant_values=242)
    corners = np.rint(truth["xy_um"]).astype(int)
    patches = np.stack([padded[y : y + 112, x : x + 112] for x, y in corners])
    small = cv2.resize(rgb, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA).astype(int)
    blood = np.argwhere((small[..., 2] < small[..., 1] + 15) & (small[..., 0] - small[..., 1] > 60))
    lognorm = np.log1p(counts / np.nansum(counts, 1, keepdims=True) * 1e4)
    return Measured(row["split"], row["donor"], truth, lognorm, patches, blood[:, ::-1] * 4.0 + 2.0)


def texture(section: Measured) -> np.ndarray:
    """Energy and skewness of brightness in bands of scale: what a look at arrangement gives."""
    out = []
    for patch in section.patches.astype(np.float32).mean(3):
        scales = [patch, *(cv2.GaussianBlur(patch, (0, 0), s) for s in (1, 2, 4, 6, 9))]
        bands = [a - b for a, b in itertools.pairwise(scales)]
        out.append([f for b in bands for f in (b.std(), (b**3).mean() / b.std() ** 3)])
    return np.array(out)


def surroundings(section: Measured) -> np.ndarray:
    """How much blood lies at which distance: what a look around gives."""
    distance = np.hypot(*(section.truth["xy_um"][:, None] - section.blood_um[None]).transpose(2, 0, 1))
    return np.stack([((distance >= r) & (distance < r + 30)).sum(1) for r in range(0, 330, 30)], 1).astype(float)


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Per column; 0 where one of the two does not vary, NaN where b is not measured."""
    a, b = a - a.mean(0), b - b.mean(0)
    size = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.where(np.isnan(size), np.nan, (a * b).sum(0) / np.maximum(size, 1e-9))


class Gate:
    """Mean Pearson per gene class on held-out donors, within each section, of predictions from features."""

    def __init__(self, found: list[Measured]) -> None:
        self.train = [s for s in found if s.split == "train"]
        self.test = [s for s in found if s.split == "test"]
        self.kind = found[0].truth["gene_class"]
        y = np.concatenate([s.lognorm for s in self.train])
        self.y = np.where(np.isnan(y), np.nanmean(y, 0), y)
        self.groups = np.concatenate([[s.donor] * len(s.lognorm) for s in self.train])

    def score(self, predictions: list[np.ndarray]) -> dict[str, float]:
        per_gene = np.nanmean([pearson(p, s.lognorm) for p, s in zip(predictions, self.test, strict=True)], 0)
        scores = {c: float(per_gene[self.kind == c].mean()) for c in "abcde"}
        return scores | {"a-d": float(per_gene[self.kind != "e"].mean())}

    def ridge(self, features: Callable[[Measured], np.ndarray]) -> dict[str, float]:
        x, test_x = (np.concatenate([features(s) for s in part]) for part in (self.train, self.test))
        predicted = ridge_predict(x, self.y, test_x, self.groups)
        return self.score(np.split(predicted, np.cumsum([len(s.lognorm) for s in self.test])[:-1]))
