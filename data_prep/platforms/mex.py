"""A matrix as MEX: matrix.mtx, features.tsv (or genes.tsv) and barcodes.tsv, gzipped or not, read in one pass forward.

In: the folder. Out: features, barcodes, where each barcode's counts start, and a way to read the counts by barcode.
Whether a file is gzipped is told by its content, not by its name.
"""

import contextlib
import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.platforms import whole_counts
from data_prep.platforms.found import one

if TYPE_CHECKING:
    import pandas as pd

_LINES = 1 << 20  # of the matrix at a time
_TEXT_BYTES = 1 << 30  # of barcodes or features: Visium HD's 11 million barcodes take a quarter
_LINE_BYTES = 1 << 16  # of a line of the header
_CURE = "restore it from the outs folder of the run"
_DAMAGE = (ValueError, OSError, EOFError, zlib.error)
Entries = tuple[npt.NDArray, npt.NDArray]  # column, count


@dataclass(frozen=True)
class Mex:
    """What is known before the counts are read."""

    features: list[list[str]]  # [K] the fields of each line: id, name, type
    barcodes: list[str]  # [N]
    indptr: npt.NDArray[np.int64]  # [N + 1]
    opened: Callable[[], AbstractContextManager[Callable[[int, int], Entries]]]


class _Header(NamedTuple):
    features: int
    barcodes: int
    entries: int


def files_of(folder: Path) -> tuple[Path, Path, Path]:
    """Matrix, features, barcodes. Raises ValueError where one is missing."""
    return (
        one(folder, ("matrix.mtx.gz", "matrix.mtx"), "matrix"),
        one(folder, ("features.tsv.gz", "features.tsv", "genes.tsv.gz", "genes.tsv"), "features"),
        one(folder, ("barcodes.tsv.gz", "barcodes.tsv"), "barcodes"),
    )


def opened_text(path: Path) -> IO[bytes]:
    """A file that may be gzipped, as plain bytes."""
    with path.open("rb") as handle:
        zipped = handle.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped else path.open("rb")  # type: ignore[return-value]


def lines(path: Path) -> list[str]:
    """The lines of a text. Raises ValueError where the file is damaged or no UTF-8 text."""
    try:
        with opened_text(path) as handle:
            data = handle.read(_TEXT_BYTES + 1)
        if len(data) > _TEXT_BYTES:
            raise ValueError(f"more than {_TEXT_BYTES >> 20} MiB")
        text = data.decode("utf-8-sig")  # spreadsheets put a mark before the first line
    except _DAMAGE as error:
        raise ValueError(f"{path}: not readable as text ({error}); {_CURE}") from error
    rows = text.replace("\r\n", "\n").removesuffix("\n").split("\n")  # splitlines breaks at more than line breaks
    return rows if text else []


def read(folder: Path) -> Mex:
    """Read and check everything but the counts' order in memory.

    Raises:
        ValueError: a file is missing or damaged, the three do not fit, or a count is none.
    """
    path, features_path, barcodes_path = files_of(folder)
    features = [line.split("\t") for line in lines(features_path)]
    barcodes = [line.split("\t")[0] for line in lines(barcodes_path)]
    try:
        header = _header(path)
        if header[:2] != (len(features), len(barcodes)):
            raise _ToldError(
                f"{path}: is {header.features} x {header.barcodes}, but there are {len(features)} features and "
                f"{len(barcodes)} barcodes; give files of one run"
            )
        length, rising = _lengths(path, header)
    except _ToldError:
        raise
    except _DAMAGE as error:
        raise ValueError(f"{path}: no readable matrix ({error}); {_CURE}") from error
    indptr = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    if rising:
        return Mex(features, barcodes, indptr, lambda: _forward(path))
    return Mex(features, barcodes, indptr, lambda: _sorted(path))


class _ToldError(ValueError):
    """A fault that names its file and its cure already."""


