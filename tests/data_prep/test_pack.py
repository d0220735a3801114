"""pack: splits that keep donors whole, groups that lose nothing, the same bytes twice, a manifest that says it all."""

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import pack, records
from data_prep.packing import groups, plan, write
from storm import files, genes, regions, schema, shards, store
from storm.config import load
from storm.prep_config import PrepConfig
from tests.conftest import PREP_TINY
from tests.data_prep.vendors import write_manifest

CONFIG = load(PrepConfig, PREP_TINY)
INFO = store.SlideInfo(
    slide_id="s", section="s", donor="d", study="t", organ="skin", species="human", platform="visium", kind="spot",
    split="", mpp=0.5, mpp_source="manifest", width_px0=2000, height_px0=2000, tile_px=112, tile_mpp=1.0,
    alignment=np.eye(3).tolist(), alignment_source="", residual_px0=None,
)  # fmt: skip


def info(slide_id: str, donor: str, split: str = "", section: str = "") -> store.SlideInfo:
    return dataclasses.replace(INFO, slide_id=slide_id, donor=donor, split=split, section=section or slide_id)


def groups_of(folder: Path) -> list[tuple[str, str, schema.Group]]:
    """(split, key, group) of a whole shard set."""
    opened = shards.ShardSet(folder)
    found = []
    for split in opened.manifest["splits"]:
        index = opened.index(split)
        found += [(split, index.key(i), opened.read(split, index, i)) for i in range(len(index))]
    return found


def write_store(
    folder: Path, what: store.SlideInfo, n: int, genes_: tuple[str, ...] = ("G1", "G2", "G3"), tiles: int | None = None
) -> None:
    """A store of n profiles on a line of tiles, one tile each (or only so many tiles)."""
    rng = np.random.default_rng(n)
    counts = rng.integers(1, 5, (n, len(genes_)))
    profiles = schema.Profiles(
        [f"p{i}" for i in range(n)], np.array([[112.0 * i + 56, 56.0] for i in range(n)]).reshape(n, 2),
        np.full(n, 55, np.float32), np.zeros(n, np.uint8), np.arange(n + 1, dtype=np.int64) * len(genes_),
        np.tile(np.arange(len(genes_), dtype=np.int32), n), counts.reshape(-1).astype(np.int32),
    )  # fmt: skip
    made = [store.Tile(0, i, bytes([i % 256]) * 50, [1.0] * 7) for i in range(n if tiles is None else tiles)]
    what = dataclasses.replace(what, facts={"profiles": n, "notes": []})
    store.write(folder, what, made, profiles, genes.GeneTable(genes_, genes_))


def test_each_profile_is_in_exactly_one_group_with_its_own_counts(tiny_shards: Path, tiny_store: Path) -> None:
    table = shards.ShardSet(tiny_shards).genes
    seen: dict[tuple[str, str], dict[str, int]] = {}
    for _, _, group in groups_of(tiny_shards):
        p = group.profiles
        for i, name in enumerate(p.ids):
            assert (group.meta.slide, name) not in seen
            span = slice(p.indptr[i], p.indptr[i + 1])
            assert (np.diff(p.gene[span]) > 0).all()
            seen[group.meta.slide, name] = {
                table.ids[g]: c for g, c in zip(p.gene[span], p.count[span].tolist(), strict=True)
            }
    for path in store.paths(tiny_store):
        opened = store.SlideStore(path)
        own, p = opened.genes(), opened.profiles()
        for i, name in enumerate(p.ids):
            span = slice(p.indptr[i], p.indptr[i + 1])
            counts = {own.ids[g]: c for g, c in zip(p.gene[span], p.count[span].tolist(), strict=True)}
            assert seen.pop((opened.info.slide_id, name)) == counts
    assert not seen


