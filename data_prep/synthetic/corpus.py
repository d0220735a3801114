"""A corpus: donors, sections, platforms and splits, each section grown, stained, measured and written.

In: a size and a seed. Out: `manifest.csv` (written last), `images/`, `measurements/`, `truth/` and gene descriptors
under one folder. Where cells are measured too, each donor gives two adjacent cuts: the same latent tissue, each with
its own stain and H&E, measured by Visium and by Xenium.
"""

import csv
import functools
import io
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from data_prep.synthetic import expression, instrument, vendors
from data_prep.synthetic.descriptors import write_descriptors
from data_prep.synthetic.expression import PLATFORMS, GenePanel
from data_prep.synthetic.render import Stain, render
from data_prep.synthetic.tissue import LATENTS, Floats, Tissue, at, grow, smooth_field
from storm import files

COLUMNS = ("slide_id", "image", "measurement", "platform", "donor", "study", "organ", "species", "spots", "mpp",
           "split", "section", "license")  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How large a corpus is. Donors come in the order train, val, test.

    Without cells every third donor is measured by legacy ST; with them each donor by Visium and by Xenium.
    """

    train: int
    val: int
    test: int
    second: int  # donor 0, second, 2 second, ... have two sections; 0: none
    genes: int
    mpp: float
    visium_um: float  # side of a section
    st_um: float
    probes: int = 0  # genes of the Xenium panel; 0: no cells

    @property
    def donors(self) -> int:
        return self.train + self.val + self.test


SIZES = {
    "tiny": Size(train=2, val=0, test=1, second=0, genes=320, mpp=0.5, visium_um=1000.0, st_um=1200.0),
    "quickstart": Size(train=5, val=0, test=3, second=2, genes=400, mpp=1.0, visium_um=1500.0, st_um=2400.0),
    "benchmark": Size(train=9, val=2, test=5, second=1, genes=2000, mpp=0.5, visium_um=2600.0, st_um=3200.0),
    "pair": Size(train=1, val=0, test=1, second=0, genes=160, mpp=1.0, visium_um=600.0, st_um=0.0, probes=80),
    "platforms": Size(train=6, val=0, test=3, second=0, genes=600, mpp=1.0, visium_um=1800.0, st_um=0.0, probes=300),
}


@dataclass(frozen=True)
class Section:
    """One section = one row of the manifest."""

    index: int
    donor: int
    cut: int
    platform: str
    split: str
    side_um: float
    tissue: int  # index of the first section of the same latent tissue

    @property
    def slide_id(self) -> str:
        return f"d{self.donor:02d}s{self.cut}_{self.platform}"


@dataclass(frozen=True)
class Spots:
    """S spots of the array: where they are said to be and where they really took their molecules."""

    array: npt.NDArray[np.int64]  # [S, 2] Visium: row, col; ST: x, y
    new: Floats  # [S, 2] ST: the array place with decimals
    written_um: Floats  # [S, 2]
    true_um: Floats  # [S, 2]
    diameter_um: float


def sections(size: Size) -> list[Section]:
    """All sections of a corpus, in the manifest's order."""
    found: list[Section] = []
    for donor in range(size.donors):
        split = "train" if donor < size.train else "val" if donor < size.train + size.val else "test"
        for cut, platform in enumerate(_platforms(size, donor)):
            side_um = size.st_um if platform == "st" else size.visium_um
            same = len(found) - (platform == "xenium")
            found.append(Section(len(found), donor, cut, platform, split, side_um, same))
    return found


def _platforms(size: Size, donor: int) -> list[str]:
    """What each cut of a donor is measured by."""
    if size.probes:
        return ["visium", "xenium"]
    return ["st" if donor % 3 == 1 else "visium"] * (2 if size.second and donor % size.second == 0 else 1)


def _lattice(rng: np.random.Generator, section: Section, mpp: float) -> Spots:
    """The spots whose centres lie in the image, slightly turned and shifted by an alignment error of 0-15 um."""
    visium = section.platform == "visium"
    rows, columns = (vendors.ROWS, vendors.COLUMNS) if visium else (35, 33)
    row, col = (i.ravel() for i in np.mgrid[:rows, :columns])
    if visium:
        row, col = row[(row + col) % 2 == 0], col[(row + col) % 2 == 0]
        new, pitch_um = np.stack([col, row], 1).astype(float), np.array([50.0, 50.0 * np.sqrt(3)])
    else:
        new, pitch_um = np.stack([col, row], 1) + rng.normal(0, 0.03, (len(row), 2)), np.array([200.0, 200.0])
    turn = rng.uniform(-0.02, 0.02)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    corner = -np.array([10, 6]) * pitch_um + rng.uniform(0, 1, 2) * pitch_um  # the array is larger than the section
    written = corner + new * pitch_um @ matrix.T
    written = np.rint(written / mpp) * mpp if visium else np.round(written / mpp, 2) * mpp
    shift = rng.uniform(0, 15) * np.array([np.cos(a := rng.uniform(0, 2 * np.pi)), np.sin(a)])
    seen = ((written > 30) & (written < section.side_um - 30)).all(1)
    array = np.stack([row, col] if visium else [col, row], 1)
    return Spots(array[seen], new[seen], written[seen], (written + shift)[seen], 55.0 if visium else 100.0)


