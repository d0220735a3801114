"""One reader per technology: the vendor's files in, one `Measurement` out.

A reader is a module with two functions: `inputs(source)`, the files it will read (they are hashed, so that a changed
file rebuilds the slide), and `read(source)`. Both raise ValueError naming file, fact and cure.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from storm.schema import CountBlock, spans

VENDORS = ("st", "visium", "visium_hd", "xenium", "cosmx")  # platforms whose own files are read
FORMATS = (*VENDORS, "hest", "h5ad", "spatialdata")  # a reader each, under this name
GENE, CONTROL, OTHER = 0, 1, 2  # kinds of columns: genes; probes that measure nothing; antibodies and the like
_BLOCK_ENTRIES = 1 << 21

Rows = npt.NDArray[np.int64]
# The counts of the profiles at ascending `rows`, as consecutive blocks whose `gene` is the column's number.
Counts = Callable[[Rows], Iterator[CountBlock]]


@dataclass(frozen=True)
class Source:
    """What a reader is given: columns of the manifest."""

    platform: str  # of schema.PLATFORMS
    measurement: Path
    spots: Path | None = None
    alignment: Path | None = None
    unit: str = ""  # cell, square<N>um or disc<N>um; blank: the platform's usual one
    space_um: float | None = None  # um per unit of the measurement's own coordinates, where the files do not tell
    assume_aligned: bool = False  # the measurement's own pixels are those of the image
    species: str = ""  # human or mouse; blank: not told


@dataclass(frozen=True)
class Measurement:
    """What a platform measured: N profiles, their places in the measurement's own space, and their counts."""

    platform: str  # of schema.PLATFORMS
    kind: str  # of schema.KINDS
    ids: list[str]  # [N] the vendor's own
    xy: npt.NDArray[np.float64]  # [N, 2] centres (x right, y down) in the measurement's own space
    footprint_um: npt.NDArray[np.float32]  # [N] disc's diameter or square's side; a polygon's follows from its area
    footprint_kind: npt.NDArray[np.uint8]  # [N] schema.DISC, SQUARE or POLYGON
    counts: Counts
    names: list[str]  # [K] columns: Ensembl ids or symbols
    symbols: list[str]  # [K] what to show
    column_kind: npt.NDArray[np.uint8]  # [K] GENE, CONTROL or OTHER
    # The own space: px of the image that was measured (matrix None, space_um None), or another one of `space_um` um per
    # unit, which `matrix` [3, 3] takes to level-0 px of the slide. None where no file tells it.
    space_um: float | None = None
    matrix: npt.NDArray[np.float64] | None = None
    matrix_source: str = "measured on this image"
    # Vertices of profile i: polygon_xy[polygon_indptr[i]:polygon_indptr[i + 1]], own space.
    polygon_indptr: npt.NDArray[np.int64] | None = None  # [N + 1]
    polygon_xy: npt.NDArray[np.float64] | None = None  # [V, 2]
    in_tissue: npt.NDArray[np.int8] | None = None  # [N] the vendor's word: 1, 0, -1 not told
    lattice_um: npt.NDArray[np.float64] | None = None  # [M, 2] the printed places, for the fit of mpp
    lattice_xy: npt.NDArray[np.float64] | None = None  # [M, 2] where they were found, own space
    reported_mpp: float | None = None  # by the vendor's files for the measured image; only compared
    notes: list[str] = field(default_factory=list)  # what was left out, and why
    facts: dict[str, Any] = field(default_factory=dict)  # of the vendor's files: versions and names of panels, no more


@dataclass(frozen=True)
class Frame:
    """The own space of a measurement, as Measurement has it."""

    space_um: float
    matrix: npt.NDArray[np.float64] | None
    source: str


class Reader(Protocol):
    """A platform's module.

    One may also have `frame(source) -> Frame | None`: the space without the profiles, where that is cheap to tell.
    """

    def inputs(self, source: Source) -> list[Path]:
        """The files that `read` will read."""

    def read(self, source: Source) -> Measurement:
        """The measurement. Raises ValueError naming file, fact and cure."""


def reader(name: str) -> Reader:
    """The module that reads one of FORMATS."""
    return cast(Reader, import_module(f"data_prep.platforms.{name}"))


def whole_counts(values: npt.NDArray, source: Path) -> npt.NDArray[np.int32]:
    """`values` as integers. Raises ValueError where one is negative or no whole number: those are no raw counts."""
    with np.errstate(invalid="ignore"):
        counts = values.astype(np.int32)
        wrong = np.flatnonzero((counts != values) | (counts < 0))
    if wrong.size:
        raise ValueError(f"{source}: holds {values[wrong[0]]}, which is no count; give the raw counts, not normalised")
    return counts


def counts_in_memory(indptr: npt.NDArray, column: npt.NDArray, count: npt.NDArray) -> Counts:
    """The counts of a CSR matrix that is in memory."""

    def blocks(rows: Rows) -> Iterator[CountBlock]:
        for part in row_blocks(indptr, rows):
            own, entries = spans(indptr, part)
            yield CountBlock(own, column[entries].astype(np.int32), count[entries].astype(np.int32))

    return blocks


def row_blocks(indptr: npt.NDArray, rows: Rows) -> Iterator[Rows]:
    """`rows` in consecutive parts of about 2 million counts, so that memory does not grow with the measurement."""
    running = np.cumsum(np.diff(indptr)[rows])
    start = 0
    while start < len(rows):
        before = running[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(running, before + _BLOCK_ENTRIES, side="right")))
        yield rows[start:end]
        start = end
