"""AnnData on disk, an h5ad file or the zarr folder of a table: names, single columns, and the counts as a stream.

In: the path. Out: `Annotated`. Counts are raw ones in layers['counts'], else in X; stored by profile (CSR, dense) they
are read in blocks when they are asked for; stored by gene (CSC) they are turned in memory up to a size. Only what is
named here is read, by h5py, zarr and anndata's readers of elements: no part of a file is unpickled, and no link out of
it is followed.
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from data_prep.platforms import CONTROL, GENE, OTHER, Counts, Rows, counts_in_memory, row_blocks, tenx, whole_counts
from storm import genes
from storm.schema import CountBlock, spans

MAX_TURNED = 30_000_000  # entries of a matrix stored by gene that are turned in memory, about 1 GB
_BLOCK_CELLS = 1 << 22  # of a dense matrix that are read at once
_PROBE = 1 << 16  # entries that are looked at before any count is asked for
_DAMAGE = (OSError, KeyError, RuntimeError, TypeError, UnicodeDecodeError)
_ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id", "ensembl", "feature_id")
_SYMBOL_COLUMNS = ("gene_symbols", "gene_symbol", "feature_name", "gene_name", "gene_names", "symbol")
_TYPE_COLUMNS = ("feature_types", "feature_type")
_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{11}(\.\d+)?")
_ELEMENTS = (
    "", "array", "string-array", "categorical", "string", "numeric-scalar", "dict", "dataframe", "nullable-integer",
    "nullable-boolean", "nullable-string-array",
)  # fmt: skip
_METADATA = (".zarray", ".zgroup", ".zattrs", ".zmetadata", "zarr.json")


@dataclass(frozen=True)
class Annotated:
    """N profiles and K columns."""

    ids: list[str]  # [N] obs_names
    names: list[str]  # [K] Ensembl ids where the file has them
    symbols: list[str]  # [K]
    column_kind: npt.NDArray[np.uint8]  # [K] GENE, CONTROL or OTHER
    counts: Counts
    notes: list[str]
    facts: dict[str, Any]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The root group of an h5ad file or a zarr folder.

    Raises:
        ValueError: it cannot be read, here or in what is done with it.
    """
    try:
        if path.is_dir():
            import zarr

            check_codecs(path)
            yield zarr.open_group(path, mode="r")
        elif not path.is_file():
            raise ValueError(f"{path}: no such file; correct its path")
        else:
            with h5py.File(path, "r") as root:
                yield root
    except _DAMAGE as error:
        raise ValueError(f"{path}: no readable AnnData ({error}); write it again with anndata") from error


