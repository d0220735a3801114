"""The index of a split: a row of 80 bytes per group in a plain .npy, mapped, so that a node holds it once.

In: what the sidecars of its shards tell. Out: `<split>/index.npy`. 120 million profiles are about 1.9 million groups,
which take 152 MB.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from storm import files

INDEX = "index.npy"
VERSION = 3  # of the index and of a split's entry in the manifest; version 1 was an npz with a list of keys
ROW = np.dtype([
    ("offset", "<i8"),  # bytes from the start of the tar
    ("size", "<i4"),  # bytes of the group's members with their headers
    ("shard", "<i4"), ("profiles", "<i4"), ("tiles", "<i4"),
    ("slide", "<i4"), ("group", "<i4"),  # the key is <slide>_<group>; slides are numbered in the split's entry
    ("sha256", "u1", (32,)),  # of the group's bytes: what nobody can forge
    ("xxh3", "u1", (16,)),  # of the same, 128 bits: what finds damage at a tenth of the cost
])  # fmt: skip


class DamagedError(ValueError):
    """A group is not there, or not as it was packed; the others may be."""


class Span(NamedTuple):
    """Where the bytes of a group lie, and what they must be."""

    shard: int
    offset: int
    size: int
    sha256: bytes
    xxh3: bytes
    key: str


@dataclass(frozen=True)
class Index:
    """Where each group of a split lies, and what it holds; all arrays are of length n (groups)."""

    slides: tuple[str, ...]  # by number
    path: Path | None  # where it is mapped from
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int32]
    shard: npt.NDArray[np.int32]
    profiles: npt.NDArray[np.int32]
    tiles: npt.NDArray[np.int32]
    slide: npt.NDArray[np.int32]
    group: npt.NDArray[np.int32]
    sha256: npt.NDArray[np.uint8]  # [n, 32]
    xxh3: npt.NDArray[np.uint8]  # [n, 16]

    def __len__(self) -> int:
        return len(self.offset)

    def __reduce__(self) -> Any:
        return (Index.load, (self.path, self.slides)) if self.path else super().__reduce__()  # another process maps too

    def key(self, i: int) -> str:
        """The key of group i: what its members' names begin with."""
        return f"{self.slides[self.slide[i]]}_{self.group[i]:05d}"

    def find(self, key: str) -> int | None:
        """The group of a key."""
        slide, _, number = key.rpartition("_")
        if slide not in self.slides or not number.isdecimal():
            return None
        found = np.flatnonzero((self.slide == self.slides.index(slide)) & (self.group == int(number)))
        return int(found[0]) if len(found) and self.key(int(found[0])) == key else None

    def span(self, i: int) -> Span:
        """Where group i lies."""
        place = int(self.shard[i]), int(self.offset[i]), int(self.size[i])
        return Span(*place, self.sha256[i].tobytes(), self.xxh3[i].tobytes(), self.key(i))

    def save(self, path: Path) -> None:
        """Write the index, complete or not at all."""
        rows = np.zeros(len(self), ROW)
        for name in ROW.names or ():
            rows[name] = getattr(self, name)
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, rows, allow_pickle=False)
        files.write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, slides: Sequence[str]) -> "Index":
        """Map an index. Raises ValueError where there is none, or none of this version."""
        if not path.is_file():
            raise ValueError(f"{path}: no such index; the shard set is incomplete, run data_prep.pack again")
        rows = np.load(path, mmap_mode="r" if path.stat().st_size else None, allow_pickle=False)
        if rows.dtype != ROW or rows.ndim != 1:
            raise ValueError(f"{path}: its rows are not those of an index; restore it or pack again")
        plain = np.asarray(rows)  # not the subclass: it is slow to take a number from
        return cls(tuple(slides), path, *(plain[name] for name in ROW.names or ()))
