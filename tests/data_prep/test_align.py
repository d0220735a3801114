"""The lattice fit recovers a known map; the sources of mpp are ranked and compared."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import align
from storm.config import PrepConfig

CONFIG = PrepConfig()
LATTICE = np.array([(x * 100.0, y * 86.6) for x in range(6) for y in range(5)])


@given(st.floats(0.1, 2.0), st.floats(-np.pi, np.pi), st.floats(-1e4, 1e4), st.booleans())
def test_a_known_similarity_is_recovered(mpp: float, angle: float, shift: float, mirrored: bool) -> None:
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = turn @ np.diag([-1.0 if mirrored else 1.0, 1.0]) / mpp
    fit = align.fit_lattice(LATTICE, LATTICE @ linear.T + shift)
    assert fit.mpp == pytest.approx(mpp)
    assert fit.anisotropy == pytest.approx(0, abs=1e-6)
    assert fit.residual_px0 < 1e-5
    np.testing.assert_allclose(align.apply(fit.matrix, LATTICE), LATTICE @ linear.T + shift, atol=1e-4)
    assert align.lattice_fault(fit, "visium", CONFIG) is None


@pytest.mark.parametrize(
    ("stretch", "noise_px0", "platform", "fault"),
    [
        (1.0, 0.5, "visium", None),
        (1.0, 9.0, "visium", "off their lattice"),
        (1.0, 9.0, "st", None),
        (1.0, 90.0, "st", "off their lattice|two pixel sizes"),
        (1.015, 0.0, "visium", "two pixel sizes, 1.5 % apart"),
        (1.015, 0.0, "st", None),
        (1.05, 0.0, "st", "two pixel sizes"),
    ],
)
def test_limits_of_a_fit(stretch: float, noise_px0: float, platform: str, fault: str | None) -> None:
    rng = np.random.default_rng(0)
    lattice = np.array([(x * 200.0, y * 200.0) for x in range(20) for y in range(20)])
    px0 = lattice * [stretch, 1.0] / 0.5 + noise_px0 * rng.standard_normal(lattice.shape)
    found = align.lattice_fault(align.fit_lattice(lattice, px0), platform, CONFIG)
    assert (found is None) if fault is None else re.search(fault, found or "")


@pytest.mark.parametrize("points", [LATTICE[:2], LATTICE[LATTICE[:, 1] == 0], np.zeros((5, 2))])
def test_spots_on_a_line_tell_no_mpp(points: np.ndarray) -> None:
    with pytest.raises(ValueError, match="give mpp in the manifest"):
        align.fit_lattice(points, points * 2)


def test_ranking_of_mpp_sources() -> None:
    told: dict[str, float | None] = {"manifest": 0.5, "lattice": 0.51, "embedded": 0.52}
    for source in ("manifest", "lattice", "embedded"):
        found = align.choose_mpp(dict(told), CONFIG)
        assert (found.value, found.source, found.notes) == (told[source], source, [])
        told[source] = None
    with pytest.raises(ValueError, match="is unknown; give um per pixel in the column mpp"):
        align.choose_mpp(told, CONFIG)


def test_disagreeing_sources_are_reported_or_refused() -> None:
    assert "10 % apart" in align.choose_mpp({"lattice": 0.5, "embedded": 0.55}, CONFIG).notes[0]
    with pytest.raises(ValueError, match="100 % apart; is this the image that was measured"):
        align.choose_mpp({"lattice": 0.25, "embedded": 0.5}, CONFIG)
    told = align.choose_mpp({"manifest": 0.25, "embedded": 0.5}, CONFIG)
    assert (told.value, len(told.notes)) == (0.25, 1)


def test_junk_in_a_file_is_no_mpp() -> None:
    assert align.choose_mpp({"lattice": 0.5, "embedded": 352.8}, CONFIG).source == "lattice"
    with pytest.raises(ValueError, match=r"352\.8 told by embedded is not believable"):
        align.choose_mpp({"embedded": 352.8}, CONFIG)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,0,5\n0,1,6\n0,0,1", None),
        ("1,0\n0,1", "no invertible affine"),
        ("1,0,0\n0,0,0\n0,0,1", "no invertible affine"),
        ("1,0,0\n0,1,0\n1,0,1", "no invertible affine"),
        ("1,0,nan\n0,1,0\n0,0,1", "no invertible affine"),
        ("a,b,c", "not a csv of numbers"),
    ],
)
def test_alignment_files(tmp_path: Path, text: str, expected: str | None) -> None:
    path = tmp_path / "m.csv"
    path.write_text(text)
    if expected is None:
        assert align.apply(align.read_matrix(path), np.array([[1.0, 2.0]])).tolist() == [[6.0, 8.0]]
        return
    with pytest.raises(ValueError, match=expected):
        align.read_matrix(path)
