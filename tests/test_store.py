"""The slide store: what is written is read, equal content gives equal bytes, damage is named."""

import dataclasses
import os
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from storm import schema, store
from storm.genes import GeneTable

INFO = store.SlideInfo(
    slide_id="s1", section="s1", donor="d", study="t", organ="skin", species="human", platform="visium", kind="spot",
    split="", mpp=0.5, mpp_source="manifest", width_px0=1000, height_px0=900, tile_px=224, tile_mpp=0.5,
    alignment=np.eye(3).tolist(), alignment_source="file", residual_px0=None, facts={"profiles": 2},
)  # fmt: skip
GENES = GeneTable(("ENSG1", "ENSG2"), ("a", "b"))
PROFILES = schema.Profiles(
    ["p-1", "q-1"], np.array([[1.0, 2.0], [3.0, 4.0]]), np.full(2, 55, np.float32), np.zeros(2, np.uint8),
    np.array([0, 1, 3]), np.array([1, 0, 1], np.int32), np.array([5, 1, 2], np.int32),
)  # fmt: skip


def tiles(n: int = 5, size: int = 100_000) -> list[store.Tile]:
    """Tiles that together span several chunks of the store."""
    rng = np.random.default_rng(0)
    return [
        store.Tile(i // 3, i % 3, rng.integers(0, 256, size + i, np.uint8).tobytes(), (i / 10, *[0.0] * 6))
        for i in range(n)
    ]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return store.write(tmp_path, INFO, tiles(), PROFILES, GENES)


def test_round_trip(written: Path) -> None:
    opened = store.SlideStore(written)
    assert opened.info == INFO
    assert [opened.jpeg(i) for i in (4, 0, 1, 2, 3)] == [tiles()[i].jpeg for i in (4, 0, 1, 2, 3)]
    assert opened.tile_bytes[3] == 100_003
    assert opened.tile_index[1, 1] == 4
    np.testing.assert_allclose(opened.tissue, [0, 0.1, 0.2, 0.3, 0.4])
    assert opened.genes() == GENES
    again = opened.profiles()
    assert again.ids == PROFILES.ids
    for name in ("xy_um", "footprint_um", "footprint_kind", "indptr", "gene", "count"):
        np.testing.assert_array_equal(getattr(again, name), getattr(PROFILES, name))


def test_many_chunks_are_written_whole_and_in_order(tmp_path: Path) -> None:
    many = tiles(n=12, size=1_000_000)  # more than is held before a write
    opened = store.SlideStore(store.write(tmp_path, INFO, many, PROFILES, GENES))
    assert [opened.jpeg(i) for i in range(12)] == [tile.jpeg for tile in many]


def test_two_writes_are_byte_identical(written: Path, tmp_path: Path) -> None:
    other = store.write(tmp_path / "other", INFO, tiles(), PROFILES, GENES)
    assert other.read_bytes() == written.read_bytes()


def test_a_slide_without_tiles_or_profiles(tmp_path: Path) -> None:
    empty = PROFILES.take(np.array([], np.int64))
    opened = store.SlideStore(store.write(tmp_path, INFO, [], empty, GeneTable((), ())))
    assert (len(opened), len(opened.profiles()), len(opened.genes())) == (0, 0, 0)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[store.Tile]:
        yield tiles()[0]
        raise ValueError("the slide is damaged")

    with pytest.raises(ValueError, match="damaged"):
        store.write(tmp_path, INFO, broken(), PROFILES, GENES)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_write_left_is_removed(tmp_path: Path) -> None:
    def killed(slide_id: str) -> None:
        def half() -> Iterator[store.Tile]:
            yield from tiles(2)
            os.kill(os.getpid(), signal.SIGKILL)

        pid = os.fork()
        if not pid:
            store.write(tmp_path, dataclasses.replace(INFO, slide_id=slide_id), half(), PROFILES, GENES)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    for slide_id in ("s1", "s10"):
        killed(slide_id)
    store.write(tmp_path, INFO, tiles(1), PROFILES, GENES)
    (other,) = {p.name for p in tmp_path.iterdir()} - {"s1.zarr.zip"}
    assert other.startswith(".s10.")


def test_facts_may_grow_while_tiles_are_consumed(tmp_path: Path) -> None:
    info = dataclasses.replace(INFO, facts={})

    def counting() -> Iterator[store.Tile]:
        yield from tiles(2)
        info.facts["tiles"] = 2

    assert store.SlideStore(store.write(tmp_path, info, counting(), PROFILES, GENES)).info.facts == {"tiles": 2}


def test_damage_is_named(written: Path, tmp_path: Path) -> None:
    data = bytearray(written.read_bytes())
    at = bytes(data).index(tiles()[0].jpeg[:50])
    data[at] ^= 1
    (tmp_path / "damaged.zarr.zip").write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged\.zarr\.zip: .* is damaged"):
        store.SlideStore(tmp_path / "damaged.zarr.zip").jpeg(0)
    (tmp_path / "cut.zarr.zip").write_bytes(data[:1000])
    with pytest.raises(ValueError, match=r"cut\.zarr\.zip: no complete slide store"):
        store.SlideStore(tmp_path / "cut.zarr.zip")
    with pytest.raises(ValueError, match="no such slide store"):
        store.SlideStore(tmp_path / "absent.zarr.zip")
    with pytest.raises(ValueError, match="no such folder, no slide store"):
        store.paths(tmp_path / "empty")
    (tmp_path / "slide.tif").write_bytes(b"II*")
    for other in ("slide.tif", "."):  # which nobody is told to delete
        with pytest.raises(ValueError, match=r"no such slide store .*; name one"):
            store.SlideStore(tmp_path / other)


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    path = store.write(tmp_path, dataclasses.replace(INFO, schema_version=99), tiles(1), PROFILES, GENES)
    with pytest.raises(ValueError, match="schema version 99"):
        store.SlideStore(path)


def test_morton_keeps_neighbours_near() -> None:
    numbers = {store.morton(r, c) for r in range(8) for c in range(8)}
    assert numbers == set(range(64))
    assert [store.morton(0, 1), store.morton(1, 0), store.morton(1, 1)] == [1, 2, 3]


def test_a_store_with_other_facts_than_ours_is_refused(tmp_path: Path) -> None:
    path = store.write(tmp_path, INFO, tiles(1), PROFILES, GENES)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["zarr.json"] = parts["zarr.json"].replace(b'"mpp":', b'"Mpp":')
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match=r"s1\.zarr\.zip: no sound slide store .*'Mpp'.*; delete it and run"):
        store.SlideStore(path)
