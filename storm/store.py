"""The slide store: everything known of one slide in one file, `<store>/<slide_id>.zarr.zip`.

In: a slide's facts, its tiles as JPEG bytes, its profiles. Out: random access to them. Zarr v3 in a stored (not
deflated) zip with fixed times, so that equal content gives equal bytes; written under a temporary name and renamed.

    attributes            SlideInfo
    tiles/jpeg            uint8 [bytes]       all tile JPEGs end to end, neighbours close (Morton order)
    tiles/offsets         int64 [T + 1]       tile i = jpeg[offsets[i]:offsets[i + 1]]
    tiles/crc32           uint32 [T]
    tiles/place           int32 [T, 2]        (row, col) on the slide's grid
    tiles/quality         float32 [T, Q]      columns as schema.TILE_QUALITY
    profiles/...          ids, xy_um, footprint_um, footprint_kind, polygon_indptr, polygon_um   (schema.Profiles)
    quality/...           per profile, as schema.PROFILE_QUALITY
    counts/...            indptr, gene, count                        CSR over genes/
    genes/...             ids, symbols, total (summed counts of each gene)
    overview/...          jpeg (a small picture of the slide), tissue (GeoJSON in level-0 px), both uint8
"""

import contextlib
import dataclasses
import functools
import os
import struct
import weakref
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec
from zarr.storage import LocalStore, ZipStore

from storm import files, schema
from storm.counts import CHUNK, CODEC, CountReader, damaged
from storm.genes import GeneTable

_JPEG_CHUNK_BYTES = 1 << 20
_PLACES = ("xy_um", "footprint_um", "footprint_kind", "polygon_indptr", "polygon_um")
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
SUFFIX = ".zarr.zip"


@dataclass(frozen=True)
class SlideInfo:
    """What is known of a slide besides its arrays. Lengths name their unit; `mpp` is that of level 0."""

    slide_id: str
    section: str
    donor: str
    study: str
    organ: str
    species: str
    platform: str  # of schema.PLATFORMS; 'unknown' for an image without a measurement
    kind: str  # of schema.KINDS: what its profiles are
    split: str  # train, val, test, or '' where the manifest leaves it to pack
    mpp: float
    mpp_source: str  # manifest, lattice, matrix or embedded
    width_px0: int  # of the image; without one of the frame that the profiles lie in
    height_px0: int
    tile_px: int
    tile_mpp: float
    alignment: list[list[float]]  # 3 x 3, measurement's own space -> level-0 px
    alignment_source: str
    residual_px0: float | None  # rms of the lattice fit, None without a lattice
    image: bool = True  # False: expression alone, no tiles
    license: str = ""
    use_terms: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # whitelisted slide properties, QC and mapping figures
    schema_version: int = schema.SCHEMA_VERSION

    @property
    def tile_um(self) -> float:
        """Side of a tile in um."""
        return self.tile_px * self.tile_mpp


@dataclass(frozen=True)
class Tile:
    """One encoded tile on its way into a store."""

    row: int
    col: int
    jpeg: bytes
    quality: Sequence[float]  # in the order of schema.TILE_QUALITY


def morton(row: int, col: int) -> int:
    """Z-order number of a grid place: places with near numbers are near each other."""
    return sum(((row >> b & 1) << 1 | (col >> b & 1)) << 2 * b for b in range(20))


class _Growing:
    """Appends to a growing zarr array, whole chunks at a time, so that memory stays bounded."""

    def __init__(self, group: zarr.Group, name: str, dtype: str, chunk: int, codec: BloscCodec | None) -> None:
        self.array = group.create_array(name, shape=(0,), chunks=(chunk,), dtype=dtype, compressors=codec)
        self.chunk = chunk
        self.pending: list[npt.NDArray] = []
        self.waiting = self.written = 0

    def append(self, data: npt.NDArray) -> None:
        self.pending.append(data)
        self.waiting += len(data)
        if self.waiting >= self.chunk:
            self._write(self.waiting - self.waiting % self.chunk)

    def finish(self) -> None:
        if self.waiting:
            self._write(self.waiting)

    def _write(self, size: int) -> None:
        data = np.concatenate(self.pending)
        self.array.resize((self.written + size,))
        self.array[self.written :] = data[:size]
        self.pending = [data[size:]]
        self.written += size
        self.waiting -= size


