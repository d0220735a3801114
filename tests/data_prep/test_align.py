"""The lattice fit recovers a known map; the sources of mpp are ranked and compared."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import align
from storm.prep_config import PrepConfig

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
    with pytest.raises(ValueError, match=r"embedded mpp of 352\.8 is not believable"):
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


# Xenium Explorer's own example: a point of the H&E, in px, and where it lies on the morphology image (10x Genomics,
# "How can I convert coordinates between H&E image and Xenium data").
EXPLORER = """0.011071028838929093,1.2895790134339569,807.9788953065927
-1.2895790134339569,0.011071028838929093,73097.655174759
0,0,1"""


def test_the_explorers_matrix_goes_from_the_slide_to_the_morphology_image(tmp_path: Path) -> None:
    path = tmp_path / "he_imagealignment.csv"
    path.write_text("\ufeff" + EXPLORER)
    found = align.read_alignment(path, from_slide=True)
    assert (found.source, found.residual_px0) == ("file", None)
    np.testing.assert_allclose(align.apply(found.matrix, np.array([[807.9788953, 73097.6551748]])), [[0, 0]], atol=1e-5)
    # A step to the right on the slide is a step up on the morphology image: it is turned by a quarter.
    np.testing.assert_allclose(align.apply(found.matrix, np.array([[808.0, 73096.4]])), [[0.973, 0.008]], atol=1e-3)
    assert 0.2125 / np.sqrt(np.linalg.det(found.matrix[:2, :2])) == pytest.approx(0.2740, abs=1e-4)
    forward = align.read_alignment(path)
    np.testing.assert_allclose(align.apply(forward.matrix, np.zeros((1, 2))), [[807.98, 73097.66]], atol=0.01)


MAPS = {
    "turned by 90 degrees": np.array([[0, -0.8, 900], [0.8, 0, 20], [0, 0, 1.0]]),
    "mirrored": np.array([[-0.8, 0, 900], [0, 0.8, 20], [0, 0, 1.0]]),
    "turned by 12 degrees": np.array([[0.78, -0.17, 40], [0.17, 0.78, 20], [0, 0, 1.0]]),
}


def write_key_points(path: Path, matrix: np.ndarray, fixed: np.ndarray, noise: float = 0.0) -> Path:
    moving = align.apply(matrix, fixed) + noise * np.random.default_rng(0).standard_normal(fixed.shape)
    lines = ["fixedX,fixedY,alignmentX,alignmentY"]
    lines += [",".join(f"{v:.6f}" for v in [*a, *b]) for a, b in zip(fixed, moving, strict=True)]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("name", MAPS)
def test_key_points_give_the_map_of_the_matrix(tmp_path: Path, name: str) -> None:
    fixed = np.random.default_rng(1).uniform(0, 1000, (20, 2))
    found = align.read_alignment(write_key_points(tmp_path / "k.csv", MAPS[name], fixed), from_slide=True)
    np.testing.assert_allclose(found.matrix, MAPS[name], atol=1e-4)
    assert (found.source, found.points) == ("key points", 20)
    assert found.residual_px0 == pytest.approx(0, abs=1e-4)
    np.savetxt(tmp_path / "m.csv", np.linalg.inv(MAPS[name]), delimiter=",")
    np.testing.assert_allclose(align.read_alignment(tmp_path / "m.csv", from_slide=True).matrix, MAPS[name], atol=1e-6)


def test_key_points_are_fitted_all_of_them_and_their_residual_told(tmp_path: Path) -> None:
    fixed = np.random.default_rng(1).uniform(0, 1000, (200, 2))
    found = align.read_alignment(write_key_points(tmp_path / "k.csv", MAPS["mirrored"], fixed, noise=3.0))
    assert found.residual_px0 == pytest.approx(3 * np.sqrt(2), rel=0.15)
    np.testing.assert_allclose(found.matrix[:2, 2], [900, 20], atol=1.5)  # three points alone would be some 5 px off


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fixedX,fixedY,alignmentX\n1,2,3", r"columns \['alignmentY'\] are missing"),
        ("fixedX,fixedY,alignmentX,alignmentY\n1,2,3,4\n5,6,7,9", "2 key points; a map needs three or more"),
        ("fixedX,fixedY,alignmentX,alignmentY\n1,1,1,1\n2,2,2,2\n3,3,3,3", "3 key points lie on one line"),
        ("fixedX,fixedY,alignmentX,alignmentY\n1,1,1,x\n2,2,2,2\n3,3,3,3", "key points are no numbers"),
        ("fixedX,fixedY,alignmentX,alignmentY\n1,1,1,nan\n2,2,2,2\n3,1,3,3", "all of them numbers"),
        ("fixedX,fixedY,alignmentX,alignmentY\n", "0 key points"),
        ("1,0,0,0\n0,1,0,0\n0,0,1,0", "no invertible affine 3 x 3 matrix"),
        ("2,4,1\n1,2,5\n0,0,1", "no invertible affine 3 x 3 matrix"),
        ("", "no invertible affine 3 x 3 matrix"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*input contained no data.*:UserWarning")
def test_alignment_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        align.read_alignment(tmp_path / "m.csv")


def test_an_image_is_no_alignment_file(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"m\.csv: not a csv of numbers"):
        align.read_alignment(tmp_path / "m.csv")
    with pytest.raises(ValueError, match=r"none\.csv: no such alignment file"):
        align.read_alignment(tmp_path / "none.csv")


def test_a_map_that_no_scanner_could_give() -> None:
    path = Path("m.csv")
    assert align.check_scale(np.diag([0.8, -0.8, 1]), 0.2125, path) == []
    assert "stretches one direction by 25.0 %" in align.check_scale(np.diag([1.0, 0.8, 1]), 0.2125, path)[0]
    with pytest.raises(ValueError, match=r"m\.csv: makes a pixel of the slide 5\.31e-05 um wide"):
        align.check_scale(np.diag([4000.0, 4000, 1]), 0.2125, path)  # a map from mm
    with pytest.raises(ValueError, match=r"makes a pixel of the slide 10\.6 um wide"):
        align.check_scale(np.diag([0.02, 0.02, 1]), 0.2125, path)
