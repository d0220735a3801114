"""Visium (Space Ranger 1 to 3, CytAssist or not): an `outs` folder -> a Measurement.

In: the filtered matrix as 10x HDF5 (both layouts) or MEX (gzipped or not), `spatial/` with the positions and the
scale factors; names may carry an `<id>_` prefix, and all may lie in one folder. Out: one disc of 55 um for each barcode
of the matrix.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep import align
from data_prep.platforms import Measurement, Source, spaceranger, tenx
from data_prep.platforms.found import OUTS, maybe, one
from data_prep.platforms.tenx import Whole
from storm.schema import DISC

SPOT_UM = 55.0
SCALEFACTOR_SPOT_UM = 65.0  # spot_diameter_fullres is the diameter of a theoretical spot of 65 um
COL_UM, ROW_UM = 50.0, 100.0 * 3**0.5 / 2  # neighbours in a row are two columns, 100 um, apart
_MATRICES = tuple(
    f"{kind}_bc_matrix{end}"
    for kind in ("filtered_feature", "raw_feature", "raw_probe")
    for end in (".h5", "")
)  # fmt: skip
_POSITIONS = tuple(
    f"tissue_positions{end}" for end in (".csv", "_list.csv", ".csv.gz", "_list.csv.gz", "_list.txt")
)  # fmt: skip


def matrix_path(outs: Path) -> Path:
    """The filtered matrix, else the raw one, else that of the probes. Raises ValueError where there is none."""
    if not outs.is_dir():
        raise ValueError(f"{outs}: is no folder; {OUTS}")
    if maybe(outs, ("binned_outputs", "square_008um", "square_016um")):
        raise ValueError(f"{outs}: holds bins of Visium HD; write visium_hd in the column platform")
    return one(outs, _MATRICES, "matrix")


def _locate(source: Source) -> tuple[Path, Path, Path, Path | None]:
    """Matrix, positions, scale factors, probe set."""
    outs = source.measurement
    matrix = matrix_path(outs)
    spatial = maybe(outs, ("spatial",)) or outs
    positions = source.spots or one(spatial, _POSITIONS, "positions")
    return matrix, positions, one(spatial, ("scalefactors_json.json",), "scale factors"), spaceranger.probe_set(outs)


def inputs(source: Source) -> list[Path]:
    """The matrix, the positions, the scale factors and, where there is one, the probe set."""
    matrix, *others = _locate(source)
    return [*tenx.files_of(matrix), *(path for path in others if path)]


def read_matrix(outs: Path) -> Whole:
    """The counts of an outs folder as they are: all barcodes and features, whether they have positions or not.

    Raises:
        ValueError: there is no matrix, it is damaged, or it holds no raw counts.
    """
    return tenx.whole(tenx.open_matrix(matrix_path(outs)))


def chosen(
    matrix: tenx.Matrix, rows: npt.NDArray[np.int64], positions: spaceranger.Positions
) -> tuple[npt.NDArray[np.int64], list[str]]:
    """(rows of the matrix that become profiles, notes): those with a place; of a raw matrix those in tissue.

    Args:
        rows: row of the positions for each barcode, -1 for none.

    Raises:
        ValueError: none is left.
    """
    notes = spaceranger.stranger_note(rows, "a position")
    raw = "raw_" in matrix.path.name
    kept = rows >= 0
    if raw:
        kept &= positions.in_tissue[rows] == 1
        notes.append(f"raw matrix: {int((rows >= 0).sum() - kept.sum())} barcodes that are not in tissue are left out")
    if not kept.any():
        raise ValueError(f"{matrix.path}: holds no barcode{' in tissue' if raw else ''}; give a section with spots")
    return np.flatnonzero(kept), notes


def _mirrored(source: Source, positions: spaceranger.Positions, lattice_um: npt.NDArray[np.float64]) -> list[str]:
    """The lattice fits as well when x and y are exchanged: only its turning sense tells."""
    try:
        fit = align.fit_lattice(lattice_um, positions.xy)
    except ValueError:  # on one line; whether that matters is for those who need the fit
        return []
    spatial = maybe(source.measurement, ("spatial",)) or source.measurement
    if np.linalg.det(fit.matrix[:2, :2]) > 0 or maybe(spatial, ("cytassist_image.tiff",)):
        return []
    return [
        "WARNING: the lattice lies mirrored on the image; unless the image is (as with CytAssist), the positions have "
        "their two last columns exchanged: pxl_row comes before pxl_col"
    ]


def read(source: Source) -> Measurement:
    """One profile for each barcode of the filtered matrix (of a raw one: those in tissue), in the matrix's order.

    Raises:
        ValueError: files are missing or unreadable, or the barcodes of the matrix have no positions.
    """
    if source.unit:
        raise ValueError(f"{source.measurement}: Visium has spots, no {source.unit}; leave the column unit blank")
    matrix_file, positions_path, scale_path, probes = _locate(source)
    matrix, positions = tenx.open_matrix(matrix_file), spaceranger.read_positions(positions_path)
    scale = spaceranger.scale_factors(scale_path)
    place = spaceranger.join(matrix, positions, positions_path)
    rows, notes = chosen(matrix, place, positions)
    kinds, told = spaceranger.measured_kinds(matrix, probes)
    at = place[rows]
    lattice_um = positions.array * (COL_UM, ROW_UM)
    diameter = scale.get("spot_diameter_fullres")
    return Measurement(
        "visium", "spot", matrix.barcodes.take(rows).to_pylist(), positions.xy[at],
        np.full(len(rows), SPOT_UM, np.float32), np.full(len(rows), DISC, np.uint8),
        lambda wanted: matrix.counts(rows[wanted]), matrix.names, matrix.symbols, kinds,
        in_tissue=positions.in_tissue[at], lattice_um=lattice_um, lattice_xy=positions.xy,
        reported_mpp=SCALEFACTOR_SPOT_UM / diameter if diameter else None,
        notes=[*notes, *told, *_mirrored(source, positions, lattice_um)], facts={"measured": matrix.facts},
    )  # fmt: skip
