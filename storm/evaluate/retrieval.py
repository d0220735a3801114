"""Protocol 7, retrieval: which expression of a gallery belongs to an image, and which image to an expression.

In: an export with vectors for alignment, a cohort. Out: a table (plain values, for JSON): recall at 1, 5 and 10, mean
reciprocal rank, median rank, within each test section and across all of them.

The vectors come from two passes: one sees pixels alone, the other counts alone. Equal similarities share a rank.
Chance is exact for the gallery's size. The control knows no content: it retrieves by what a ridge, fitted on training
sections, tells of depth and number of genes from the place in the section and the area of the footprint. It must be at
chance, or part of what the model retrieves is geometry.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storm.evaluate import statistics
from storm.evaluate.baselines import ridge_predict
from storm.evaluate.expression import Cohort, inputs, provenance, read
from storm.evaluate.sections import Section
from storm.evaluate.statistics import told
from storm.export import Pretrained
from storm.markdown import table

Floats = npt.NDArray[np.float64]
PROTOCOL = "7, retrieval between image and expression"
MODEL, CONTROL = "STORM (this project)", "geometry only"
AT = (1, 5, 10)
_CHUNK = 1024  # queries compared at once


def ranks(queries: Floats, gallery: Floats) -> Floats:
    """[N] rank of item i for query i by inner product, from 1; items as similar as it share their mean rank."""
    found = np.empty(len(queries))
    for start in range(0, len(queries), _CHUNK):
        similarity = queries[start : start + _CHUNK] @ gallery.T
        own = similarity[np.arange(len(similarity)), np.arange(start, start + len(similarity))][:, None]
        tied = np.abs(similarity - own) <= 1e-12
        found[start : start + _CHUNK] = ((similarity > own) & ~tied).sum(1) + (tied.sum(1) + 1) / 2
    return found


def chance(n: int) -> dict[str, float]:
    """The figures expected of a random order of n items."""
    found = {f"R@{k}": min(k, n) / n for k in AT}
    return found | {"MRR": float((1 / np.arange(1, n + 1)).mean()), "median rank": (n + 1) / 2}


def per_query(rank: Floats) -> dict[str, Floats]:
    """What is averaged, for each query."""
    return {f"R@{k}": (rank <= k).astype(np.float64) for k in AT} | {"MRR": 1 / rank}


def figures(rank: list[Floats], galleries: list[int], sections: list[Section], seed: int) -> dict[str, Any]:
    """Means over queries with intervals (mean over the sections), median rank, chance, and whether that is excluded."""
    found: dict[str, Any] = {}
    expected = [chance(n) for n in galleries]
    parts = [per_query(r) for r in rank]
    for name in parts[0]:
        value = float(np.mean([part[name].mean() for part in parts]))
        drawn = [
            statistics.block_means(part[name], statistics.blocks(s.xy_um), seed)
            for part, s in zip(parts, sections, strict=True)
        ]
        entry = statistics.interval(value, np.mean(drawn, axis=0)).json()
        by_chance = float(np.mean([e[name] for e in expected]))
        verdict = "above" if entry["low"] > by_chance else "below" if entry["high"] < by_chance else "at"
        found[name] = {**entry, "chance": by_chance, "against_chance": verdict}
    found["median rank"] = {
        "value": float(np.mean([np.median(r) for r in rank])),
        "chance": float(np.mean([e["median rank"] for e in expected])),
    }
    return found


@dataclass(frozen=True)
class Vectors:
    """Of each section: rows [N, A] on the side of the image and on that of expression."""

    image: list[Floats]
    expression: list[Floats]


def _unit(x: Floats) -> Floats:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _scaled(x: Floats) -> Floats:
    """Within a section: mean 0 and sd 1, so that a section's own level tells nothing."""
    spread = x.std(0)
    return (x - x.mean(0)) / np.where(spread > 1e-9, spread, 1.0)


def geometry(section: Section, area_um2: Floats) -> tuple[Floats, Floats]:
    """(place and area [N, 7], depth and number of genes [N, 2]) of a section, each scaled within it."""
    xy = _scaled(section.xy_um)
    log_area = np.log(area_um2)[:, None]
    place = np.concatenate([xy, xy**2, xy[:, :1] * xy[:, 1:], np.linalg.norm(xy, axis=1)[:, None], log_area], axis=1)
    genes = np.diff(section.counts.indptr).astype(np.float64)
    return _scaled(place), _scaled(np.stack([section.log_depth, np.log1p(genes)], axis=1))


