"""Shards: plain WebDataset tars with an index and a manifest, written once, verified on every read.

In: groups with their keys. Out: `<shards>/<split>/000000.tar ...` and random access to any group of them.

    README.md             the dataset card: counts, licences, how it was made
    genes.tsv             the vocabulary: Ensembl id, symbol, share of counts on training donors
    manifest.json         schema version, gene hash, panels, geometry, per split: shards with sha256, counts
    <split>/index.npy     per group: where it lies, its hash, what it holds; see storm.index
    <split>/000000.tar    ustar, fixed owner, mode and time: rebuilt shards are byte-identical

While a set is written each shard has a sidecar, `000000.tar.json`, that tells that it is complete and what it holds;
at the end they become the index and the manifest.
"""

import collections
import functools
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from storm import files, schema
from storm.genes import GeneTable, unpack_panel
from storm.index import INDEX, ROW, VERSION, DamagedError, Index, Span

_BLOCK = 512


def _blank_header() -> bytes:
    """A tar header without name, size and sum (blank while it is taken): no owner, no time, mode 0644."""
    block = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
    return block[:148] + b" " * 8 + block[156:]


_HEADER = _blank_header()
_TAR = re.compile(r"\d{6,}\.tar")
MANIFEST, GENES, CARD = "manifest.json", "genes.tsv", "README.md"
FEATURES = "features"  # cached ones of the set's tiles lie beside it (storm.data.features)
# What a manifest and the entries in it must hold to be read; pack writes more.
_KEYS = (
    "gene_hash", "genes_sha256", "licenses", "organs", "panels", "prep", "reference", "slides", "split_by", "splits",
    "tile_mpp", "tile_px",
)  # fmt: skip
_SPLIT = ("groups", "index_sha256", "profiles", "shards", "slides", "tiles")
_SHARD, _SLIDE = ("bytes", "name", "sha256"), ("donor", "organ", "platform", "section", "study")
_REFERENCE = ("footprint_kind", "footprint_um", "panel", "platform", "slide_log_density")
_OPEN = 64  # tars that a process keeps open; a login shell's limit is often 1,024


def _header(name: str, size: int) -> bytes:
    """The header of a member, as tarfile makes it; by hand, because that takes ten times as long."""
    if len(name) > 100:
        raise ValueError(f"{name}: a member's name has at most 100 characters; shorten the slide's id")
    block = bytearray(_HEADER)
    block[: len(name)] = name.encode()
    block[124:135] = b"%011o" % size
    block[148:155] = b"%06o\0" % sum(block)
    return bytes(block)


def group_parts(key: str, group: schema.Group) -> list[bytes]:
    """A group's span of a tar in pieces: its members with their headers, whole blocks, without the mark of the end."""
    parts = []
    for name, data in schema.encode(group):
        parts += [_header(f"{key}.{name}", len(data)), data, bytes(-len(data) % _BLOCK)]
    return parts


def shard_name(number: int) -> str:
    """The file name of a split's shard."""
    return f"{number:06d}.tar"


def sidecar_path(folder: Path, number: int) -> Path:
    """Where a shard's sidecar lies."""
    return folder / f"{shard_name(number)}.json"


class ShardWriter:
    """A shard that grows group by group under another name, and then comes to its place with its sidecar."""

    def __init__(self, scratch: Path, number: int) -> None:
        self._path, self._number = scratch / shard_name(number), number
        self._whole = hashlib.sha256()
        self._groups: list[list[Any]] = []

    def add(self, key: str, group: schema.Group) -> None:
        """Append a group."""
        parts = group_parts(key, group)
        own, quick = hashlib.sha256(), xxhash.xxh3_128()
        for part in parts:
            own.update(part)
            quick.update(part)
            self._whole.update(part)
        with self._path.open("ab") as handle:  # not kept open: shards may be more than files may
            handle.writelines(parts)
        size = sum(map(len, parts))
        hashes = own.hexdigest(), quick.hexdigest()
        self._groups.append([key, size, *hashes, len(group.profiles), len(group.tiles)])

    def close(self, folder: Path) -> int:
        """Move the shard into its split's folder, and then write its sidecar; returns its bytes."""
        end = bytes(2 * _BLOCK)
        self._whole.update(end)
        with self._path.open("ab") as handle:
            handle.write(end)
            size = handle.tell()
        files.put(self._path, folder / shard_name(self._number))
        value = {"name": self._path.name, "bytes": size, "sha256": self._whole.hexdigest(), "groups": self._groups}
        files.write_json(sidecar_path(folder, self._number), value)
        return size


def read_sidecar(folder: Path, number: int) -> dict[str, Any] | None:
    """What a complete shard holds; None where it is absent, of another size, or its sidecar is no such file."""
    path, tar = sidecar_path(folder, number), folder / shard_name(number)
    try:
        found = files.read_json(path) if path.is_file() and tar.is_file() else None
        return found if found and found["bytes"] == tar.stat().st_size and found["name"] == tar.name else None
    except (ValueError, KeyError, TypeError):
        return None


