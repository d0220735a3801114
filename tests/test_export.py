"""Export and load: complete or absent, verified file by file, loadable with three libraries, silent about donors."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from storm import checkpoints, export, files
from storm.presets import ModelConfig
from tests import untrained

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return export.export(untrained.write_checkpoint(tmp_path / "run"), tmp_path / "model")


def test_an_export_loads_to_the_weights_of_its_checkpoint(exported: Path) -> None:
    assert sorted(p.name for p in exported.iterdir()) == sorted(
        [
            "model.safetensors",
            "config.json",
            "preprocessor_config.json",
            "genes.tsv",
            "README.md",
            "LICENSE",
            "SHA256SUMS",
        ]
    )
    pretrained = export.load(exported)
    expected = untrained.weights()
    state = pretrained.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not pretrained.model.training
    assert pretrained.genes.ids == untrained.GENES.ids
    told = f"<STORM model: {len(untrained.GENES)} genes, tiles of "
    assert repr(pretrained).startswith(told) and pretrained.hash[:16] in repr(pretrained)
    assert pretrained.panel.sum() == 32 and pretrained.panel[:32].all()
    assert files.read_json(exported / "preprocessor_config.json")["tile_mpp"] == 3.5


def test_the_package_lists_what_it_looks_up_late() -> None:
    code = "import sys, storm; print({'load', 'embed', 'predict'} <= set(dir(storm)), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


def test_loading_needs_torch_safetensors_and_numpy_alone(exported: Path) -> None:
    code = f"""
import sys, importlib.abc
allowed = {{"torch", "safetensors", "numpy", "storm"}}
ours = {{"pydantic", "yaml", "deepspeed", "anndata", "zarr", "pandas", "scipy", "simplejpeg", "h5py", "sklearn",
        "matplotlib", "data_prep", "openslide", "tifffile"}}
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ours:
            raise ImportError("blocked " + name)