def test_groups_are_bounded_and_hold_the_tiles_their_profiles_read(tiny_shards: Path, tiny_store: Path) -> None:
    sizes: dict[str, list[int]] = {}
    for split, key, group in groups_of(tiny_shards):
        assert key.startswith(f"{group.meta.slide}_")
        assert split == shards.ShardSet(tiny_shards).manifest["slides"][group.meta.slide]["split"]
        opened = store.SlideStore(tiny_store / f"{group.meta.slide}{store.SUFFIX}")
        tile_um = group.meta.tile_um
        sizes.setdefault(group.meta.slide, []).append(len(group.profiles))
        for xy, g in zip(group.profiles.xy_um, group.region, strict=True):
            region = group.meta.regions[g]
            col, row = ((xy - region.origin_um) // tile_um).astype(int)
            assert 0 <= row < region.rows
            assert 0 <= col < region.cols
            assert (int(g), int(row), int(col)) in group.tiles
        for (g, row, col), data in group.tiles.items():
            x_um, y_um = group.meta.regions[g].origin_um
            place = (row + round(y_um / tile_um), col + round(x_um / tile_um))
            assert data == opened.jpeg(opened.tile_index[place])
    for numbers in sizes.values():
        assert len(numbers) == 1 or min(numbers) >= CONFIG.min_profiles


def test_groups_of_slides_are_mixed(tmp_path: Path) -> None:
    for i in range(3):
        write_store(tmp_path / "stores", info(f"s{i}", f"d{i}"), 120)
    words = ["--store", str(tmp_path / "stores"), "--out", str(tmp_path / "out"), "--config", str(PREP_TINY)]
    assert pack.main([*words, "min_profiles=6"]) == 0
    slides = [group.meta.slide for _, _, group in groups_of(tmp_path / "out")]
    changes = sum(a != b for a, b in itertools.pairwise(slides))
    assert len(slides) >= 45
    assert changes > len(slides) / 3  # in the order of slides there would be 2


def test_two_packs_are_byte_identical_and_the_seed_matters(tiny_shards: Path, tiny_store: Path, tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, str]:
        return {str(p.relative_to(folder)): files.sha256_file(p) for p in folder.rglob("*") if p.is_file()}

    words = ["--store", str(tiny_store), "--config", str(PREP_TINY)]
    assert pack.main([*words, "--out", str(tmp_path / "again")]) == 0
    assert content(tmp_path / "again") == content(tiny_shards)
    assert pack.main([*words, "--out", str(tmp_path / "other"), "seed=1"]) == 0
    assert content(tmp_path / "other")["train/000000.tar"] != content(tiny_shards)["train/000000.tar"]


def test_a_rerun_does_nothing_until_something_changed(
    tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--store", str(tiny_store), "--out", str(out), "--config", str(PREP_TINY)]

    def ran(*more: str) -> bool:
        capsys.readouterr()
        assert pack.main([*words, *more]) == 0
        return "current, nothing to do" not in capsys.readouterr().out

    assert ran()
    before = (out / "manifest.json").stat().st_mtime_ns
    assert not ran()
    assert (out / "manifest.json").stat().st_mtime_ns == before
    assert ran("min_profiles=20")
    assert not ran("min_profiles=20")
    tar = out / "train" / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    assert ran("min_profiles=20")
    assert shards.verify(out) == []


def flip_bytes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[600:604] = bytes(b ^ 1 for b in data[600:604])
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train/index.npy", lambda p: p.write_bytes(p.read_bytes() + b"x")),
        ("train/000000.tar", flip_bytes),
        ("genes.tsv", Path.unlink),
        ("manifest.json", lambda p: p.write_text("{")),
    ],
)
def test_packing_again_repairs(tiny_shards: Path, tiny_store: Path, tmp_path: Path, name: str, damage) -> None:
    out = Path(shutil.copytree(tiny_shards, tmp_path / "out"))
    damage(out / name)
    pack.pack(tiny_store, out, CONFIG)
    assert shards.verify(out) == []
    assert (out / name).read_bytes() == (tiny_shards / name).read_bytes()


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_pack_that_ends_early_leaves_the_old_set_and_is_gone_on_with(
    tiny_store: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    out = tmp_path / "out"
    pack.pack(tiny_store, out, CONFIG.model_copy(update={"seed": 5}))
    before = content(out)
    written: list[object] = []

    def stop(kind: object, name: str) -> None:
        own = getattr(kind, name)

        def counted(*args: object) -> object:
            written.append(args)
            if len(written) == last:
                raise KeyboardInterrupt
            return own(*args)

        monkeypatch.setattr(kind, name, counted)

    stop(shards.ShardWriter, "close")  # the first shard, the second; and then the end
    stop(files, "install_folder")
    with pytest.raises(KeyboardInterrupt):
        pack.pack(tiny_store, out, CONFIG)
    assert content(out) == before
    monkeypatch.undo()
    close, closed = shards.ShardWriter.close, list[Path]()

    def counted(writer: shards.ShardWriter, folder: Path) -> int:
        closed.append(folder)
        return close(writer, folder)

    monkeypatch.setattr(shards.ShardWriter, "close", counted)
    pack.pack(tiny_store, out, CONFIG)
    assert len(closed) == 3 - last  # what was written is not written again
    assert content(out) == content(tiny_shards)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_other_things_is_not_replaced(tiny_store: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'thesis\.txt', which is no part of a shard set"):
        pack.pack(tiny_store, tmp_path, CONFIG)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_cached_features_stay_beside_a_current_set_and_are_not_replaced_with_it(
    tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pack.pack(tiny_store, tmp_path / "out", CONFIG)
    (tmp_path / "out" / "features" / "key").mkdir(parents=True)
    pack.pack(tiny_store, tmp_path / "out", CONFIG)
    assert "current, nothing to do" in capsys.readouterr().out
    other = CONFIG.model_copy(update={"seed": 1})
    with pytest.raises(ValueError, match="out/features: cached features of the shards that packing would replace"):
        pack.pack(tiny_store, tmp_path / "out", other)
    assert (tmp_path / "out" / "features" / "key").is_dir()


def test_the_shard_manifest(tiny_shards: Path, tiny_store: Path) -> None:
    opened = shards.ShardSet(tiny_shards)
    manifest = opened.manifest
    assert manifest["prep"] == CONFIG.model_dump()
    assert (manifest["appended_to"], manifest["genes_left_out"]) == ([], 0)
    assert (manifest["tile_px"], manifest["split_by"], manifest["seed"]) == (112, "donor", 0)
    assert manifest["gene_hash"] == opened.genes.hash
    assert opened.genes.share is not None
    assert opened.genes.share.min() > 0
    assert opened.genes.share.sum() == pytest.approx(1)
    for slide_id, entry in manifest["slides"].items():
        path = tiny_store / f"{slide_id}{store.SUFFIX}"
        assert entry["store_sha256"] == files.sha256_file(path)
        own = store.SlideStore(path).genes()
        assert {opened.genes.ids[g] for g in np.flatnonzero(opened.panels[entry["panel"]])} == set(own.ids)
    reference = genes.unpack_panel(manifest["reference"]["panel"], len(opened.genes))
    train = [opened.panels[e["panel"]] for e in manifest["slides"].values() if e["split"] == "train"]
    np.testing.assert_array_equal(reference, np.any(train, axis=0))
    assert manifest["reference"]["platform"] in manifest["platforms"]
    assert sum(study["profiles"] for study in manifest["licenses"].values()) == sum(
        entry["profiles"] for entry in manifest["splits"].values()
    )


def test_a_donor_in_two_splits_needs_split_by_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path / "stores", info("a", "d1", "train"), 12)
    write_store(tmp_path / "stores", info("b", "d1", "test"), 12)
    words = ["--store", str(tmp_path / "stores"), "--out", str(tmp_path / "out"), "--config", str(PREP_TINY)]
    assert pack.main(words) == 2
    assert "donor 'd1' of study 't' is in two splits: slide a in train, slide b in test" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert pack.main([*words, "split_by=section"]) == 0
    assert "SPLIT BY SECTION" in capsys.readouterr().out
    assert shards.ShardSet(tmp_path / "out").manifest["split_by"] == "section"


def test_wrong_tiles_no_training_slide_and_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = tmp_path / "stores"
    write_store(stores, info("a", "d1", "test"), 12)
    words = ["--store", str(stores), "--out", str(tmp_path / "out")]
    assert pack.main(words) == 2
    assert "tiles of 112 px at 1.0 um, the config says 224 px" in capsys.readouterr().err
    assert pack.main([*words, "--config", str(PREP_TINY)]) == 2
    assert "no slide with profiles is in split train" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nowhere: no such folder; name the one that"):
        pack.pack(tmp_path / "nowhere", tmp_path / "out", CONFIG)


def test_missing_slides_are_refused_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = tmp_path / "stores"
    for i, name in enumerate("abcd"):
        write_store(stores, info(name, f"d{i}"), 12)
        path = store.store_path(stores, name)
        records.write(stores, records.Record(name, "built", bytes=path.stat().st_size, sha256=files.sha256_file(path)))
    records.write(stores, records.Record("c", "failed", "c.tif: its slide is damaged; restore it"))
    store.store_path(stores, "d").write_bytes(b"cut")
    rows = [
        {"slide_id": name, "image": f"{name}.tif", "platform": "image", "donor": f"d{i}", "study": "t"}
        for i, name in enumerate("abcde")
    ]
    write_manifest(tmp_path / "manifest.csv", rows)
    words = ["--store", str(stores), "--out", str(tmp_path / "out"), "--config", str(PREP_TINY)]
    words += ["--manifest", str(tmp_path / "manifest.csv")]
    assert pack.main(words) == 2
    told = capsys.readouterr().err
    assert "3 slides are missing; build them (data_prep.plan tells what stops them), or" in told
    assert told.endswith(
        "pack without them by --allow-missing:\n  c: failed: c.tif: its slide is damaged; restore it\n"
        "  d: its store is damaged: not of the size that was built\n  e: not built\n"
    )
    assert pack.main([*words, "--allow-missing"]) == 0
    assert capsys.readouterr().out.startswith(
        "3 slides are missing and left out:\n  c: failed: c.tif: its slide is damaged; restore it\n"
        "  d: its store is damaged: not of the size that was built\n  e: not built\n"
    )
    manifest = shards.ShardSet(tmp_path / "out").manifest
    assert set(manifest["slides"]) == {"a", "b"}
    assert manifest["left_out"] == {"missing": 3, "without_profiles": 0}
    store.store_path(stores, "d").unlink()
    assert pack.main([*words, "--allow-missing", "--task", "0", "--tasks", "2"]) == 0
    told = capsys.readouterr().out
    assert "current, nothing to do" in told and "left out" not in told  # the log of --plan has it
    assert pack.main([*words, "--allow-missing", "--plan"]) == 0
    assert "\n  d: its store is gone\n" in capsys.readouterr().out


def test_slides_without_an_image_are_packed(tmp_path: Path) -> None:
    what = dataclasses.replace(info("e", "d1"), image=False)
    write_store(tmp_path / "stores", what, 80, tiles=0)
    pack.pack(tmp_path / "stores", tmp_path / "out", CONFIG)
    found = groups_of(tmp_path / "out")
    assert sum(len(group.profiles) for _, _, group in found) == 80
    assert all(not group.tiles for _, _, group in found)


def test_counts_bound_the_size_of_a_sample(tmp_path: Path) -> None:
    write_store(tmp_path, dataclasses.replace(info("a", "d1"), platform="xenium"), 300)
    opened = store.SlideStore(tmp_path / "a.zarr.zip")
    places = opened.places()
    places.xy_um[:] = 50.0  # all in one region
    for config, largest in ((CONFIG, 300), (CONFIG.model_copy(update={"max_profiles": 40}), 40),
                            (CONFIG.model_copy(update={"max_group_mb": 0.001}), 41)):  # fmt: skip
        parts = [len(r.profiles) for planned in groups.plan(opened, places, config) for r, _ in planned.regions]
        assert sum(parts) == 300
        assert largest / 2 < max(parts) <= largest


def test_a_plan_has_the_tiles_that_each_region_reads(tiny_store: Path) -> None:
    for path in store.paths(tiny_store):
        opened = store.SlideStore(path)
        places = opened.places()
        found = groups.plan(opened, opened.places(bare=True), CONFIG)
        assert [planned.number for planned in found] == list(range(len(found)))
        for planned in found:
            for region, tiles in planned.regions:
                rows = region.profiles
                read = regions.tiles_read(places.xy_um[rows], places.footprint_um[rows], opened.info.tile_um)
                assert tiles == regions.region_tiles(region, read, opened.tile_index)


@pytest.mark.parametrize("scattered", [False, True])
def test_a_slide_that_memory_does_not_hold_is_packed_alike(
    tiny_store: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scattered: bool
) -> None:
    for module in (plan, write):
        monkeypatch.setattr(module, "IN_MEMORY", 0)
    monkeypatch.setattr(groups, "_BATCH", 5_000)  # about two groups
    monkeypatch.setattr(store.SlideStore, "scattered", lambda self, rows: scattered)
    pack.pack(tiny_store, tmp_path / "out", CONFIG)

    def spans(folder: Path) -> set[bytes]:
        opened = shards.ShardSet(folder)
        return {row.tobytes() for split in opened.manifest["splits"] for row in opened.index(split).sha256}

    assert spans(tmp_path / "out") == spans(tiny_shards)


def test_two_packs_of_one_set_at_once_end_with_one_set(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--store", str(tiny_store), "--out", str(tmp_path / "out"), "--config", str(PREP_TINY)]
    written = pack.write_pools

    def overtaken(*given: Any) -> int:
        monkeypatch.setattr(pack, "write_pools", written)
        assert pack.main(words) == 0  # the other one ends first, and the folder in which both work is gone
        return written(*given)

    monkeypatch.setattr(pack, "write_pools", overtaken)
    assert pack.main(words) == 0
    assert "another pack of the same stores has just made it" in capsys.readouterr().out
    left = tmp_path / "out" / f".manifest.json.{files._host()}.0r0.4194305.1.0123abcd.tmp"  # of no process that can be
    left.write_bytes(b"")
    assert pack.main(words) == 0
    assert not left.exists()
    assert shards.verify(tmp_path / "out") == []
