"""verify: what is whole has no fault; every kind of damage is named, with its cure, and nothing is changed."""

import dataclasses
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import records, verify
from data_prep.packing import manifest as describe
from storm import files, shards, store
from storm.index import INDEX, Index

SPLIT = "train"


@pytest.fixture
def stores(tiny_store: Path, tmp_path: Path) -> Path:
    """Stores that a test may damage."""
    return Path(shutil.copytree(tiny_store, tmp_path / "stores"))


@pytest.fixture
def packed(tiny_shards: Path, tmp_path: Path) -> Path:
    """A shard set that a test may damage."""
    return Path(shutil.copytree(tiny_shards, tmp_path / "set"))


def first(folder: Path) -> Path:
    return store.paths(folder)[0]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)


def member(path: Path, name: str) -> int:
    """Where the bytes of a zip's member begin."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(name)
    return entry.header_offset + 30 + len(name)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_is_whole_has_no_fault(
    tiny_store: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    for path, kind, count in ((tiny_store, "stores", 3), (first(tiny_store), "stores", 1), (tiny_shards, "shards", 2)):
        assert verify.main([str(path), "--workers", workers]) == 0
        last = capsys.readouterr().out.splitlines()[-1].split()
        assert (last[:2], last[-1]) == ([kind, str(count)], "0")


def test_other_paths_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, told in ((tmp_path, "is no slide store, no folder of them"), (tmp_path / "nowhere", "no such file or")):
        assert verify.main([str(path)]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda p: flip(p, member(p, "tiles/jpeg/c/0") + 99), r"tile 0 is damaged \(crc32\)"),
        (lambda p: flip(p, member(p, "counts/gene/c/0") + 9), r"counts/gene/c/0 is damaged \(crc32\)"),
        (lambda p: flip(p, member(p, "profiles/xy_um/c/0/0") + 9), r"profiles/xy_um/c/0/0 is damaged \(crc32\)"),
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), "does not read"),
        (lambda p: p.write_bytes(b""), "does not read"),
        (lambda p: p.write_bytes(b"plain text"), "does not read"),
    ],
)
def test_damaged_stores_are_named(stores: Path, damage: Callable[[Path], None], fault: str) -> None:
    path = first(stores)
    damage(path)
    before = path.read_bytes()
    found = verify.verify(stores).faults
    assert len(found) == 2
    assert found[0].startswith(f"{path.name}: ")
    assert re.search(fault, found[0])
    assert "its sha256 is not that of its record" in found[1]
    assert path.read_bytes() == before


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Change members of a store; its zip and its record are made to agree again."""
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    change(held)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in held.items():
            archive.writestr(name, data)
    slide_id = path.name.removesuffix(store.SUFFIX)
    records.write(
        path.parent,
        records.Record(slide_id, "built", bytes=path.stat().st_size, sha256=files.sha256_file(path)),
    )


def attributes(held: dict[str, bytes], **changes: object) -> None:
    values = json.loads(held["zarr.json"])
    values["attributes"] |= changes
    held["zarr.json"] = json.dumps(values).encode()


def shape(held: dict[str, bytes], name: str, size: int) -> None:
    values = json.loads(held[f"{name}/zarr.json"])
    values["shape"][0] = size
    held[f"{name}/zarr.json"] = json.dumps(values).encode()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda held: shape(held, "counts/count", 7), r"arrays of other lengths than the rest: counts/count \(7, not"),
        (
            lambda held: shape(held, "quality/depth", 7),
            r"arrays of other lengths than the rest: quality/depth \(7, not",
        ),
        (lambda held: attributes(held, facts={"profiles": 9999, "notes": []}), "tells of 9999 profiles and holds"),
        (lambda held: attributes(held, slide_id="another"), "holds slide another; give it its own name back"),
        (lambda held: attributes(held, schema_version=1), "schema version 1, this code reads"),
        (lambda held: attributes(held, strange=1), "does not read"),
        (lambda held: held.pop("tiles/crc32/zarr.json"), "does not read"),
    ],
)
def test_stores_that_contradict_themselves(
    stores: Path, change: Callable[[dict[str, bytes]], None], fault: str
) -> None:
    rewrite(first(stores), change)
    (found,) = verify.verify(stores).faults
    assert re.search(fault, found)


