"""What an instrument of single cells makes of a latent tissue: outlines with errors, and who gets whose molecules.

In: a `Tissue`. Out: `Segmented`: N cells with polygons in um, and the share [N, C] of the molecules of each true cell
that each of them gets. A cell spreads from its nucleus until it meets its neighbours. About 10 % are merged with a
neighbour, shifted onto it or missed; of every cell's molecules 5-20 % land in the cells around it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse, spatial

from data_prep.synthetic.render import NUCLEUS
from data_prep.synthetic.tissue import Floats, Tissue, at

GOOD, MERGED, SHIFTED, _MISSED = range(4)
ERRORS = 0.10  # of the cells: a third each merged, shifted, missed
SPILL = (0.05, 0.20)  # of a cell's molecules that neighbours get; drawn per section
CORNERS = 20
_NEAR = 8  # neighbours that may bound a cell
_SPILL_NEAR = 4  # neighbours that get its molecules
_SHIFTED_SHARE = 0.3  # of its own molecules that a shifted cell loses, and of its neighbour's that it gains
_MERGE_UM = 16.0  # apart at most
_ONE_UM = 1.0  # nuclei nearer than this are seen as one


@dataclass(frozen=True)
class Segmented:
    """N cells as segmented, of C true ones."""

    xy_um: Floats  # [N, 2]
    polygon_um: Floats  # [N, CORNERS, 2], not closed
    error: npt.NDArray[np.int64]  # [N] GOOD, MERGED or SHIFTED
    nuclei: sparse.csr_array  # [N, C] the true cells that each is meant to be: rows sum to 1
    share: sparse.csr_array  # [N, C] of each true cell's molecules
    true_area_um2: Floats  # [C]


def areas(polygon_um: Floats) -> Floats:
    """Area [N] of polygons [N, V, 2] by the shoelace formula."""
    x, y = polygon_um[..., 0], polygon_um[..., 1]
    return np.abs((x * np.roll(y, -1, 1) - np.roll(x, -1, 1) * y).sum(1)) / 2


def segment(rng: np.random.Generator, tissue: Tissue, margin_um: float = 30.0) -> Segmented:
    """Outline the cells that lie `margin_um` inside the image and on tissue, with the errors that real ones have."""
    xy = tissue.xy_um
    inside = ((xy > margin_um) & (xy < tissue.side_um - margin_um)).all(1) & (at(tissue.inside, xy) > 0.1)
    away_um, near = spatial.KDTree(xy).query(xy, k=_NEAR + 1)
    near, first = near[:, 1:], near[:, 1]
    true = _outlines(rng, tissue, near)
    error = rng.choice(4, len(xy), p=[1 - ERRORS, *[ERRORS / 3] * 3])
    error[~inside] = _MISSED
    apart_um = away_um[:, 1]
    merging = (apart_um < _ONE_UM) | (error == MERGED) & (apart_um < _MERGE_UM)
    pairs = _pairs(merging, first, error == _MISSED)
    shifted = _shifted((error == SHIFTED) & (apart_um > _ONE_UM), first, pairs)
    error[error != _MISSED] = GOOD
    error[pairs[:, 0]], error[pairs[:, 1]], error[shifted] = MERGED, _MISSED, SHIFTED
    places, outlines = _misplaced(rng, xy, true, pairs, shifted, first)
    kept = error != _MISSED
    nuclei = _matrix(len(xy), [(np.arange(len(xy)), np.arange(len(xy)), 1.0), (*pairs.T, 1.0)])[kept]
    share = _share(rng, pairs, shifted, near)[kept]
    mean = sparse.diags_array(1 / nuclei.sum(1)) @ nuclei
    return Segmented(places[kept], outlines[kept], error[kept], sparse.csr_array(mean), share, areas(true))


def _directions() -> Floats:
    angle = 2 * np.pi * np.arange(CORNERS) / CORNERS
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def _outlines(rng: np.random.Generator, tissue: Tissue, near: npt.NDArray[np.int64]) -> Floats:
    """Polygons [C, CORNERS, 2]: the nucleus and 2-5 um around it, cut halfway to each neighbour."""
    towards = _directions()
    turn = np.arctan2(towards[:, 1], towards[:, 0])[None] - tissue.angle[:, None]
    long, short = (NUCLEUS[tissue.kind, :2] / 2).T[..., None]
    nucleus = long * short / np.hypot(short * np.cos(turn), long * np.sin(turn))
    spread = rng.uniform(2.0, 5.0, (len(near), 1)) + rng.normal(0, 0.25, nucleus.shape)
    between = tissue.xy_um[near] - tissue.xy_um[:, None]  # [C, k, 2]
    along = between @ towards.T  # [C, k, CORNERS]
    reach = 0.49 * (between**2).sum(2)[..., None] / np.maximum(along, 1e-6)
    radius = np.minimum(nucleus + spread, np.where(along > 0, reach, np.inf).min(1))
    return tissue.xy_um[:, None] + np.maximum(radius, 0.5)[..., None] * towards


def _pairs(
    wanted: npt.NDArray[np.bool_], first: npt.NDArray[np.int64], taken: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """[M, 2] cells and the nearest neighbours that they swallow; no cell comes twice, and none that is `taken`."""
    taken, found = taken.copy(), []
    for cell in np.flatnonzero(wanted):
        if not (taken[cell] or taken[first[cell]]):
            taken[cell] = taken[first[cell]] = True
            found.append((cell, first[cell]))
    return np.array(found, np.int64).reshape(-1, 2)


def _shifted(
    wanted: npt.NDArray[np.bool_], first: npt.NDArray[np.int64], pairs: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Cells that move onto their nearest neighbour: none of a merger, and no two onto the same."""
    cells = np.flatnonzero(wanted)
    cells = cells[~np.isin(cells, pairs) & ~np.isin(first[cells], pairs)]
    return cells[np.unique(first[cells], return_index=True)[1]]


