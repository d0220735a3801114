"""Visium (Space Ranger 1 to 3): an `outs` folder -> a Measurement.

In: the filtered matrix as 10x HDF5 (both layouts) or MEX (gzipped or not), `spatial/` with the positions and the
scale factors; names may carry an `<id>_` prefix. Out: one disc of 55 um for each barcode of the matrix.

The columns of a positions file are barcode, in_tissue, array_row, array_col, pxl_row, pxl_col: ROW FIRST, so x is the
last one. Whether the file has a header is told by its content, not by its name.
"""

import csv
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from data_prep.platforms import GENE, Measurement, Source, counts_in_memory, whole_counts
from storm import files
from storm.schema import DISC

SPOT_UM = 55.0
SCALEFACTOR_SPOT_UM = 65.0  # spot_diameter_fullres is the diameter of a theoretical spot of 65 um
COL_UM, ROW_UM = 50.0, 100.0 * 3**0.5 / 2  # neighbours in a row are two columns, 100 um, apart
_EXPRESSION = "Gene Expression"


@dataclass(frozen=True)
class Matrix:
    """Counts as CSR over barcodes: all features, of the types that `types` tells."""

    barcodes: list[str]
    names: list[str]
    symbols: list[str]
    types: list[str]
    indptr: npt.NDArray[np.int64]
    column: npt.NDArray[np.int64]
    count: npt.NDArray[np.int64]


def _one(folder: Path, names: tuple[str, ...], what: str) -> Path:
    """The only entry of a folder that is one of `names`, bare or behind an `<id>_` prefix; earlier names win."""
    for name in names:
        found = [folder / name] if (folder / name).exists() else sorted(folder.glob(f"*_{name}"))
        if len(found) > 1:
            raise ValueError(f"{folder}: holds {len(found)} files *_{name}; leave one, of this section")
        if found:
            return found[0]
    raise ValueError(f"{folder}: has no {what} ({' or '.join(names)}); give the outs folder that Space Ranger wrote")


def _matrix_path(outs: Path) -> Path:
    """The filtered matrix, else the raw one."""
    if not outs.is_dir():
        raise ValueError(f"{outs}: is no folder; give the outs folder that Space Ranger wrote")
    kinds = ("filtered_feature_bc_matrix", "raw_feature_bc_matrix")
    return _one(outs, tuple(f"{kind}{end}" for kind in kinds for end in (".h5", "")), "matrix")


def _locate(outs: Path, spots: Path | None) -> tuple[Path, Path, Path]:
    """Matrix, positions, scale factors."""
    matrix = _matrix_path(outs)
    spatial = _one(outs, ("spatial",), "folder with the positions")
    positions = spots or _one(spatial, ("tissue_positions.csv", "tissue_positions_list.csv"), "positions")
    return matrix, positions, _one(spatial, ("scalefactors_json.json",), "scale factors")


def _mex_files(folder: Path) -> tuple[Path, Path, Path]:
    return (
        _one(folder, ("matrix.mtx.gz", "matrix.mtx"), "matrix"),
        _one(folder, ("features.tsv.gz", "features.tsv", "genes.tsv.gz", "genes.tsv"), "features"),
        _one(folder, ("barcodes.tsv.gz", "barcodes.tsv"), "barcodes"),
    )


def inputs(source: Source) -> list[Path]:
    """The matrix, the positions and the scale factors."""
    matrix, positions, scale = _locate(source.measurement, source.spots)
    return [*(_mex_files(matrix) if matrix.is_dir() else [matrix]), positions, scale]


def _text(dataset: h5py.Dataset) -> list[str]:
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 1:
        raise KeyError(f"{dataset.name} is no list of names")
    return [v.decode() if isinstance(v, bytes) else str(v) for v in dataset[...]]


def _numbers(group: h5py.Group, name: str, kinds: str) -> npt.NDArray:
    """A list of numbers. Raises KeyError where the entry is anything else."""
    found = group[name]
    if not isinstance(found, h5py.Dataset) or found.ndim != 1 or found.dtype.kind not in kinds:
        raise KeyError(f"{name} is no list of numbers")
    return np.asarray(found[...])


