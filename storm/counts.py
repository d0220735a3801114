"""The counts of a slide store, read by rows.

In: the store's file, where each profile's counts start. Out: the counts of chosen profiles. Zarr arrays `counts/gene`
and `counts/count` of whole chunks, read by hand: zarr takes twice as long.
"""

import functools
import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from numcodecs import Blosc
from zarr.codecs import BloscCodec

from storm import schema

CHUNK = 1 << 20  # entries of an array
# Bytes of equal weight side by side: gene numbers and counts come a fifth smaller than by zstd alone, and faster.
CODEC, _DECODER = BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"), Blosc()
_CACHED = 64  # chunks, 256 MB
_LONG = 1000  # entries of a run, on average, from which it is copied as a piece

Rows = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]


def damaged(path: Path, name: str, error: Exception) -> ValueError:
    """What is told of an array of a store that does not read."""
    return ValueError(f"{path}: {name} is damaged ({error}); delete it and run data_prep.build")


class CountReader:
    """Counts as CSR over the store's genes; the chunks that were read last are kept."""

    def __init__(self, path: Path, indptr: Rows) -> None:
        self.path, self.indptr = path, indptr
        self._chunks: dict[tuple[str, int], npt.NDArray[np.int32]] = {}  # newest last

    @functools.cached_property
    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    def _chunk(self, name: str, k: int) -> npt.NDArray[np.int32]:
        found = self._chunks.pop((name, k), None)
        if found is None:
            try:
                found = np.frombuffer(_DECODER.decode(self._archive.read(f"counts/{name}/c/{k}")), np.int32)
            except KeyError:
                found = np.zeros(CHUNK, np.int32)  # zarr does not store a chunk of zeros
            except (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError) as error:
                raise damaged(self.path, f"counts/{name}", error) from error
        self._chunks[name, k] = found
        if len(self._chunks) > _CACHED:
            del self._chunks[next(iter(self._chunks))]
        return found

    def scattered(self, rows: Rows) -> bool:
        """Whether the counts of some rows lie in so many chunks that a second look would read them again."""
        ends = np.concatenate([self.indptr[rows], self.indptr[rows + 1]])
        return 2 * len(np.unique(ends // CHUNK)) > _CACHED

    def read(self, rows: Rows) -> schema.CountBlock:
        """The counts of some rows, in their order.

        Raises:
            ValueError: a chunk is damaged.
        """
        starts, ends = self.indptr[rows], self.indptr[rows + 1]
        indptr = np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int64)
        gene, count = (np.empty(indptr[-1], np.int32) for _ in range(2))
        first = np.flatnonzero(np.diff(rows, prepend=-2) != 1)  # of each run of rows that follow each other
        if len(first) * _LONG < indptr[-1]:
            runs = np.stack([starts[first], np.append(ends[first[1:] - 1], ends[-1:]), indptr[first]], axis=1)
            self._copy(runs[np.argsort(runs[:, 0], kind="stable")], gene, count)
        else:
            self._gather(np.repeat(starts - indptr[:-1], ends - starts) + np.arange(indptr[-1]), gene, count)
        return schema.CountBlock(indptr, gene, count)

    def _copy(self, runs: Rows, gene: Ints, count: Ints) -> None:
        """Fill the counts of runs (start, end, place in the answer), by start, so that each chunk is come to once."""
        held, genes, counts = -1, gene, count
        for at, end, to in runs.tolist():
            while at < end:
                k, inside = divmod(at, CHUNK)
                if k != held:
                    held, genes, counts = k, self._chunk("gene", k), self._chunk("count", k)
                size = min(end - at, CHUNK - inside)
                gene[to : to + size] = genes[inside : inside + size]
                count[to : to + size] = counts[inside : inside + size]
                at, to = at + size, to + size

    def _gather(self, entries: Rows, gene: Ints, count: Ints) -> None:
        """The same for single entries, where runs are too short to be worth their while."""
        chunk = (entries // CHUNK).astype(np.int16)  # sorted by radix; 16 bits number 3e10 entries
        order = np.argsort(chunk, kind="stable")
        starts = np.flatnonzero(np.diff(chunk[order], prepend=-1))
        for part in np.split(order, starts[1:]) if len(order) else []:
            k = int(chunk[part[0]])
            inside = entries[part] - k * CHUNK
            gene[part], count[part] = self._chunk("gene", k)[inside], self._chunk("count", k)[inside]