def _depths(rng: np.random.Generator, section: Section, genes: int, dark: float, xy_um: Floats, seen: Floats) -> Floats:
    """Molecules [N] expected per profile: tied to the stain across sections, and to no pixel within one.

    `seen` [N, L] are the latents that pixels show; what chance ties to them is taken out of the log depth.
    """
    median = rng.uniform(1800, 10000) * genes / 4000 * np.exp(0.4 * dark)
    spread = rng.uniform(0.5, 1.25) * (1.0 if section.platform == "visium" else 0.7)
    noise = 0.35 * at(smooth_field(rng, section.side_um, 200.0), xy_um) + 0.93 * rng.standard_normal(len(xy_um))
    design = np.column_stack([seen, np.ones(len(seen))])
    noise -= design @ np.linalg.lstsq(design, noise, rcond=None)[0]
    return median * np.exp(spread * noise / noise.std())


def _stain(rng: np.random.Generator, dark: float) -> Stain:
    hematoxylin, eosin = np.exp(0.10 * dark + rng.normal(0, 0.05, 2))
    return Stain(1.15 * hematoxylin, 1.1 * eosin, rng.uniform(-1, 1), rng.uniform(238, 247), *rng.integers(0, 3, 2))


def _shift(rng: np.random.Generator, panel: GenePanel, section: Section, dark: float, seed: int) -> Floats:
    """What platform, donor and section add to the log expression [G]."""
    donor = np.random.default_rng([seed, 102, section.donor]).normal(0, 0.3, len(panel.ids))
    own = rng.normal(0, 0.1, len(panel.ids))
    return panel.efficiency[PLATFORMS.index(section.platform)] + donor + own + 0.5 * dark * panel.stain_programme


def _measure(
    rng: np.random.Generator, panel: GenePanel, section: Section, tissue: Tissue, spots: Spots, dark: float, seed: int
) -> dict[str, npt.NDArray]:
    """Truth and counts of the spots that lie on tissue (`kept` [S])."""
    incidence = expression.under_discs(tissue, spots.true_um, spots.diameter_um)
    kept = (np.diff(incidence.indptr) >= 3) & (at(tissue.inside, spots.true_um) > 0.2)
    expected = expression.expected_composition(panel, tissue, incidence[kept], _shift(rng, panel, section, dark, seed))
    latent = (incidence[kept] @ tissue.latent) / incidence[kept].sum(1)[:, None]
    seen = latent[:, : LATENTS.index("niche")]
    depth = _depths(rng, section, len(panel.ids), dark, spots.true_um[kept], seen)
    return {
        "kept": kept, "counts": expression.measure(rng, expected, depth), "expected": expected.astype(np.float32),
        "depth": depth, "domain": at(tissue.domain, spots.true_um[kept]), "xy_um": spots.written_um[kept],
        "true_xy_um": spots.true_um[kept], "latent": latent,
    }  # fmt: skip


def _write_measurement(
    out: Path, section: Section, mpp: float, rgb: npt.NDArray, spots: Spots, truth: dict[str, npt.NDArray],
    panel: GenePanel,
) -> npt.NDArray[np.str_]:  # fmt: skip
    """The vendor's files; returns the profile ids."""
    kept, counts = truth["kept"], truth["counts"]
    if section.platform == "visium":
        xy_px0 = np.rint(spots.written_um / mpp).astype(np.int64)
        folder = out / "measurements" / section.slide_id / "outs"
        return vendors.write_visium(folder, rgb, mpp, spots.array, xy_px0, kept, counts, panel.ids, panel.symbols)
    rows = np.concatenate([np.flatnonzero(kept), np.flatnonzero(~kept)[:1]])
    seen = truth["measured"]
    folder = out / "measurements" / section.slide_id
    return vendors.write_st(folder, section.slide_id, spots.array[rows], spots.new[rows], spots.written_um[rows] / mpp,
                            counts[:, seen], panel.symbols[seen])  # fmt: skip


