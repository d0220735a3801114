"""Additivity: the sum of mu over the parts of a square beside mu of the whole square.

In: an export, stores. Out: plain values, for JSON. The counts of an area are the sum of those of its parts, whatever
the tissue is; so must be what is expected of them. Squares of SIDE_UM on a lattice, each asked as a whole and as the
n x n squares that tile it, from H&E alone, as bins of the slide's platform:

    log ratio     log(sum of mu over the parts) - log(mu of the whole), per gene and square
    of depth      the same of the total over all genes: what the density told of small and large footprints adds
    of shares     the rest: what the composition adds

Nothing is fitted. Beside the answers as they are stand those in which the parts are read where they are, but told the
size of the whole: what is then left is of what is read, the difference is of the size that is told.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from storm import inference
from storm.evaluate import statistics
from storm.evaluate.reads import told_size
from storm.export import Pretrained
from storm.inference import Slide
from storm.markdown import table
from storm.regions import lattice_points
from storm.store import SlideStore

Floats = npt.NDArray[np.float64]

SIDE_UM, PARTS = 56.0, (2, 4, 7)  # of the whole; along its side
PITCH_UM, MOST = 200.0, 100  # squares of a section, evenly along their order
OWN_SIZE, SIZE_OF_WHOLE = "told their own size", "told the size of the whole"


def squares(store: SlideStore) -> Floats:
    """[Q, 2] centres of the squares that lie on stored tiles alone."""
    info = store.info
    points = lattice_points(info.width_px0 * info.mpp, info.height_px0 * info.mpp, PITCH_UM)
    corners = points[:, None] + SIDE_UM / 2 * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    tiles = np.floor(corners / info.tile_um).astype(np.int64)
    inside = [all((int(row), int(col)) in store.tile_index for col, row in own) for own in tiles]
    found = points[np.array(inside, dtype=bool)]
    return found if len(found) <= MOST else found[np.arange(MOST) * len(found) // MOST]


def parts(centre_um: Floats, n: int) -> Floats:
    """[Q * n * n, 2] centres of the n x n squares that tile each square, those of one side by side."""
    steps = ((np.arange(n) + 0.5) / n - 0.5) * SIDE_UM
    offset = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    return (centre_um[:, None] + offset).reshape(-1, 2)


class Expected(NamedTuple):
    """What is expected of n squares."""

    mu: Floats  # [n, K]
    depth: Floats  # [n] the total over the reference panel


def expected(pretrained: Pretrained, slide: Slide, centre_um: Floats, genes: npt.NDArray[np.int64]) -> list[Expected]:
    """Of the whole squares, and of their parts for each of PARTS, from one call."""
    places = [parts(centre_um, n) for n in (1, *PARTS)]
    side = np.concatenate([np.full(len(xy), SIDE_UM / n) for xy, n in zip(places, (1, *PARTS), strict=True)])
    asked = inference.with_squares(slide, np.concatenate(places), side.astype(np.float32))
    found = inference.predict(pretrained, asked, genes=genes)
    ends = np.cumsum([len(xy) for xy in places])[:-1]
    mu, depth = found.mu.astype(np.float64), np.exp(found.log_depth.astype(np.float64))
    return [Expected(*of) for of in zip(np.split(mu, ends), np.split(depth, ends), strict=True)]


class Logs(NamedTuple):
    """Of Q squares: logs of mu, summed over the parts and of the whole, and the log ratio of the totals."""

    summed: Floats  # [Q, K]
    whole: Floats  # [Q, K]
    depth: Floats  # [Q]


def logs(whole: Expected, of_parts: Expected) -> Logs:
    """The parts of a square lie side by side."""
    q = len(whole.depth)
    summed, depth = of_parts.mu.reshape(q, -1, of_parts.mu.shape[1]).sum(1), of_parts.depth.reshape(q, -1).sum(1)
    return Logs(np.log(summed), np.log(whole.mu), np.log(depth / whole.depth))


def measure(pretrained: Pretrained, stores: Iterable[SlideStore], gene_ids: list[str]) -> dict[str, Any]:
    """The table as plain values; `skipped` where no square lies on tissue."""
    genes = np.array([pretrained.genes.index[gene_id] for gene_id in gene_ids], dtype=np.int64)
    found: dict[tuple[str, int], list[Logs]] = {}
    number = 0
    for store in stores:
        if not len(centre_um := squares(store)):
            continue
        slide, number = inference.prepare(pretrained, store), number + len(centre_um)
        for told in (OWN_SIZE, SIZE_OF_WHOLE):
            with nullcontext() if told == OWN_SIZE else told_size(pretrained.model, float(np.log(SIDE_UM))):
                whole, *smaller = expected(pretrained, slide, centre_um, genes)
            for n, of_parts in zip(PARTS, smaller, strict=True):
                found.setdefault((told, n), []).append(logs(whole, of_parts))
    if not number:
        return {"skipped": f"no square of {SIDE_UM:g} um lies on stored tiles alone"}
    rows = [{"told": told, "side_um": SIDE_UM / n, **_summary(of)} for (told, n), of in found.items()]
    return {
        "squares": number, "side_um": SIDE_UM, "genes": len(genes), "rows": rows,
        "reference_um": float(pretrained.reference["footprint_um"]),
    }  # fmt: skip


def _summary(sections: list[Logs]) -> dict[str, Any]:
    """Quartiles of the log ratios over genes, squares and sections; Pearson of the logs over the squares of a section,
    mean over genes and sections."""
    ratio = np.concatenate([of.summed - of.whole for of in sections])
    depth = np.concatenate([of.depth for of in sections])
    quartiles = {
        name: np.percentile(values, [25, 50, 75]).tolist()
        for name, values in (("log_ratio", ratio), ("depth", depth), ("shares", ratio - depth[:, None]))
    }
    pearson = [statistics.pearson(of.summed, of.whole) for of in sections]
    return quartiles | {"pearson": float(np.mean(pearson))}


def text(values: dict[str, Any]) -> str:
    """The table as Markdown."""
    if "skipped" in values:
        return f"Skipped: {values['skipped']}."
    head = ["parts", "side, um", "sum / whole, median (IQR)", "of depth", "of shares", "Pearson of the logs"]
    rows: list[list[object]] = []
    for row in values["rows"]:
        low, middle, high = np.exp(row["log_ratio"])
        of = [f"{q[1]:+.3f} ({q[0]:+.3f} to {q[2]:+.3f})" for q in (row["depth"], row["shares"])]
        rows.append([row["told"], f"{row['side_um']:g}", f"{middle:.3f} ({low:.3f} to {high:.3f})", *of,
                     f"{row['pearson']:.3f}"])  # fmt: skip
    return f"{_ABOUT.format(**values)}\n\n{table(head, rows)}"


_ABOUT = """{squares} squares of {side_um:g} um, {genes} genes: the sum of mu over the parts that tile a square, beside
mu of the square; 1 is additive. Median and quartiles over genes and squares; depth and shares: the two parts of the log
ratio. The reference footprint of the model is {reference_um:.1f} um: squares are pooled in training from the size of
a region's median cell or bin on, so a side well below it was never shown."""