def join_split(folder: Path, sidecars: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write a split's index from the sidecars of its shards, in their order.

    Returns:
        The split's entry for the manifest: shards with size and sha256, and the counts.
    """
    slides = sorted({group[0].rpartition("_")[0] for sidecar in sidecars for group in sidecar["groups"]})
    number_of = {name: number for number, name in enumerate(slides)}
    rows = np.zeros(sum(len(sidecar["groups"]) for sidecar in sidecars), ROW)
    at = 0
    for shard, sidecar in enumerate(sidecars):
        offset = 0
        for key, size, sha256, xxh3, profiles, tiles in sidecar["groups"]:
            slide, _, group = key.rpartition("_")
            hashes = (np.frombuffer(bytes.fromhex(text), np.uint8) for text in (sha256, xxh3))
            rows[at] = (offset, size, shard, profiles, tiles, number_of[slide], int(group), *hashes)
            offset, at = offset + size, at + 1
    index = Index(tuple(slides), None, *(rows[name] for name in ROW.names or ()))
    index.save(folder / INDEX)
    return {
        "shards": [{**{k: s[k] for k in ("name", "bytes", "sha256")}, "groups": len(s["groups"])} for s in sidecars],
        "groups": len(index), "profiles": int(index.profiles.sum()), "tiles": int(index.tiles.sum()),
        "slides": slides, "index_version": VERSION, "index_sha256": files.sha256_file(folder / INDEX),
    }  # fmt: skip


def _places(span: bytes) -> Iterator[tuple[str, int, int]]:
    """(name behind the key, start, end) of a group's members. By hand: tarfile takes about ten times as long."""
    at = 0
    while at + _BLOCK <= len(span):
        name = span[at : at + 100].rstrip(b"\0").decode()
        size = int(span[at + 124 : at + 136].rstrip(b"\0 "), 8)
        yield name.partition(".")[2], at + _BLOCK, at + _BLOCK + size
        at += _BLOCK + -(-size // _BLOCK) * _BLOCK


def members(span: bytes) -> dict[str, bytes]:
    """Name behind the key -> bytes."""
    return {name: span[start:end] for name, start, end in _places(span)}


def decode_span(span: bytes, source: str) -> schema.Group:
    """The group of `group_parts`. `source` names it in errors."""
    view = memoryview(span)  # no member is copied before it is decoded
    found = {name: view[a:b] for name, a, b in _places(span)}
    return schema.decode(found, source)


def check_span(data: bytes, span: Span, tar: str, foreign: bool = False) -> None:
    """Compare bytes with those that were packed.

    Args:
        tar: names the shard.
        foreign: they come from elsewhere, so by sha256; else by xxh3, which finds what a disk or a copy spoiled.

    Raises:
        DamagedError: they differ.
    """
    same = hashlib.sha256(data).digest() == span.sha256 if foreign else xxhash.xxh3_128_digest(data) == span.xxh3
    if not same:
        fact = "truncated" if len(data) < span.size else f"damaged ({'sha256' if foreign else 'xxh3'})"
        raise DamagedError(f"{tar}: group {span.key}: {fact}; restore the shard or pack again")


class Tars:
    """The tars of a split in a folder: one read per group, verified. The last ones read stay open."""

    def __init__(self, folder: Path, names: Sequence[str] | None = None, verify: bool = True) -> None:
        """`names` of the files where they are not those of a shard set; without `verify` no hash is compared."""
        self.folder, self.names, self.verify = folder, names, verify
        self._open: collections.OrderedDict[int, io.FileIO] = collections.OrderedDict()

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of groups.

        Raises:
            DamagedError: a shard is missing, truncated or damaged there (names shard and key).
        """
        return [self._read(span) for span in spans]

    def _read(self, span: Span) -> bytes:
        try:
            data = os.pread(self._file(span.shard).fileno(), span.size, span.offset)
        except FileNotFoundError:
            fact = "the shard is missing; restore it or pack again"
            raise DamagedError(f"{self.path(span.shard)}: group {span.key}: {fact}") from None
        except OSError as error:
            fact = f"does not read ({error.strerror}); look at its disk"
            raise DamagedError(f"{self.path(span.shard)}: group {span.key}: {fact}") from None
        if self.verify or len(data) != span.size:
            check_span(data, span, self.path(span.shard))
        return data

    def path(self, number: int) -> str:
        """Where a shard lies. Plain text: it is asked for with every group, and a Path takes as long as the read."""
        return f"{self.folder}/{self.names[number] if self.names else shard_name(number)}"

    def has(self, number: int) -> bool:
        """Whether a shard is there."""
        return number in self._open or os.path.isfile(self.path(number))

    def open(self, number: int) -> BinaryIO:
        """A shard from its beginning, to be copied."""
        return open(self.path(number), "rb")

    def _file(self, number: int) -> io.FileIO:
        if number not in self._open:
            self._open[number] = io.FileIO(self.path(number))
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]

    def __reduce__(self) -> tuple[Any, ...]:
        return Tars, (self.folder, self.names, self.verify)  # each process opens its own

    def __del__(self) -> None:
        for file in self._open.values():
            file.close()


def _check_keys(manifest: dict[str, Any], path: Path) -> None:
    """Raise ValueError where a manifest lacks a key, or holds what is no object or list where one belongs."""

    def check(value: Any, keys: Sequence[str], *place: str) -> None:
        lacking = [key for key in keys if not isinstance(value, dict) or key not in value]
        if lacking or not isinstance(value, dict):
            fact = f"lacks the key {'.'.join([*place, *lacking[:1]])}" if lacking else f"{'.'.join(place)} is no object"
            raise ValueError(f"{path}: {fact}; restore the file as pack wrote it, or pack again")

    check(manifest, _KEYS)
    check(manifest["reference"], _REFERENCE, "reference")
    check(manifest["prep"], ("spots_side",), "prep")
    for name, keys in (("slides", _SLIDE), ("panels", ("mask",)), ("splits", _SPLIT)):
        check(manifest[name], (), name)
        for key, entry in manifest[name].items():
            check(entry, keys, name, key)
    for split, entry in manifest["splits"].items():
        listed = entry["shards"] if isinstance(entry["shards"], list) else [None]
        for number, shard in enumerate(listed):
            check(shard, _SHARD, "splits", split, "shards", str(number))


class ShardSet:
    """A folder of shards, open for reading."""

    def __init__(self, folder: Path) -> None:
        """Open a shard set.

        Raises:
            ValueError: no manifest (pack writes it last), another schema version, a key that is missing, a split or
                shard that is named as pack names none, or genes that are missing or of another hash.
        """
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{path}: no shard manifest; name a shard set (in training data.shards=FOLDER), or run "
                             "python -m data_prep.pack to its end")  # fmt: skip
        self.manifest: dict[str, Any] = files.read_json(path)
        version = self.manifest.get("schema_version") if isinstance(self.manifest, dict) else None
        if version != schema.SCHEMA_VERSION:
            raise ValueError(f"{path}: schema version {version}, this code reads {schema.SCHEMA_VERSION}; pack again")
        _check_keys(self.manifest, path)
        for split, entry in self.manifest["splits"].items():
            if entry.get("index_version") != VERSION:
                raise ValueError(f"{path}: its index is of version {entry.get('index_version', 1)}, this code reads "
                                 f"{VERSION}; pack again (the stores stay as they are)")  # fmt: skip
            strange = [s["name"] for s in entry["shards"] if not _TAR.fullmatch(s["name"])]
            if split not in schema.SPLITS or strange:
                raise ValueError(f"{path}: names a {f'shard {strange[0]!r}' if strange else f'split {split!r}'}, "
                                 "which pack never writes; pack again")  # fmt: skip
        self.genes = self._genes(folder / GENES)
        self._tars: dict[str, Tars] = {}

    def _genes(self, path: Path) -> GeneTable:
        if not path.is_file():
            raise ValueError(f"{path}: no such gene table; the shard set is incomplete, restore it or pack again")
        if files.sha256_file(path) != self.manifest["genes_sha256"]:
            raise ValueError(f"{path}: not the table that was packed (sha256); pack again")
        table = GeneTable.read(path)
        if table.hash != self.manifest["gene_hash"]:
            raise ValueError(f"{path}: reads as other genes than were packed (gene_hash); pack again")
        return table

    @functools.cached_property
    def panels(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Panel id -> bool [G] over the vocabulary."""
        size = len(self.genes)
        return {name: unpack_panel(entry["mask"], size) for name, entry in self.manifest["panels"].items()}

    def index(self, split: str) -> Index:
        """The index of a split. Raises ValueError where the set has no such split, or its index was changed."""
        if split not in self.manifest["splits"]:
            raise ValueError(f"{self.folder}: has no split {split!r}; it has {sorted(self.manifest['splits'])}")
        path, entry = self.folder / split / INDEX, self.manifest["splits"][split]
        if path.is_file() and files.sha256_file(path) != entry["index_sha256"]:
            raise ValueError(f"{path}: not the index that was packed (sha256); pack again")
        return Index.load(path, entry["slides"])

    def read(self, split: str, index: Index, i: int) -> schema.Group:
        """Group i of a split, verified against its hash.

        Raises:
            DamagedError: the shard is missing, truncated or damaged there (names shard and key).
        """
        if split not in self._tars:
            self._tars[split] = Tars(self.folder / split)
        (data,) = self._tars[split].read([index.span(i)])
        return decode_span(data, f"{self.folder / split / shard_name(int(index.shard[i]))}: group {index.key(i)}")


def verify(folder: Path) -> list[str]:
    """Read every index and shard of a set against its sha256; one line per fault, none where all is well.

    Raises:
        ValueError: the set does not open (see ShardSet).
    """
    faults = []
    for split, entry in ShardSet(folder).manifest["splits"].items():
        digests = {INDEX: entry["index_sha256"]} | {shard["name"]: shard["sha256"] for shard in entry["shards"]}
        for name, sha256 in digests.items():
            path = folder / split / name
            if not path.is_file():
                faults.append(f"{path}: missing; restore it or pack again")
            elif files.sha256_file(path) != sha256:
                faults.append(f"{path}: its sha256 is not that of the manifest; restore it or pack again")
    return faults
