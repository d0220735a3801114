"""The report of an untrained model on synthetic tissue: complete, reproducible, honest, silent on donors."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from storm import export, files
from storm.evaluate import figures, report
from storm.evaluate.protocols import Known
from tests import untrained


@pytest.fixture(scope="module")
def model(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return export.export(untrained.shards_checkpoint(tiny_shards, folder / "run"), folder / "model")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    values = {"train/loss/expr": 1.0, "train/loss/depth": None, "train/loss/image": 0.5}
    lines: list[dict] = [{"step": s, "train/loss": 2 - s / 100, **values} for s in (1, 2, 3, 4, 3, 4, 5)]
    lines.insert(4, {"step": 2, "event": "resumed", "lines_dropped": 2})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def written(
    model: Path, run: Path, tiny_store: Path, tiny_shards: Path, synthetic_tiny: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    out = tmp_path_factory.mktemp("report") / "report"
    report.write(report.Sources(model, tiny_store, tiny_shards, Known(synthetic_tiny / "truth"), run), out)
    return out


def test_everything_is_there(written: Path) -> None:
    assert {p.name for p in written.iterdir()} == {
        "report.md", "evaluation.json", "table.csv", "table.md", "classes.csv", "classes.md", "loss_curve.png",
        "gene_map.png",
    }  # fmt: skip
    for name in ("loss_curve.png", "gene_map.png"):
        assert (written / name).read_bytes().startswith(b"\x89PNG") and (written / name).stat().st_size > 20_000
        assert f"]({name})" in (written / "report.md").read_text()


def test_the_table_holds_every_method_in_every_column(written: Path) -> None:
    rows = list(csv.DictReader((written / "table.csv").open()))
    columns = {"lognorm/var", "raw/var", "residual/var", "lognorm/binned"}
    methods = {row["method"] for row in rows}
    assert len(methods) == 14 and len(rows) == 56 and {row["column"] for row in rows} == columns
    assert all(float(row["low"]) <= float(row["high"]) for row in rows)
    values = files.read_json(written / "evaluation.json")
    assert report.score_table(values) in (written / "table.md").read_text()  # whatever the order of its keys
    assert values["model_trained_on_these_shards"] is True
    assert values["input"] == "H&E only" and values["split_by"] == "donor"
    assert {len(values[key]) for key in ("model_hash", "shards_sha256")} == {64}
    control = next(m for m in values["methods"] if m["role"] == "control")
    assert abs(control["scores"]["lognorm/var"]["value"]) < 0.08


def test_gene_classes_lie_between_control_and_oracle(written: Path) -> None:
    values = files.read_json(written / "evaluation.json")["gene_classes"]
    classes = values["classes"]
    for name, donors in values["model_by_donor"].items():
        assert len(donors) == 1 and donors[0] == pytest.approx(classes[name]["scores"][values["methods"][0]])
    assert sorted(classes) == ["a", "b", "c", "d", "e"]
    for name in "abcd":
        scores = classes[name]["scores"]
        assert scores["oracle"] > max(scores["colour ridge"], 0.2)
        assert abs(scores["colour ridge, patches shuffled"]) < 0.1
    assert abs(classes["e"]["scores"]["oracle"]) < 0.1 and classes["e"]["skill"] is None
    assert classes["a"]["scores"]["colour ridge"] > 0.2


def test_no_donor_slide_or_path_is_told(written: Path, tiny_shards: Path, synthetic_tiny: Path) -> None:
    slides = files.read_json(tiny_shards / "manifest.json")["slides"]
    for path in written.glob("*.*"):
        text = path.read_bytes()
        for word in [*slides, "donor00", "donor02", str(synthetic_tiny)]:
            assert word.encode() not in text, (path.name, word)


def test_the_same_evaluation_writes_the_same_bytes(
    written: Path, model: Path, run: Path, tiny_store: Path, tiny_shards: Path, synthetic_tiny: Path, tmp_path: Path
) -> None:
    sources = report.Sources(model, tiny_store, tiny_shards, Known(synthetic_tiny / "truth"), run)
    report.write(sources, tmp_path / "again")
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_split_by_section_is_printed_with_every_table(written: Path) -> None:
    values = files.read_json(written / "evaluation.json") | {
        "split_by": "section",
        "model_trained_on_these_shards": False,
    }
    text = report.report_text(values, curve=False)
    assert text.index("**split_by: section.**") < text.index("| method |")
    assert "was not trained on these shards" in text and "loss_curve" not in text


def test_what_others_wrote_is_text_in_the_report(written: Path) -> None:
    values = files.read_json(written / "evaluation.json")
    values["model_code"] = "<script>alert(1)</script>|x\n# y"
    values["gene_classes"]["classes"]["<b>"] = values["gene_classes"]["classes"]["a"]
    text = report.report_text(values, curve=False)
    assert "<script>" not in text and "&lt;script&gt;" in text and "<b>" not in text and "\n# y" not in text


def test_no_cell_is_a_formula() -> None:
    rows: list[list[object]] = [
        ["=HYPERLINK(1)", "@x", "-0.1234", -0.5, "+1.5", "-2+3", "a"],
        ["\tb", "-nan", "", None, "-", "x=1", 3],
    ]
    assert list(csv.reader(report._csv(rows).decode().splitlines())) == [
        ["'=HYPERLINK(1)", "'@x", "-0.1234", "-0.5", "+1.5", "'-2+3", "a"],
        ["'\tb", "-nan", "", "", "'-", "x=1", "3"],
    ]


def test_a_symbol_that_looks_like_mathematics_is_drawn(tmp_path: Path) -> None:
    xy_um, values = np.random.default_rng(0).uniform(0, 2000, (20, 2)), np.arange(40.0).reshape(20, 2)
    image = np.full((50, 50, 3), 255, np.uint8)
    figures.gene_map(image, 0.025, xy_um, 55.0, [r"$\frac$", "A$B$"], values, values, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 10_000


def test_what_is_no_report_is_not_replaced(model: Path, tiny_store: Path, tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    with pytest.raises(ValueError, match="is no report"):
        report.write(report.Sources(model, tiny_store, tiny_shards), tmp_path / "mine")


def test_wrong_folders_are_named(model: Path, tiny_store: Path, tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"log\.jsonl: no such log"):
        report.write(report.Sources(model, tiny_store, tiny_shards, run=tmp_path), tmp_path / "out")
    with pytest.raises(ValueError, match="no truth of this slide"):
        report.write(report.Sources(model, tiny_store, tiny_shards, Known(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_resumed_runs_later_lines_count(run: Path) -> None:
    assert [line["step"] for line in report.read_log(run)] == [1, 2, 3, 4, 5]


def test_a_changed_store_is_refused(model: Path, tiny_store: Path, tiny_shards: Path, tmp_path: Path) -> None:
    for path in tiny_store.glob("*.zarr.zip"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    victim = sorted(tmp_path.glob("*.zarr.zip"))[0]
    with victim.open("ab") as handle:
        handle.write(b"\0")
    with pytest.raises(ValueError, match=f"{victim.name}: not the store .*into {tiny_shards} .* of one corpus"):
        report.write(report.Sources(model, tmp_path, tiny_shards), tmp_path / "out")
