"""Whether a shard set is whole: every byte against both its hashes, and every profile exactly once.

In: an open set. Out: per shard its faults and the profiles it holds; then the faults of the set as a whole. A byte is
read once: the shard's hash and those of its groups are taken on the way.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.check_store import READ_ERRORS
from data_prep.packing import manifest as describe
from storm import files, shards
from storm.index import INDEX, Index

_END = bytes(1024)  # of a tar
_AGAIN = "restore it or pack again"


@dataclass
class Checked:
    """What a shard holds: the names of its profiles per slide, as packed text, and its faults."""

    profiles: dict[str, bytes] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def check_shard(path: Path, entry: dict[str, Any], index: Index, number: int) -> Checked:
    """Read one shard against its entry in the manifest and its groups in the index.

    Raises:
        any of READ_ERRORS: it cannot be read at all.
    """
    found, whole = Checked(), hashlib.sha256()
    names: dict[str, list[bytes]] = {}
    at = 0
    with path.open("rb") as handle:
        for i in np.flatnonzero(index.shard == number).tolist():
            if index.offset[i] != at:
                found.faults.append(f"group {index.key(i)}: lies not where the one before it ends; {_AGAIN}")
                handle.seek(int(index.offset[i]))
            span = handle.read(int(index.size[i]))
            at = int(index.offset[i]) + len(span)
            whole.update(span)
            if xxhash.xxh3_128_digest(span) != index.xxh3[i].tobytes():
                fact = "truncated" if len(span) < index.size[i] else "damaged (xxh3)"
                found.faults.append(f"group {index.key(i)}: {fact}; {_AGAIN}")
                continue
            slide, own, fault = _group(span, index, i)
            names.setdefault(slide, []).append(own)
            if fault:
                found.faults.append(f"group {index.key(i)}: {fault}; {_AGAIN}")
        rest = handle.read()
    whole.update(rest)
    if rest != _END:
        found.faults.append(f"holds {len(rest)} bytes behind its last group, not the end of a tar; {_AGAIN}")
    if whole.hexdigest() != entry["sha256"]:
        found.faults.append(f"its sha256 is not that of the manifest; {_AGAIN}")
    found.profiles = {slide: b"\n".join(own) for slide, own in names.items()}
    return found


def _group(span: bytes, index: Index, i: int) -> tuple[str, bytes, str]:
    """(slide, names of its profiles as packed text, fault) of a group."""
    members = shards.members(span)
    with zipfile.ZipFile(io.BytesIO(members["profiles.npz"])) as archive:
        names = np.lib.format.read_array(io.BytesIO(archive.read("ids.npy")), allow_pickle=False).tobytes()
    count = names.count(b"\n") + 1 if names else 0
    tiles = sum(name.endswith(".jpg") for name in members)
    fault = ""
    if not span.startswith(f"{index.key(i)}.".encode()):
        fault = "the tar calls it otherwise"
    elif (count, tiles) != (index.profiles[i], index.tiles[i]):
        fault = f"holds {count} profiles and {tiles} tiles, the index tells {index.profiles[i]} and {index.tiles[i]}"
    return json.loads(members["meta.json"])["slide"], names, fault


def check_manifest(folder: Path) -> str:
    """What is wrong with a set's manifest, from which all other hashes come; '' where nothing is or it is not there.

    Raises:
        ValueError: it is no JSON.
    """
    path = folder / shards.MANIFEST
    if not path.is_file():
        return ""  # which ShardSet tells
    told = files.read_json(path)
    sound = isinstance(told, dict) and told.get("sha256") == describe.digest(told)
    return "" if sound else f"{path}: is not as it was packed (sha256); {_AGAIN}"


def check_card(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Faults of the dataset card."""
    path = folder / shards.CARD
    if not path.is_file():
        return [f"{path.name}: missing; {_AGAIN}"]
    same = files.sha256_file(path) == manifest["card_sha256"]
    return [] if same else [f"{path.name}: its sha256 is not that of the manifest; {_AGAIN}"]


@dataclass(frozen=True)
class CheckShard:
    """Checks shard `number` of a split; an object, so that it can be sent to a process."""

    folder: Path
    manifest: dict[str, Any]

    def __call__(self, item: tuple[str, int]) -> Checked:
        split, number = item
        entry = self.manifest["splits"][split]["shards"][number]
        path = self.folder / split / entry["name"]
        try:
            index = Index.load(self.folder / split / INDEX, self.manifest["splits"][split]["slides"])
            checked = check_shard(path, entry, index, number)
        except FileNotFoundError:
            checked = Checked(faults=[f"missing; {_AGAIN}"])
        except READ_ERRORS as error:
            checked = Checked(faults=[f"does not read ({' '.join(str(error).split())}); {_AGAIN}"])
        checked.faults = [f"{split}/{entry['name']}: {fault}" for fault in checked.faults]
        return checked


def check_profiles(manifest: dict[str, Any], checked: Iterable[Checked]) -> Iterator[str]:
    """Faults of slides whose profiles are not each in exactly one group, when every shard has been read."""
    found: dict[str, list[bytes]] = {}
    for one in checked:
        for slide, names in one.profiles.items():
            found.setdefault(slide, []).append(names)
    for slide in sorted(found.keys() - manifest["slides"].keys()):
        yield f"slide {slide}: is in the shards and not in the manifest; pack again"
    for slide, entry in sorted(manifest["slides"].items()):
        ids = b"\n".join(found[slide]).split(b"\n") if slide in found else []
        different = len(set(ids))
        if different != len(ids):
            yield f"slide {slide}: {len(ids) - different} profiles come more than once; pack again"
        if different != entry["profiles"]:
            yield f"slide {slide}: {different} of {entry['profiles']} profiles are there; pack again"
