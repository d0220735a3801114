"""All protocols on the synthetic tissue with an untrained model: they run, say what they are, and claim nothing."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from storm import cli, export, files
from storm.evaluate import expression, protocols, transfer, uncertainty, within
from tests import untrained


@pytest.fixture(scope="module")
def values(tiny_store: Path, tiny_shards: Path, synthetic_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("protocols")
    checkpoint = untrained.shards_checkpoint(tiny_shards, folder / "run")
    assert cli.main(["export", "--run", str(folder / "run"), "--out", str(folder / "model")]) == 0
    assert checkpoint.is_dir()
    words = ["--model", str(folder / "model"), "--store", str(tiny_store), "--shards", str(tiny_shards)]
    words += ["--truth", str(synthetic_tiny / "truth"), "--out", str(folder / "report")]
    names = ",".join(name for name in protocols.NAMES if name != protocols.EXPRESSION)
    assert cli.main(["evaluate", *words, "--protocols", names]) == 0
    return {
        "model": folder / "model",
        "store": tiny_store,
        "text": (folder / "report" / "report.md").read_text(),
        **files.read_json(folder / "report/evaluation.json"),
    }


def test_each_protocol_is_reported_with_its_provenance(values: dict) -> None:
    found = values["protocols"]
    assert set(found) == set(protocols.NAMES) - {protocols.EXPRESSION}
    for name, of in found.items():
        assert f"# Report: {name} (protocol {of['protocol']})" in values["text"]
        if "skipped" not in of:
            assert of["split_by"] == "donor" and of["seed"] == 0 and of["input"], name
            assert {len(of[key]) for key in ("model_hash", "shards_sha256")} == {64}
            assert of["model_trained_on_these_shards"] is True and of["code"] and of["bootstrap"]
    for word in ("donor00", "donor02", "d00s0", "d02s0"):
        assert word not in values["text"] and word not in str(found)


def test_what_cannot_be_run_says_why(values: dict) -> None:
    skipped = {name: of["skipped"] for name, of in values["protocols"].items() if "skipped" in of}
    assert set(skipped) == {"retrieval", "transfer", "unseen", "footprints"}
    assert "align_width is 0" in skipped["retrieval"] and "trained on" in skipped["transfer"]
    assert "--descriptors" in skipped["unseen"] and "of cells" in skipped["footprints"]
    for reason in skipped.values():
        assert f"Skipped: {reason}." in values["text"]


def test_an_untrained_model_is_beaten(values: dict) -> None:
    shares = values["protocols"]["imputation"]["shares"]
    assert [entry["share"] for entry in shares] == [0.05, 0.5]
    half = {m["name"]: m["scores"]["all"]["value"] for m in shares[1]["methods"]}
    assert len(half) == 7 and half["ordinary kriging"] > 0.1
    assert shares[1]["versus_best_baseline"]["all"]["value"] < 0
    assert set(shares[1]["classes"]) == set("abcde") and "visible counts add to H&E" in values["text"]
    for backend in values["protocols"]["domains"]["backends"].values():
        assert len(backend["methods"]) == 8
        assert all(-0.5 <= m["ari"]["low"] <= m["ari"]["high"] <= 1 for m in backend["methods"].values())
    levels = values["protocols"]["probes"]["levels"]
    assert set(levels) == {"colour", "image features", "embedding, H&E only", "embedding, H&E and counts"}


def test_uncertainty_says_who_calibrates_and_claims_nothing_of_few(values: dict) -> None:
    found = values["protocols"]["uncertainty"]
    assert found["val"] == {"sections": 0, "donors": 0, "left_out": 0} and len(found["bins"]) == 5
    for donor in found["donors"]:
        assert donor["calibrated_by"] == "other test donors" and donor["guarantee"] is False
        noise = donor["methods"]["negative binomial"]
        assert 0 <= noise["covered"] <= 1 and 0.9 <= noise["promised"] <= 1
    assert "No guarantee" in values["text"]


def test_validation_sections_calibrate_where_there_are_any(
    values: dict, tiny_store: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """A training section taken for one of a validation donor: it is read over the cohort's genes, or left out."""
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    manifest = files.read_json(shards / "manifest.json")
    platform = {e["platform"] for e in manifest["slides"].values() if e["split"] == "test"}
    name = next(n for n, e in manifest["slides"].items() if e["split"] == "train" and e["platform"] in platform)
    manifest["slides"][name]["split"] = "val"
    files.write_json(shards / "manifest.json", manifest)
    pretrained = export.load(values["model"])
    cohort = expression.with_val(expression.open_cohort(pretrained, tiny_store, shards), tiny_store, shards)
    assert [s.slide_id for s in cohort.val] == [name] and cohort.val_left_out == 0
    (donor,) = uncertainty.evaluate(pretrained, cohort)["donors"]
    assert (donor["calibrated_by"], donor["calibrators"], donor["guarantee"]) == ("val donors", 1, False)
    assert 0 <= donor["methods"]["split-conformal"]["covered"] <= 1
    lacking = dataclasses.replace(cohort, gene_ids=[*cohort.gene_ids, "ENSG1"])
    assert expression.with_val(lacking, tiny_store, shards).val_left_out == 1