def _put(group: zarr.Group, name: str, data: npt.NDArray) -> None:
    # A chunk never smaller than one row keeps empty arrays legal.
    chunks = (max(1, min(len(data), CHUNK)), *data.shape[1:])
    array = group.create_array(name, shape=data.shape, chunks=chunks, dtype=data.dtype, compressors=CODEC)
    array[...] = data


def _zip_folder(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _ZIP_TIME)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes())


class Writer:
    """The parts of a store on their way into its file; tiles and counts are streamed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._root = zarr.create_group(LocalStore(folder), zarr_format=3)

    def put_tiles(self, tiles: Iterable[Tile]) -> None:
        """Write tiles, which are consumed once; best neighbours after each other."""
        group = self._root.create_group("tiles")
        jpeg = _Growing(group, "jpeg", "uint8", _JPEG_CHUNK_BYTES, None)
        offsets, crcs, places, quality = [0], [], [], []
        for tile in tiles:
            jpeg.append(np.frombuffer(tile.jpeg, np.uint8))
            offsets.append(offsets[-1] + len(tile.jpeg))
            crcs.append(zlib.crc32(tile.jpeg))
            places.append((tile.row, tile.col))
            quality.append(tile.quality)
        jpeg.finish()
        _put(group, "offsets", np.array(offsets, np.int64))
        _put(group, "crc32", np.array(crcs, np.uint32))
        _put(group, "place", np.array(places, np.int32).reshape(-1, 2))
        _put(group, "quality", np.array(quality, np.float32).reshape(-1, len(schema.TILE_QUALITY)))

    def put_counts(self, blocks: Iterable[schema.CountBlock], genes: GeneTable) -> tuple[npt.NDArray, npt.NDArray]:
        """Write the counts of all profiles, in blocks of consecutive ones, and their genes with the total of each.

        Returns:
            Depth [N] and number of genes [N] of each profile.
        """
        group, table = self._root.create_group("counts"), self._root.create_group("genes")
        columns = {name: _Growing(group, name, "int32", CHUNK, CODEC) for name in ("gene", "count")}
        total = np.zeros(len(genes), np.int64)
        depths, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for block in blocks:
            columns["gene"].append(block.gene.astype(np.int32, copy=False))
            columns["count"].append(block.count.astype(np.int32, copy=False))
            running = np.concatenate([[0], np.cumsum(block.count, dtype=np.int64)])
            depths.append(np.diff(running[block.indptr]))
            lengths.append(np.diff(block.indptr))
            total += np.bincount(block.gene, block.count, len(genes)).astype(np.int64)
        for column in columns.values():
            column.finish()
        length = np.concatenate(lengths)
        _put(group, "indptr", np.concatenate([[0], np.cumsum(length)]).astype(np.int64))
        _put(table, "ids", schema.pack_text(list(genes.ids)))
        _put(table, "symbols", schema.pack_text(list(genes.symbols)))
        _put(table, "total", total)
        return np.concatenate(depths), length

    def put_profiles(self, profiles: schema.Profiles, quality: dict[str, npt.NDArray]) -> None:
        """Write places and footprints (the counts are put_counts') and what is known of each profile's quality."""
        group, qc = self._root.create_group("profiles"), self._root.create_group("quality")
        _put(group, "ids", schema.pack_text(profiles.ids))
        for name in _PLACES:
            _put(group, name, getattr(profiles, name))
        for name, dtype in schema.PROFILE_QUALITY.items():
            _put(qc, name, quality[name].astype(dtype))

    def put_overview(self, jpeg: bytes, tissue_geojson: bytes) -> None:
        """Write a small picture of the slide, and its tissue as GeoJSON in level-0 px; empty without an image."""
        group = self._root.create_group("overview")
        _put(group, "jpeg", np.frombuffer(jpeg, np.uint8))
        _put(group, "tissue", np.frombuffer(tissue_geojson, np.uint8))

    def close(self, info: SlideInfo, target: Path) -> None:
        """Write the attributes and then everything into `target`, complete or not at all."""
        self._root.attrs.put(dataclasses.asdict(info))
        with files.replacing(target) as temporary:
            _zip_folder(self._folder, temporary)


@contextlib.contextmanager
def writing(folder: Path, slide_id: str) -> Iterator[Writer]:
    """A writer for one slide's store; whatever is not closed leaves nothing behind."""
    with files.scratch_folder(folder / schema.check_slide_id(slide_id)) as scratch:
        yield Writer(scratch)


def store_path(folder: Path, slide_id: str) -> Path:
    """Where a slide's store lies."""
    return folder / f"{schema.check_slide_id(slide_id)}{SUFFIX}"


def write(folder: Path, info: SlideInfo, tiles: Iterable[Tile], profiles: schema.Profiles, genes: GeneTable) -> Path:
    """Write one slide's store from what is in memory, complete or not at all; returns its path.

    `info.facts` may grow while the tiles are consumed: it is written after them.
    """
    target = store_path(folder, info.slide_id)
    n = len(profiles)
    with writing(folder, info.slide_id) as writer:
        writer.put_tiles(tiles)
        depth, found = writer.put_counts([schema.CountBlock(profiles.indptr, profiles.gene, profiles.count)], genes)
        quality = {name: np.zeros(n, dtype) for name, dtype in schema.PROFILE_QUALITY.items()}
        writer.put_profiles(profiles, quality | {"depth": depth, "genes": found, "in_tissue": np.full(n, -1)})
        writer.put_overview(b"", b"")
        writer.close(info, target)
    return target


class SlideStore:
    """One slide's store, open for reading."""

    def __init__(self, path: Path) -> None:
        """Open a store.

        Raises:
            ValueError: no store, a damaged one, or one of another schema version.
        """
        self.path = path
        if not (path.is_file() and path.name.endswith(SUFFIX)):  # another file is never called a broken store
            raise ValueError(f"{path}: no such slide store (*{SUFFIX}); name one, or build it with data_prep.build")
        try:
            self._root = zarr.open_group(ZipStore(path, mode="r"), mode="r")
        except (zipfile.BadZipFile, FileNotFoundError, KeyError) as error:
            raise ValueError(f"{path}: no complete slide store ({error}); delete it and run data_prep.build") from error
        attributes: dict[str, Any] = dict(self._root.attrs)
        if attributes.get("schema_version") != schema.SCHEMA_VERSION:
            raise ValueError(f"{path}: schema version {attributes.get('schema_version')}, this code reads "
                             f"{schema.SCHEMA_VERSION}; rebuild it with data_prep.build")  # fmt: skip
        try:
            self.info = SlideInfo(**attributes)
        except TypeError as error:
            raise ValueError(f"{path}: no sound slide store ({error}); delete it and run data_prep.build") from error
        self.place: npt.NDArray[np.int32] = self._array("tiles/place")  # [T, 2] (row, col)
        self._offsets = self._array("tiles/offsets")
        self.tile_index = {(int(r), int(c)): i for i, (r, c) in enumerate(self.place)}

    @functools.cached_property
    def tile_quality(self) -> npt.NDArray[np.float32]:
        """[T, Q] as schema.TILE_QUALITY."""
        return self._array("tiles/quality")

    @functools.cached_property
    def _crc32(self) -> npt.NDArray[np.uint32]:
        return self._array("tiles/crc32")

    @property
    def tissue(self) -> npt.NDArray[np.float32]:
        """[T] share of each tile that is tissue."""
        return self.tile_quality[:, schema.TILE_QUALITY.index("tissue")]

    def _array(self, name: str, span: slice = slice(None)) -> npt.NDArray:
        try:
            return np.asarray(self._root[name][span])  # type: ignore[index]
        except (zipfile.BadZipFile, zlib.error, RuntimeError) as error:
            raise damaged(self.path, name, error) from error

    def __len__(self) -> int:
        return len(self.place)

    def lengths(self) -> dict[str, int]:
        """Length of every array by its name, without reading any."""
        arrays = self._root.members(max_depth=None)
        return {name: int(array.shape[0]) for name, array in arrays if isinstance(array, zarr.Array)}

    @property
    def tile_bytes(self) -> npt.NDArray[np.int64]:
        """[T] size of each tile's JPEG."""
        return np.diff(self._offsets)

    @functools.cached_property
    def _jpeg_places(self) -> npt.NDArray[np.int64]:
        """Where each chunk of the JPEG bytes starts in the file: they are stored as they are, and zarr is slow here."""
        count = -(-int(self._offsets[-1]) // _JPEG_CHUNK_BYTES)
        with zipfile.ZipFile(self.path) as archive, self.path.open("rb") as handle:
            starts = []
            for k in range(count):
                entry = archive.getinfo(f"tiles/jpeg/c/{k}")
                handle.seek(entry.header_offset + 26)
                starts.append(entry.header_offset + 30 + sum(struct.unpack("<HH", handle.read(4))))
        return np.array(starts, np.int64)

    @functools.cached_property
    def _handle(self) -> int:
        handle = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, handle)
        return handle

    def jpeg(self, i: int) -> bytes:
        """The JPEG bytes of tile i.

        Raises:
            ValueError: the bytes are not those that were written.
        """
        at, end = int(self._offsets[i]), int(self._offsets[i + 1])
        parts = []
        while at < end:
            chunk, inside = divmod(at, _JPEG_CHUNK_BYTES)
            size = min(end - at, _JPEG_CHUNK_BYTES - inside)
            parts.append(os.pread(self._handle, size, int(self._jpeg_places[chunk]) + inside))
            at += size
        data = b"".join(parts)
        if zlib.crc32(data) != int(self._crc32[i]):
            raise ValueError(f"{self.path}: tile {i} is damaged (crc32); delete the store and run data_prep.build")
        return data

    def genes(self) -> GeneTable:
        """The measured genes: the columns of the counts, and the panel."""
        ids, symbols = (schema.unpack_text(self._array(f"genes/{name}")) for name in ("ids", "symbols"))
        return GeneTable(tuple(ids), tuple(symbols))

    def gene_totals(self) -> npt.NDArray[np.int64]:
        """[G] summed counts of each gene of `genes()`."""
        return self._array("genes/total")

    def genes_hash(self) -> str:
        """`genes().hash`, without making the list: the ids are stored as what it is taken of."""
        return files.sha256_of(self._array("genes/ids").tobytes())

    def places(self, bare: bool = False) -> schema.Profiles:
        """All profiles without their counts; `bare`: also without their names and the vertices of their polygons."""
        arrays = {name: self._array(f"profiles/{name}") for name in _PLACES[: len(_PLACES) - bare]}
        ids = [""] * len(arrays["xy_um"]) if bare else schema.unpack_text(self._array("profiles/ids"))
        none = np.zeros(0, np.int32)
        return schema.Profiles(ids=ids, indptr=np.zeros(len(ids) + 1, np.int64), gene=none, count=none, **arrays)

    def profiles(self) -> schema.Profiles:
        """All profiles; `gene` indexes `genes()`."""
        found = self.places()
        found.indptr, found.gene, found.count = (self._array(f"counts/{n}") for n in ("indptr", "gene", "count"))
        return found

    @functools.cached_property
    def indptr(self) -> npt.NDArray[np.int64]:
        """[N + 1] where each profile's counts start."""
        return self._array("counts/indptr")

    @functools.cached_property
    def _counts(self) -> CountReader:
        return CountReader(self.path, self.indptr)

    def scattered(self, rows: npt.NDArray[np.int64]) -> bool:
        """Whether the counts of some profiles lie in so many chunks that a second look would read them again."""
        return self._counts.scattered(rows)

    def counts(self, rows: npt.NDArray[np.int64]) -> schema.CountBlock:
        """The counts of some profiles, without reading those of all: best for rows that lie near each other."""
        return self._counts.read(rows)

    def quality(self) -> dict[str, npt.NDArray]:
        """Per profile, as schema.PROFILE_QUALITY."""
        return {name: self._array(f"quality/{name}") for name in schema.PROFILE_QUALITY}

    def log_density(self, places: schema.Profiles) -> float:
        """Mean over the profiles (`places()`, which may be bare) with counts of log(depth / footprint area in um2)."""
        return schema.slide_log_density(self._array("quality/depth"), places.area_um2)

    def overview(self) -> tuple[bytes, bytes]:
        """(JPEG of the whole slide, GeoJSON of its tissue in level-0 px), both empty without an image."""
        return self._array("overview/jpeg").tobytes(), self._array("overview/tissue").tobytes()


def paths(folder: Path) -> list[Path]:
    """The stores in a folder, by name. Raises ValueError where there is none."""
    found = sorted(folder.glob(f"*{SUFFIX}"))
    if not found:
        fact = "holds" if folder.is_dir() else "no such folder,"
        raise ValueError(f"{folder}: {fact} no slide store (*{SUFFIX}); run python -m data_prep.build")
    return found
