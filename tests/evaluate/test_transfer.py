"""Transfer: who is compared with whom, equal depth, ratios that are known."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from storm.evaluate import expression, targets, transfer
from storm.evaluate.expression import Cohort, Score
from storm.evaluate.sections import Section
from storm.evaluate.within import Within
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


def test_a_paired_ratio_draws_the_same_blocks_on_both_sides(cohort: Cohort) -> None:
    """What both models are shown differs little, so they rise and fall together from block to block."""
    rng = np.random.default_rng(1)
    test = cohort.test[2:]
    measured = [s.counts.toarray() for s in test]
    better, worse = (
        expression.score([[m + sd * m.std(0) * rng.normal(size=m.shape) for m in measured]], measured, test, 0)
        for sd in (2.0, 2.2)
    )
    same = transfer.ratio(better, better, paired=True)
    assert same == {"value": 1.0, "low": 1.0, "high": 1.0} and transfer.verdict(same) == "consistent"
    found = transfer.ratio(worse, better, paired=True)
    assert found and found["value"] == pytest.approx(worse.value / better.value)
    by_hand = np.percentile([a / b for a, b in zip(worse.replicates, better.replicates, strict=True)], [2.5, 97.5])
    assert [found["low"], found["high"]] == pytest.approx(by_hand.tolist())


@pytest.mark.parametrize(("low", "told"), [(0.8, "consistent"), (0.79, "not shown to be consistent")])
def test_the_verdict_is_of_the_lower_bound(low: float, told: str) -> None:
    assert transfer.verdict({"value": 0.95, "low": low, "high": 1.1}) == told
    assert transfer.verdict(None) == "not shown to be consistent"


def rival(cohort: Cohort, platforms: tuple[str, ...] = ("xenium",), donors: tuple[str, ...] = ("d", "e")) -> Within:
    """A second model: what it was trained on, without weights."""
    genes: Any = SimpleNamespace(index={name: i for i, name in enumerate(cohort.gene_ids)})
    pretrained: Any = SimpleNamespace(
        data={"platforms": {name: {} for name in platforms}, "shards_hash": "abc"}, genes=genes, hash="def",
        panel=np.ones(len(cohort.gene_ids), bool), code_version="0",
    )  # fmt: skip
    slides = frozenset(f"{donor}_x" for donor in donors)
    return Within(pretrained, Path("second"), frozenset(("study", donor) for donor in donors), slides)


def test_a_second_model_that_is_no_yardstick_is_refused(cohort: Cohort) -> None:
    first: Any = SimpleNamespace(data={"platforms": {"visium": {}}})
    good = rival(cohort)
    transfer.check(first, cohort, good)
    with pytest.raises(ValueError, match="second: was trained on st, not on the target platform xenium; give"):
        transfer.check(first, cohort, rival(cohort, ("st",)))
    with pytest.raises(ValueError, match=r"holds the donors of 1 of 2 sections of xenium .*without these donors .*c_x"):
        transfer.check(first, cohort, rival(cohort, donors=("c", "d")))
    with pytest.raises(ValueError, match=r"holds the donors of 1 of 2 .*b_x"):  # the section under another donor's name
        transfer.check(first, cohort, dataclasses.replace(good, slides=frozenset({"b_x"})))
    short: Any = SimpleNamespace(**{**vars(good.pretrained), "panel": np.arange(len(cohort.gene_ids)) > 1})
    with pytest.raises(ValueError, match=r"lacks 2 of 12 shared genes \(as g0\); train both models"):
        transfer.check(first, cohort, dataclasses.replace(good, pretrained=short))
    transfer.check(first, cohort, rival(cohort, donors=("a",)))  # donor a is tested nowhere


def stand_in(monkeypatch: pytest.MonkeyPatch, worse: float = 0.0) -> None:
    """Models are stood in for by what they should have said, since only stores with pixels hold a real one.

    The first one's answers are `worse` by noise of so many sd; the second has a hash.
    """

    def model(pretrained: Any, cohort: Cohort, test: list[Section], columns: Any, seed: int) -> Score:
        rng, first = np.random.default_rng(5), not hasattr(pretrained, "hash")
        measured = [targets.lognorm(s.counts[:, columns], s.depth) for s in test]
        noise = [m.std(0) * rng.normal(size=m.shape) for m in measured]
        told = [m + (1 + worse * first) * n for m, n in zip(measured, noise, strict=True)]
        return expression.score([told], measured, test, seed)

    monkeypatch.setattr(transfer, "_colour", lambda cohort, section, side_um: section.colour)
    monkeypatch.setattr(transfer, "_footprints", lambda cohort, section: np.full(len(section.rows), 55.0))
    monkeypatch.setattr(transfer, "_model", model)
    monkeypatch.setattr(transfer, "provenance", lambda *args: {"protocol": transfer.PROTOCOL})


def test_the_table_holds_both_relations_the_ridges_and_the_reasons(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
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


def test_a_second_model_gives_each_relation_its_verdict(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    first: Any = SimpleNamespace(data={"platforms": {"visium": {}}})
    for worse, told in ((0.0, "consistent"), (2.0, "not shown to be consistent")):
        stand_in(monkeypatch, worse)
        found = transfer.evaluate(first, cohort, 0, rival(cohort))
        by_relation = {g["relation"]: g for g in found["groups"]}
        for relation in ("technical", "new donor"):
            group = by_relation[relation]
            assert group["verdict"] == told and (group["ratio_to_trained_on_target"]["value"] == 1) == (not worse)
            assert set(group["scores"]) == {transfer.MODEL, transfer.SOURCE, transfer.TARGET, transfer.TRAINED}
        assert "verdict" not in by_relation["within"] and transfer.TRAINED not in by_relation["within"]["scores"]
        assert found["within"]["trained_on"] == ["xenium"] and found["within"]["donors"] == 2
        assert f"| {told} |" in transfer.text(found) and "trained on xenium, 2 sections" in transfer.text(found)
    alone = transfer.evaluate(first, cohort, 0)
    assert alone["within"] is None and "verdict |" not in transfer.text(alone)
