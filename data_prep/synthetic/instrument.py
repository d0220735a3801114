"""A Xenium run over a latent tissue: counts of segmented cells, their truth, and the bundle with its alignment.

In: a `Tissue`, the genes of the panel, what platform and donor add. Out: the truth as arrays, and the vendor's files.
The composition that is expected of a cell is that of the molecules it gets: spill-over and segmentation errors enter.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from data_prep.synthetic import expression, xenium
from data_prep.synthetic.cells import CellSection
from data_prep.synthetic.expression import GenePanel
from data_prep.synthetic.segment import areas, segment
from data_prep.synthetic.tissue import Floats, Tissue, at

ALIGNMENT_UM = 3.0  # at most: the H&E is of the same cut and put in place by key points
DEPTH = (20.0, 700.0)  # of one cell, expected
_AREA_TIE = 0.75  # correlation of log area and log depth of the true cells
_CONTROL_SHARE = 0.05  # of the cells hold a molecule of a control


def run(
    rng: np.random.Generator, panel: GenePanel, tissue: Tissue, shift: Floats, dark: float
) -> dict[str, npt.NDArray[Any]]:
    """Counts and truth of one run, and the cells' `polygon_um` [N, V, 2] in the frame of the written places."""
    cells = segment(rng, tissue)
    every = expression.cell_expression(panel, tissue.latent, shift)
    every /= every.sum(1, keepdims=True)
    mean = cells.share @ (_depths(rng, cells.true_area_um2, dark)[:, None] * every)
    depth = mean.sum(1).clip(*DEPTH)
    expected = mean / mean.sum(1, keepdims=True)
    turn = rng.uniform(0, 2 * np.pi)
    moved = rng.uniform(0, ALIGNMENT_UM) * np.array([np.cos(turn), np.sin(turn)])
    return {
        "counts": expression.measure(rng, expected, depth), "expected": expected.astype(np.float32), "depth": depth,
        "domain": at(tissue.domain, cells.xy_um), "xy_um": cells.xy_um + moved, "true_xy_um": cells.xy_um,
        "latent": cells.nuclei @ tissue.latent, "segmentation": cells.error, "area_um2": areas(cells.polygon_um),
        "polygon_um": cells.polygon_um + moved,
    }  # fmt: skip


def _depths(rng: np.random.Generator, area_um2: Floats, dark: float) -> Floats:
    """Molecules [C] expected of the true cells: larger cells hold more, by and large."""
    size = np.log(area_um2)
    size = (size - size.mean()) / size.std()
    noise = _AREA_TIE * size + np.sqrt(1 - _AREA_TIE**2) * rng.standard_normal(len(size))
    return rng.uniform(80, 200) * np.exp(0.4 * dark) * np.exp(rng.uniform(0.5, 0.8) * noise)


def write(
    folder: Path, rng: np.random.Generator, truth: dict[str, npt.NDArray[Any]], panel: GenePanel, side_um: float,
    mpp: float,
) -> npt.NDArray[np.str_]:  # fmt: skip
    """The bundle and `he_imagealignment.csv`, which turns the H&E onto the morphology image; returns the cells' ids."""
    matrix = _placed(rng, side_um)
    counts = _with_controls(rng, truth["counts"])
    places, corners = (_mapped(matrix, truth[name]) for name in ("xy_um", "polygon_um"))
    closed = np.concatenate([corners, corners[:, :1]], axis=1)
    section = CellSection(
        places, np.arange(len(places) + 1) * closed.shape[1], closed.reshape(-1, 2).astype(np.float32), counts,
        panel.ids.tolist(), panel.symbols.tolist(), list(xenium.CONTROLS),
    )  # fmt: skip
    ids = xenium.write_xenium(folder, section, transcripts=False)
    scale = np.diag([1 / xenium.PIXEL_UM, 1 / xenium.PIXEL_UM, 1.0])
    xenium.write_alignment(folder / "he_imagealignment.csv", scale @ matrix @ np.diag([mpp, mpp, 1.0]))
    return np.array(ids)


def _placed(rng: np.random.Generator, side_um: float) -> Floats:
    """[3, 3] um of the H&E -> um of the morphology image: quarter turns, a small turn, and all of it at positive um."""
    angle = rng.integers(0, 4) * np.pi / 2 + rng.uniform(-0.03, 0.03)
    matrix = np.eye(3)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    corners = np.array([[0, 0], [side_um, 0], [0, side_um], [side_um, side_um]])
    matrix[:2, 2] = rng.uniform(50, 200, 2) - (corners @ matrix[:2, :2].T).min(0)
    return matrix


def _mapped(matrix: Floats, xy_um: Floats) -> Floats:
    return np.asarray(xy_um @ matrix[:2, :2].T + matrix[:2, 2])


def _with_controls(rng: np.random.Generator, counts: npt.NDArray[np.int32]) -> sparse.csr_matrix:
    """Counts [N, genes and controls]."""
    controls = np.zeros((len(counts), len(xenium.CONTROLS)), np.int32)
    hit = np.flatnonzero(rng.random(len(counts)) < _CONTROL_SHARE)
    controls[hit, rng.integers(0, controls.shape[1], len(hit))] = 1
    return sparse.csr_matrix(np.hstack([counts, controls]))
