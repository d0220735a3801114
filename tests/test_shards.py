"""Shards: random access, verified; readable by plain webdataset; rebuilt byte for byte."""

import io
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from storm import files, schema, shards, store
from storm.index import INDEX, ROW, Index

SPLIT = "train"


@pytest.fixture
def shard_copy(tiny_shards: Path, tmp_path: Path) -> Path:
    """A shard set that a test may damage."""
    return Path(shutil.copytree(tiny_shards, tmp_path / "copy"))


def tar_of(folder: Path) -> Path:
    return folder / SPLIT / "000000.tar"


def test_every_group_is_read_and_the_counts_are_the_stores(tiny_shards: Path, tiny_store: Path) -> None:
    opened = shards.ShardSet(tiny_shards)
    seen: dict[str, list[str]] = {}
    for split in opened.manifest["splits"]:
        index = opened.index(split)
        for i in range(len(index)):
            group = opened.read(split, index, i)
            assert (len(group.profiles), len(group.tiles)) == (index.profiles[i], index.tiles[i])
            seen.setdefault(group.meta.slide, []).extend(group.profiles.ids)
    stores = {p.name.removesuffix(store.SUFFIX): store.SlideStore(p) for p in store.paths(tiny_store)}
    assert {s: sorted(ids) for s, ids in seen.items()} == {s: sorted(o.profiles().ids) for s, o in stores.items()}


def test_plain_webdataset_reads_the_shards(tiny_shards: Path) -> None:
    opened = shards.ShardSet(tiny_shards)
    index = opened.index(SPLIT)
    samples = list(webdataset.WebDataset(str(tar_of(tiny_shards)), shardshuffle=False).decode("rgb8"))
    assert [s["__key__"] for s in samples] == [index.key(i) for i in range(len(index))]
    for i, sample in enumerate(samples):
        group = opened.read(SPLIT, index, i)
        assert sample["meta.json"]["slide"] == group.meta.slide
        pixels = [value for name, value in sample.items() if name.endswith(".jpg")]
        assert len(pixels) == len(group.tiles) > 0
        assert all(p.shape == (group.meta.tile_px, group.meta.tile_px, 3) for p in pixels)
        np.testing.assert_array_equal(sample["profiles.npz"]["count"], group.profiles.count)


def test_members_carry_no_owner_and_no_time(tiny_shards: Path) -> None:
    with tarfile.open(tar_of(tiny_shards)) as tar:
        assert {(m.uid, m.gid, m.uname, m.gname, m.mtime, m.mode) for m in tar} == {(0, 0, "", "", 0, 0o644)}


def rewritten(tiny_shards: Path, folder: Path, per_shard: int) -> tuple[Index, dict[str, Any]]:
    """The groups of a split written again; (their index, the new split's entry)."""
    opened = shards.ShardSet(tiny_shards)
    index = opened.index(SPLIT)
    numbers = range(-(-len(index) // per_shard))
    for number in numbers:
        writer = shards.ShardWriter(folder, number)
        for i in range(number * per_shard, min(len(index), (number + 1) * per_shard)):
            writer.add(index.key(i), opened.read(SPLIT, index, i))
        writer.close(folder / SPLIT)
    sidecars = [found for n in numbers if (found := shards.read_sidecar(folder / SPLIT, n))]
    return index, shards.join_split(folder / SPLIT, sidecars)


def test_a_rewritten_split_is_byte_identical(tiny_shards: Path, tmp_path: Path) -> None:
    _, entry = rewritten(tiny_shards, tmp_path, 10_000)
    assert entry == shards.ShardSet(tiny_shards).manifest["splits"][SPLIT]
    assert tar_of(tmp_path).read_bytes() == tar_of(tiny_shards).read_bytes()


def test_small_shards_hold_the_same_groups(tiny_shards: Path, tmp_path: Path) -> None:
    index, entry = rewritten(tiny_shards, tmp_path, 1)
    assert [s["groups"] for s in entry["shards"]] == [1] * len(index)
    again = Index.load(tmp_path / SPLIT / INDEX, entry["slides"])
    assert (again.sha256 == index.sha256).all()
    assert [again.key(i) for i in range(len(again))] == [index.key(i) for i in range(len(index))]
    assert sorted(p.name for p in tmp_path.iterdir()) == [SPLIT]


def test_a_group_is_the_tar_that_the_library_would_write(tiny_shards: Path) -> None:
    opened = shards.ShardSet(tiny_shards)
    index = opened.index(SPLIT)
    group, buffer = opened.read(SPLIT, index, 0), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in schema.encode(group):
            entry = tarfile.TarInfo(f"{index.key(0)}.{name}")
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
        end = tar.offset
    assert b"".join(shards.group_parts(index.key(0), group)) == buffer.getvalue()[:end]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "000000.tar").unlink(),
        lambda folder: (folder / "000000.tar").open("ab").write(b"x"),
        lambda folder: (folder / "000000.tar.json").write_text("{"),
        lambda folder: (folder / "000000.tar.json").write_text("[]"),
        lambda folder: (folder / "000000.tar.json").write_text('{"bytes": 1}'),
    ],
)
def test_a_shard_is_complete_only_with_its_sidecar(tiny_shards: Path, tmp_path: Path, damage) -> None:
    rewritten(tiny_shards, tmp_path, 10_000)
    assert shards.read_sidecar(tmp_path / SPLIT, 0)
    damage(tmp_path / SPLIT)
    assert shards.read_sidecar(tmp_path / SPLIT, 0) is None


