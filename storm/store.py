"""The slide store: everything known of one slide in one file, `<store>/<slide_id>.zarr.zip`.

In: a slide's facts, its tiles as JPEG bytes, its profiles. Out: random access to them. Zarr v3 in a stored (not
deflated) zip with fixed times, so that equal content gives equal bytes; written under a temporary name and renamed.

    attributes            SlideInfo
    tiles/jpeg            uint8 [bytes]       all tile JPEGs end to end, neighbours close (Morton order)
    tiles/offsets         int64 [T + 1]       tile i = jpeg[offsets[i]:offsets[i + 1]]
    tiles/crc32           uint32 [T]
    tiles/place           int32 [T, 2]        (row, col) on the slide's grid
    tiles/tissue          float32 [T]         share of the tile that is tissue
    profiles/...          ids, xy_um, footprint_um, footprint_kind   (schema.Profiles)
    counts/...            indptr, gene, count                        CSR over genes/
    genes/...             ids, symbols
"""

import dataclasses
import functools
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec
from zarr.storage import LocalStore, ZipStore

from storm import files, schema
from storm.genes import GeneTable

_JPEG_CHUNK_BYTES = 256 << 10  # a chunk is read whole: a few tiles, so that one tile costs little more than itself
_CACHED_CHUNKS = 8
_WRITE_BYTES = 32 * _JPEG_CHUNK_BYTES
_CACHED_CHUNKS = 64
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
    split: str  # train, val, test, or '' where the manifest leaves it to pack
    mpp: float
    mpp_source: str  # manifest, lattice or embedded
    width_px0: int
    height_px0: int
    tile_px: int
    tile_mpp: float
    alignment: list[list[float]]  # 3 x 3, measurement's own space -> level-0 px
    alignment_source: str
    residual_px0: float | None  # rms of the lattice fit, None without a lattice
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
    tissue: float


def morton(row: int, col: int) -> int:
    """Z-order number of a grid place: places with near numbers are near each other."""
    return sum(((row >> b & 1) << 1 | (col >> b & 1)) << 2 * b for b in range(20))


class _JpegArray:
    """Appends tile bytes to a growing zarr array, whole chunks at a time, so that memory stays bounded."""

    def __init__(self, group: zarr.Group) -> None:
        self.array = group.create_array("jpeg", shape=(0,), chunks=(_JPEG_CHUNK_BYTES,), dtype="uint8",
                                        compressors=None)  # fmt: skip
        self.pending = bytearray()
        self.written = 0

    def append(self, data: bytes) -> None:
        self.pending += data
        if len(self.pending) >= _WRITE_BYTES:
            self._write(_WRITE_BYTES)

    def finish(self) -> None:
        if self.pending:
            self._write(len(self.pending))

    def _write(self, size: int) -> None:
        self.array.resize((self.written + size,))
        self.array[self.written :] = np.frombuffer(bytes(self.pending[:size]), np.uint8)
        self.written += size
        del self.pending[:size]


def _put(group: zarr.Group, name: str, data: npt.NDArray) -> None:
    # A chunk never smaller than one row keeps empty arrays legal.
    chunks = (max(1, min(len(data), 1 << 20)), *data.shape[1:])
    array = group.create_array(name, shape=data.shape, chunks=chunks, dtype=data.dtype, compressors=ZstdCodec(level=3))
    array[...] = data


def _put_tiles(root: zarr.Group, tiles: Iterable[Tile]) -> None:
    group = root.create_group("tiles")
    jpeg = _JpegArray(group)
    offsets, crcs, places, tissue = [0], [], [], []
    for tile in tiles:
        jpeg.append(tile.jpeg)
        offsets.append(offsets[-1] + len(tile.jpeg))
        crcs.append(zlib.crc32(tile.jpeg))
        places.append((tile.row, tile.col))
        tissue.append(tile.tissue)
    jpeg.finish()
    _put(group, "offsets", np.array(offsets, np.int64))
    _put(group, "crc32", np.array(crcs, np.uint32))
    _put(group, "place", np.array(places, np.int32).reshape(-1, 2))
    _put(group, "tissue", np.array(tissue, np.float32))


def _put_profiles(root: zarr.Group, profiles: schema.Profiles, genes: GeneTable) -> None:
    group, counts, table = (root.create_group(name) for name in ("profiles", "counts", "genes"))
    _put(group, "ids", schema.pack_text(profiles.ids))
    for name in ("xy_um", "footprint_um", "footprint_kind"):
        _put(group, name, getattr(profiles, name))
    for name in ("indptr", "gene", "count"):
        _put(counts, name, getattr(profiles, name))
    _put(table, "ids", schema.pack_text(list(genes.ids)))
    _put(table, "symbols", schema.pack_text(list(genes.symbols)))


def _zip_folder(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _ZIP_TIME)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes())