def test_stores_and_records_belong_together(stores: Path) -> None:
    a, b, c = (path.name.removesuffix(store.SUFFIX) for path in store.paths(stores))
    records.record_path(stores, a).unlink()
    store.store_path(stores, b).unlink()
    records.write(stores, records.Record(c, "failed", "its image is cut short; restore it"))
    assert verify.verify(stores).faults == [
        f"{a}{store.SUFFIX}: has no record, its build did not end; run data_prep.build",
        f"{b}: has a record and no store; run data_prep.build",
        f"{c}: failed to build: its image is cut short; restore it",
    ]


def test_each_fault_is_told_once(stores: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, _ = store.paths(stores)
    a.write_bytes(b"plain text")
    b.unlink()
    tar_of(packed).unlink()
    (packed / "test" / INDEX).write_bytes(b"x")
    for folder, count in ((stores, 3), (packed, 2)):
        faults = verify.verify(folder).faults
        capsys.readouterr()
        assert verify.main([str(folder)]) == 1
        told = capsys.readouterr().out
        assert [told.count(fault) for fault in faults] == [1] * count
        assert told.splitlines()[-1].split()[-1] == str(count)


def test_a_store_of_another_build_than_its_record(stores: Path) -> None:
    a, b, _ = store.paths(stores)
    shutil.copy(b, a)
    found = verify.verify(a).faults
    assert len(found) == 2
    assert "its sha256 is not that of its record; delete it and run data_prep.build" in found[1]


def test_what_builds_left_is_listed_with_age_and_owner(stores: Path) -> None:
    live = files.temporary(stores / "a.zarr.zip")
    live.write_bytes(b"")
    dead = stores / live.name.replace(f".{os.getpid()}.", ".999999999.")
    dead.mkdir()
    os.utime(dead, (0, 0))
    verdict = verify.verify(stores)
    (fault,) = verdict.faults
    assert fault.startswith(f"{dead.name}: left ")
    assert f"hours ago by process 999999999 of host {os.uname().nodename}, which is gone" in fault
    (note,) = verdict.notes
    assert note.startswith(f"{live.name}: left 0.0 hours ago by process {os.getpid()} of host")
    assert dead.exists() and live.exists()


def tar_of(folder: Path) -> Path:
    return folder / SPLIT / "000000.tar"


@pytest.mark.parametrize(
    ("damage", "faults"),
    [
        (lambda f: flip(tar_of(f), 600), ["damaged (xxh3); restore", "its sha256 is not that of the manifest"]),
        (lambda f: tar_of(f).write_bytes(tar_of(f).read_bytes()[:5000]),
         ["truncated; restore", "not the end of a tar", "its sha256 is not"]),
        (lambda f: tar_of(f).write_bytes(tar_of(f).read_bytes() + b"more"), ["1028 bytes behind its", "sha256"]),
        (lambda f: tar_of(f).unlink(), [f"{SPLIT}/000000.tar: missing; restore it or pack again"]),
        (lambda f: flip(f / SPLIT / INDEX, 200), ["index.npy: not the index that was packed"]),
    ],
)  # fmt: skip
def test_damaged_shards_are_named(packed: Path, damage: Callable[[Path], None], faults: list[str]) -> None:
    damage(packed)
    found = verify.verify(packed).faults
    for part in faults:
        assert any(part in fault for fault in found), found


def sign(packed: Path, manifest: dict[str, Any]) -> None:
    """Write a changed manifest with the hash that fits it."""
    files.write_json(packed / shards.MANIFEST, manifest | {"sha256": describe.digest(manifest)})


def repack(packed: Path, change: Callable[[list], None]) -> None:
    """Write the groups of a split again, changed, with hashes that hold."""
    opened = shards.ShardSet(packed)
    index = opened.index(SPLIT)
    groups = [(index.key(i), opened.read(SPLIT, index, i)) for i in range(len(index))]
    change(groups)
    writer = shards.ShardWriter(packed / "scratch", 0)
    (packed / "scratch").mkdir()
    for key, group in groups:
        writer.add(key, group)
    writer.close(packed / SPLIT)
    sidecar = shards.read_sidecar(packed / SPLIT, 0)
    assert sidecar
    opened.manifest["splits"][SPLIT] = shards.join_split(packed / SPLIT, [sidecar])
    shards.sidecar_path(packed / SPLIT, 0).unlink()
    (packed / "scratch").rmdir()
    sign(packed, opened.manifest)


def lose_a_profile(groups: list) -> None:
    group = groups[0][1]
    group.profiles, group.region = group.profiles.take(np.arange(1, len(group.profiles))), group.region[1:]


def rename_slide(groups: list) -> None:
    group = groups[0][1]
    groups[0] = (groups[0][0], dataclasses.replace(group, meta=dataclasses.replace(group.meta, slide="stranger")))


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        (lambda groups: groups.append(("copy_00000", groups[0][1])), ["profiles come more than once; pack again"]),
        (lambda groups: groups.pop(), ["profiles are there; pack again"]),
        (lose_a_profile, ["profiles are there; pack again"]),
        (rename_slide, ["slide stranger: is in the shards and not in the manifest", "profiles are there"]),
    ],
)
def test_every_profile_is_there_once(packed: Path, change: Callable[[list], None], faults: list[str]) -> None:
    repack(packed, change)
    found = verify.verify(packed).faults
    assert [part in fault for part, fault in zip(faults, found, strict=True)] == [True] * len(faults)


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("profiles", lambda a: a + 1, "the index tells"),
        ("tiles", lambda a: a + 1, "the index tells"),
        ("offset", lambda a: a + 512, "lies not where the one before it ends"),
        ("group", lambda a: a + 1, "the tar calls it otherwise"),
    ],
)
def test_an_index_against_its_tars(packed: Path, name: str, change: Callable, fault: str) -> None:
    path = packed / SPLIT / INDEX
    manifest = files.read_json(packed / shards.MANIFEST)
    index = Index.load(path, manifest["splits"][SPLIT]["slides"])
    object.__setattr__(index, name, change(getattr(index, name)))
    index.save(path)
    manifest["splits"][SPLIT]["index_sha256"] = files.sha256_file(path)
    sign(packed, manifest)
    assert fault in verify.verify(packed).faults[0]