def test_a_truncated_tar_is_named(shard_copy: Path) -> None:
    data = tar_of(shard_copy).read_bytes()
    tar_of(shard_copy).write_bytes(data[: len(data) // 2])
    opened = shards.ShardSet(shard_copy)
    index = opened.index(SPLIT)
    last = int(np.argmax(index.offset))
    with pytest.raises(ValueError, match=rf"000000\.tar: group {index.key(last)}: truncated"):
        opened.read(SPLIT, index, last)
    assert [fault for fault in shards.verify(shard_copy) if "sha256" in fault] == shards.verify(shard_copy) != []


def test_a_flipped_byte_is_named(shard_copy: Path) -> None:
    data = bytearray(tar_of(shard_copy).read_bytes())
    data[600] ^= 1
    tar_of(shard_copy).write_bytes(data)
    opened = shards.ShardSet(shard_copy)
    index = opened.index(SPLIT)
    with pytest.raises(ValueError, match="damaged"):
        opened.read(SPLIT, index, int(np.argmin(index.offset)))


def test_missing_and_changed_files_are_named(shard_copy: Path) -> None:
    opened = shards.ShardSet(shard_copy)
    assert shards.verify(shard_copy) == []
    index = opened.index(SPLIT)
    tar_of(shard_copy).unlink()
    with pytest.raises(ValueError, match="the shard is missing"):
        opened.read(SPLIT, index, 0)
    with pytest.raises(ValueError, match="has no split 'val'"):
        opened.index("val")
    files.write_bytes(shard_copy / SPLIT / INDEX, schema.save_arrays({"shard": np.zeros(1)}))
    with pytest.raises(ValueError, match="not the index that was packed"):
        opened.index(SPLIT)
    with (shard_copy / shards.GENES).open("a") as handle:
        handle.write("X\tx\t0.1\n")
    with pytest.raises(ValueError, match="not the table that was packed"):
        shards.ShardSet(shard_copy)
    (shard_copy / shards.GENES).unlink()
    with pytest.raises(ValueError, match=r"genes\.tsv: no such gene table; .* pack again"):
        shards.ShardSet(shard_copy)
    (shard_copy / shards.MANIFEST).unlink()
    with pytest.raises(ValueError, match="no shard manifest"):
        shards.ShardSet(shard_copy)


def test_a_changed_index_is_a_fault(shard_copy: Path) -> None:
    with (shard_copy / SPLIT / INDEX).open("ab") as handle:
        handle.write(b"x")
    assert ["index.npy: its sha256" in fault for fault in shards.verify(shard_copy)] == [True]


@pytest.mark.parametrize("what", ["shard", "split"])
def test_names_that_leave_the_set_are_refused(shard_copy: Path, what: str) -> None:
    manifest = files.read_json(shard_copy / shards.MANIFEST)
    if what == "shard":
        manifest["splits"][SPLIT]["shards"][0]["name"] = "../../000000.tar"
    else:
        manifest["splits"][f"../{SPLIT}"] = manifest["splits"].pop(SPLIT)
    files.write_json(shard_copy / shards.MANIFEST, manifest)
    with pytest.raises(ValueError, match=rf"manifest\.json: names a {what} '\.\./.* which pack never writes"):
        shards.verify(shard_copy)


def _without(values: Any, *place: str) -> None:
    for part in place[:-1]:
        values = values[0] if isinstance(values, list) else next(iter(values.values())) if part == "*" else values[part]
    del values[place[-1]]


@pytest.mark.parametrize(
    "place",
    ["tile_px", "reference", "splits", "reference.panel", "prep.spots_side", "slides.*.study", "panels.*.mask",
     "splits.*.index_sha256", "splits.*.shards.*.name"],
)  # fmt: skip
def test_a_manifest_without_a_key_is_told_by_file_and_key(shard_copy: Path, place: str) -> None:
    path = shard_copy / shards.MANIFEST
    manifest = files.read_json(path)
    _without(manifest, *place.split("."))
    files.write_json(path, manifest)
    told = (
        re.escape(f"{path}: lacks the key ")
        + place.replace(".", r"\.").replace("*", r"\w+")
        + "; restore .* pack again"
    )
    with pytest.raises(ValueError, match=told):
        shards.ShardSet(shard_copy)


@pytest.mark.parametrize(
    ("change", "fact"),
    [({"splits": 7}, "splits is no object"), ({"slides": {"a": []}}, r"lacks the key slides\.a\.donor"),
     ({"splits": {"train": dict.fromkeys(("groups", "index_sha256", "profiles", "shards", "slides", "tiles"), 1)}},
      r"lacks the key splits\.train\.shards\.0\.bytes")],
)  # fmt: skip
def test_a_manifest_of_other_types_is_told_by_file_and_key(shard_copy: Path, change: dict[str, Any], fact: str) -> None:
    path = shard_copy / shards.MANIFEST
    files.write_json(path, files.read_json(path) | change)
    with pytest.raises(ValueError, match=rf"manifest\.json: {fact}; restore the file"):
        shards.ShardSet(shard_copy)


def test_genes_that_read_as_others_are_refused(shard_copy: Path) -> None:
    manifest = files.read_json(shard_copy / shards.MANIFEST)
    files.write_json(shard_copy / shards.MANIFEST, manifest | {"gene_hash": "0" * 64})
    with pytest.raises(ValueError, match=r"genes\.tsv: reads as other genes"):
        shards.ShardSet(shard_copy)


def test_a_manifest_that_is_a_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"manifest\.json: schema version None, this code reads"):
        shards.ShardSet(tmp_path)


def test_an_index_is_mapped_and_finds_its_keys(tiny_shards: Path) -> None:
    index = shards.ShardSet(tiny_shards).index(SPLIT)
    keys = [index.key(i) for i in range(len(index))]
    assert ROW.itemsize == 80 and not (index.offset.flags.owndata or index.offset.flags.writeable)
    assert [index.find(key) for key in keys] == list(range(len(index)))
    assert [index.find(key) for key in ("nobody_00000", f"{index.slides[0]}_99999", keys[0][:-1], "")] == [None] * 4


def test_a_set_with_an_older_index_is_refused_with_the_cure(shard_copy: Path) -> None:
    manifest = files.read_json(shard_copy / shards.MANIFEST)
    del manifest["splits"][SPLIT]["index_version"]
    files.write_json(shard_copy / shards.MANIFEST, manifest)
    with pytest.raises(ValueError, match=r"manifest\.json: its index is of version 1, .* pack again"):
        shards.ShardSet(shard_copy)


def test_few_tars_stay_open(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_OPEN", 2)
    index, entry = rewritten(tiny_shards, tmp_path, 1)
    again, tars = Index.load(tmp_path / SPLIT / INDEX, entry["slides"]), shards.Tars(tmp_path / SPLIT)
    for i in (0, 1, 2, 0):
        (span,) = tars.read([again.span(i)])
        assert len(span) == index.size[i]
    assert len(tars._open) == 2
