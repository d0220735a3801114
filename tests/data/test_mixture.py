"""Mixtures: shares by weight, tempering, floors and caps; what cannot hold is refused; a plain one changes nothing."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storm.config import MixtureConfig
from storm.data import mixture
from storm.data.mixture import Slides
from storm.data.order import UNIT
from tests.data.corpora import stream, write

# Three studies of 10, 30 and 160 groups; the second has two donors, one of them with two sections.
GROUPS = np.array([10, 10, 5, 15, 160])
SLIDES = Slides(
    GROUPS, np.array([0, 0, 0, 1, 1]), ["a", "b", "b", "b", "c"], ["a1", "b1", "b1", "b2", "c1"],
    ["a1s", "b1s", "b1t", "b2s", "c1s"], ["visium", "visium", "xenium", "xenium", "xenium"],
)  # fmt: skip


def shares(**keys) -> np.ndarray:
    """[S] share of an epoch's groups that each slide gets."""
    return mixture.expected(SLIDES, MixtureConfig(repeat_most=1000, **keys)) * GROUPS / GROUPS.sum()


def test_without_weights_each_group_comes_once() -> None:
    np.testing.assert_allclose(mixture.expected(SLIDES, MixtureConfig()), 1)
    assert mixture.is_plain(MixtureConfig()) and not mixture.is_plain(MixtureConfig(power=0.5))


def test_a_power_tempers_studies_donors_and_sections() -> None:
    even = shares(power=0.0)
    np.testing.assert_allclose(even, [1 / 3, 1 / 12, 1 / 12, 1 / 6, 1 / 3])
    root = shares(power=0.5)
    study = np.sqrt([10, 30, 160]) / np.sqrt([10, 30, 160]).sum()
    np.testing.assert_allclose([root[0], root[1:4].sum(), root[4]], study)
    np.testing.assert_allclose(root[1] / root[2], np.sqrt(2))


def test_weights_of_corpora() -> None:
    np.testing.assert_allclose(shares(corpora=[3.0, 1.0]), GROUPS * [3, 3, 3, 1, 1] / (75 + 175))
    assert shares(corpora=[1.0, 0.0])[3:].sum() == 0
    for wrong in ([1.0], [0.0, 0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match=r"data\.mixture\.corpora=.*give a weight >= 0 for each"):
            shares(corpora=wrong)


def test_caps_and_floors_hold_together() -> None:
    found = shares(study_most=0.5, donor_most=0.4, platform_least=0.3)
    assert found.sum() == pytest.approx(1) and found[:2].sum() >= 0.3 - 1e-5
    assert max(found[0], found[1:4].sum(), found[4]) <= 0.4 + 1e-5
    np.testing.assert_allclose(found[1] / found[0], 1, rtol=1e-4)  # one platform, no cap reached: still in proportion
    few = mixture.expected(SLIDES, MixtureConfig(power=0.0, repeat_most=4))
    assert few.max() <= 4 + 1e-6 and few @ GROUPS == pytest.approx(GROUPS.sum())


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"study_most": 0.3}, "study_most=0.3"),
        ({"platform_least": 0.6}, "platform_least=0.6"),
        ({"platform_least": 0.4, "repeat_most": 2.0}, "repeat_most=2.0|platform_least=0.4"),
    ],
)
def test_what_cannot_hold_is_refused(keys: dict, named: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.mixture: .*({named}).* cannot hold with 3 studies.*loosen it"):
        mixture.expected(SLIDES, MixtureConfig(**keys))


@given(power=st.floats(0, 1), seed=st.integers(0, 99))
def test_slides_donors_and_studies_come_floor_or_ceil_of_their_expectation(power: float, seed: int) -> None:
    slide_of = np.random.default_rng(seed).permutation(np.repeat(np.arange(5, dtype=np.int32), GROUPS))
    made = mixture.multiplicity(SLIDES, slide_of, MixtureConfig(power=power, repeat_most=100))
    assert made.expected.sum() == GROUPS.sum() * UNIT
    taken = made.draw(seed * 12345)
    assert len(taken) == GROUPS.sum()
    expected = mixture.expected(SLIDES, MixtureConfig(power=power, repeat_most=100)) * GROUPS
    for members in ([0], [1], [2], [3], [4], [1, 2], [1, 2, 3]):  # slides, a donor, a study
        number = np.isin(slide_of[taken], members).sum()
        assert abs(number - expected[members].sum()) < 1 + 1e-2


def test_a_stream_with_a_mixture_keeps_its_length(tmp_path: Path) -> None:
    shards = write(tmp_path / "set", [(f"s{i % 3}", i // 3) for i in range(7)])
    mixed = stream(shards, mixture=MixtureConfig(power=0.0))
    groups = np.bincount(mixed.order.epoch(0), minlength=7)
    assert groups.sum() == 7 == mixed.order.size
    (index,) = (part.index for part in mixed.corpus.groups.parts)
    studies = np.array(["t0", "t1", "t0"])[index.slide]  # of s0, s1, s2: as `corpora.slide` says
    assert {3, 4} == {int(groups[studies == name].sum()) for name in ("t0", "t1")}
