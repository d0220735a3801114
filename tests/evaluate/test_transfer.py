"""Transfer: who is compared with whom, equal depth, ratios that are known."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from storm.evaluate import transfer
from storm.evaluate.expression import Cohort, Score
from storm.evaluate.sections import Section
from tests.evaluate import cohorts


def made(name: str, donor: str, depth: float, rng: np.random.Generator, n: int = 144) -> Section:
    """A section in which the first colour drives the genes."""
    latent = rng.normal(size=(n, 1))
    found = cohorts.section(name, donor, latent * np.repeat([0.8, -0.8], 6), rng, depth)
    return dataclasses.replace(found, colour=np.concatenate([latent, found.colour[:, 1:]], axis=1))


@pytest.fixture
def cohort() -> Cohort:
    rng = np.random.default_rng(0)
    platforms = {"a_v": "visium", "b_v": "visium", "b_x": "xenium", "c_v": "visium", "c_x": "xenium", "d_x": "xenium"}
    sections = {n: made(n, n[0], 3000 if p == "visium" else 300, rng) for n, p in platforms.items()}
    found = cohorts.cohort([sections[n] for n in ("a_v", "b_v", "d_x")], [sections[n] for n in ("b_x", "c_v", "c_x")])
    stores: Any = {n: SimpleNamespace(info=SimpleNamespace(platform=p)) for n, p in platforms.items()}
    return dataclasses.replace(found, stores=stores)


def test_a_donor_who_was_seen_is_technical_and_a_new_one_is_apart(cohort: Cohort) -> None:
    found = transfer.groups(cohort, {"visium"})
    assert {key: [s.slide_id for s in of] for key, of in found.items()} == {
        ("visium", "within"): ["c_v"], ("xenium", "technical"): ["b_x"], ("xenium", "new donor"): ["c_x"],
    }  # fmt: skip
    both = transfer.groups(cohort, {"visium", "xenium"})
    assert {relation for _, relation in both} == {"within"}


def test_thinning_brings_all_sections_to_one_depth_and_leaves_the_originals(cohort: Cohort) -> None:
    before = [s.counts.toarray() for s in cohort.train + cohort.test]
    found = transfer.equal_depth(cohort, 0)
    least = min(np.median(b.sum(1)) for b in before)
    for section, counts in zip(found.train + found.test, before, strict=True):
        assert np.median(section.depth) == pytest.approx(least, rel=0.1)
        assert (section.counts.toarray() <= counts[section.rows]).all()
        np.testing.assert_array_equal(section.depth, section.counts.toarray().sum(1))
    for section, counts in zip(cohort.train + cohort.test, before, strict=True):
        np.testing.assert_array_equal(section.counts.toarray(), counts)
    again = transfer.equal_depth(cohort, 0)
    assert all((a.counts != b.counts).nnz == 0 for a, b in zip(again.test, found.test, strict=True))


def test_a_ratio_has_an_interval_where_what_it_stands_on_is_above_0() -> None:
    rng = np.random.default_rng(0)

    def scored(value: float, sd: float) -> Score:
        return Score(value, rng.normal(value, sd, 1000), np.full((1, 3), value))

    sharp, wide = (transfer.ratio(scored(0.38, sd), scored(0.4, 0.01)) for sd in (0.01, 0.1))
    assert sharp and wide and sharp["value"] == wide["value"] == pytest.approx(0.95)
    assert 0.8 <= sharp["low"] < 0.95 < sharp["high"] and wide["low"] < 0.8
    assert transfer.ratio(scored(0.1, 0.01), scored(0.01, 0.02)) is None


def test_the_table_holds_both_relations_the_ridges_and_the_reasons(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is stood in for by what it should have said, since only stores with pixels hold a real one."""
    monkeypatch.setattr(transfer, "_colour", lambda cohort, section, side_um: section.colour)
    monkeypatch.setattr(transfer, "_footprints", lambda cohort, section: np.full(len(section.rows), 55.0))
    monkeypatch.setattr(
        transfer, "_model", lambda p, c, test, columns, seed: transfer._ridge(c, test, test, columns, 0)
    )
    monkeypatch.setattr(transfer, "provenance", lambda *args: {"protocol": transfer.PROTOCOL})
    found = transfer.evaluate(SimpleNamespace(data={"platforms": {"visium": {}}}), cohort, 0)  # type: ignore[arg-type]
    by_key = {(g["platform"], g["relation"]): g for g in found["groups"]}
    assert set(by_key) == {("visium", "within"), ("xenium", "technical"), ("xenium", "new donor")}
    for (_, relation), group in by_key.items():
        assert (transfer.TARGET in group["scores"]) == (relation != "within") == ("ratio_to_within" in group)
        assert group["scores"][transfer.SOURCE]["value"] > 0.3
    assert by_key["xenium", "technical"]["ratio_to_within"][transfer.MODEL]["value"] == pytest.approx(1, abs=0.25)
    assert "technical" in transfer.text(found) and "| -" in transfer.text(found)
    trained = SimpleNamespace(data={"platforms": {"visium": {}, "xenium": {}}})
    assert "trained on" in transfer.evaluate(trained, cohort, 0)["skipped"]  # type: ignore[arg-type]
