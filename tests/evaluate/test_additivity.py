"""Additivity: exact where a model tells every footprint one density and one composition, and told where it does not."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from storm import export, files, inference, store
from storm.evaluate import additivity
from storm.evaluate.additivity import OWN_SIZE, PARTS, SIDE_UM, SIZE_OF_WHOLE, Expected
from tests import untrained

GENES = list(untrained.GENES.ids[:20])


def load(folder: Path) -> export.Pretrained:
    return export.load(export.export(untrained.write_checkpoint(folder / "run"), folder / "model"))


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> store.SlideStore:
    return store.SlideStore(untrained.write_store(tmp_path_factory.mktemp("noise")))


def test_the_parts_tile_the_square_and_the_squares_lie_on_tissue(noise: store.SlideStore) -> None:
    centre = additivity.squares(noise)
    assert 20 < len(centre) <= additivity.MOST
    corners = centre[:, None] + SIDE_UM / 2 * np.array([[-1, -1], [1, 1]])
    for col, row in np.floor(corners / 112).reshape(-1, 2):
        assert (int(row), int(col)) in noise.tile_index
    assert (additivity.parts(centre, 1) == centre).all()
    for n in PARTS:
        own = additivity.parts(centre, n).reshape(len(centre), n * n, 2) - centre[:, None]
        covered = {(round(x / SIDE_UM * n + n / 2 - 0.5), round(y / SIDE_UM * n + n / 2 - 0.5)) for x, y in own[3]}
        assert len(covered) == n * n and np.abs(own).max() == pytest.approx((SIDE_UM - SIDE_UM / n) / 2)


def test_one_density_and_one_composition_are_additive(noise: store.SlideStore, tmp_path: Path) -> None:
    """log mu = log area + a constant of the gene: what a model with zero heads says."""
    pretrained = load(tmp_path)
    pretrained.model.decoder.ask.weight.data.zero_()
    pretrained.model.depth.out.weight.data.zero_()
    found = additivity.measure(pretrained, [noise], GENES)
    assert found["squares"] == len(additivity.squares(noise)) and found["genes"] == 20
    assert [(row["told"], row["side_um"]) for row in found["rows"]] == [
        (told, SIDE_UM / n) for told in (OWN_SIZE, SIZE_OF_WHOLE) for n in PARTS
    ]
    for row in found["rows"]:
        for name in ("log_ratio", "depth", "shares"):
            assert row[name] == pytest.approx([0, 0, 0], abs=1e-5), row
    assert "| told their own size | 8 | 1.000 (1.000 to 1.000) |" in additivity.text(found)
    assert files.dump_json(found)


def test_what_the_size_adds_is_told_apart(noise: store.SlideStore, tmp_path: Path) -> None:
    """A model whose size moves its answers: off as it is, and otherwise where all are told one size."""
    found = additivity.measure(load(tmp_path), [noise], GENES)
    own, whole = (
        {row["side_um"]: row for row in found["rows"] if row["told"] == told} for told in (OWN_SIZE, SIZE_OF_WHOLE)
    )
    assert any(abs(own[SIDE_UM / n]["log_ratio"][1] - whole[SIDE_UM / n]["log_ratio"][1]) > 1e-3 for n in PARTS)
    for row in found["rows"]:
        assert row["log_ratio"] == sorted(row["log_ratio"]) and -1 <= row["pearson"] <= 1


def test_logs_by_hand() -> None:
    whole = Expected(np.array([[4.0, 10.0], [2.0, 3.0]]), np.array([20.0, 10.0]))
    of_parts = Expected(np.array([[1.0, 5], [3, 15], [1, 1], [1, 2]]), np.array([10.0, 30, 5, 5]))
    found = additivity.logs(whole, of_parts)
    assert np.exp(found.summed) == pytest.approx(np.array([[4, 20], [2, 3]]))
    assert np.exp(found.depth) == pytest.approx([2, 1])
    summary = additivity._summary([found])
    assert summary["log_ratio"][1] == pytest.approx(0) and summary["pearson"] == pytest.approx(1)


def test_one_call_answers_as_many_do(noise: store.SlideStore, tmp_path: Path) -> None:
    pretrained = load(tmp_path)
    slide, centre = inference.prepare(pretrained, noise), additivity.squares(noise)[:5]
    genes = np.arange(20)
    found = additivity.expected(pretrained, slide, centre, genes)
    for n, of in zip((1, *PARTS), found, strict=True):
        at = additivity.parts(centre, n)
        alone = inference.predict(
            pretrained, inference.with_squares(slide, at, np.full(len(at), SIDE_UM / n, np.float32)), genes=genes
        )
        assert of.mu == pytest.approx(alone.mu.astype(np.float64), rel=1e-4) and of.mu.shape == (5 * n * n, 20)


def test_a_slide_without_tissue_enough_is_skipped(noise: store.SlideStore, tmp_path: Path) -> None:
    small = store.SlideStore(noise.path)
    small.info = dataclasses.replace(small.info, width_px0=100, height_px0=100)
    found = additivity.measure(load(tmp_path), [small], GENES)
    assert additivity.text(found) == "Skipped: no square of 56 um lies on stored tiles alone."
