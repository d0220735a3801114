"""The command `storm`: every sub-command once, the exit codes, one line per error."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
from PIL import Image

import storm
from data_prep import records, wanted
from storm import cli, export
from tests import untrained

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return export.export(untrained.write_checkpoint(folder / "run"), folder / "model")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    for i, name in enumerate(("one", "two")):
        untrained.write_store(folder, name, side=6, seed=i)
    return folder


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong call prints; its exit code is 2."""
    assert cli.main(words) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1, printed
    return printed


def test_export_verify_and_tampering(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    untrained.write_checkpoint(tmp_path / "run")
    (tmp_path / "terms").write_text("MIT\n")
    out = tmp_path / "model"
    assert (
        cli.main(["export", "--run", str(tmp_path / "run"), "--out", str(out), "--license", str(tmp_path / "terms")])
        == 0
    )
    assert (out / "LICENSE").read_text() == "MIT\n"
    assert cli.main(["verify", str(out)]) == 0
    (out / "genes.tsv").write_text("x")
    capsys.readouterr()
    assert cli.main(["verify", str(out)]) == 1
    assert "genes.tsv: its sha256 is not" in capsys.readouterr().out
    assert "neither an export" in fails(["verify", str(tmp_path / "run")], capsys)


def test_export_says_split_by_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    untrained.write_checkpoint(tmp_path / "run", split_by="section")
    assert cli.main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 0
    assert "SPLIT BY SECTION" in capsys.readouterr().out


def test_verify_of_a_shard_set(tiny_shards: Path) -> None:
    assert cli.main(["verify", str(tiny_shards)]) == 0


def test_embed_of_a_folder_of_stores(model: Path, stores: Path, tmp_path: Path) -> None:
    words = ["embed", "--model", str(model), "--store", str(stores)]
    assert cli.main([*words, "--out", str(tmp_path / "all")]) == 0
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["one.h5ad", "two.h5ad"]
    assert cli.main([*words, "--slide", "two", "--image-only", "-o", str(tmp_path / "two.h5ad")]) == 0
    two = anndata.read_h5ad(tmp_path / "two.h5ad")
    assert two.uns["storm"]["input"] == "H&E only"
    both = anndata.read_h5ad(tmp_path / "all" / "two.h5ad")
    assert both.uns["storm"]["input"] == "H&E and counts" and both.X.sum() == two.X.sum()
    assert cli.main([*words, "--split", "test", "--out", str(tmp_path / "test")]) == 0
    assert len(list((tmp_path / "test").iterdir())) == 2


def test_slides_whose_stores_are_gone_are_named(
    model: Path, stores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in stores.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    records.write(tmp_path, records.Record("three", "built"))
    wanted.write(tmp_path, tmp_path / "m.csv", ["one", "four"])
    words = ["embed", "--model", str(model), "--store", str(tmp_path), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    told = capsys.readouterr().err
    assert "2 slides are missing and left out:\n  four: not built" in told and "\n  three: its store is gone\n" in told
    assert cli.main([*words, "--slide", "one"]) == 0
    assert not capsys.readouterr().err


def test_one_slide_that_fails_is_listed_and_the_rest_goes_on(
    model: Path, stores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in stores.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "one.zarr.zip").write_bytes(b"torn")
    assert cli.main(["embed", "--model", str(model), "--store", str(tmp_path), "-o", str(tmp_path / "out")]) == 1
    assert "one.zarr.zip: FAILED" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["two.h5ad"]


def test_predict_with_genes_from_a_list_or_a_file(model: Path, stores: Path, tmp_path: Path) -> None:
    words = ["predict", "--model", str(model), "--store", str(stores / "one.zarr.zip"), "-o", str(tmp_path / "p.h5ad")]
    assert cli.main([*words, "--genes", "GENE3,GENE1"]) == 0
    assert list(anndata.read_h5ad(tmp_path / "p.h5ad").var_names) == ["GENE3", "GENE1"]
    (tmp_path / "genes.txt").write_text("ENSG00000000002\nGENE39\n")
    assert cli.main([*words, "--genes", str(tmp_path / "absent.txt")]) == 2
    assert cli.main([*words, "--genes", str(tmp_path / "genes.txt"), "--unit", "mu"]) == 0
    found = anndata.read_h5ad(tmp_path / "p.h5ad")
    assert list(found.var_names) == ["GENE2"] and list(found.uns["storm"]["genes_left_out"]) == ["GENE39"]
    (tmp_path / "genes.txt").write_text("\ufeffGENE2\n", encoding="utf-8")  # as some editors begin a file
    assert cli._genes(str(tmp_path / "genes.txt")) == ["GENE2"]
    assert cli._genes(" GENE3, GENE1,") == ["GENE3", "GENE1"]
    many = [f"GENE{i}" for i in range(100)]
    assert cli._genes(",".join(many)) == many, "longer than a file's name may be"
    (tmp_path / "genes.txt").write_bytes(b"\n")
    for told in ("", ",", str(tmp_path / "genes.txt")):
        with pytest.raises(ValueError, match="names no gene"):
            cli._genes(told)
    (tmp_path / "genes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"genes\.txt: is no UTF-8 text"):
        cli._genes(str(tmp_path / "genes.txt"))


def test_predict_of_genes_known_by_descriptors(
    model: Path, stores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(untrained.MODEL, descriptor_width=3)
    checkpoint = untrained.write_checkpoint(tmp_path / "run", config=config)
    described = export.export(checkpoint, tmp_path / "model")
    np.savez(tmp_path / "d.npz", gene_id=np.array(["ENSG00000099999"]), descriptor=np.array([[1, 2, 3.0]]))
    words = ["predict", "--store", str(stores / "one.zarr.zip"), "-o", str(tmp_path / "p.h5ad")]
    words += ["--genes", "GENE3,ENSG00000099999", "--descriptors", str(tmp_path / "d.npz")]
    assert cli.main([*words, "--model", str(described)]) == 0
    found = anndata.read_h5ad(tmp_path / "p.h5ad")
    assert list(found.var_names) == ["GENE3", "ENSG00000099999"] and list(found.var["unseen"]) == [False, True]
    assert np.isfinite(found.X).all() and (found.X > 0).all()
    assert "d.npz: has 3 columns, the model was trained without descriptors" in fails(
        [*words, "--model", str(model)], capsys
    )


def test_the_users_object_is_joined(model: Path, stores: Path, tmp_path: Path) -> None:
    own = anndata.AnnData(np.ones((2, 1), np.float32))
    own.obs_names = ["spot9-1", "spot2-1"]
    own.write_h5ad(tmp_path / "own.h5ad")
    words = ["embed", "--model", str(model), "--store", str(stores), "--slide", "one", "-o", str(tmp_path / "e.h5ad")]
    assert cli.main([*words, "--adata", str(tmp_path / "own.h5ad")]) == 0
    found = anndata.read_h5ad(tmp_path / "e.h5ad")
    assert list(found.obs_names) == ["spot9-1", "spot2-1"] and found.obsm["X_storm"].shape == (2, 32)


def test_embed_of_visium_without_a_manifest(tiny_shards: Path, synthetic_tiny: Path, tmp_path: Path) -> None:
    model = export.export(untrained.shards_checkpoint(tiny_shards, tmp_path / "run"), tmp_path / "model")
    outs = sorted(synthetic_tiny.glob("measurements/*/outs"))[0]
    image = synthetic_tiny / "images" / f"{outs.parent.name}.tif"
    words = ["embed", "--model", str(model), "--visium", str(outs), "--image", str(image)]
    assert cli.main([*words, "-o", str(tmp_path / "out.h5ad")]) == 0
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert all(name.endswith("-1") for name in found.obs_names) and found.var_names.is_unique
    assert set(found.var) >= {"gene_ids", "feature_types"} and found.X.sum() > 0
    assert np.isfinite(found.obsm["X_storm"]).all() and found.obsm["X_storm"].std() > 0
    assert image.stem in found.uns["spatial"]


def test_visium_barcodes_without_a_profile_are_left_out_and_told(
    tiny_shards: Path, synthetic_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = export.export(untrained.shards_checkpoint(tiny_shards, tmp_path / "run"), tmp_path / "model")
    outs = sorted(synthetic_tiny.glob("measurements/*/outs"))[0]
    shutil.copytree(outs, tmp_path / "outs")
    places = tmp_path / "outs" / "spatial" / "tissue_positions.csv"
    for filtered in (tmp_path / "outs").glob("filtered_feature_bc_matrix*"):
        filtered.rename(filtered.with_name(filtered.name.replace("filtered", "raw")))  # it holds all barcodes
    header, *rows = places.read_text().splitlines()
    off = [i for i, row in enumerate(rows) if row.split(",")[1] == "1"][:2]
    for i in off:
        rows[i] = rows[i].replace(",1,", ",0,", 1)
    places.write_text("\n".join([header, *rows]) + "\n")
    image = synthetic_tiny / "images" / f"{outs.parent.name}.tif"
    words = ["embed", "--model", str(model), "--visium", str(tmp_path / "outs"), "--image", str(image)]
    assert cli.main([*words, "-o", str(tmp_path / "out.h5ad")]) == 0
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert f"left out 2 of {found.n_obs + 2} barcodes" in capsys.readouterr().out
    assert not set(found.obs_names) & {rows[i].split(",")[0] for i in off} and len(found) > 10


def test_embed_of_an_image_without_counts(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(90, 200, (40, 40, 3)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
    pixels[..., 1] //= 2  # purple and coarse, so that it counts as tissue
    Image.fromarray(pixels).save(tmp_path / "my slide.png")
    words = ["embed", "--model", str(model), "--image", str(tmp_path / "my slide.png"), "-o", str(tmp_path / "o.h5ad")]
    assert "mpp" in fails(words, capsys)
    assert cli.main([*words, "--mpp", "1.75"]) == 0
    assert "my slide.png: 1.7500 um per pixel (--mpp)" in capsys.readouterr().out
    found = anndata.read_h5ad(tmp_path / "o.h5ad")
    assert found.obs_names[0] == "lattice_0_0" and found.obsm["X_storm"].shape == (121, 32)


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["--store", "nowhere"], "nowhere: no such folder, no slide store"),
        (["--store", "x", "--image", "y"], "name the input"),
        ([], "name the input"),
        (["--image", "nowhere.svs"], "nowhere.svs"),
        (["--store", "x", "--mpp", "1"], "go with --image"),
    ],
)
def test_wrong_input_is_one_line(
    model: Path, words: list[str], fact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fact in fails(["embed", "--model", str(model), *words, "-o", str(tmp_path / "o")], capsys)


def test_a_wrong_model_and_unknown_slides(
    stores: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "o.h5ad")]
    assert "SHA256SUMS" in fails(["embed", "--model", str(tmp_path), "--store", str(stores), *out], capsys)
    run = untrained.write_checkpoint(tmp_path / "run").parent.parent
    cure = f"python launch/export.py --run {run} --out EXPORT"
    for folder in (run, next((run / "checkpoints").iterdir())):
        assert cure in fails(["embed", "--model", str(folder), "--store", str(stores), *out], capsys)
    assert "is an export already" in fails(["export", "--run", str(model), "--out", str(tmp_path / "x")], capsys)
    words = ["embed", "--model", str(model), "--store", str(stores)]
    assert "holds no slide 'three'" in fails([*words, "--slide", "three", *out], capsys)
    assert "give a folder" in fails([*words, *out], capsys)
    assert "unit 'tpm'" in fails(["predict", *words[1:], "--slide", "one", "--unit", "tpm", *out], capsys)


def test_a_missing_library_is_told_with_its_cure(
    model: Path, stores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "storm.results", raising=False)
    monkeypatch.delattr(storm, "results", raising=False)
    monkeypatch.setitem(sys.modules, "anndata", None)
    words = ["embed", "--model", str(model), "--store", str(stores), "-o", str(tmp_path / "o")]
    assert fails(words, capsys) == "error: anndata is not installed; python -m pip install 'storm-tissue[use]'\n"


def test_doctor_and_the_launch_files(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "storm.cli", "doctor"], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert "core: complete" in done.stdout and "devices: " in done.stdout
    for name in ("embed", "export", "evaluate"):
        words = [sys.executable, f"launch/{name}.py", "--help"]
        env = {"PYTHONPATH": str(REPO), "PATH": ""}
        done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=True, env=env)
        assert done.stdout.startswith(f"usage: storm {name} ")
