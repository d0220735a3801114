"""10x matrices, which Visium, Visium HD and Xenium share: HDF5 of both layouts, and MEX.

In: a file `*.h5`, or a folder with matrix, features and barcodes. Out: a `Matrix`: its barcodes, features and where
each barcode's counts start are in memory, the counts are read in row blocks when they are asked for.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.platforms import CONTROL, GENE, OTHER, Rows, mex, row_blocks, whole_counts
from storm.schema import CountBlock, spans

EXPRESSION = "Gene Expression"
CONTROLS = (
    "Negative Control Probe", "Negative Control Codeword", "Unassigned Codeword", "Blank Codeword",
    "Deprecated Codeword", "Genomic Control",
)  # fmt: skip
PROBE_LEFT_OUT = "Filtered Probe"  # our word: a probe that Space Ranger itself keeps out of the counts of genes
_CACHE_BYTES = 32 << 20  # holds a chunk of HDF5, so that none is read twice
_GAP_ENTRIES = 1024  # a gap between wanted rows that is read over: a new read costs more
# What h5py raises where a file is damaged or of another form.
_DAMAGE = (OSError, KeyError, RuntimeError, UnicodeDecodeError, pa.ArrowInvalid)
# (column, count) of the entries from a start to an end; called with rising spans only.
Span = Callable[[int, int], tuple[npt.NDArray, npt.NDArray]]


@dataclass(frozen=True)
class Matrix:
    """Counts as CSR over barcodes: all features, of the types that `types` tells."""

    path: Path
    barcodes: pa.Array  # [N] of strings: half a million Python strings are made only where they are needed
    names: list[str]  # [K] Ensembl ids where the vendor gives them
    symbols: list[str]  # [K]
    types: list[str]  # [K]
    indptr: npt.NDArray[np.int64]  # [N + 1]
    opened: Callable[[], AbstractContextManager[Span]]
    facts: dict[str, str] = field(default_factory=dict)  # of the file: software, chemistry, genome

    def counts(self, rows: Rows) -> Iterator[CountBlock]:
        """The counts of the barcodes at ascending `rows`, block by block; `gene` is the feature's number.

        Raises:
            ValueError: the file is damaged, names a feature that is not there, or holds no raw counts.
        """
        with self.opened() as span:
            for part in row_blocks(self.indptr, rows):
                yield self._block(span, part)

    def _block(self, span: Span, rows: Rows) -> CountBlock:
        start, end = self.indptr[rows], self.indptr[rows + 1]
        own = np.concatenate([[0], np.cumsum(end - start)]).astype(np.int64)
        column, count = np.empty(own[-1], np.int32), np.empty(own[-1], np.int32)
        breaks = np.flatnonzero(start[1:] - end[:-1] > _GAP_ENTRIES) + 1
        edges = [0, *breaks.tolist(), len(rows)]
        for first, last in itertools.pairwise(edges):
            here = slice(own[first], own[last])
            if own[first] == own[last]:
                continue
            columns, counts = span(int(start[first]), int(end[last - 1]))
            if len(columns) > own[last] - own[first]:
                _, wanted = spans(self.indptr - start[first], rows[first:last])
                columns, counts = columns[wanted], counts[wanted]
            if columns.min() < 0 or columns.max() >= len(self.names):
                raise unsound(self.path, f"an index lies outside 0 to {len(self.names) - 1}")
            column[here], count[here] = columns, whole_counts(counts, self.path)
        return CountBlock(own, column, count)

    @property
    def kinds(self) -> npt.NDArray[np.uint8]:
        """[K] GENE, CONTROL or OTHER."""
        of = {EXPRESSION: GENE, **dict.fromkeys(CONTROLS, CONTROL)}
        return np.array([of.get(kind, OTHER) for kind in self.types], np.uint8)

    def notes(self) -> list[str]:
        """What is left out of the genes, where anything is."""
        others = Counter(kind for kind in self.types if kind != EXPRESSION)
        told = ", ".join(f"{n} {kind}" for kind, n in sorted(others.items()))
        return [f"{others.total()} features that are no gene expression are left out ({told})"] if others else []


def unsound(path: Path, fault: str) -> ValueError:
    """The error of a matrix that contradicts itself."""
    return ValueError(f"{path}: no sound 10x matrix ({fault}); restore it from the outs folder of the run")


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: no readable 10x matrix ({error}); restore it from the outs folder of the run")


def open_matrix(path: Path) -> Matrix:
    """The matrix of an HDF5 file or a MEX folder.

    Raises:
        ValueError: it is damaged, of another form, of several genomes, or its parts do not fit each other.
    """
    return _open_mex(path) if path.is_dir() else _open_h5(path)


def _fitting(found: Matrix, entries: int) -> Matrix:
    """The matrix itself. Raises ValueError where its arrays contradict each other: one would read beside them."""
    indptr, features, barcodes = found.indptr, len(found.names), len(found.barcodes)
    faults = {
        f"{features} ids, {len(found.symbols)} names and {len(found.types)} types of features": (
            not features == len(found.symbols) == len(found.types)
        ),
        f"indptr has {len(indptr)} numbers for {barcodes} barcodes": len(indptr) != barcodes + 1,
        f"indptr does not rise from 0 to {entries}": (
            not len(indptr) or indptr[0] != 0 or indptr[-1] != entries or bool((np.diff(indptr) < 0).any())
        ),
    }
    for fault, met in faults.items():
        if met:
            raise unsound(found.path, fault)
    return found


def files_of(path: Path) -> list[Path]:
    """The files that `open_matrix` reads."""
    return list(mex.files_of(path)) if path.is_dir() else [path]


def _group(root: h5py.File, path: Path) -> h5py.Group:
    """The group that holds the matrix: named `matrix`, or, before Cell Ranger 3, as its genome."""
    entries = [root["matrix"]] if "matrix" in root else list(root.values())
    groups = [entry for entry in entries if isinstance(entry, h5py.Group) and "barcodes" in entry]
    if len(groups) != 1:
        fact = f"holds {len(groups)} genomes; give the matrix of one species" if groups else (
            "is HDF5, but holds no 10x matrix; give the filtered_feature_bc_matrix.h5 of the run"
        )  # fmt: skip
        raise ValueError(f"{path}: {fact}")
    return groups[0]


def _strings(dataset: h5py.Dataset) -> pa.Array:
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 1 or dataset.dtype.kind not in "SO":
        raise KeyError(f"{dataset.name} is no list of names")
    return pa.array(dataset[...], pa.binary()).cast(pa.string())


def _length(group: h5py.Group, name: str, kinds: str) -> int:
    """The length of a list of numbers. Raises KeyError where the entry is anything else."""
    found = group[name]
    if not isinstance(found, h5py.Dataset) or found.ndim != 1 or found.dtype.kind not in kinds:
        raise KeyError(f"{name} is no list of numbers")
    return len(found)


def _features(group: h5py.Group) -> tuple[list[str], list[str], list[str]]:
    """Ids, names and types of the columns; probes are given their gene, so that those of one gene are summed."""
    if "features" not in group:  # Cell Ranger before 3
        ids, names = (_strings(group[key]).to_pylist() for key in ("genes", "gene_names"))
        return ids, names, [EXPRESSION] * len(ids)
    features = group["features"]
    probes = "gene_id" in features and "filtered_probes" in features
    keys = ("gene_id", "gene_name", "feature_type") if probes else ("id", "name", "feature_type")
    ids, names, types = (_strings(features[key]).to_pylist() for key in keys)
    if probes:
        used = features["filtered_probes"][...]
        if used.shape != (len(types),):
            raise KeyError("filtered_probes does not fit the features")
        types = [kind if keep else PROBE_LEFT_OUT for kind, keep in zip(types, used, strict=True)]
    return ids, names, types


def _fact(value: object) -> str:
    """A vendor's word on its own software as plain text."""
    found = value.reshape(-1)[0] if isinstance(value, np.ndarray) and value.size else value
    text = found.decode(errors="replace") if isinstance(found, bytes) else str(found)
    return "".join(c for c in text if c.isascii() and c.isprintable())[:64]