@pytest.mark.parametrize(
    "change",
    [lambda m: next(iter(m["slides"].values())).update(donor="someone else"), lambda m: m["prep"].update(seed=9),
     lambda m: m.update(splits=7), lambda m: m["splits"][SPLIT].update(shards="x"), lambda m: m.pop("sha256")],
    ids=["donor", "config", "splits", "shards", "hash"],
)  # fmt: skip
def test_a_manifest_that_was_changed_is_a_fault(
    packed: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict], Any]
) -> None:
    manifest = files.read_json(packed / shards.MANIFEST)
    change(manifest)
    files.write_json(packed / shards.MANIFEST, manifest)
    assert verify.main([str(packed)]) == 1
    assert "manifest.json: is not as it was packed (sha256); restore it or pack again" in capsys.readouterr().out


@pytest.mark.parametrize(("data", "fault"), [(b"# nothing", "its sha256 is not that of"), (None, "missing")])
def test_a_card_that_was_changed_is_a_fault(packed: Path, data: bytes | None, fault: str) -> None:
    (packed / shards.CARD).unlink()
    if data:
        (packed / shards.CARD).write_bytes(data)
    (found,) = verify.verify(packed).faults
    assert found.startswith(f"README.md: {fault}")


def test_what_is_no_part_of_a_set_is_noted(packed: Path) -> None:
    (packed / "thesis.txt").write_text("mine")
    (packed.parent / ".set.0123456789abcdef.packing").mkdir()
    (packed.parent / ".other.0123456789abcdef.packing").mkdir()
    verdict = verify.verify(packed)
    assert verdict.faults == []
    assert verdict.notes == [
        "thesis.txt: is no part of the set",
        ".set.0123456789abcdef.packing: a pack of this set that did not end",
    ]