def test_transfer_reads_real_stores(values: dict, tiny_store: Path, tiny_shards: Path) -> None:
    """The same model, taken for one that was trained on legacy ST alone: the Visium donor is a new one."""
    pretrained = export.load(values["model"])
    data = {**pretrained.data, "platforms": {"st": pretrained.data["platforms"]["st"]}}
    cohort = expression.open_cohort(pretrained, tiny_store, tiny_shards)
    found = transfer.evaluate(dataclasses.replace(pretrained, data=data), cohort, 0)
    (group,) = found["groups"]
    assert (group["platform"], group["relation"], group["donors"]) == ("visium", "new donor", 1)
    assert set(group["scores"]) == {transfer.MODEL, transfer.SOURCE, transfer.TARGET}
    assert "ratio_to_within" not in group and found["trained_on"] == ["st"]
    assert group["scores"][transfer.SOURCE]["value"] > 0 and "new donor" in transfer.text(found)


def test_a_second_model_is_known_by_its_shards(
    values: dict, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its shard set names the donors of its training and validation, the export does not."""
    manifest = files.read_json(tiny_shards / "manifest.json")
    trained = [name for split in ("train", "val") for name in manifest["splits"].get(split, {"slides": []})["slides"]]
    model = values["model"]
    assert set(within._slides([manifest, {"splits": {}}], ("train", "test"))) == set(manifest["slides"]) - set(
        manifest["splits"].get("val", {"slides": []})["slides"]
    )
    found = within.open_within(model, [tiny_shards], symmetries=2)
    assert found.slides == set(trained) and found.pretrained.symmetries == 2
    assert found.donors == {(e["study"], e["donor"]) for n, e in manifest["slides"].items() if n in trained}
    checkpoint = untrained.shards_checkpoint(tiny_shards, tmp_path / "run")
    reference = files.read_json(checkpoint / "reference.json")
    files.write_json(checkpoint / "reference.json", reference | {"platforms": {"st": {"slides": 7, "profiles": 1}}})
    (checkpoint / "COMPLETE").unlink()
    untrained.seal(checkpoint)
    with pytest.raises(ValueError, match="not split train of its shards"):
        within.open_within(export.export(checkpoint, tmp_path / "model"), [tiny_shards])
    other = tmp_path / "other"
    shutil.copytree(tiny_shards, other)
    files.write_json(other / "manifest.json", manifest | {"seed": 99})
    with pytest.raises(ValueError, match=r"was trained on other shards than .*other; name its own by --within-shards"):
        within.open_within(model, [other])
    words = ["--model", str(model), "--store", str(values["store"]), "--shards", str(tiny_shards)]
    words += ["--out", str(tmp_path / "report"), "--within", str(model)]
    assert cli.main(["evaluate", *words]) == 2 and "goes with the protocol transfer" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_names_that_are_no_protocol_are_refused() -> None:
    for names in ([], ["imputation", "survival"], [""]):
        with pytest.raises(ValueError, match="is no protocol; choose of expression, imputation"):
            protocols.check(names)
