"""Domains: agreement against the library's, clusters that are there, boundaries, votes, labels from files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from storm.evaluate import clusters, domains
from tests.evaluate import cohorts


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 5))
def test_the_rand_index_is_the_librarys(seed: int, k: int, c: int) -> None:
    rng = np.random.default_rng(seed)
    label, cluster = rng.integers(0, k, 40), rng.integers(0, c, 40)
    counts = clusters.contingency(label, cluster, rng.integers(0, 4, 40))
    assert float(clusters.adjusted_rand(counts.sum(0))) == pytest.approx(adjusted_rand_score(label, cluster))


def labelled(side: int = 16) -> domains.Labelled:
    """Four quarters of a square."""
    made = cohorts.section("a", "d", np.zeros((side * side, 5)), np.random.default_rng(0))
    half = (side - 1) * 50
    return domains.Labelled(made, (made.xy_um[:, 0] > half) * 2 + (made.xy_um[:, 1] > half).astype(np.int64))


@pytest.mark.parametrize("backend", sorted(clusters.BACKENDS))
def test_domains_that_are_there_are_found_and_noise_holds_none(backend: str) -> None:
    labels, rng = labelled(), np.random.default_rng(1)
    clear = 8 * np.eye(4)[labels.label] + rng.normal(0, 0.5, (256, 4))
    noise = rng.normal(size=(256, 4))
    found = [
        domains._score(domains.Features([x], smoothed=False), [labels], (15, 1.5), backend, 0) for x in (clear, noise)
    ]
    assert found[0]["ari_quartiles"][2] == pytest.approx(1.0) and found[0]["boundary_f1_quartiles"][2] == 1
    assert abs(found[1]["ari"]) < 0.05 and abs(found[1]["replicates"].mean()) < 0.1
    weak = 0.6 * np.eye(4)[labels.label] + 0.3 * rng.normal(size=(256, 4))
    plain, smooth = (
        domains._score(domains.Features([weak], smoothed), [labels], (15, 1.5), backend, 0)
        for smoothed in (False, True)
    )
    assert smooth["ari"] > plain["ari"] + 0.1 and plain["voted_ari_quartiles"][1] > plain["ari"]


def test_edges_and_votes() -> None:
    labels = labelled()
    near = labels.near()
    assert clusters.boundary_f1(near, labels.label, labels.label) == 1
    assert clusters.boundary_f1(near, labels.label, np.zeros_like(labels.label)) == 0
    np.testing.assert_allclose(near.sum(1), 1)
    wrong = labels.label.copy()
    wrong[16 * 3 + 3] = (wrong[16 * 3 + 3] + 1) % 4  # one profile amid its domain
    np.testing.assert_array_equal(clusters.vote(near, wrong), labels.label)


def test_radius_and_components_are_chosen_where_they_serve() -> None:
    labels, rng = labelled(), np.random.default_rng(3)
    x = 0.8 * np.eye(4)[labels.label] + 0.6 * rng.normal(size=(256, 4))
    assert domains.choose(domains.Features([x], smoothed=True), [labels], 0)[1] > 1.5
    assert domains.choose(domains.Features([x], smoothed=True), [], 0) == (15, 1.5)


def test_labels_come_from_a_csv_or_the_truth(tmp_path: Path) -> None:
    made = labelled().section
    (tmp_path / "a.csv").write_text("profile_id,label\np1,cortex\np2,\nother,x\n")
    found = domains.read_labels(made, None, tmp_path)
    assert found[:3] == ["", "cortex", ""] and len(found) == 256
    (tmp_path / "a.csv").write_text("\ufeffprofile_id,label\np1,cortex\n", encoding="utf-8")  # as spreadsheets save it
    assert domains.read_labels(made, None, tmp_path)[:3] == ["", "cortex", ""]
    np.savez(tmp_path / "a.npz", profile_id=np.array(["p0", "p3"]), domain=np.array([4, 2]))
    assert domains.read_labels(made, tmp_path, None)[:4] == ["4", "", "", "2"]
    assert set(domains.read_labels(made, None, None)) == {""}
    (tmp_path / "a.csv").write_text("profile_id,layer\np1,cortex\n")
    with pytest.raises(ValueError, match=r"a\.csv: its first line lacks the columns"):
        domains.read_labels(made, None, tmp_path)
    (tmp_path / "a.csv").write_text("profile_id,label\nq,cortex\n")
    with pytest.raises(ValueError, match=r"a\.csv: names none of this slide's profiles"):
        domains.read_labels(made, None, tmp_path)


def test_unlabelled_profiles_are_left_out_and_one_domain_is_none() -> None:
    made = labelled().section
    names = ["a"] * 20 + ["b"] * 20 + [""] * 216
    found = domains.labelled(made, names)
    assert found and found[0].k == 2 and len(found[0].section.rows) == 40 and found[1].sum() == 40
    assert (
        domains.labelled(made, ["a"] * 256) is None and domains.labelled(made, ["a"] * 9 + ["b"] + [""] * 246) is None
    )
