"""Cells by how they are read: the arithmetic of discs, and the whole protocol on cells of the synthetic tissue."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data_prep import build, pack
from data_prep.synthetic import SIZES
from data_prep.synthetic.corpus import COLUMNS, manifest_row, sections, write_section
from storm import cli, export, files
from storm.evaluate import additivity, footprints
from storm.evaluate.additivity import PARTS
from storm.evaluate.expression import Cohort, open_cohort
from storm.evaluate.footprints import ALL, RIDGE, centred, discs, open_cells
from storm.evaluate.reads import GRID, OWN_TILE, READS, TILE_MEAN
from storm.evaluate.sections import open_section, take
from storm.store import SlideStore
from tests import untrained
from tests.conftest import PREP_TINY


def test_discs_hold_cells_that_are_within_their_radius_of_one_centre() -> None:
    rng = np.random.default_rng(0)
    xy_um = rng.uniform(0, 2000, (20_000, 2))
    disc = discs(xy_um)
    assert (disc >= 0).mean() == pytest.approx(np.pi / 4 * 55**2 / (100 * 50 * 3**0.5), abs=0.02)
    numbers, sizes = np.unique(disc[disc >= 0], return_counts=True)
    assert sizes.min() >= 2 and abs(len(numbers) - 2000**2 / (100 * 50 * 3**0.5)) < 45
    middle = np.array([xy_um[disc == i].mean(0) for i in numbers])
    assert max(np.linalg.norm(np.ptp(xy_um[disc == i], axis=0)) for i in numbers) <= 55 * 2**0.5
    apart = np.linalg.norm(middle[:, None] - middle[None], axis=-1)
    assert apart[apart > 0].min() > 60


def test_a_cell_alone_in_its_disc_is_in_none() -> None:
    at = np.array([[100.0, 0.0], [110, 5], [200, 0], [250, 0], [150, 86.6]])
    assert discs(at).tolist()[2:] == [-1, -1, -1] and len(set(discs(at)[:2])) == 1 and discs(at)[0] >= 0


def test_the_mean_of_each_disc_is_taken() -> None:
    values = np.array([[1.0, 2], [3, 2], [10, 0], [14, 4], [12, 8]])
    assert centred(values, np.array([7, 7, 3, 3, 3])).tolist() == [[-1, 0], [1, 0], [-2, -4], [2, 0], [0, 4]]
    assert (centred(np.array([[0.1], [0.1], [0.1]]), np.zeros(3, int)) == 0).all()


def test_discs_in_one_tile_and_cells_whose_own_tile_is_not_whole(tmp_path: Path) -> None:
    opened = SlideStore(untrained.write_store(tmp_path))  # tiles of 112 um; that of row 1, column 1 is not stored
    section = take(open_section(opened, [untrained.GENES.ids[0]]), np.arange(5))
    at = np.array([[105, 173.2], [118, 173.2], [600, 173.2], [605, 173.2], [300, 173.2]])
    found = open_cells(dataclasses.replace(section, xy_um=at), opened, np.arange(5.0)[:, None])
    assert found.in_one_tile.tolist() == [False, False, True, True] and found.share.ravel().tolist() == [0, 1, 2, 3]
    assert found.section.ids == section.ids[:4] and found.white == 0.5
    assert found.disc[0] == found.disc[1] != found.disc[2] == found.disc[3]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two donors' sections of cells, small: tissue, stores, shards and the export of an untrained model."""
    folder, size = tmp_path_factory.mktemp("cells"), SIZES["pair"]
    chosen = [section for section in sections(size) if section.platform == "xenium"]
    for section in chosen:
        write_section(folder / "tissue", size, 0, section)
    rows = [manifest_row(section, size.mpp) for section in chosen]
    lines = [",".join(COLUMNS), *(",".join(str(row.get(name, "")) for name in COLUMNS) for row in rows)]
    (folder / "tissue" / "manifest.csv").write_text("\n".join(lines) + "\n")
    words = [str(folder / "tissue" / "manifest.csv"), "--store", str(folder / "stores"), "--workers", "1"]
    assert build.main([*words, "--config", str(PREP_TINY)]) == 0
    words = ["--store", str(folder / "stores"), "--out", str(folder / "shards"), "--config", str(PREP_TINY)]
    assert pack.main(words) == 0
    untrained.shards_checkpoint(folder / "shards", folder / "run")
    assert cli.main(["export", "--run", str(folder / "run"), "--out", str(folder / "model")]) == 0
    return folder


def evaluate(cells: Path, out: Path, *more: str) -> dict:
    words = [word for name in ("model", "store", "shards") for word in (f"--{name}", str(cells / name))]
    words[3] = str(cells / "stores")
    assert cli.main(["evaluate", *words, "--protocols", "footprints", "--out", str(out), *more]) == 0
    return files.read_json(out / "evaluation.json")["protocols"]["footprints"]