sys.meta_path.insert(0, Block())
import storm
model = storm.load({str(exported)!r})
print(type(model.model).__name__, len(model.genes), model.hash)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["Storm", "40", export.load(exported).hash], done.stderr


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "genes.tsv", "README.md", "LICENSE"])
def test_a_changed_file_is_named(exported: Path, name: str) -> None:
    data = bytearray((exported / name).read_bytes())
    data[len(data) // 2] ^= 1
    (exported / name).write_bytes(bytes(data))
    with pytest.raises(ValueError, match=f"{name}: its sha256 is not that of SHA256SUMS"):
        export.load(exported)


def test_a_missing_file_and_missing_sums_are_named(exported: Path) -> None:
    (exported / "genes.tsv").unlink()
    with pytest.raises(ValueError, match=r"genes\.tsv: is missing"):
        export.load(exported)
    (exported / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="SHA256SUMS: is missing"):
        export.load(exported)


def test_sums_that_point_outside_are_refused(exported: Path) -> None:
    with (exported / "SHA256SUMS").open("a") as handle:
        handle.write("0" * 64 + "  ../../secret\n")
    with pytest.raises(ValueError, match="leaves its root"):
        export.load(exported)


def test_sums_that_are_no_text_are_named(exported: Path) -> None:
    (exported / "SHA256SUMS").write_bytes(b"\xff\xfe")
    assert export.verify(exported) == [f"{exported / 'SHA256SUMS'}: is no UTF-8 text; fetch it again or export again"]


@pytest.mark.parametrize("share", ["x", "nan", "-1", None])
def test_genes_without_shares_are_refused(exported: Path, share: str | None) -> None:
    lines = (exported / "genes.tsv").read_text().splitlines()
    columns = [line.split("\t")[:2] for line in lines]
    if share is not None:
        columns = [columns[0] + ["share"], *([*words, share] for words in columns[1:])]
    (exported / "genes.tsv").write_text("\n".join(map("\t".join, columns)) + "\n")
    config = files.read_json(exported / "config.json")
    with pytest.raises(ValueError, match=r"genes\.tsv(: the column share holds what is no share| has no column share)"):
        export.load(_changed(exported, "n_genes", config["n_genes"]))


def _changed(exported: Path, key: str, value: object) -> Path:
    """The export with one value of its config.json changed (None: removed), under sums that hold."""
    config = files.read_json(exported / "config.json")
    *parents, last = key.split(".")
    inner = config
    for name in parents:
        inner = inner[name]
    inner.pop(last) if value is None else inner.update({last: value})
    files.write_json(exported / "config.json", config)
    names = sorted(path.name for path in exported.iterdir() if path.name != "SHA256SUMS")
    sums = "".join(f"{files.sha256_file(exported / name)}  {name}\n" for name in names)
    (exported / "SHA256SUMS").write_text(sums)
    return exported


@pytest.mark.parametrize(
    ("key", "value", "fact"),
    [
        ("model", None, r"config\.json: model is None"),
        ("data.spots_side", None, r"config\.json: data\.spots_side is None"),
        ("data.spots_side", 0, r"config\.json: data\.spots_side is 0"),
        ("data.split_by", "luck", r"config\.json: data\.split_by is 'luck'"),
        ("data.gene_hash", "0" * 64, r"config\.json: data\.gene_hash is not that of genes\.tsv"),
        ("n_genes", 1, r"config\.json: n_genes is 1, genes\.tsv holds 40"),
        ("n_genes", True, r"config\.json: n_genes is True"),
        ("reference", [], r"config\.json: reference\.slide_log_density is None"),
        ("reference.panel", "zz", r"config\.json: reference\.panel is no mask"),
        ("reference.panel", "ff", r"config\.json: reference\.panel is no mask"),
        ("reference.panel", "00" * 5, r"config\.json: reference\.panel is no mask"),
        ("reference.platform", "sonar", r"config\.json: reference\.platform 'sonar' is unknown"),
        ("reference.footprint_um", -1, r"config\.json: reference\.footprint_um is -1"),
        ("reference.footprint_kind", 7, r"config\.json: reference\.footprint_kind"),
        ("model.head_width", 0, r"model: its model config is not valid \(model\.head_width=0 must be 1 or more\)"),
        ("model.tile_mpp", 0, r"model\.tile_mpp=0 must be above 0"),
        ("model.organs", 3, r"its model config is not valid"),
        ("model.organs", [], r"model\.safetensors: weights of another model \(size mismatch for fusion\.organ"),
        ("model.image_width", 10**6, r"model\.safetensors: weights of another model"),
        ("model.space_depth", 10**5, r"another model \(model config: .* more than \d+ weights; it holds \d+\)"),
        ("model.patch_px", 10**6, r"model\.tile_px=32 is no multiple of patch_px"),
        ("model.registers", 10**6, r"model\.safetensors: weights of another model"),
        ("model.align_width", 10**6, r"model\.safetensors: weights of another model"),
        ("data.platforms", {"visium": 3}, r"config\.json: data\.platforms does not count slides"),
        ("data.spots_side", 10**9, r"config\.json: data\.spots_side is 1000000000"),
        ("reference.footprint_um", 10**400, r"config\.json: reference\.footprint_um is 1000"),
        ("reference.slide_log_density", 1e300, r"config\.json: reference\.slide_log_density is 1e\+300"),
        ("model.tile_px", 16 * 10**4, r"another model \(model config: tiles of 160000 px"),
    ],
)
def test_a_foreign_config_is_refused_by_file_and_key(exported: Path, key: str, value: object, fact: str) -> None:
    with pytest.raises(ValueError, match=fact):
        export.load(_changed(exported, key, value))


def test_what_has_no_depth_is_bounded_too(exported: Path) -> None:
    _changed(exported, "model.space_depth", 0)
    with pytest.raises(ValueError, match=r"model\.safetensors: weights of another model"):
        export.load(_changed(exported, "model.space_width", 16 * 10**4))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ModelConfig) if field.type is int])
def test_a_size_without_end_is_refused(exported: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"config is not valid \(model\.{name}={10**30} must be 1,000,000 or less\)"):
        export.load(_changed(exported, f"model.{name}", 10**30))


@pytest.mark.parametrize(
    "name", ["image_width", "image_depth", "gene_width", "fusion_width", "fusion_depth", "space_width", "space_depth",
             "registers", "align_width", "descriptor_width"]
)  # fmt: skip
def test_what_is_too_large_for_its_weights_is_not_built(
    exported: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object) -> None:
        pytest.fail("it takes memory before the sizes are compared")

    monkeypatch.setattr(export, "Storm", build)
    with pytest.raises(ValueError, match=r"another model \(model config: .* more than \d+ weights; it holds \d+\)"):
        export.load(_changed(exported, f"model.{name}", 16 * 10**4))