def _misplaced(
    rng: np.random.Generator, xy: Floats, true: Floats, pairs: npt.NDArray[np.int64], shifted: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
) -> tuple[Floats, Floats]:  # fmt: skip
    """Centres [C, 2] and outlines [C, CORNERS, 2] with mergers in the first of each pair, and 2-5 um of shift."""
    places, outlines = xy.copy(), true.copy()
    for cell, other in pairs:
        places[cell] = (xy[cell] + xy[other]) / 2
        outlines[cell] = _around(np.concatenate([true[cell], true[other]]), places[cell])
    step = xy[first[shifted]] - xy[shifted]
    step *= (rng.uniform(2.0, 5.0, len(step)) / np.hypot(*step.T))[:, None]
    places[shifted] += step
    outlines[shifted] += step[:, None]
    return places, outlines


def _around(points: Floats, centre: Floats) -> Floats:
    """The convex hull of points, seen from `centre` within it in CORNERS directions [CORNERS, 2]."""
    away = points[spatial.ConvexHull(points).vertices] - centre
    edge = np.roll(away, -1, 0) - away
    normal = np.stack([edge[:, 1], -edge[:, 0]], 1)  # outwards: the hull is counter-clockwise
    along = normal @ _directions().T  # [E, CORNERS]
    reach = np.where(along > 1e-9, (normal * away).sum(1)[:, None] / np.maximum(along, 1e-9), np.inf).min(0)
    return centre + reach[:, None] * _directions()


def _matrix(count: int, entries: list[tuple[npt.NDArray, npt.NDArray, float]]) -> sparse.csr_array:
    """[count, count] with a value at each (rows, columns); what comes twice is added."""
    value = np.concatenate([np.full(len(rows), value) for rows, _, value in entries])
    row, column = (np.concatenate([entry[i] for entry in entries]) for i in (0, 1))
    return sparse.csr_array((value, (row, column)), shape=(count, count))


def _share(
    rng: np.random.Generator, pairs: npt.NDArray[np.int64], shifted: npt.NDArray[np.int64],
    near: npt.NDArray[np.int64],
) -> sparse.csr_array:  # fmt: skip
    """[C, C] the share of the molecules of the true cell in a column that the outline in a row gets."""
    count, every = len(near), np.arange(len(near))
    spill = np.clip(rng.uniform(*SPILL) * np.exp(rng.normal(0, 0.2, count)), *SPILL)
    source = np.repeat(every, _SPILL_NEAR)
    lies = sparse.csr_array(
        (spill[source] / _SPILL_NEAR, (near[:, :_SPILL_NEAR].ravel(), source)), shape=(count, count)
    ) + sparse.diags_array(1 - spill, format="csr")
    other, moved = near[shifted, 0], _SHIFTED_SHARE
    held = [(every, every, 1.0), (*pairs.T, 1.0)]
    held += [(shifted, shifted, -moved), (shifted, other, moved), (other, other, -moved)]
    return sparse.csr_array(_matrix(count, held) @ lies)
