"""Configs: strict, with the nearest key named; what is dumped is loaded again."""

from pathlib import Path

import pytest

from storm import config
from storm.config import RunConfig
from storm.prep_config import PrepConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tile_pxx=1", r"tile_pxx is no key \(nearest: tile_px\)"),
        ("patient=1", r"patient is no key \(known: tile_px, "),
        ("tile_px=many", "tile_px='many'"),
        ("tile_px=true", "tile_px=True"),
        ("tile_px=0", "greater than or equal to 16"),
        ("tile_px=100000", "less than or equal to 4096"),
        ("seed=-1", "greater than or equal to 0"),
        ("mpp_refuse=-1", "greater than or equal to 0"),
        ("tile_px", "write section.key=value"),
        ("split_by=slide", "'donor' or 'section'"),
    ],
)
def test_faults_of_a_prep_config(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.load(PrepConfig, None, [word])


@pytest.mark.parametrize(
    "word", ["seed=-1", f"seed={10**20}", "optim.clip=.inf", "optim.lr=.inf", "optim.betas=[1.0, 0.9]"]
)
def test_numbers_out_of_range_are_named_by_key(word: str) -> None:
    with pytest.raises(ValueError, match=rf"command line: {word.partition('=')[0]}[.=\d]"):
        config.load(RunConfig, None, ["run_dir=r", "data.shards=s", word])


@pytest.mark.parametrize("number", [10**9 + 1, 10**26])
@pytest.mark.parametrize(
    "key",
    ["optim.steps", "log_every", "mask.loss_genes", "data.skip_most", "data.window_shards", "checkpoint.every_steps",
     "checkpoint.keep_last", "validation.groups", "stop.max_restarts", "data.workers", "data.micro_batch_size",
     "data.global_batch_size", "data.remote_retries"],
)  # fmt: skip
def test_whole_numbers_without_end_are_refused(key: str, number: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^command line: {key}(\.\S+)?={number}: .*(is more than|less than or equal to) "
    ) as told:
        config.load(RunConfig, None, ["run_dir=r", "data.shards=s", f"{key}={number}"])
    assert "1,000,000,000, the most of any whole number; give a smaller one" in str(told.value) or "data." in key


def test_numbers_with_an_exponent_are_no_whole_ones() -> None:
    with pytest.raises(ValueError, match=r"command line: optim\.steps=1e\+26: Input should be a valid integer"):
        config.load(RunConfig, None, ["run_dir=r", "data.shards=s", "optim.steps=1e26"])
    loaded = config.load(RunConfig, None, ["run_dir=r", "data.shards=s", f"seed={2**32 - 1}", "optim.steps=1000000000"])
    assert (loaded.seed, loaded.optim.steps) == (2**32 - 1, 10**9)
    with pytest.raises(ValueError, match=r"max_tiles=1000000001: .*is more than 1,000,000,000"):
        config.load(PrepConfig, None, ["max_tiles=1000000001"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.likelihood=nbb", r"model\.likelihood='nbb' is unknown \(nearest: nb\)"),
        ("model.align_width=-1", r"model\.align_width=-1 must be 0 or more"),
        ("loss.align_over=rank", "'group' or 'batch'"),
        ("loss.corr_from=1.5", "less than or equal to 1"),
        ("mask.feature_dropout=0.5", r"acts on cached features; set data\.features=auto"),
        ("loss={expr: 0, depth: 0, image: 0, corr: 0, spatial: 0, align: 0, anchor: 0}", "nothing would be learned"),
        ("mask={image_only: 0, in_context: 0, gene_level: 0, gene_only: 0}", "are all 0; give one a positive share"),
        ("mask={in_context: 0, hide_all_tiles: 0.4}", "acts in mode in_context, whose share is 0"),
        ("model.encoder_train=frozen", r"model\.encoder='vit' starts without weights: frozen it would stay random"),
        ("model.preset=[tiny]", r"model\.preset=\['tiny'\] is unknown"),
        ("model={1: 2}", r"model\.1 is no key"),
        ("model.pixel_mean=[a, 0.5, 0.5]", r"model\.pixel_mean=\['a', 0\.5, 0\.5\] should hold numbers alone"),
        ("model.organs=[[liver]]", "should hold names alone"),
        ("model.encoder_options={img_size: 4", r"override 'model\.encoder_options=.*not readable as YAML"),
    ],
)
def test_faults_of_likelihood_losses_and_features(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.load(RunConfig, None, ["run_dir=r", "data.shards=s", word])


def test_faults_of_a_file_name_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("mask: {image_olny: 0.5}\nrun_dir: r\ndata: {shards: s}\n")
    with pytest.raises(ValueError, match=r"c\.yaml: mask\.image_olny is no key \(nearest: image_only\)"):
        config.load(RunConfig, path)
    with pytest.raises(ValueError) as told:
        config.load(RunConfig, path, ["train.steps=4", "seed=x"])
    assert {line.split(" ")[0] for line in str(told.value).splitlines()} == {f"{path}:", "command"}
    assert "command line: train is no key (known: run_dir, " in str(told.value)
    for text in (b"\xff", b"seed: 2001-99-99", b"[" * 3000):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"c\.yaml: not readable as YAML"):
            config.load(RunConfig, path)
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="a config is a mapping"):
        config.load(PrepConfig, path)
    with pytest.raises(ValueError, match="no such config file"):
        config.load(PrepConfig, tmp_path / "absent.yaml")


def test_overrides_win_and_exponents_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: r\ndata: {shards: s}\noptim: {lr: 3e-4}\n")
    loaded = config.load(RunConfig, path, ["optim.steps=7", "model.preset=small"])
    assert (loaded.optim.lr, loaded.optim.steps, loaded.model.image_width) == (3e-4, 7, 384)


def test_dump_loads_to_an_equal_config(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    run = config.load(RunConfig, None, ["run_dir=r", "data.shards=s", "model.preset=base", "model.organs=[skin]"])
    for value in (run, PrepConfig()):
        path.write_text(config.dump(value))
        assert config.load(type(value), path) == value


def test_shipped_prep_configs_load_and_hold_only_what_differs() -> None:
    default = PrepConfig().model_dump()
    assert config.load(PrepConfig, CONFIGS / "prep.yaml") == PrepConfig()
    tiny = config.load(PrepConfig, CONFIGS / "prep_tiny.yaml")
    assert tiny.tile_px * tiny.tile_mpp == PrepConfig().tile_px * PrepConfig().tile_mpp
    text = (CONFIGS / "prep_tiny.yaml").read_text()
    keys = [line.split(":")[0] for line in text.splitlines() if line and not line.startswith("#")]
    assert all(tiny.model_dump()[key] != default[key] for key in keys)


def test_compilation_is_refused_with_zero_3() -> None:
    words = ["run_dir=x", "data.shards=y", "engine.compile=true"]
    assert config.load(RunConfig, None, words).engine.compile
    with pytest.raises(ValueError, match=r"engine.*compile=true: ZeRO 3 gathers weights in hooks.*use zero_stage 0-2"):
        config.load(RunConfig, None, [*words, "engine.zero_stage=3"])