def check_codecs(folder: Path) -> None:
    """Raises ValueError where an array of a zarr folder asks to be unpickled."""
    for path in sorted(p for p in folder.rglob("*") if p.name in _METADATA):
        try:
            told = json.dumps(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: is no JSON ({error}); write the table again") from None
        if re.search(r'"(numcodecs\.)?pickle"', told):
            raise ValueError(f"{path}: is stored as pickles, which are never read; write the table again with anndata")


def node(root: Any, name: str) -> Any:
    """The group or array `name`. Raises KeyError where it is not there or lies in another file."""
    found = root
    for part in name.split("/"):
        if not hasattr(found, "keys") or part not in found:
            raise KeyError(f"it has no {name}")
        if isinstance(found, h5py.Group) and not isinstance(found.get(part, getlink=True), h5py.HardLink):
            raise KeyError(f"{name} is a link")
        found = found[part]
    if isinstance(found, h5py.Dataset) and (found.external or found.is_virtual):
        raise KeyError(f"{name} lies in another file")
    return found


def keys(root: Any, name: str) -> list[str]:
    """The entries of the group `name`, none where it is not there."""
    try:
        found = node(root, name)
    except KeyError:
        return []
    return sorted(found.keys()) if hasattr(found, "keys") else []


def element(root: Any, name: str) -> Any:
    """What anndata makes of an entry: an array, a categorical, a text, a dict."""
    from anndata.io import read_elem

    found = node(root, name)
    for child in found.keys() if isinstance(found, h5py.Group) else ():
        node(root, f"{name}/{child}")
    if isinstance(found, h5py.Dataset) and isinstance(found.attrs.get("categories"), h5py.Reference):
        return root[found.attrs["categories"]][...][found[...]]  # a categorical as anndata 0.7 wrote it
    form = tuple(_text(found.attrs.get(f"encoding-{what}", "")) for what in ("type", "version"))
    if form[0] not in _ELEMENTS or bool(form[0]) != bool(form[1]):
        raise KeyError(f"{name} is stored as {' '.join(form)}, which is not read")
    return read_elem(found)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _names(root: Any, axis: str, path: Path) -> list[str]:
    """obs_names or var_names."""
    group = node(root, axis)
    if not hasattr(group, "keys"):
        raise ValueError(f"{path}: was written by anndata before 0.7; read it with a later one and write it again")
    return [_text(name) for name in element(root, f"{axis}/{_text(group.attrs['_index'])}")]


def column(root: Any, axis: str, name: str) -> npt.NDArray | None:
    """A column of obs or var, None where it is not there."""
    return np.asarray(element(root, f"{axis}/{name}")) if name in keys(root, axis) else None


def _first(root: Any, columns: tuple[str, ...]) -> list[str] | None:
    """The first of the columns that var has, blank where a value is missing."""
    for name in columns:
        found = column(root, "var", name)
        if found is not None:
            texts = [_text(value) for value in found]
            return ["" if text in ("nan", "None", "<NA>", "NaN") else text for text in texts]
    return None


def _genes(root: Any, path: Path) -> tuple[list[str], list[str], npt.NDArray[np.uint8]]:
    """(names, symbols, kinds of the columns)."""
    index = _names(root, "var", path)
    ensembl = sum(bool(_ENSEMBL.match(name)) for name in index) > len(index) / 2
    other = _first(root, _SYMBOL_COLUMNS if ensembl else _ID_COLUMNS)
    filled = [text or name for text, name in zip(other or index, index, strict=True)]
    names, symbols = (index, filled) if ensembl else (filled, index)
    types = _first(root, _TYPE_COLUMNS) or [tenx.EXPRESSION] * len(index)
    of = {"": GENE, tenx.EXPRESSION: GENE, **dict.fromkeys(tenx.CONTROLS, CONTROL)}
    kinds = np.array([of.get(kind, OTHER) for kind in types], np.uint8)
    named = np.array([genes.is_control(n) or genes.is_control(s) for n, s in zip(names, symbols, strict=True)], bool)
    kinds[named & (kinds == GENE)] = CONTROL
    return names, symbols, kinds


def load(root: Any, path: Path) -> Annotated:
    """Names and counts.

    Raises:
        ValueError: profiles share a name, there is no matrix, it is damaged, or its first entries are no raw counts.
        KeyError: a part of every AnnData is missing; `opened` names the file.
    """
    ids = _names(root, "obs", path)
    if len(set(ids)) < len(ids):
        twice = next(name for name, n in Counter(ids).items() if n > 1)
        raise ValueError(f"{path}: obs_names hold {twice!r} twice; give every profile a name of its own")
    names, symbols, kinds = _genes(root, path)
    where = "layers/counts" if "counts" in keys(root, "layers") else "X"
    stream = _stream(root, path, where, (len(ids), len(names)))
    told = {"controls": int((kinds == CONTROL).sum()), "features of another kind": int((kinds == OTHER).sum())}
    notes = [f"{n} {what} are left out" for what, n in told.items() if n]
    return Annotated(ids, names, symbols, kinds, stream, notes, {"counts from": where})


def places(root: Any, path: Path, count: int) -> npt.NDArray[np.float64]:
    """[N, 2] obsm['spatial'].

    Raises:
        ValueError: it is missing, of another shape, or holds values that are no numbers.
    """
    if "spatial" not in keys(root, "obsm"):
        raise ValueError(f"{path}: has no obsm['spatial']; put the centres (x, y) of the profiles there")
    xy = np.asarray(element(root, "obsm/spatial"))
    if xy.shape != (count, 2) or xy.dtype.kind not in "iuf":
        raise ValueError(f"{path}: obsm['spatial'] is {' x '.join(map(str, xy.shape))} of {xy.dtype}, not {count} x 2 "
                         "numbers; put the centres (x, y) of the profiles there")  # fmt: skip
    bad = np.flatnonzero(~np.isfinite(xy).all(axis=1))
    if bad.size:
        raise ValueError(f"{path}: obsm['spatial'] has no place for {bad.size} of {count} profiles; remove these")
    return xy.astype(np.float64)


def in_tissue(root: Any) -> npt.NDArray[np.int8] | None:
    """[N] obs['in_tissue'] as 1, 0, or -1 where it is neither."""
    found = column(root, "obs", "in_tissue")
    words = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}
    return None if found is None else np.array([words.get(_text(value).lower(), -1) for value in found], np.int8)


