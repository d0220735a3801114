"""Unseen genes: those outside the vocabulary that the table describes are scored, and nothing else."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from storm import export, files, store
from storm.descriptors import Descriptors
from storm.evaluate import protocols, sections, statistics, unseen
from storm.evaluate.expression import Cohort
from storm.evaluate.sections import Section
from tests import untrained

NOVEL = "ENSG99999999999"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> export.Pretrained:
    folder = tmp_path_factory.mktemp("model")
    config = dataclasses.replace(untrained.MODEL, descriptor_width=4)
    checkpoint = untrained._write(
        folder / "run" / "checkpoints" / "step_0000020", config, untrained.GENES, untrained.reference(), 20
    )
    return export.load(export.export(checkpoint, folder / "model"))


def test_a_gene_that_is_described_is_scored(pretrained: export.Pretrained, tmp_path: Path) -> None:
    opened = store.SlideStore(untrained.write_store(tmp_path))
    section: Section = sections.open_section(opened, [untrained.GENES.ids[0]])
    cohort = Cohort([], [section], {section.slide_id: opened}, [untrained.GENES.ids[0]], "donor", "0" * 64)
    rng = np.random.default_rng(0)
    table = Descriptors(
        (NOVEL, "ENSG88888888888", untrained.GENES.ids[3]), rng.normal(size=(3, 4)).astype(np.float32), "t"
    )
    np.savez(tmp_path / "table.npz", gene_id=np.array(table.ids), descriptor=table.values)
    known = protocols.Known(descriptors=tmp_path / "table.npz")
    found = protocols.run(pretrained, cohort, 0, known, None, "unseen")
    assert found["genes"] == 1 and set(found["by_gene"]) == {NOVEL} and len(found["model_hash"]) == 64
    own = found["scores"][unseen.MODEL]
    assert own["low"] <= own["value"] <= own["high"] and abs(own["value"]) < 0.3  # the counts are noise
    assert found["scores"][unseen.DEALT]["value"] == pytest.approx(own["value"]) and found["p"] > 0.9  # one gene alone
    assert f"| {unseen.MODEL} |" in protocols.text("unseen", found)
    none = unseen.evaluate(pretrained, cohort, Descriptors(table.ids[2:], table.values[2:], "t"))
    assert "share no gene" in none["skipped"]
    with pytest.raises(ValueError, match="t: has 3 columns"):
        unseen.evaluate(pretrained, cohort, Descriptors(table.ids, table.values[:, :3], "t"))
    assert files.dump_json(found)


def test_without_a_table_it_says_what_is_missing(pretrained: export.Pretrained) -> None:
    cohort = Cohort([], [], {}, [], "donor", "0" * 64)
    assert "--descriptors" in unseen.evaluate(pretrained, cohort, None)["skipped"]


def test_a_deal_of_descriptors_permutes_the_predictions(pretrained: export.Pretrained, tmp_path: Path) -> None:
    opened = store.SlideStore(untrained.write_store(tmp_path))
    section = sections.open_section(opened, [untrained.GENES.ids[0]])
    cohort = Cohort([], [section], {section.slide_id: opened}, [untrained.GENES.ids[0]], "donor", "0" * 64)
    rows, order = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32), np.array([3, 0, 4, 1, 2])
    plain, dealt = (unseen._predicted(pretrained, cohort, [section], given)[0] for given in (rows, rows[order]))
    np.testing.assert_allclose(dealt, plain[:, order], rtol=1e-5)


def test_own_predictions_stand_out_of_the_deals() -> None:
    rng = np.random.default_rng(1)
    measured = [rng.normal(size=(50, 6)) for _ in range(2)]
    predicted = [y + 0.5 * rng.normal(size=y.shape) for y in measured]
    drawn = unseen.dealt(predicted, measured, rng)
    own = np.mean([statistics.pearson(x, y) for x, y in zip(predicted, measured, strict=True)])
    assert len(drawn) == unseen.DRAWS and abs(drawn.mean() - own / 6) < 0.05 and own > np.percentile(drawn, 99)
    assert unseen._pearsons(np.zeros((9, 2)), np.ones((9, 2))).tolist() == [[0, 0], [0, 0]]
