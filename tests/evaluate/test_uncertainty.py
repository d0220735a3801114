"""Uncertainty: intervals by hand, and planted counts and errors whose coverage is known."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from storm.evaluate import uncertainty
from storm.prediction import Prediction
from tests.evaluate import cohorts

DEPTH = 5000.0


def told(share: np.ndarray, size: float | np.ndarray, zeros: float = 0.0, depth: float = DEPTH) -> Prediction:
    n, k = share.shape
    return Prediction(
        np.arange(k), share.astype(np.float32), np.full(n, np.log(depth), np.float32), np.zeros(n, np.float32),
        np.full((n, k), size, np.float32), np.full(k, zeros, np.float32),
    )  # fmt: skip


def test_the_ends_are_those_of_scipy_and_their_probability_is_summed_by_hand() -> None:
    share = np.array([[0.0001, 0.002, 0.05]])
    for size, law in ((2.0, lambda m: stats.nbinom(2, 2 / (2 + m))), (np.inf, lambda m: stats.poisson(m))):
        low, high, promised = uncertainty.noise_interval(told(share, size))
        for i, mean in enumerate(np.exp(np.log(np.float32(DEPTH))) * share[0].astype(np.float32)):
            mass = law(mean).pmf(np.arange(5000))
            reached = np.cumsum(mass)
            assert low[0, i] == np.argmax(reached >= 0.05) and high[0, i] == np.argmax(reached >= 0.95)
            inside = mass[int(low[0, i]) : int(high[0, i]) + 1].sum()
            assert promised[0, i] == pytest.approx(inside, rel=1e-5) and inside >= 0.9


def test_zeros_beside_the_counts_widen_downwards() -> None:
    share = np.array([[0.01]])
    low, high, promised = uncertainty.noise_interval(told(share, 3.0, zeros=0.2))
    mean = 50.0
    assert low[0, 0] == 0 and high[0, 0] == stats.nbinom.ppf(0.75 / 0.8, 3, 3 / (3 + mean))
    assert promised[0, 0] == pytest.approx(0.2 + 0.8 * stats.nbinom.cdf(high[0, 0], 3, 3 / (3 + mean)), rel=1e-5)
    assert all(np.isnan(part).all() for part in uncertainty.noise_interval(told(share, np.nan)))


def test_planted_counts_are_held_as_often_as_promised_and_others_are_not() -> None:
    rng = np.random.default_rng(0)
    share = np.repeat(np.array([[0.0002, 0.002, 0.02, 0.2]]), 20000, axis=0)
    count = rng.negative_binomial(4, 4 / (4 + DEPTH * share)).astype(float)
    held, promised, width = uncertainty.noise_of(told(share, 4.0), count).mean(0)
    np.testing.assert_allclose(held, promised, atol=0.008)
    assert held[3] == pytest.approx(0.9, abs=0.008) and (np.diff(width) > 0).all()
    narrow = uncertainty.noise_of(told(share, np.inf), count).mean(0)
    assert narrow[0, 3] < 0.2 and narrow[1, 3] == pytest.approx(0.9, abs=0.01)


def test_a_radius_weighs_donors_alike_and_counts_an_unseen_one_where_there_are_enough() -> None:
    small, large = np.arange(1.0, 11)[:, None], 100 + np.arange(1000.0)[:, None]
    assert uncertainty.radius([small])[0] == 9  # 9 of 10
    assert uncertainty.radius([small, large])[0] == 100 + 799  # half of the weight, and .8 of the other half
    ten = [np.full((3, 1), float(i)) for i in range(10)]
    assert uncertainty.radius(ten)[0] == 9  # .99 of the weight, not .9
    assert uncertainty.radius(ten[:8])[0] == 7 and uncertainty.radius(ten[:9])[0] == 8


def test_errors_of_like_donors_are_held_in_nine_of_ten() -> None:
    rng = np.random.default_rng(0)
    donors = [np.abs(rng.normal(size=(400, 20))) for _ in range(40)]
    covered = [
        (donors[i] <= uncertainty.radius([donors[j] for j in range(40) if j != i][:5])).mean() for i in range(40)
    ]
    assert np.mean(covered) == pytest.approx(0.9, abs=0.01)


def test_who_calibrates() -> None:
    test: Any = {("s", "a"): np.ones((2, 1)), ("s", "b"): np.zeros((2, 1))}
    others = uncertainty.calibrations(test, {})
    assert others["s", "a"][0] == {"calibrated_by": "other test donors", "calibrators": 1, "guarantee": False}
    assert others["s", "a"][1][0].max() == 0
    by_val = uncertainty.calibrations(
        test, {("s", f"v{i}"): np.ones((2, 1)) for i in range(9)} | {("s", "a"): test["s", "a"]}
    )
    assert by_val["s", "b"][0] == {"calibrated_by": "val donors", "calibrators": 10, "guarantee": True}
    assert by_val["s", "a"][0]["calibrators"] == 9  # never the donor itself
    assert uncertainty.calibrations({("s", "a"): test["s", "a"]}, {})["s", "a"][0]["calibrators"] == 0


def test_the_tables_tell_donors_apart_and_never_name_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows the law but not that one donor's is another: that donor alone is not covered."""
    rng = np.random.default_rng(0)
    law = np.log(np.linspace(1, 40, 12))[None]
    rates = {f"donor{i}": np.repeat(law[:, ::-1] if i == 3 else law, 400, axis=0) for i in range(4)}
    sections = {name: cohorts.section(name, name, rate, rng, DEPTH) for name, rate in rates.items()}
    share = np.exp(np.repeat(law, 400, axis=0)) / np.exp(law).sum()
    monkeypatch.setattr(uncertainty, "_ask", lambda p, c, section, columns: told(share[:, columns], np.inf))
    monkeypatch.setattr(uncertainty, "provenance", lambda *args: {"protocol": uncertainty.PROTOCOL})
    cohort = cohorts.cohort([sections["donor0"]], list(sections.values()))
    stores: Any = {name: SimpleNamespace(info=SimpleNamespace(platform="visium")) for name in sections}
    genes: Any = SimpleNamespace(share=share[0], index={name: i for i, name in enumerate(cohort.gene_ids)})
    pretrained: Any = SimpleNamespace(genes=genes)
    found = uncertainty.evaluate(pretrained, dataclasses.replace(cohort, stores=stores))
    noise = [of["methods"]["negative binomial"] for of in found["donors"]]
    for of in noise[:3]:
        assert of["covered"] == pytest.approx(of["promised"], abs=0.02) and of["covered"] == pytest.approx(
            0.91, abs=0.02
        )
    assert noise[3]["covered"] < 0.4
    conformal = [of["methods"]["split-conformal"]["covered"] for of in found["donors"]]
    assert conformal[3] < 0.5 and min(conformal[:3]) > 0.9  # the strange donor widens the others
    assert [of["genes"] for of in found["bins"]] == [3, 3, 2, 2, 2]
    for of in (*(row["methods"] for row in found["bins"]), *(row["methods"] for row in found["donors"])):
        for name in (uncertainty.NB, uncertainty.CONFORMAL):
            assert of[name]["low"] <= of[name]["covered"] <= of[name]["high"], of
    width = [
        [of["methods"]["negative binomial"][k] for k in ("low", "high")]
        for of in (found["bins"][4], found["donors"][0])
    ]
    assert width[0][0] < 0.75 and np.ptp(width[0]) > 5 * np.ptp(width[1])  # one strange donor of four, beside blocks
    said = uncertainty.text(found)
    assert "| negative binomial: 95 % interval |" in said
    assert "No guarantee" in said and "3 other test donors" in said and "donor0" not in said + str(found)
