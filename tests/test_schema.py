"""The sample: what is encoded is decoded, equal content gives equal bytes, odd input is refused."""

import io
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storm import schema


def profiles(counts: list[list[int]]) -> schema.Profiles:
    """Profiles of a dense table of counts."""
    table = np.array(counts, dtype=np.int32).reshape(len(counts), -1)
    row, gene = np.nonzero(table)
    n = len(counts)
    return schema.Profiles(
        [f"p{i}" for i in range(n)], np.arange(2.0 * n).reshape(n, 2), np.full(n, 55, np.float32),
        np.full(n, schema.DISC, np.uint8), np.searchsorted(row, np.arange(n + 1)).astype(np.int64),
        gene.astype(np.int32), table[row, gene],
    )  # fmt: skip


def group(counts: list[list[int]], tiles: dict[tuple[int, int, int], bytes]) -> schema.Group:
    """A group of one region."""
    meta = schema.GroupMeta(
        slide="s", section="c", donor="d", study="t", organ="skin", species="human", platform="visium", kind="spot",
        panel="p", slide_log_density=-1.25, mpp=0.5, tile_px=224, tile_mpp=0.5,
        regions=(schema.RegionMeta((0.0, 112.0), 5, 5),),
    )  # fmt: skip
    return schema.Group(meta, profiles(counts), np.zeros(len(counts), np.int32), tiles)


tables = st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=8)
shapes = st.lists(st.integers(0, 3), max_size=3)
arrays = st.builds(np.zeros, shapes, st.sampled_from(["u1", "<i4", ">i4", "<i8", "<f4", "?"]), st.sampled_from("CF"))
tile_maps = st.dictionaries(st.tuples(*[st.integers(0, 12)] * 3), st.binary(max_size=20), max_size=5)


@given(tables, tile_maps)
def test_decode_of_encode_is_the_group(counts: list[list[int]], tiles: dict[tuple[int, int, int], bytes]) -> None:
    before = group(counts, tiles)
    members = schema.encode(before)
    after = schema.decode(dict(members), "test")
    assert after.meta == before.meta
    assert after.tiles == before.tiles
    assert after.profiles.ids == before.profiles.ids
    for name in ("xy_um", "footprint_um", "footprint_kind", "indptr", "gene", "count"):
        one, other = getattr(before.profiles, name), getattr(after.profiles, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert schema.encode(after) == members


@given(st.dictionaries(st.from_regex("a_[a-z]{1,9}", fullmatch=True), arrays, max_size=4))
def test_members_are_the_bytes_of_numpy(arrays: dict[str, np.ndarray]) -> None:
    arrays |= {"every_other": np.arange(9)[::2], "turned": np.arange(6.0).reshape(2, 3).T}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    # Headers of the zip file differ between releases of Python, ours never do.
    ours, theirs = (zipfile.ZipFile(file) for file in (io.BytesIO(schema.save_arrays(arrays)), buffer))
    assert ours.testzip() is None and ours.namelist() == theirs.namelist()
    assert all(ours.read(name) == theirs.read(name) for name in ours.namelist())
    with np.load(io.BytesIO(schema.save_arrays(arrays)), allow_pickle=False) as found:
        assert found.files == list(arrays)
        assert all((found[name] == array).all() for name, array in arrays.items())


def test_arrays_that_are_no_numbers_or_too_large_are_refused() -> None:
    with pytest.raises(TypeError, match="array of references"):
        schema.save_arrays({"names": np.array(["a", None], object)})
    with pytest.raises(ValueError, match="arrays long: 2 GB or more in one npz"):
        schema.save_arrays({"long": np.broadcast_to(np.zeros(1, np.uint8), 1 << 31)})


@given(tables, st.data())
def test_take_keeps_each_profiles_counts(counts: list[list[int]], data: st.DataObject) -> None:
    whole = profiles(counts)
    rows = np.array(data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=6)), dtype=np.int64)
    part = whole.take(rows)
    dense = np.zeros((len(rows), 4), np.int64)
    dense[np.repeat(np.arange(len(rows)), np.diff(part.indptr)), part.gene] = part.count
    np.testing.assert_array_equal(dense, np.array(counts)[rows].reshape(-1, 4))
    np.testing.assert_array_equal(part.depth, dense.sum(axis=1))


def test_slide_log_density_by_hand() -> None:
    found = profiles([[2, 3], [0, 0], [0, 7]])
    area = np.pi / 4 * 55**2
    by_hand = (np.log(5 / area) + np.log(7 / area)) / 2
    assert schema.slide_log_density(found.depth, found.area_um2) == pytest.approx(by_hand)
    assert schema.slide_log_density(np.zeros(1, np.int64), np.ones(1)) == 0.0


@pytest.mark.parametrize("slide_id", ["a.b", "a b", "", "x" * 65, "a/b"])
def test_slide_ids_that_would_break_a_key(slide_id: str) -> None:
    with pytest.raises(ValueError, match="no dot, no space"):
        schema.check_slide_id(slide_id)


def test_decode_refuses_missing_members_and_other_versions() -> None:
    members = dict(schema.encode(group([[1]], {})))
    with pytest.raises(ValueError, match=r"here: members \['profiles.npz'\] are missing"):
        schema.decode({"meta.json": members["meta.json"]}, "here")
    newer = members["meta.json"].replace(f'"schema_version": {schema.SCHEMA_VERSION}'.encode(), b'"schema_version": 99')
    with pytest.raises(ValueError, match="schema version 99"):
        schema.decode(members | {"meta.json": newer}, "here")


def test_text_round_trip() -> None:
    assert schema.unpack_text(schema.pack_text([])) == []
    assert schema.unpack_text(schema.pack_text(["a-1", "", "b"])) == ["a-1", "", "b"]


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\u2028", "\x0c", "\x85", "\x00"])
def test_names_with_breaks_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="holds a control or line-break character"):
        schema.pack_text(["a", name])
