"""The alignment check: it finds a known shift, is silent without one, and without a relation of counts and nuclei."""

import json

import numpy as np
import numpy.typing as npt
import pytest

from data_prep import registration
from data_prep.synthetic.expression import under_discs
from data_prep.synthetic.tissue import at, smooth_field
from tests.data_prep.pictures import overview_of, section

SPOT_UM, SIDE_UM, MPP = 55.0, 2200.0, 2.0
AREA_UM2 = np.pi / 4 * SPOT_UM**2


def spots(seed: int, shift_um: tuple[float, float] = (0.0, 0.0)) -> tuple[npt.NDArray, npt.NDArray]:
    """(places [N, 2], counts [N]) of spots on a lattice; their molecules come from the cells `shift_um` further on."""
    rng = np.random.default_rng([seed, *map(abs, map(int, shift_um))])
    grown, _ = section(seed, SIDE_UM, MPP)
    axis = np.arange(60.0, SIDE_UM - 60, 100.0)
    places = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    true = places + np.array(shift_um)
    cells = np.diff(under_discs(grown, true, SPOT_UM).indptr)
    kept = (cells >= 1) & (at(grown.inside, true) > 0.1)
    return places[kept], rng.poisson(300 * cells[kept] * np.exp(0.6 * rng.standard_normal(kept.sum())))


def checked(seed: int, places: npt.NDArray, counts: npt.NDArray) -> dict:
    seen = overview_of(section(seed, SIDE_UM, MPP)[1], MPP)
    size = np.full(len(places), SPOT_UM, np.float32)
    found = registration.check(seen, MPP, places, size, counts, np.full(len(places), AREA_UM2))
    json.dumps(found, allow_nan=False)
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shift_um", [(100.0, 0.0), (60.0, -80.0), (-130.0, 100.0)])
def test_a_known_shift_is_found(seed: int, shift_um: tuple[float, float]) -> None:
    found = checked(seed, *spots(seed, shift_um))
    assert found["best_shift_um"] == pytest.approx(shift_um, abs=18)
    assert found["r_best"] > found["r"] + 0.1
    x, y = found["best_shift_um"]
    words = f"counts fit the image better when shifted by ({x}, {y}) um: "
    assert found["note"] == words + f"r {found['r_best']:.2f} instead of {found['r']:.2f}"


@pytest.mark.parametrize("seed", [0, 1])
def test_aligned_counts_get_no_note(seed: int) -> None:
    found = checked(seed, *spots(seed))
    assert (found["note"], found["checked"]) == ("", True)
    assert found["r"] > 0.4
    assert np.hypot(*found["best_shift_um"]) <= 15


def test_counts_without_a_relation_get_no_note() -> None:
    """Shuffled ones, and smooth random fields, which fit a smooth image somewhere by chance."""
    places, counts = spots(0)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        assert checked(0, places, rng.permutation(counts))["note"] == ""
        field = at(smooth_field(rng, SIDE_UM, 300.0), places)
        assert checked(0, places, rng.poisson(1000 * np.exp(0.8 * field)))["note"] == ""


def test_too_few_profiles_are_not_checked() -> None:
    places, counts = spots(0)
    counts[registration.MIN_PROFILES - 1 :] = 0
    found = checked(0, places, counts)
    assert found == {"checked": False, "note": "", "reason": "49 profiles with counts, 50 are needed"}


def test_equal_counts_have_no_correlation() -> None:
    places, counts = spots(0)
    found = checked(0, places, np.full_like(counts, 7))
    assert (found["r"], found["r_best"], found["best_shift_um"], found["note"]) == (0.0, 0.0, [0, 0], "")


def test_profiles_at_the_border_and_on_one_line() -> None:
    rng = np.random.default_rng(0)
    places = np.stack([rng.uniform(0, SIDE_UM, 80), np.zeros(80)], 1)
    places[0] = (SIDE_UM, SIDE_UM)
    assert checked(0, places, rng.poisson(100, 80) + 1)["note"] == ""