def test_the_tables_of_an_untrained_model(cells: Path, tmp_path: Path) -> None:
    found = evaluate(cells, tmp_path / "report", "--truth", str(cells / "tissue" / "truth"))
    text = (tmp_path / "report" / "report.md").read_text()
    assert found["asked"]["sections"] == 1 and 100 < found["asked"]["cells"] < 400
    assert set(found["cells"]) == {*"abcde", ALL} and found["genes"][ALL] == sum(found["genes"][c] for c in "abcd")
    for name, of in found["cells"].items():
        for shown in ("measured", "truth"):
            scores = of[shown]["scores"]
            assert set(scores) == set(READS)
            constant = name == "e" and shown == "truth"
            assert constant or len({entry["value"] for entry in scores.values()}) == 3, name
            for read in (OWN_TILE, TILE_MEAN):
                less = of[shown]["less_grid"][read]
                assert less["value"] == pytest.approx(scores[read]["value"] - scores[GRID]["value"])
                assert less["low"] <= less["value"] <= less["high"]
    of, bounds = found["cells"]["a"], found["cells"]["a"]["bounds"]
    assert bounds["oracle"] > bounds[RIDGE] + 0.02
    room = bounds["oracle"] - bounds[RIDGE]
    for read in READS:
        assert of["skill"][read] == pytest.approx((of["measured"]["scores"][read]["value"] - bounds[RIDGE]) / room)
    assert of["skill_less_grid"][OWN_TILE]["value"] == pytest.approx(of["skill"][OWN_TILE] - of["skill"][GRID])
    assert 0 < found["inside"]["in one tile"]["cells"] < found["inside"]["all discs"]["cells"]
    assert found["inside"]["all discs"]["cells"] == found["asked"]["cells"]
    assert len(found["additivity"]["rows"]) == 2 * len(PARTS)
    for head in ("### Cells, with what was measured", "### Inside a spot's area, with the truth: in one tile"):
        assert head in text
    assert "d01s1" not in text and "donor01" not in text


def test_an_oracle_scores_one_inside_a_spot(cells: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth in place of the answers of two ways, and each disc's mean in place of those of the third."""

    def known(pretrained: object, cohort: Cohort, asked: list[footprints.Cells], genes: list[str]) -> tuple:
        share = [np.log(of.share) for of in asked]
        means = [x - centred(x, of.disc) for x, of in zip(share, asked, strict=True)]
        lognorm = [np.log1p(1e4 * of.share) for of in asked]
        answers = {GRID: share, OWN_TILE: [x + m for x, m in zip(share, means, strict=True)], TILE_MEAN: means}
        return dict.fromkeys(READS, lognorm), answers

    monkeypatch.setattr(footprints, "predictions", known)
    pretrained = export.load(cells / "model")
    cohort = open_cohort(pretrained, cells / "stores", cells / "shards")
    found = footprints._by_truth(pretrained, cohort, cells / "tissue" / "truth", 0)
    for of in found["inside"].values():
        for name in "abcd":
            scores = of["classes"][name]["scores"]
            assert scores[GRID]["value"] == pytest.approx(1) and scores[OWN_TILE]["value"] == pytest.approx(1)
            assert scores[TILE_MEAN]["value"] == 0
        assert {entry["value"] for entry in of["classes"]["e"]["scores"].values()} == {0}  # the truth is constant
    assert found["inside"].keys() == {"all discs", "in one tile"}
    assert found["cells"]["a"]["skill"] == pytest.approx(dict.fromkeys(READS, 1.0))
    assert found["cells"][ALL]["truth"]["scores"][GRID]["value"] == pytest.approx(1)


def test_without_truth_the_additivity_alone_is_told(cells: Path, tmp_path: Path) -> None:
    found = evaluate(cells, tmp_path / "report")
    assert "cells" not in found and found["additivity"]["squares"] > 0
    assert "no truth is given; --truth names" in (tmp_path / "report" / "report.md").read_text()


def test_a_truth_that_is_given_is_not_asked_for_where_no_cells_share_a_disc(
    cells: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprints, "discs", lambda xy_um: np.full(len(xy_um), -1))
    monkeypatch.setattr(additivity, "measure", lambda *given: {"skipped": "not asked here"})
    pretrained = export.load(cells / "model")
    cohort = open_cohort(pretrained, cells / "stores", cells / "shards")
    found = footprints.evaluate(pretrained, cohort, 0, cells / "tissue" / "truth")
    said = footprints.text(found)
    assert "--truth" not in said and "no two cells of 1 sections share a disc of 55 um" in said
