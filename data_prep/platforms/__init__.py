"""One reader per technology: the vendor's files in, one `Measurement` out.

A reader is a module with two functions: `inputs(measurement, spots)`, the files it will read (they are hashed, so that
a changed file rebuilds the slide), and `read(measurement, spots)`.
"""

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

READERS = ("st", "visium")


@dataclass(frozen=True)
class Measurement:
    """What a platform measured: N profiles, their places in pixels of the full-resolution image, and counts as CSR."""

    ids: list[str]
    xy_px0: npt.NDArray[np.float64]  # [N, 2] centres, x right, y down
    footprint_um: npt.NDArray[np.float32]  # [N] disc diameter or square side
    footprint_kind: npt.NDArray[np.uint8]  # [N] schema.DISC or schema.SQUARE
    indptr: npt.NDArray[np.int64]  # [N + 1]
    column: npt.NDArray[np.int64]  # [nnz] index in `names`
    count: npt.NDArray[np.int64]  # [nnz]
    names: list[str]  # what identifies each column best: Ensembl ids where the file has them
    symbols: list[str]  # what to show
    lattice_um: npt.NDArray[np.float64] | None = None  # [M, 2] the printed places, for the fit of mpp
    lattice_px0: npt.NDArray[np.float64] | None = None  # [M, 2] where they were found in the image
    reported_mpp: float | None = None  # by the vendor's files; only compared
    notes: list[str] = field(default_factory=list)  # what was left out, and why


class Reader(Protocol):
    """A platform's module."""

    def inputs(self, measurement: Path, spots: Path | None) -> list[Path]:
        """The files that `read` will read."""

    def read(self, measurement: Path, spots: Path | None) -> Measurement:
        """The measurement. Raises ValueError naming file, fact and cure."""


def reader(platform: str) -> Reader:
    """The module that reads a platform of READERS."""
    return cast(Reader, import_module(f"data_prep.platforms.{platform}"))


def whole_counts(values: npt.NDArray, source: Path) -> npt.NDArray[np.int64]:
    """`values` as integers. Raises ValueError where one is negative or no whole number: those are no raw counts."""
    counts = values.astype(np.int64)
    wrong = np.flatnonzero((counts != values) | (counts < 0))
    if wrong.size:
        raise ValueError(f"{source}: holds {values[wrong[0]]}, which is no count; give the raw counts, not normalised")
    return counts
