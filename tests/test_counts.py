"""Counts by rows: those of the whole matrix, whatever rows are asked in whatever order; damage is named."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storm import counts, schema, store
from storm.genes import GeneTable
from tests.data_prep.test_pack import info, write_store

GENES = 9


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.SlideStore]:
    """A store of 40 profiles with 0 to 9 genes each, in chunks of 16 counts."""
    folder = tmp_path_factory.mktemp("counts")
    rng = np.random.default_rng(0)
    chosen = rng.random((40, GENES)) < rng.random((40, 1))
    indptr = np.concatenate([[0], np.cumsum(chosen.sum(1))]).astype(np.int64)
    gene = np.nonzero(chosen)[1].astype(np.int32)
    count = rng.integers(1, 9, len(gene)).astype(np.int32)
    profiles = schema.Profiles(
        [str(i) for i in range(40)], np.zeros((40, 2)), np.ones(40, np.float32), np.zeros(40, np.uint8),
        indptr, gene, count,
    )  # fmt: skip
    names = tuple(f"G{i}" for i in range(GENES))
    with pytest.MonkeyPatch.context() as patch:
        for module in (counts, store):
            patch.setattr(module, "CHUNK", 16)
        patch.setattr(counts, "_CACHED", 3)
        path = store.write(folder, info("s", "d"), [], profiles, GeneTable(names, names))
        yield store.SlideStore(path)


@settings(max_examples=100)
@given(rows=st.lists(st.integers(0, 39), max_size=60), long=st.sampled_from([0, 10_000]))
def test_any_rows_in_any_order(opened: store.SlideStore, rows: list[int], long: int) -> None:
    whole = opened.profiles()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "_LONG", long)  # copied as runs, or entry by entry
        found = opened.counts(np.array(rows, np.int64))
    expected = whole.take(np.array(rows, np.int64))
    np.testing.assert_array_equal(found.indptr, expected.indptr)
    np.testing.assert_array_equal(found.gene, expected.gene)
    np.testing.assert_array_equal(found.count, expected.count)
    assert found.gene.dtype == found.count.dtype == np.int32


def test_scattered_tells_what_the_kept_chunks_do_not_hold(opened: store.SlideStore) -> None:
    assert not opened.scattered(np.array([0]))
    assert opened.scattered(np.arange(40))
    assert not opened.scattered(np.zeros(0, np.int64))


def test_a_chunk_of_zeros_reads_as_zeros(tmp_path: Path) -> None:
    write_store(tmp_path, info("s", "d"), 5, ("G1",))  # the gene's number is 0 throughout
    opened = store.SlideStore(store.store_path(tmp_path, "s"))
    assert opened.counts(np.arange(5)).gene.tolist() == [0] * 5


def test_damage_is_named(tmp_path: Path) -> None:
    write_store(tmp_path, info("s", "d"), 50)
    path = store.store_path(tmp_path, "s")
    data = path.read_bytes()
    at = data.index(b"counts/count/c/0") + 40
    path.write_bytes(data[:at] + bytes(b ^ 255 for b in data[at : at + 8]) + data[at + 8 :])
    with pytest.raises(
        ValueError, match=r"s\.zarr\.zip: counts/count is damaged .*; delete it and run data_prep.build"
    ):
        store.SlideStore(path).counts(np.arange(50))