def _stream(root: Any, path: Path, name: str, shape: tuple[int, int]) -> Counts:
    matrix = node(root, name)
    if hasattr(matrix, "keys"):
        form = _text(matrix.attrs.get("encoding-type", matrix.attrs.get("h5sparse_format", "")))
        told = tuple(int(n) for n in matrix.attrs.get("shape", matrix.attrs.get("h5sparse_shape", ())))
    else:
        form, told = "dense", matrix.shape
    if told != shape:
        raise ValueError(f"{path}: {name} is {' x '.join(map(str, told))}, but there are {shape[0]} obs_names and "
                         f"{shape[1]} var_names; write it again with anndata")  # fmt: skip
    if form == "dense":
        _check_numbers(matrix, name)
        whole_counts(matrix[: max(1, _PROBE // max(1, shape[1]))].reshape(-1), path)
        return lambda rows: _dense_blocks(path, name, rows)
    if form.removesuffix("_matrix") not in ("csr", "csc"):
        raise ValueError(f"{path}: {name} is stored as {form or 'nothing known'}; write it as CSR with anndata")
    by_gene = form.startswith("csc")
    indptr = _indptr(root, path, name, shape[1] if by_gene else shape[0])
    whole_counts(node(root, f"{name}/data")[:_PROBE], path)
    if by_gene:
        return _turned(root, path, name, shape, indptr)
    return lambda rows: _sparse_blocks(path, name, indptr, shape[1], rows)


def _check_numbers(array: Any, name: str) -> None:
    if array.dtype.kind not in "iufb":
        raise KeyError(f"{name} holds {array.dtype}, no numbers")


def _indptr(root: Any, path: Path, name: str, lines: int) -> npt.NDArray[np.int64]:
    """Where the entries of each line start. Raises ValueError where the matrix contradicts itself."""
    for part, kinds in (("indptr", "iu"), ("indices", "iu"), ("data", "iufb")):
        found = node(root, f"{name}/{part}")
        if getattr(found, "ndim", 0) != 1 or found.dtype.kind not in kinds:
            raise KeyError(f"{name}/{part} is no list of numbers")
    indptr = node(root, f"{name}/indptr")[...].astype(np.int64)
    entries, columns = (node(root, f"{name}/{part}").shape[0] for part in ("data", "indices"))
    sound = len(indptr) == lines + 1 and indptr[0] == 0 and indptr[-1] == entries == columns
    if not sound or (np.diff(indptr) < 0).any():
        raise ValueError(f"{path}: {name} is no sound matrix (indptr, indices and data do not fit each other); write "
                         "it again with anndata")  # fmt: skip
    return indptr


def _bounded(column: npt.NDArray, end: int, path: Path, name: str) -> npt.NDArray[np.int32]:
    if len(column) and (column.min() < 0 or column.max() >= end):
        raise ValueError(f"{path}: {name} has an index outside 0 to {end - 1}; write it again with anndata")
    return column.astype(np.int32)


def _turned(root: Any, path: Path, name: str, shape: tuple[int, int], indptr: npt.NDArray[np.int64]) -> Counts:
    """A matrix stored by gene, turned in memory."""
    from scipy.sparse import csc_matrix

    if indptr[-1] > MAX_TURNED:
        raise ValueError(
            f"{path}: {name} is stored by gene (CSC) and has {indptr[-1]} entries, more than {MAX_TURNED} that are "
            f"turned in memory; write it by profile: adata.{name.replace('/', '.')} as scipy's csr_matrix"
        )
    count = whole_counts(node(root, f"{name}/data")[...], path)
    profile = _bounded(node(root, f"{name}/indices")[...], shape[0], path, name)
    rows = csc_matrix((count, profile, indptr), shape=shape).tocsr()
    return counts_in_memory(rows.indptr.astype(np.int64), rows.indices, rows.data)


def _sparse_blocks(
    path: Path, name: str, indptr: npt.NDArray[np.int64], columns: int, rows: Rows
) -> Iterator[CountBlock]:
    with opened(path) as root:
        index, data = (node(root, f"{name}/{part}") for part in ("indices", "data"))
        # Whole stretches of the file are read, also where rows between are not asked for.
        for part in row_blocks(indptr, np.arange(rows[0], rows[-1] + 1) if len(rows) else rows):
            start, end = int(indptr[part[0]]), int(indptr[part[-1] + 1])
            column, count = _bounded(index[start:end], columns, path, name), whole_counts(data[start:end], path)
            own, entries = spans(
                indptr - start, rows[np.searchsorted(rows, part[0]) : np.searchsorted(rows, part[-1] + 1)]
            )
            yield CountBlock(own, column[entries], count[entries])


def _dense_blocks(path: Path, name: str, rows: Rows) -> Iterator[CountBlock]:
    with opened(path) as root:
        matrix = node(root, name)
        step = max(1, _BLOCK_CELLS // max(1, matrix.shape[1]))
        for start in range(int(rows[0]), int(rows[-1]) + 1, step) if len(rows) else ():
            own = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + step)]
            values = matrix[start : start + step][own - start]
            row, column = np.nonzero(values)
            indptr = np.searchsorted(row, np.arange(len(own) + 1)).astype(np.int64)
            yield CountBlock(indptr, column.astype(np.int32), whole_counts(values[row, column], path))