def _skip_header(handle: IO[bytes]) -> _Header:
    """The three sizes; the handle then stands at the first entry."""
    kind = handle.readline(_LINE_BYTES).decode().lower().split()
    if kind[:3] != ["%%matrixmarket", "matrix", "coordinate"] or kind[3:4] not in (["integer"], ["real"]):
        raise ValueError("its first line is not %%MatrixMarket matrix coordinate integer")
    if kind[4:] != ["general"]:
        raise ValueError(f"it is {' '.join(kind[4:])}, not general")
    line = handle.readline(_LINE_BYTES)
    while line.startswith(b"%") or (line and not line.strip()):
        line = handle.readline(_LINE_BYTES)
    sizes = line.split()
    if len(sizes) != 3 or not all(word.isdigit() for word in sizes):
        raise ValueError("the line of its sizes has not three numbers")
    return _Header(*map(int, sizes))


def sizes(path: Path) -> tuple[int, int, int]:
    """Features, barcodes and entries, as a matrix's header tells. Raises ValueError where it is none."""
    try:
        return _header(path)
    except _DAMAGE as error:
        raise ValueError(f"{path}: no readable matrix ({error}); {_CURE}") from error


def _header(path: Path) -> _Header:
    with opened_text(path) as handle:
        return _skip_header(handle)


def _chunks(path: Path) -> Iterator["pd.DataFrame"]:
    """The entries in the file's order: column (feature) and row (barcode), both from 1, count."""
    import pandas as pd

    with opened_text(path) as handle:
        if _skip_header(handle).entries:
            types = {"column": np.int64, "row": np.int64, "count": np.float64}
            yield from pd.read_csv(
                handle, sep=r"\s+", header=None, names=list(types), dtype=types, chunksize=_LINES, index_col=False
            )  # fmt: skip


def _lengths(path: Path, header: _Header) -> tuple[npt.NDArray[np.int64], bool]:
    """([N] entries of each barcode, whether the barcodes rise through the file); every entry is checked."""
    length, rising, last, seen = np.zeros(header.barcodes, np.int64), True, 0, 0
    for chunk in _chunks(path):
        row, column = chunk["row"].to_numpy(), chunk["column"].to_numpy()
        outside = np.flatnonzero((row < 1) | (row > header.barcodes) | (column < 1) | (column > header.features))
        if outside.size:
            at = outside[0]
            raise ValueError(f"entry {seen + at + 1} is of feature {column[at]} and barcode {row[at]}")
        try:
            whole_counts(chunk["count"].to_numpy(), path)
        except ValueError as error:
            raise _ToldError(str(error)) from None
        rising = rising and last <= row[0] and bool((np.diff(row) >= 0).all())
        last, seen = row[-1], seen + len(row)
        length += np.bincount(row - 1, minlength=header.barcodes)
    if seen != header.entries:
        raise ValueError(f"it tells {header.entries} entries and holds {seen}")
    return length, rising


@contextlib.contextmanager
def _forward(path: Path) -> Iterator[Callable[[int, int], Entries]]:
    """Spans of a file whose barcodes rise: each must start where the last one ended, or later."""
    chunks = _chunks(path)
    held: list[Entries] = []
    first = after = 0  # numbers of the first entry that is held, and of the first that is not yet read

    def span(start: int, end: int) -> Entries:
        nonlocal held, first, after
        while after < end:
            chunk = next(chunks)
            after += len(chunk)
            held.append((chunk["column"].to_numpy() - 1, chunk["count"].to_numpy()))
            if after <= start:
                held, first = [], after
        column, count = (np.concatenate(parts) for parts in zip(*held, strict=True))
        held, kept = [(column[end - first :], count[end - first :])], slice(start - first, end - first)
        first = end
        return column[kept], count[kept]

    try:
        yield span
    finally:
        chunks.close()  # type: ignore[attr-defined]


@contextlib.contextmanager
def _sorted(path: Path) -> Iterator[Callable[[int, int], Entries]]:
    """Spans of a file in another order than the vendor's: all of it is held in memory, by barcode."""
    parts = [
        [chunk[name].to_numpy().astype(np.int32) for name in ("row", "column", "count")] for chunk in _chunks(path)
    ]
    row, column, count = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(row, kind="stable")
    column, count = column[order] - 1, count[order]
    yield lambda start, end: (column[start:end], count[start:end])