def _fitting(matrix: Matrix, path: Path) -> Matrix:
    """The matrix itself. Raises ValueError where its arrays contradict each other: scipy would read beside them."""
    indptr, features, entries = matrix.indptr, len(matrix.names), len(matrix.count)
    faults = {
        f"{features} ids, {len(matrix.symbols)} names and {len(matrix.types)} types of features": (
            not features == len(matrix.symbols) == len(matrix.types)
        ),
        f"indptr has {len(indptr)} numbers for {len(matrix.barcodes)} barcodes": (
            len(indptr) != len(matrix.barcodes) + 1
        ),
        f"{len(matrix.column)} indices for {entries} counts": len(matrix.column) != entries,
        f"indptr does not rise from 0 to {entries}": (
            not len(indptr) or indptr[0] != 0 or indptr[-1] != entries or bool((np.diff(indptr) < 0).any())
        ),
        f"an index lies outside 0 to {features - 1}": bool(((matrix.column < 0) | (matrix.column >= features)).any()),
    }
    for fault, met in faults.items():
        if met:
            raise ValueError(f"{path}: no sound 10x matrix ({fault}); restore it from Space Ranger's outs")
    return matrix


def _read_h5(path: Path) -> Matrix:
    try:
        with h5py.File(path, "r") as root:
            entries = [root["matrix"]] if "matrix" in root else list(root.values())
            groups = [entry for entry in entries if isinstance(entry, h5py.Group)]
            if len(groups) != 1:
                raise ValueError(f"{path}: holds {len(groups)} genomes; give the matrix of one species")
            group = groups[0]
            if "features" in group:
                names, symbols, types = (_text(group["features"][k]) for k in ("id", "name", "feature_type"))
            else:  # Cell Ranger before 3
                names, symbols = _text(group["genes"]), _text(group["gene_names"])
                types = [_EXPRESSION] * len(names)
            found = Matrix(
                _text(group["barcodes"]), names, symbols, types, _numbers(group, "indptr", "iu").astype(np.int64),
                _numbers(group, "indices", "iu").astype(np.int64), whole_counts(_numbers(group, "data", "iuf"), path),
            )  # fmt: skip
            return _fitting(found, path)
    except (OSError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no readable 10x matrix ({error}); restore it from Space Ranger's outs") from error


def _lines(path: Path) -> list[list[str]]:
    import gzip

    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")  # splitlines breaks at more than line breaks
    return [line.split("\t") for line in lines if text]


def _read_mex(folder: Path) -> Matrix:
    from scipy.io import mmread
    from scipy.sparse import coo_matrix

    matrix_path, features_path, barcodes_path = _mex_files(folder)
    features, barcodes = _lines(features_path), [row[0] for row in _lines(barcodes_path)]
    try:
        matrix = coo_matrix(mmread(matrix_path))
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{matrix_path}: no readable matrix ({error}); restore it from Space Ranger's outs") from error
    if matrix.shape != (len(features), len(barcodes)):
        raise ValueError(
            f"{matrix_path}: is {matrix.shape[0]} x {matrix.shape[1]}, but there are {len(features)} features and "
            f"{len(barcodes)} barcodes; give files of one run"
        )
    rows = matrix.T.tocsr()
    types = [row[2] if len(row) > 2 else _EXPRESSION for row in features]
    names = [row[0] for row in features]
    symbols = [row[1] if len(row) > 1 else row[0] for row in features]
    return Matrix(
        barcodes, names, symbols, types, rows.indptr.astype(np.int64), rows.indices.astype(np.int64),
        whole_counts(rows.data, matrix_path),
    )  # fmt: skip


def read_matrix(outs: Path) -> Matrix:
    """The counts of an outs folder as they are: all barcodes and features, whether they have positions or not.

    Raises:
        ValueError: there is no matrix, it is damaged, or it holds no raw counts.
    """
    path = _matrix_path(outs)
    return _read_mex(path) if path.is_dir() else _read_h5(path)


def read_positions(path: Path) -> dict[str, tuple[bool, int, int, float, float]]:
    """Barcode -> (in_tissue, array_row, array_col, x_px0, y_px0).

    Raises:
        ValueError: a line without six fields, with fields that are no numbers, or of a barcode that came before.
    """
    rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    if rows and not (len(rows[0]) > 1 and rows[0][1].strip().isdigit()):
        rows = rows[1:]  # a header: its second field is a name
    found: dict[str, tuple[bool, int, int, float, float]] = {}
    for number, row in enumerate(rows, 1):
        try:
            barcode, in_tissue, array_row, array_col, y_px0, x_px0 = row
            place = (in_tissue.strip() == "1", int(array_row), int(array_col), float(x_px0), float(y_px0))
            if not math.isfinite(place[3] + place[4]):
                raise ValueError("its place is no number")
            if found.setdefault(barcode, place) is not place:
                raise ValueError(f"{barcode} comes twice")
        except ValueError as error:
            raise ValueError(f"{path}: row {number} is not barcode, in_tissue, array_row, array_col, pxl_row, pxl_col "
                             f"({error}); restore it from Space Ranger's outs") from None  # fmt: skip
    if not found:
        raise ValueError(f"{path}: holds no spot; restore it from Space Ranger's outs")
    return found


def _joined(barcodes: list[str], known: list[str], matrix: Path, positions: Path) -> list[str]:
    """The name in `known` of each barcode; where '-1' is on one side only it is ignored on both."""
    if not set(barcodes) <= set(known):
        bare = {re.sub(r"-1$", "", name): name for name in known}
        barcodes = [bare.get(re.sub(r"-1$", "", b), b) for b in barcodes]
    strangers = [b for b in barcodes if b not in set(known)]
    if strangers:
        raise ValueError(
            f"{matrix}: {len(strangers)} of {len(barcodes)} barcodes (as {strangers[0]!r}) are not in {positions.name} "
            f"(as {next(iter(known), '')!r}); give the positions of the same section"
        )
    if len(set(barcodes)) < len(barcodes):
        twice = next(b for b, n in Counter(barcodes).items() if n > 1)
        raise ValueError(f"{matrix}: barcode {twice!r} comes twice; restore it from Space Ranger's outs")
    return barcodes


def _scale_mpp(path: Path) -> float | None:
    scale = files.read_json(path)
    if not isinstance(scale, dict):
        raise ValueError(f"{path}: holds no names with numbers; restore it from Space Ranger's outs")
    diameter = scale.get("spot_diameter_fullres")
    if not diameter:
        return None
    if not isinstance(diameter, int | float) or not 0 < diameter < math.inf:
        raise ValueError(f"{path}: spot_diameter_fullres is no number of pixels; restore it from Space Ranger's outs")
    return SCALEFACTOR_SPOT_UM / diameter


def _expression(matrix: Matrix, rows: npt.NDArray[np.int64]) -> Matrix:
    """The given barcodes and the gene-expression features alone (antibodies and controls are no genes)."""
    from scipy.sparse import csr_matrix

    keep = np.array([kind == _EXPRESSION for kind in matrix.types])
    whole = csr_matrix((matrix.count, matrix.column, matrix.indptr), shape=(len(matrix.barcodes), len(keep)))
    part = whole[rows][:, np.flatnonzero(keep)]
    names, symbols = ([text for text, k in zip(texts, keep, strict=True) if k]
                      for texts in (matrix.names, matrix.symbols))  # fmt: skip
    return Matrix(
        [matrix.barcodes[r] for r in rows], names, symbols, [_EXPRESSION] * len(names), part.indptr.astype(np.int64),
        part.indices.astype(np.int64), part.data,
    )  # fmt: skip


def read(source: Source) -> Measurement:
    """One profile for each barcode of the filtered matrix (of a raw one: those in tissue), in the matrix's order.

    Raises:
        ValueError: files are missing or unreadable, or the barcodes of the matrix have no positions.
    """
    matrix_path, positions_path, scale_path = _locate(source.measurement, source.spots)
    matrix = read_matrix(source.measurement)
    positions = read_positions(positions_path)
    joined = _joined(matrix.barcodes, list(positions), matrix_path, positions_path)
    raw = "raw_feature_bc_matrix" in matrix_path.name
    rows = np.array([r for r, b in enumerate(joined) if positions[b][0] or not raw], dtype=np.int64)
    notes = [f"raw matrix: {len(joined) - len(rows)} barcodes that are not in tissue are left out"] if raw else []
    if not rows.size:
        raise ValueError(f"{matrix_path}: holds no barcode{' in tissue' if raw else ''}; give a section with spots")
    kept = _expression(matrix, rows)
    dropped = len(matrix.names) - len(kept.names)
    if dropped:
        notes.append(f"{dropped} features that are no gene expression are left out")
    places = np.array([positions[joined[r]][3:] for r in rows], dtype=np.float64).reshape(-1, 2)
    lattice = np.array([(p[2] * COL_UM, p[1] * ROW_UM, p[3], p[4]) for p in positions.values()])
    return Measurement(
        "visium", "spot", kept.barcodes, places, np.full(len(rows), SPOT_UM, np.float32),
        np.full(len(rows), DISC, np.uint8), counts_in_memory(kept.indptr, kept.column, kept.count), kept.names,
        kept.symbols, np.full(len(kept.names), GENE, np.uint8), lattice_um=lattice[:, :2], lattice_xy=lattice[:, 2:],
        reported_mpp=_scale_mpp(scale_path), notes=notes,
    )  # fmt: skip
