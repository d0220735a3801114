"""Retrieval: identical vectors are perfect, random ones are at chance, the control is what its geometry is."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from storm.evaluate import retrieval
from tests.evaluate import cohorts


def vectors(n: int, seed: int) -> np.ndarray:
    return retrieval._unit(np.random.default_rng(seed).normal(size=(n, 16)))


def made_sections(n: int = 2) -> list:
    rng = np.random.default_rng(0)
    return [cohorts.section(f"s{i}", f"d{i}", np.zeros((144, 6)), rng) for i in range(n)]


def test_ranks_are_those_of_a_plain_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_CHUNK", 7)
    queries, gallery = vectors(30, 0), vectors(30, 1)
    similarity = queries @ gallery.T
    expected = [1 + sorted(-similarity[i]).index(-similarity[i, i]) for i in range(30)]
    np.testing.assert_array_equal(retrieval.ranks(queries, gallery), expected)
    assert (retrieval.ranks(queries, np.ones((30, 16))) == 15.5).all()  # all alike: the mean rank, no luck


def test_identical_vectors_are_perfect_and_random_ones_at_chance() -> None:
    sections = made_sections()
    same = [vectors(144, i) for i in range(2)]
    perfect = retrieval._table(retrieval.Vectors(same, same), sections, 0)
    random = retrieval._table(retrieval.Vectors(same, [vectors(144, 9 + i) for i in range(2)]), sections, 0)
    assert len(perfect) == 4
    for task in perfect:
        assert perfect[task]["R@1"]["value"] == 1 == perfect[task]["MRR"]["value"]
        assert perfect[task]["R@10"]["against_chance"] == "above"
        assert random[task]["R@10"]["against_chance"] == "at" and random[task]["MRR"]["against_chance"] == "at"
    across = perfect["image -> expression, across"]
    assert across["R@10"]["chance"] == pytest.approx(10 / 288) and across["median rank"]["chance"] == 144.5


def test_chance_is_that_of_a_random_order() -> None:
    rng = np.random.default_rng(0)
    rank = rng.permuted(np.tile(np.arange(1.0, 21), (4000, 1)), axis=1)[:, 0]
    found = {name: values.mean() for name, values in retrieval.per_query(rank).items()}
    expected = retrieval.chance(20)
    for name, value in found.items():
        assert value == pytest.approx(expected[name], abs=0.02)


@pytest.mark.parametrize(("tied", "verdict"), [(0.0, "at"), (3.0, "above")])
def test_the_control_finds_what_geometry_tells_of_depth_and_nothing_else(tied: float, verdict: str) -> None:
    rng = np.random.default_rng(1)
    sections = []
    for i in range(4):
        made = cohorts.section(f"s{i}", f"d{i}", np.zeros((400, 6)), rng)
        depth = np.exp(7 + tied * made.xy_um[:, 0] / 2000 + 0.3 * rng.normal(size=400)).astype(np.int64)
        sections.append(dataclasses.replace(made, depth=depth))
    cohort = cohorts.cohort(sections[:2], sections[2:])
    area = SimpleNamespace(area_um2=np.full(400, 2400.0))
    stores: Any = {s.slide_id: SimpleNamespace(places=lambda bare: area) for s in sections}
    found = retrieval._table(retrieval.control(dataclasses.replace(cohort, stores=stores)), cohort.test, 0)
    for task, entry in found.items():
        if "within" in task:
            assert entry["MRR"]["against_chance"] == verdict, (task, entry["MRR"])


def test_the_controls_inner_product_is_a_distance() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 8, 2))
    expected = -((a[:, None] - b[None]) ** 2).sum(-1)
    np.testing.assert_allclose(retrieval._near(a, 1.0) @ retrieval._near(b, -1.0).T, expected, atol=1e-12)


def test_a_model_without_vectors_for_alignment_is_skipped_with_the_reason() -> None:
    pretrained = SimpleNamespace(config=SimpleNamespace(align_width=0))
    found = retrieval.evaluate(pretrained, cohorts.cohort(made_sections(), []))  # type: ignore[arg-type]
    assert "align_width is 0" in found["skipped"]
