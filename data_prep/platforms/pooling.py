"""Molecules with places -> counts in squares of N um (pseudo-spots), in bounded memory.

In: a function that streams the molecules, as often as it is asked. Out: the squares that hold a gene, and their counts
as a stream. Square (i, j) covers [i N, (i + 1) N) x [j N, (j + 1) N) um of the measurement's own frame.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.platforms import GENE, Rows, row_blocks, units
from storm.schema import SQUARE, CountBlock

_PENDING = 1 << 22  # keys that wait before equal ones are joined
_PASS_MOLECULES = 1 << 23  # of one pass over the file
_OFFSET = 1 << 30  # makes numbers of squares positive; two of them fit into one of 63 bits


def square_of(unit: str, platform: str) -> units.Footprint | None:
    """The squares that a manifest's `unit` asks for, None where it asks for cells.

    Raises:
        ValueError: it asks for discs.
    """
    asked = units.footprint(unit, platform)
    if asked and asked.shape != SQUARE:
        raise ValueError(f"unit {unit}: {platform} is read as cells or pooled into squares; write cell or square<N>um")
    return asked


class Molecules(NamedTuple):
    """Some molecules: their places, and what they are."""

    xy_um: npt.NDArray[np.float64]  # [n, 2] in the measurement's own frame
    column: npt.NDArray[np.int64]  # [n]


# Streams all molecules; those whose y lies outside of [low, high) um may be left out.
Stream = Callable[[float, float], Iterator[Molecules]]


class _Tally:
    """How often each key came, without keeping every key that came."""

    def __init__(self) -> None:
        self.key: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self.count: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self._pending: list[npt.NDArray[np.int64]] = []
        self._waiting = 0

    def add(self, key: npt.NDArray[np.int64]) -> None:
        self._pending.append(key)
        self._waiting += len(key)
        if self._waiting >= _PENDING:
            self.join()

    def join(self) -> None:
        """Bring `key` (ascending) and `count` up to date."""
        new, times = np.unique(np.concatenate([*self._pending, np.zeros(0, np.int64)]), return_counts=True)
        self._pending, self._waiting = [], 0
        key = np.concatenate([self.key, new])
        count = np.concatenate([self.count, times.astype(np.int32)]).astype(np.int32, copy=False)
        order = np.argsort(key, kind="stable")  # two ascending parts, which this kind of sorting merges
        key, count = key[order], count[order]
        first = np.flatnonzero(np.diff(key, prepend=-1))
        self.key = key[first]
        self.count = np.add.reduceat(count, first, dtype=np.int32) if len(first) else count


def _keys(xy_um: npt.NDArray[np.float64], side_um: float) -> npt.NDArray[np.int64]:
    """The square of each place: row by row, and from left to right within a row."""
    col, row = np.floor(xy_um / side_um).astype(np.int64).T
    return ((row + _OFFSET) << 32) | (col + _OFFSET)


@dataclass(frozen=True)
class Squares:
    """The squares that hold at least one molecule of a gene."""

    side_um: float
    key: npt.NDArray[np.int64]  # [N] ascending
    molecules: npt.NDArray[np.int32]  # [N] of genes
    columns: int
    stream: Stream

    @property
    def place(self) -> npt.NDArray[np.int64]:
        """[N, 2] (column i, row j) of each square."""
        return np.column_stack([(self.key & 0xFFFFFFFF) - _OFFSET, (self.key >> 32) - _OFFSET])

    @property
    def centre_um(self) -> npt.NDArray[np.float64]:
        """[N, 2] centres in the measurement's own frame."""
        return np.asarray((self.place + 0.5) * self.side_um, np.float64)

    def counts(self, rows: Rows) -> Iterator[CountBlock]:
        """The counts of the squares at ascending `rows`; a pass over the file for each 8 million molecules."""
        running = np.cumsum(self.molecules[rows], dtype=np.int64)
        start = 0
        while start < len(rows):
            before = running[start - 1] if start else 0
            end = max(start + 1, int(np.searchsorted(running, before + _PASS_MOLECULES, side="right")))
            indptr, gene, count = self._block(self.key[rows[start:end]])
            for part in row_blocks(indptr, np.arange(end - start)):
                own = indptr[part[0] : part[-1] + 2]
                entries = slice(own[0], own[-1])
                yield CountBlock(own - own[0], gene[entries], count[entries])
            start = end

    def _block(self, key: npt.NDArray[np.int64]) -> CountBlock:
        low, high = ((k >> 32) - _OFFSET for k in (key[0], key[-1]))
        found = _Tally()
        for part in self.stream(low * self.side_um, (high + 1) * self.side_um):
            own = _keys(part.xy_um, self.side_um)
            at = np.searchsorted(key, own).clip(0, len(key) - 1)
            hit = key[at] == own
            found.add(at[hit] * self.columns + part.column[hit])
        found.join()
        square, column = np.divmod(found.key, self.columns)
        indptr = np.searchsorted(square, np.arange(len(key) + 1)).astype(np.int64)
        return CountBlock(indptr, column.astype(np.int32), found.count)


def squares(stream: Stream, side_um: float, column_kind: npt.NDArray[np.uint8]) -> Squares:
    """Find the squares of a stream of molecules. `column_kind` [K] tells which of their columns are genes."""
    found = _Tally()
    for part in stream(-np.inf, np.inf):
        found.add(_keys(part.xy_um[column_kind[part.column] == GENE], side_um))
    found.join()
    return Squares(side_um, found.key, found.count, len(column_kind), stream)