def control(cohort: Cohort) -> Vectors:
    """Depth and number of genes as geometry foretells them, beside the measured ones."""
    areas = [
        cohort.stores[s.slide_id].places(bare=True).area_um2[s.rows] for s in (*cohort.train, *cohort.test)
    ]  # fmt: skip
    sides = [geometry(s, area) for s, area in zip((*cohort.train, *cohort.test), areas, strict=True)]
    train, test = sides[: len(cohort.train)], sides[len(cohort.train) :]
    x, y = (np.concatenate(part) for part in zip(*train, strict=True))
    fold = inputs(cohort.train).fold
    foretold = [ridge_predict(x, y, place, fold) for place, _ in test]
    return Vectors([_near(p, 1.0) for p in foretold], [_near(depth, -1.0) for _, depth in test])


def _near(x: Floats, side: float) -> Floats:
    """Rows whose inner product with those of the other side (1, -1) is minus the squared distance."""
    square, one = (x**2).sum(1, keepdims=True), np.ones((len(x), 1))
    return np.concatenate([np.sqrt(2) * x, *((square, one) if side > 0 else (-one, -square))], axis=1)


def _table(vectors: Vectors, sections: list[Section], seed: int) -> dict[str, Any]:
    """Both directions, within sections and across."""
    found: dict[str, Any] = {}
    for name, queries, gallery in (
        ("image -> expression", vectors.image, vectors.expression),
        ("expression -> image", vectors.expression, vectors.image),
    ):
        within = [ranks(q, g) for q, g in zip(queries, gallery, strict=True)]
        ends = np.cumsum([len(q) for q in queries])[:-1]
        across = np.split(ranks(np.concatenate(queries), np.concatenate(gallery)), ends)
        total = sum(map(len, within))
        found[f"{name}, within a section"] = figures(within, [len(r) for r in within], sections, seed)
        found[f"{name}, across"] = figures(across, [total] * len(across), sections, seed)
    return found


def evaluate(pretrained: Pretrained, cohort: Cohort, seed: int = 0) -> dict[str, Any]:
    """The table of protocol 7 as plain values."""
    if not pretrained.config.align_width:
        reason = "the model has no vectors for alignment (model.align_width is 0)"
        return {"protocol": PROTOCOL, "skipped": reason}
    image = read(pretrained, cohort, ("align_image",), cohort.test)
    expression = read(pretrained, cohort, ("align_expression",), cohort.test, use_counts=True, use_image=False)
    own = Vectors(*([_unit(x) for values in found.values() for x in values] for found in (image, expression)))
    compared = {MODEL: own} | ({CONTROL: control(cohort)} if cohort.train else {})
    return {
        **provenance(pretrained, cohort, seed, PROTOCOL, "H&E only against expression only"),
        "gallery": sum(len(s.rows) for s in cohort.test), "galleries": [len(s.rows) for s in cohort.test],
        "methods": {name: _table(vectors, cohort.test, seed) for name, vectors in compared.items()},
    }  # fmt: skip


def text(values: dict[str, Any]) -> str:
    """Tables as Markdown."""
    names = [*(f"R@{k}" for k in AT), "MRR"]
    rows: list[list[object]] = []
    for method, of in values["methods"].items():
        for task, entry in of.items():
            cells = [f"{told(entry[name])} ({entry[name]['chance']:.3f})" for name in names]
            middle = entry["median rank"]
            rows.append([method, task, *cells, f"{middle['value']:.0f} ({middle['chance']:.0f})"])
    lines = [
        f"* {CONTROL}, {task}: R@10 is {entry['R@10']['against_chance']} chance, MRR is "
        f"{entry['MRR']['against_chance']} chance."
        for task, entry in values["methods"].get(CONTROL, {}).items()
    ]
    about = (
        f"{values['gallery']} profiles in the gallery across sections. In round brackets: what chance gives. The\n"
        "control knows place, area, depth and number of genes alone and must be at chance."
    )
    return "\n\n".join([about, table(["method", "task", *names, "median rank"], rows), "\n".join(lines)])
