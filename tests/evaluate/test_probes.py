"""Probes: a section's stain is found, also in blocks that were not seen; without one there is chance."""

import numpy as np
import pytest

from storm.evaluate import probes, statistics
from tests.evaluate import cohorts


def made(n: int = 4) -> list:
    """Two donors with two sections each."""
    rng = np.random.default_rng(0)
    return [cohorts.section(f"s{i}", f"d{i // 2}", np.zeros((196, 6)), rng) for i in range(n)]


def test_folds_hold_whole_blocks() -> None:
    sections = made()
    for section, fold in zip(sections, probes.folds(sections, 0), strict=True):
        block = statistics.blocks(section.xy_um, least=probes.FOLDS)
        assert all(len(set(fold[block == b])) == 1 for b in range(block.max() + 1)) and len(set(fold)) > 1


def test_a_sections_own_level_is_decodable_and_noise_is_not() -> None:
    sections, rng = made(), np.random.default_rng(1)
    level = [rng.normal(0, 1, 8) for _ in sections]
    stained = [rng.normal(size=(196, 8)) + own for own in level]
    same = [rng.normal(size=(196, 8)) for _ in sections]
    found, none = (probes.leakage(x, sections, 0) for x in (stained, same))
    assert set(found) == {"section within donor", "donor"}
    for task in found:
        assert found[task]["chance"] == 0.5 and found[task]["low"] > 0.8
        assert abs(none[task]["value"] - 0.5) < 0.08 and none[task]["low"] < none[task]["value"] < none[task]["high"]


def test_what_is_smooth_in_space_is_no_identity() -> None:
    """Fields of the sections' own are learned by heart on shuffled folds; on unseen blocks they tell little."""
    sections, rng = made(2), np.random.default_rng(2)
    block = [statistics.blocks(s.xy_um, least=probes.FOLDS) for s in sections]
    fields = [rng.normal(size=(b.max() + 1, 12))[b] + 0.1 * rng.normal(size=(len(b), 12)) for b in block]
    held, _ = probes.probe(fields, [0, 1], sections, 0)
    shuffled = [np.random.default_rng(i).integers(0, 5, 196) for i in range(2)]
    mixed = np.mean([h.mean() for h in probes.hits(fields, [0, 1], shuffled)])
    assert held < 0.7 and mixed > held + 0.15


def test_biology_is_what_a_ridge_keeps() -> None:
    rng = np.random.default_rng(0)
    latent = [rng.normal(size=(196, 1)) for _ in range(4)]
    law = np.array([1.0, -1.0] * 5)
    sections = [cohorts.section(f"s{i}", f"d{i}", z * law, rng) for i, z in enumerate(latent)]
    cohort = cohorts.cohort(sections[:2], sections[2:])
    good = probes.biology((latent[:2], latent[2:]), cohort, np.arange(10), 0)
    noise = [rng.normal(size=(196, 3)) for _ in range(4)]
    bad = probes.biology((noise[:2], noise[2:]), cohort, np.arange(10), 0)
    assert good["low"] > 0.8 and abs(bad["value"]) < 0.1


def test_one_section_per_donor_leaves_the_donors() -> None:
    sections = made()
    assert set(probes.tasks([sections[0], sections[2]])) == {"donor"}
    assert probes.tasks(sections[:1]) == {} and set(probes.tasks(sections[:2])) == {"section within donor"}


@pytest.mark.filterwarnings("error::sklearn.exceptions.ConvergenceWarning")
def test_the_regression_converges_on_components_of_very_different_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One direction moves every feature, the labels lie in small ones: one common scale takes twice as many."""
    sections, rng = made(), np.random.default_rng(3)
    level = 0.3 * rng.normal(size=(4, 60))
    features = [(rng.normal(size=(196, 60)) + own) * np.logspace(0, -3, 60) for own in level]
    features = [x + 3 * rng.normal(size=(196, 1)) for x in features]
    monkeypatch.setattr(probes, "_ITERATIONS", 45)
    found = probes.leakage(features, sections, 0)
    assert found["section within donor"]["low"] > 0.6 and found["donor"]["low"] > 0.6


def test_a_scale_per_component_leaves_what_is_rounding_small() -> None:
    np.testing.assert_allclose(probes.unit_scale(np.array([[0, 0.0], [2, 1e-14]])), [1, 1e-3])