def test_an_encoder_without_end_is_not_built(exported: Path) -> None:
    _changed(exported, "model.encoder", "timm/vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"1000000000 blocks; depth or depths are 512 at most"):
        export.load(_changed(exported, "model.encoder_options", {"img_size": 32, "depth": 10**9}))


def test_a_config_that_is_no_object_is_refused(exported: Path) -> None:
    (exported / "config.json").write_text("[1]")
    sums = (exported / "SHA256SUMS").read_text().splitlines(keepends=True)
    own = [f"{files.sha256_of(b'[1]')}  config.json\n" if "config.json" in line else line for line in sums
           if "preprocessor" not in line]  # fmt: skip
    own += [line for line in sums if "preprocessor" in line]
    (exported / "SHA256SUMS").write_text("".join(own))
    with pytest.raises(ValueError, match=r"config\.json: holds no object"):
        export.load(exported)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    checkpoint = untrained.write_checkpoint(tmp_path / "run", complete=False)
    model = files.read_json(checkpoint / "model.json")
    model["model"]["space_width"] = 48
    files.write_json(checkpoint / "model.json", model)
    untrained.seal(checkpoint)
    with pytest.raises(ValueError, match=r"model\.safetensors: weights of another model"):
        export.export(checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_weights_that_are_no_numbers_are_refused(exported: Path) -> None:
    weights = load_file(exported / "model.safetensors")
    weights["tile.bias"][3] = float("nan")
    save_file(weights, exported / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: tile\.bias holds what is no number"):
        export.load(_changed(exported, "step", 1))


def test_a_damaged_checkpoint_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    checkpoint = untrained.write_checkpoint(tmp_path / "run")
    (checkpoint / "genes.tsv").write_bytes(b"ensembl_id\tsymbol\n")
    with pytest.raises(ValueError, match=r"genes\.tsv: its sha256 is not that of COMPLETE"):
        export.export(checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_that_is_no_export_is_not_replaced(exported: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_0000020"
    before = (exported / "SHA256SUMS").read_bytes()
    assert export.export(checkpoint, exported) == exported
    assert (exported / "SHA256SUMS").read_bytes() == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is no export"):
        export.export(checkpoint, tmp_path / "thesis")


def test_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoints.latest(run)
    for step in (9, 100, 20):
        untrained.write_checkpoint(run, step)
    untrained.write_checkpoint(run, 200, complete=False)
    assert checkpoints.latest(run).name == "step_0000100"
    assert [p.name for p in checkpoints.complete(run)] == ["step_0000009", "step_0000020", "step_0000100"]


def test_card_and_licence_tell_terms_and_no_donor(tmp_path: Path) -> None:
    checkpoint = untrained.write_checkpoint(tmp_path / "run", split_by="section")
    exported = export.export(checkpoint, tmp_path / "model")
    card, notice = (exported / "README.md").read_text(), (exported / "LICENSE").read_text()
    assert "**split_by: section.**" in card
    assert "| study1 | 2 | 200 |" in card and "| study1 | CC0-1.0 | not stated |" in card
    assert "has to choose" in notice and "CC0-1.0" in notice
    for path in exported.iterdir():
        data = path.read_bytes()
        assert untrained.PLANTED.encode() not in data and untrained.HOME.encode() not in data, path
    given = export.export(checkpoint, tmp_path / "licensed", license_text="MIT, and so on.\n")
    assert (given / "LICENSE").read_text() == "MIT, and so on.\n"
    assert export.load(given).hash == export.load(exported).hash  # the licence's text moves no prediction


def test_study_names_cannot_break_the_card(tmp_path: Path) -> None:
    checkpoint = untrained.write_checkpoint(tmp_path / "run", complete=False)
    reference = files.read_json(checkpoint / "reference.json")
    reference["studies"] = {"<script>|x\n# y": {"slides": 1, "profiles": 1}}
    files.write_json(checkpoint / "reference.json", reference)
    untrained.seal(checkpoint)
    card = (export.export(checkpoint, tmp_path / "model") / "README.md").read_text()
    assert "| &lt;script&gt;&#124;x # y | 1 | 1 |" in card


def test_two_exports_of_one_checkpoint_are_byte_identical(exported: Path, tmp_path: Path) -> None:
    again = export.export(tmp_path / "run" / "checkpoints" / "step_0000020", tmp_path / "again" / "model")
    assert {p.name: p.read_bytes() for p in exported.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}
    assert np.isfinite(export.load(again).reference["slide_log_density"])