def _open_h5(path: Path) -> Matrix:
    try:
        with h5py.File(path, "r") as root:
            group = _group(root, path)
            names, symbols, types = _features(group)
            _length(group, "indptr", "iu")
            indptr = group["indptr"][...].astype(np.int64)
            entries, counts = _length(group, "indices", "iu"), _length(group, "data", "iuf")
            if entries != counts:
                raise unsound(path, f"{entries} indices for {counts} counts")
            keys = {"software": "software_version", "chemistry": "chemistry_description"}
            facts = {name: _fact(root.attrs[key]) for name, key in keys.items() if key in root.attrs}
            barcodes = _strings(group["barcodes"])
            found = Matrix(path, barcodes, names, symbols, types, indptr, lambda: _h5_span(path), facts)
            return _fitting(found, counts)
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


@contextlib.contextmanager
def _h5_span(path: Path) -> Iterator[Span]:
    with h5py.File(path, "r", rdcc_nbytes=_CACHE_BYTES) as root:
        group = _group(root, path)
        column, count = group["indices"], group["data"]

        def span(start: int, end: int) -> tuple[npt.NDArray, npt.NDArray]:
            try:
                return column[start:end], count[start:end]
            except _DAMAGE as error:
                raise _unreadable(path, error) from error

        yield span


def _open_mex(folder: Path) -> Matrix:
    found = mex.read(folder)
    types = [row[2] if len(row) > 2 else EXPRESSION for row in found.features]
    symbols = [row[1] if len(row) > 1 else row[0] for row in found.features]
    names = [row[0] for row in found.features]
    return Matrix(folder, pa.array(found.barcodes, pa.string()), names, symbols, types, found.indptr, found.opened)


@dataclass(frozen=True)
class Whole:
    """A matrix in memory."""

    barcodes: list[str]
    names: list[str]
    symbols: list[str]
    types: list[str]
    indptr: npt.NDArray[np.int64]
    column: npt.NDArray[np.int32]
    count: npt.NDArray[np.int32]


def whole(matrix: Matrix) -> Whole:
    """The matrix with all its counts."""
    blocks = list(matrix.counts(np.arange(len(matrix.barcodes))))
    empty = [np.zeros(0, np.int32)]
    return Whole(
        matrix.barcodes.to_pylist(), matrix.names, matrix.symbols, matrix.types, matrix.indptr,
        np.concatenate([block.gene for block in blocks] or empty),
        np.concatenate([block.count for block in blocks] or empty),
    )  # fmt: skip
