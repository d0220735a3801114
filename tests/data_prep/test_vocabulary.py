"""Vocabulary: genes in one order, shares that agree across panels; splits: donors and sections stay whole."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_prep import splits, vocabulary
from storm import genes, schema, store
from storm.prep_config import PrepConfig
from tests.data_prep.test_pack import info, write_store


def test_shares_of_one_panel_are_the_mean_composition() -> None:
    counts = np.array([[600.0, 400.0], [0.0, 10000.0]])
    share = vocabulary.shares([vocabulary.composition(c, np.ones(2, bool)) for c in counts])
    np.testing.assert_allclose(share, [0.3, 0.7], atol=1e-3)


def test_shares_across_panels_are_consistent() -> None:
    truth = np.array([0.5, 0.3, 0.15, 0.05])
    measured = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]], bool)
    parts = [vocabulary.composition(np.where(m, 1e9 * truth, 0), m) for m in measured]
    share = vocabulary.shares(parts)
    np.testing.assert_allclose(share, truth, rtol=1e-3)


def test_donors_of_one_panel_may_be_summed_first() -> None:
    rng = np.random.default_rng(0)
    measured = np.array([[1, 1, 1, 1], [1, 1, 0, 1]], bool)[rng.integers(0, 2, 9)]
    parts = [vocabulary.composition(rng.integers(0, 50, 4).astype(float), m) for m in measured]
    joined = vocabulary.merged(parts)
    assert (len(joined), sum(part.donors for part in joined)) == (2, 9)
    np.testing.assert_allclose(vocabulary.shares(joined), vocabulary.shares(parts), rtol=1e-12)
    assert all(part.donors == 1 for part in parts)


def test_a_gene_that_no_donor_measured_has_the_smallest_share() -> None:
    part = vocabulary.composition(np.array([90.0, 10.0, 0.0]), np.array([True, True, False]))
    share = vocabulary.shares([part])
    assert share[2] == share.min() > 0
    assert share[0] > share[1]


def test_a_vocabulary_is_the_union_and_a_kept_one_leaves_genes_out() -> None:
    tables = {name: genes.GeneTable(ids, ids) for name, ids in {"x": ("G1", "G2"), "y": ("G2", "G9")}.items()}
    found = vocabulary.over(tables)
    assert found.table.ids == ("G1", "G2", "G9")
    assert found.panels[found.panel_of["y"]].tolist() == [False, True, True]
    assert found.left_out == {"x": 0, "y": 0}
    kept = vocabulary.over(tables, genes.GeneTable(("G2", "G3"), ("G2", "G3")))
    assert kept.table.ids == ("G2", "G3")
    assert kept.left_out == {"x": 1, "y": 1}
    assert kept.panel_of["x"] == kept.panel_of["y"]


def test_a_donors_composition_is_of_all_its_stores(tmp_path: Path) -> None:
    table = genes.GeneTable(("G1", "G2", "G9"), ("G1", "G2", "G9"))
    stores = []
    for name, ids in {"a": ("G1", "G2"), "b": ("G2", "G9")}.items():
        write_store(tmp_path, info(name, "d1"), 12, ids)
        path = store.store_path(tmp_path, name)
        stores.append((path, vocabulary.columns(store.SlideStore(path).genes(), table)))
    found = vocabulary.donor_composition(stores, 3)
    totals = [store.SlideStore(path).gene_totals() for path, _ in stores]
    counts = np.array([totals[0][0], totals[0][1] + totals[1][0], totals[1][1]]) + 0.5
    np.testing.assert_allclose(found.total, counts / counts.sum())
    assert found.measured.all()


slides = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=12)


@given(slides, st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.2]), st.integers(0, 3))
def test_assigned_splits_keep_donors_and_sections_whole(
    rows: list[tuple[int, int]], test_share: float, val_share: float, seed: int
) -> None:
    config = PrepConfig(test_share=test_share, val_share=val_share, seed=seed)
    infos = [info(f"s{i}", f"d{donor}", section=f"c{cut}") for i, (donor, cut) in enumerate(rows)]
    found = splits.assign(infos, config)
    assert found.keys() == {i.slide_id for i in infos}
    for one in infos:
        for other in infos:
            if one.donor == other.donor or one.section == other.section:
                assert found[one.slide_id] == found[other.slide_id]
    assert splits.assign(infos[::-1], config) == found
    if not test_share and not val_share:
        assert set(found.values()) == {"train"}


def test_shares_of_donors_are_met_and_told_splits_stay() -> None:
    infos = [info(f"s{i}", f"d{i}") for i in range(20)] + [info("told", "d20", "val"), info("mate", "d20")]
    found = splits.assign(infos, PrepConfig(test_share=0.25, val_share=0.1))
    blank = [found[f"s{i}"] for i in range(20)]
    assert [blank.count(split) for split in schema.SPLITS] == [13, 2, 5]
    assert found["mate"] == "val"


def test_sections_tie_donors_in_a_chain_however_long() -> None:
    infos = [info(f"s{i}", f"d{i // 2}", section=f"c{(i + 1) // 2}") for i in range(400)]
    assert [len(unit) for unit in splits.units(infos, "donor")] == [400]
    assert max(len(unit) for unit in splits.units(infos, "section")) == 2