def write(folder: Path, info: SlideInfo, tiles: Iterable[Tile], profiles: schema.Profiles, genes: GeneTable) -> Path:
    """Write one slide's store, complete or not at all; `tiles` are consumed once, best in Morton order.

    `info.facts` may grow while the tiles are consumed: it is written after them.

    Returns:
        The path of the store, `folder/<slide_id>.zarr.zip`.
    """
    target = folder / f"{schema.check_slide_id(info.slide_id)}{SUFFIX}"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".{info.slide_id}.*/"):  # of a write that was killed; ids hold no dot
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{info.slide_id}.", dir=folder) as scratch:
        root = zarr.create_group(LocalStore(scratch), zarr_format=3)
        _put_tiles(root, tiles)
        _put_profiles(root, profiles, genes)
        root.attrs.put(dataclasses.asdict(info))
        with files.replacing(target) as temporary:
            _zip_folder(Path(scratch), temporary)
    return target


class SlideStore:
    """One slide's store, open for reading."""

    def __init__(self, path: Path) -> None:
        """Open a store.

        Raises:
            ValueError: no store, a damaged one, or one of another schema version.
        """
        self.path = path
        if not path.is_file():
            raise ValueError(f"{path}: no such slide store; build it with python -m data_prep.build")
        try:
            self._root = zarr.open_group(ZipStore(path, mode="r"), mode="r")
        except (zipfile.BadZipFile, FileNotFoundError, KeyError) as error:
            raise ValueError(f"{path}: no complete slide store ({error}); delete it and run data_prep.build") from error
        attributes: dict[str, Any] = dict(self._root.attrs)
        if attributes.get("schema_version") != schema.SCHEMA_VERSION:
            raise ValueError(
                f"{path}: schema version {attributes.get('schema_version')}, this code reads "
                f"{schema.SCHEMA_VERSION}; rebuild it with data_prep.build"
            )
        self.info = SlideInfo(**attributes)
        self.place: npt.NDArray[np.int32] = self._array("tiles/place")  # [T, 2] (row, col)
        self.tissue: npt.NDArray[np.float32] = self._array("tiles/tissue")  # [T]
        self._offsets = self._array("tiles/offsets")
        self._crc32 = self._array("tiles/crc32")
        # zarr reads whole chunks, and the neighbours of a tile lie in the same one
        self._jpeg_chunk = functools.lru_cache(_CACHED_CHUNKS)(self._read_jpeg_chunk)
        self.tile_index = {(int(r), int(c)): i for i, (r, c) in enumerate(self.place)}

    def _array(self, name: str, span: slice = slice(None)) -> npt.NDArray:
        try:
            return np.asarray(self._root[name][span])  # type: ignore[index]
        except (zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{self.path}: {name} is damaged ({error}); delete it and run data_prep.build") from error

    def __len__(self) -> int:
        return len(self.place)

    def _read_jpeg_chunk(self, k: int) -> bytes:
        return self._array("tiles/jpeg", slice(k * _JPEG_CHUNK_BYTES, (k + 1) * _JPEG_CHUNK_BYTES)).tobytes()

    def tile_bytes(self, i: int) -> int:
        """Size of tile i's JPEG in bytes."""
        return int(self._offsets[i + 1] - self._offsets[i])

    def jpeg(self, i: int) -> bytes:
        """The JPEG bytes of tile i.

        Raises:
            ValueError: the bytes are not those that were written.
        """
        start, end = int(self._offsets[i]), int(self._offsets[i + 1])
        first = start // _JPEG_CHUNK_BYTES
        chunks = [self._jpeg_chunk(k) for k in range(first, -(-end // _JPEG_CHUNK_BYTES))]
        data = b"".join(chunks)[start - first * _JPEG_CHUNK_BYTES :][: end - start]
        if zlib.crc32(data) != int(self._crc32[i]):
            raise ValueError(f"{self.path}: tile {i} is damaged (crc32); delete the store and run data_prep.build")
        return data

    def genes(self) -> GeneTable:
        """The measured genes: the columns of the counts, and the panel."""
        ids, symbols = (schema.unpack_text(self._array(f"genes/{name}")) for name in ("ids", "symbols"))
        return GeneTable(tuple(ids), tuple(symbols))

    def profiles(self) -> schema.Profiles:
        """All profiles; `gene` indexes `genes()`."""
        places = {n: self._array(f"profiles/{n}") for n in ("xy_um", "footprint_um", "footprint_kind")}
        counts = {n: self._array(f"counts/{n}") for n in ("indptr", "gene", "count")}
        return schema.Profiles(ids=schema.unpack_text(self._array("profiles/ids")), **places, **counts)


def paths(folder: Path) -> list[Path]:
    """The stores in a folder, by name. Raises ValueError where there is none."""
    found = sorted(folder.glob(f"*{SUFFIX}"))
    if not found:
        raise ValueError(f"{folder}: holds no slide store (*{SUFFIX}); run python -m data_prep.build")
    return found
