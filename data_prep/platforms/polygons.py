"""Polygons of cells as Xenium and CosMx list them, a row per vertex -> CSR, in the order of the cells.

In: batches of (profile of each vertex, its place); the vertices of one cell follow each other. Out: `Polygons`. A
closing vertex that repeats the first is dropped, and so is a polygon of fewer than three vertices: it has no area.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storm import schema

_STRAY = 0.05  # share of polygons that may lie beside the centre of their cell


@dataclass(frozen=True)
class Polygons:
    """Polygons of N profiles; none where `indptr` does not rise."""

    indptr: npt.NDArray[np.int64]  # [N + 1]
    xy: npt.NDArray[np.float64]  # [V, 2]

    @property
    def drawn(self) -> npt.NDArray[np.bool_]:
        """[N] whether a profile has a polygon."""
        return np.diff(self.indptr) > 0

    @property
    def kinds(self) -> npt.NDArray[np.uint8]:
        """[N] schema.POLYGON where a profile has a polygon, else schema.DISC."""
        return np.where(self.drawn, schema.POLYGON, schema.DISC).astype(np.uint8)


def none_of(count: int) -> Polygons:
    """No polygon for any of `count` profiles."""
    return Polygons(np.zeros(count + 1, np.int64), np.zeros((0, 2)))


def gather(
    parts: Iterable[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]],
    count: int,
    path: Path,
    name: Callable[[int], str],
) -> Polygons:
    """The polygons of `count` profiles.

    Args:
        parts: (profile [n], xy [n, 2]) of consecutive vertices; profile -1 is no profile of ours.
        name: what the vendor calls a profile, for errors.

    Raises:
        ValueError: a vertex is no number, or the vertices of a cell lie apart in the file.
    """
    owners, places = [np.zeros(0, np.int32)], [np.zeros((0, 2))]
    for part, place in parts:
        own = part >= 0
        if not np.isfinite(place[own]).all():
            bad = int(part[own][~np.isfinite(place[own]).all(axis=1)][0])
            raise ValueError(f"{path}: a vertex of cell {name(bad)} has no place; restore the file")
        owners.append(part[own].astype(np.int32))
        places.append(place[own])
    owner, xy = np.concatenate(owners), np.concatenate(places)
    del owners, places
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    first = owner[starts].astype(np.int64)
    twice = np.flatnonzero(np.bincount(first, minlength=count) > 1)
    if twice.size:
        raise ValueError(
            f"{path}: the vertices of cell {name(int(twice[0]))} do not follow each other; give one "
            "polygon for each cell"
        )
    lengths = np.diff(starts, append=len(owner))
    if len(starts):
        lengths -= np.all(xy[starts] == xy[starts + lengths - 1], axis=1)
    return _ordered(first, starts, np.where(lengths >= 3, lengths, 0), xy, count)


def _ordered(
    owner: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64],
    xy: npt.NDArray[np.float64], count: int,
) -> Polygons:  # fmt: skip
    """The polygons by profile."""
    begin, length = np.zeros(count, np.int64), np.zeros(count, np.int64)
    begin[owner], length[owner] = starts, lengths
    indptr = np.concatenate([[0], np.cumsum(length)])
    entries = np.repeat(begin - indptr[:-1], length)
    entries += np.arange(indptr[-1])
    return Polygons(indptr, xy[entries])


def check_centres(polygons: Polygons, centre: npt.NDArray[np.float64], path: Path) -> None:
    """Raises ValueError where polygons do not lie around the centres of their cells: those are of something else."""
    rows = np.flatnonzero(polygons.drawn)
    if not rows.size:
        raise ValueError(f"{path}: holds no polygon of these cells; give the file of the same section, or remove it")
    starts = polygons.indptr[:-1][rows]
    low, high = (f.reduceat(polygons.xy, starts, axis=0) for f in (np.minimum, np.maximum))
    margin = (high - low) / 2  # the centre of a bent cell may lie beside it, but not far away
    stray = np.any((centre[rows] < low - margin) | (centre[rows] > high + margin), axis=1)
    if stray.sum() > _STRAY * len(rows):
        raise ValueError(
            f"{path}: {stray.sum()} of {len(rows)} polygons do not lie around their cells; give the file of the same "
            "section, as the vendor wrote it"
        )
