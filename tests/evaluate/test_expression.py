"""Protocol 2: patches, baselines that look where they may, controls near zero, and the floors on real sections."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from scipy import sparse

from storm import store
from storm.evaluate import baselines, expression, sections, targets
from storm.evaluate.expression import Cohort
from storm.evaluate.sections import Section
from tests import untrained

REPO = Path(__file__).resolve().parent.parent.parent


def test_a_patch_is_stitched_from_the_tiles_it_touches(tmp_path: Path) -> None:
    opened = store.SlideStore(untrained.write_store(tmp_path, side=5))
    whole = np.full((160, 160, 3), 255, np.uint8)
    for i, (row, col) in enumerate(opened.place):
        whole[row * 32 : row * 32 + 32, col * 32 : col * 32 + 32] = simplejpeg.decode_jpeg(opened.jpeg(i))
    xy_um = np.array([[200.0, 200.0], [301.0, 410.0], [10.0, 555.0]])
    found = sections.patches(opened, xy_um)
    padded = np.pad(whole, ((32, 32), (32, 32), (0, 0)), constant_values=255)
    for patch, (x, y) in zip(found, xy_um, strict=True):
        left, top = round(x / 3.5 - 16) + 32, round(y / 3.5 - 16) + 32
        np.testing.assert_array_equal(patch, padded[top : top + 32, left : left + 32])
    assert found.shape == (3, 32, 32, 3)


def test_neighbours_are_those_at_the_pitch() -> None:
    xy = np.stack(np.meshgrid(np.arange(4) * 100.0, np.arange(4) * 100.0), -1).reshape(-1, 2)
    values = np.arange(16.0)[:, None]
    found = sections.with_neighbours(values, xy)
    np.testing.assert_array_equal(found[:, :1], values)
    assert found[0, 1] == np.mean([0, 1, 4, 5])
    assert found[5, 1] == np.mean([0, 1, 2, 4, 5, 6, 8, 9, 10])


def _cohort(seed: int = 0, genes: int = 60) -> Cohort:
    """Sections in which colour drives two thirds of the genes, up or down, and depth is independent of it."""
    rng = np.random.default_rng(seed)
    law = np.array([0.0, 0.6, -0.6])[np.arange(genes) % 3]

    def section(name: str, n: int = 150) -> Section:
        colour = rng.normal(size=(n, 15))
        share = np.exp(np.outer(colour[:, 0], law))
        depth = np.exp(rng.normal(7, 0.5, n))
        counts = rng.poisson(depth[:, None] * share / share.sum(1, keepdims=True))
        xy_um = rng.uniform(0, 5000, (n, 2))
        return Section(
            name, ("study", name), np.arange(n), [f"p{i}" for i in range(n)], xy_um,
            sparse.csr_array(counts.astype(float)), counts.sum(1), colour, sections.with_neighbours(colour, xy_um),
        )  # fmt: skip

    train, test = [section("a"), section("b")], [section("c"), section("d")]
    return Cohort(train, test, {}, [str(i) for i in range(genes)], "donor", "")


def test_donors_of_two_studies_with_one_name_are_two() -> None:
    cohort = _cohort()
    train = [dataclasses.replace(s, donor=(study, "P1")) for s, study in zip(cohort.train, ("x", "y"), strict=True)]
    both = dataclasses.replace(cohort, train=train, test=train)
    assert both.donors == 2 and expression._sizes(train)["donors"] == 2
    assert len(np.unique(expression.inputs([*train, train[0]]).fold)) == 2


def test_a_section_knows_its_study_and_one_without_counts_is_refused(tmp_path: Path) -> None:
    opened = store.SlideStore(untrained.write_store(tmp_path, side=5))
    ids = list(opened.genes().ids)
    assert sections.open_section(opened, ids).donor == ("study1", untrained.PLANTED)
    bare = store.SlideStore(untrained.write_store(tmp_path, "bare", side=5, measured=False))
    with pytest.raises(ValueError, match=r"bare\.zarr\.zip: none of its profiles has a count"):
        sections.open_section(bare, ids)


def test_baselines_find_what_is_there_and_the_control_does_not() -> None:
    found = expression.baseline_scores(_cohort(), "lognorm", np.arange(60), 0)
    driven = np.arange(60) % 3 > 0
    for name in ("colour ridge", "colour MLP, 2 layers", "colour kNN"):
        assert found[name].genes[driven].mean() > 0.5, name
        assert abs(found[name].genes[~driven].mean()) < abs(found[name].genes[driven].mean()) / 2
    assert found["slide mean"].value == 0
    assert abs(found["colour ridge, patches shuffled"].value) < 0.03
    assert abs(found["predicted depth only (from colour)"].value) < 0.1
    entry = found["colour ridge"].json()
    assert entry["low"] < entry["value"] < entry["high"]


def test_no_baseline_but_the_reference_looks_at_test_depth_and_none_at_test_counts() -> None:
    cohort = _cohort()
    train, test = (expression.inputs(part, [s.colour for s in part]) for part in (cohort.train, cohort.test))
    y = np.concatenate([targets.lognorm(s.counts, s.depth) for s in cohort.train])
    other = dataclasses.replace(test, log_depth=test.log_depth[::-1])
    for method in baselines.METHODS:
        first, second = (method.predict(train, y, t, np.random.default_rng(0))[0] for t in (test, other))
        assert np.array_equal(first, second) == (method.role != "reference"), method.name


def test_image_features_are_told_from_colour() -> None:
    """Features that hold what drives the genes, seen through a random mixture, and colour that holds nothing."""
    rng = np.random.default_rng(3)
    cohort = _cohort()
    mix = rng.normal(size=(1, 40))
    image = [
        [s.colour[:, :1] @ mix + 0.1 * rng.normal(size=(len(s.rows), 40)) for s in part]
        for part in (cohort.train, cohort.test)
    ]
    blind = [
        [dataclasses.replace(s, colour=rng.normal(size=s.colour.shape), around=rng.normal(size=s.around.shape))
         for s in part] for part in (cohort.train, cohort.test)
    ]  # fmt: skip
    cohort = dataclasses.replace(cohort, train=blind[0], test=blind[1])
    found = expression.baseline_scores(
        cohort, "lognorm", np.arange(60), 0, expression.Seen((image[0], image[1]), (image[0], image[1]))
    )
    driven = np.arange(60) % 3 > 0
    for method in baselines.METHODS:
        if method.of_image:
            assert found[method.name].genes[driven].mean() > 0.5, method.name
    assert abs(found["colour ridge"].value) < 0.1
    best, worst = found["ridge on image features"], found["colour ridge"]
    assert best.minus(worst).json()["low"] > 0 and best.minus(worst).genes.shape == (60,)


def test_scores_are_reproducible() -> None:
    first, second = (expression.baseline_scores(_cohort(), "raw", np.arange(20), 5) for _ in range(2))
    assert {k: v.json() for k, v in first.items()} == {k: v.json() for k, v in second.items()}


@pytest.fixture(scope="module")
def her2st(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Section]:
    from data_prep import build

    folder = tmp_path_factory.mktemp("her2st")
    words = [str(REPO / "configs/her2st.csv"), "--root", str(real_data / "her2st"), "--store", str(folder)]
    assert build.main([*words, "--config", str(REPO / "configs/prep_her2st.yaml"), "--workers", "2"]) == 0
    stores = {name: store.SlideStore(folder / f"her2st_{name}.zarr.zip") for name in ("C2", "C3", "C4")}
    common = sorted(set.intersection(*(set(s.genes().ids) for s in stores.values())))
    return {name: sections.open_section(opened, common) for name, opened in stores.items()}


# Measured independently of this code on the same files: (colour ridge, true depth, colour -> depth, residual ridge).
FLOORS = {"C2": (0.256, 0.268, 0.212, 0.147), "C3": (0.304, 0.273, 0.237, 0.191), "C4": (0.306, 0.304, 0.266, 0.117)}


@pytest.mark.parametrize("test", sorted(FLOORS))
def test_floors_on_her2st(her2st: dict[str, Section], test: str) -> None:
    train = [section for name, section in her2st.items() if name != test]
    genes = [str(i) for i in range(her2st[test].counts.shape[1])]
    cohort = Cohort(train, [her2st[test]], {}, genes, "section", "")
    columns = expression.gene_rules(cohort)["var"]
    found = {k: v.value for k, v in expression.baseline_scores(cohort, "lognorm", columns, 0).items()}
    residual = expression.baseline_scores(cohort, "residual", columns, 0)["colour ridge"].value
    names = ("colour ridge", "true depth (measured, no image)", "predicted depth only (from colour)")
    np.testing.assert_allclose([*(found[name] for name in names), residual], FLOORS[test], atol=0.02)
    assert abs(found["colour ridge, patches shuffled"]) < 0.06