def write_section(out: Path, size: Size, seed: int, section: Section) -> None:
    """Grow, stain, measure and write one section: a pure function of (size, seed, section)."""
    cv2.setNumThreads(1)
    rng = np.random.default_rng([seed, 103, section.tissue])
    panel = expression.choose_genes(size.genes, seed)
    tissue = grow(rng, section.side_um)
    if section.tissue != section.index:
        rng = np.random.default_rng([seed, 103, section.index])
    dark = float(np.clip(rng.standard_normal(), -2, 2))
    rgb = render(rng, tissue, _stain(rng, dark), size.mpp)
    vendors.write_slide(out / "images" / f"{section.slide_id}.tif", rgb, size.mpp)
    tied = dark if section.split == "train" else -dark  # a shortcut that turns round in the test
    if section.platform == "xenium":
        _write_cells(out, size, seed, section, rng, panel, tissue, tied)
        return
    spots = _lattice(rng, section, size.mpp)
    truth = _measure(rng, panel, section, tissue, spots, tied, seed)
    # a table of legacy ST names the genes it saw, so some are missing there rather than zero
    truth["measured"] = (rng.random(size.genes) > 0.04) | (section.platform == "visium")
    profiles = _write_measurement(out, section, size.mpp, rgb, spots, truth, panel)
    _write_truth(out, section, panel, profiles, truth)


def _write_cells(
    out: Path, size: Size, seed: int, section: Section, rng: np.random.Generator, panel: GenePanel, tissue: Tissue,
    dark: float,
) -> None:  # fmt: skip
    """The Xenium bundle of a section, and its truth over the genes of its own panel."""
    probed = expression.targeted(panel, size.probes, seed)
    shift = _shift(rng, panel, section, dark, seed)[probed]
    truth = instrument.run(rng, panel.only(probed), tissue, shift, dark)
    folder = out / "measurements" / section.slide_id / "outs"
    profiles = instrument.write(folder, rng, truth, panel.only(probed), section.side_um, size.mpp)
    _write_truth(out, section, panel.only(probed), profiles, truth)


def _write_truth(
    out: Path, section: Section, panel: GenePanel, profiles: npt.NDArray[np.str_], truth: dict[str, npt.NDArray]
) -> None:
    """`truth/<slide_id>.npz`: all that is known of the profiles but what the vendor's files say."""
    (out / "truth").mkdir(parents=True, exist_ok=True)
    known = {"gene_id": panel.ids, "gene_class": panel.kind, "symbol": panel.symbols, "profile_id": profiles}
    arrays = {k: v for k, v in truth.items() if k not in ("kept", "counts", "polygon_um")} | known
    with files.replacing(out / "truth" / f"{section.slide_id}.npz") as temporary, temporary.open("wb") as handle:
        np.savez_compressed(handle, allow_pickle=False, **arrays)


def manifest_row(section: Section, mpp: float) -> dict[str, str]:
    """Column -> cell of a section's row of the manifest."""
    name, st = section.slide_id, section.platform == "st"
    folder = f"measurements/{name}"
    return {
        "slide_id": name, "image": f"images/{name}.tif",
        "measurement": f"{folder}/{name}.tsv.gz" if st else f"{folder}/outs",
        "platform": section.platform, "donor": f"donor{section.donor:02d}", "study": f"synthetic{section.donor % 2}",
        "organ": ("breast", "colon")[section.donor % 2], "species": "human",
        "spots": f"{folder}/{name}_selection.tsv" if st else "", "mpp": f"{mpp:g}", "split": section.split,
        "section": f"d{section.donor:02d}s{section.cut}", "license": "CC0-1.0",
    }  # fmt: skip


def write_corpus(folder: Path, size: str = "quickstart", seed: int = 0, workers: int = 1) -> Path:
    """Write a corpus of one of SIZES under `folder` and return the path of its manifest.

    The bytes depend on (size, seed) alone, not on `workers`. Raises ValueError for an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size {size!r} is unknown; choose one of {', '.join(SIZES)}")
    task = functools.partial(write_section, folder, SIZES[size], seed)
    todo = sections(SIZES[size])
    if workers > 1:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            list(pool.map(task, sorted(todo, key=lambda s: -s.side_um)))
    else:
        for section in todo:
            task(section)
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(manifest_row(section, SIZES[size].mpp) for section in todo)
    write_descriptors(folder, expression.choose_genes(SIZES[size].genes, seed), seed)
    manifest = folder / "manifest.csv"
    files.write_bytes(manifest, text.getvalue().encode())
    return manifest
