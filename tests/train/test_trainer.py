"""One rank: logs, checkpoints, what is refused and what stops a run."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from storm import checkpoints
from storm.config import CheckpointConfig, RunConfig, dump, load
from storm.genes import GeneTable
from storm.model.storm import Storm
from storm.presets import resolve_model
from storm.shards import ShardSet
from storm.train import checkpoint, engine, metrics
from storm.train.trainer import FINISHED, RankError, Trainer, fit_model, pretrain
from tests.train import runs
from tests.train.runs import train


@pytest.fixture(scope="module")
def finished(tiny_shards: Path, world: engine.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a checkpoint at every step, two kept."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny_shards, run_dir, world, "checkpoint.every_steps=1")
    return run_dir


def test_the_run_folder(finished: Path, tiny_shards: Path) -> None:
    assert [line["step"] for line in runs.log(finished)] == [1, 2, 3]
    logged = json.loads((finished / "log.jsonl").read_text().splitlines()[0])
    assert logged.keys() == {"step", *(tag for tag in metrics.TAGS if not tag.startswith("val/"))}
    assert logged["progress/samples"] == 4 and logged["data/st"] + logged["data/visium"] == pytest.approx(1)
    assert 0 < logged["perf/mfu"] < 1 and 0 <= logged["perf/data_wait"] < 1 and logged["perf/rank_skew"] == 0
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    assert json.loads((finished / FINISHED).read_text())["step"] == 3
    assert [path.name for path in checkpoints.complete(finished)] == ["step_0000002", "step_0000003"]
    resolved = load(RunConfig, finished / "config.yaml")
    assert resolved.model.tile_px == 112 and resolved.model.organs == tuple(ShardSet(tiny_shards).manifest["organs"])
    assert dump(resolved) == (finished / "config.yaml").read_text()
    settings = json.loads((finished / "deepspeed.json").read_text())
    assert (settings["train_batch_size"], settings["gradient_accumulation_steps"]) == (4, 2)


def test_a_checkpoint_holds_what_an_export_needs(finished: Path, tiny_shards: Path) -> None:
    path = checkpoints.latest(finished)
    marker = checkpoints.verify(path, [])
    assert checkpoints.verify(path, sorted(marker["files"]))["step"] == 3
    present = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert present == {*marker["files"], checkpoints.MARKER}
    shards = ShardSet(tiny_shards)
    assert GeneTable.read(path / "genes.tsv").hash == shards.genes.hash
    reference = json.loads((path / "reference.json").read_text())
    assert reference["gene_hash"] == shards.genes.hash and reference["split_by"] == shards.manifest["split_by"]
    total = int(shards.index("train").profiles.sum())
    for what in ("studies", "organs", "platforms"):
        assert sum(entry["profiles"] for entry in reference[what].values()) == total
    weights = load_file(path / "model.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights.values())
    model = json.loads((path / "model.json").read_text())
    assert model["n_genes"] == len(shards.genes)
    Storm(resolve_model(model["model"]), model["n_genes"]).load_state_dict(weights)


def test_no_slide_or_donor_is_named_in_what_leaves_the_run(finished: Path, tiny_shards: Path) -> None:
    text = (checkpoints.latest(finished) / "reference.json").read_text()
    assert [slide for slide in ShardSet(tiny_shards).manifest["slides"] if slide in text] == []


def test_two_runs_of_one_seed_have_the_same_losses(
    finished: Path, tiny_shards: Path, world: engine.World, tmp_path: Path
) -> None:
    train(tiny_shards, tmp_path / "again", world)
    train(tiny_shards, tmp_path / "other", world, "seed=1")
    assert runs.log(tmp_path / "again") == runs.log(finished)
    assert runs.log(tmp_path / "other") != runs.log(finished)


def test_a_stopped_run_resumes_to_the_same_losses_and_weights(
    finished: Path, stopped: Path, tiny_shards: Path, world: engine.World
) -> None:
    assert not (stopped / FINISHED).exists() and len(runs.log(stopped)) == 1
    with (stopped / "log.jsonl").open("a") as lines:
        lines.write('{"step": 2, "loss": 0}\n{"step": 3, "lo')  # what a killed run had still written
    train(tiny_shards, stopped, world, "data.workers=1", "log_every=1")
    assert runs.log(stopped) == runs.log(finished)
    ends = [load_file(checkpoints.latest(run) / "model.safetensors") for run in (stopped, finished)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_a_run_with_tokens_and_descriptors_resumes_with_its_own_table(
    tiny_shards: Path, world: engine.World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    more = (*runs.SWITCHED, runs.descriptors(tiny_shards, tmp_path), "checkpoint.every_steps=1")
    train(tiny_shards, tmp_path / "straight", world, *more)
    genes = len(ShardSet(tiny_shards).genes)
    assert f"descriptors.npz: lacks 1 of {genes} genes" in capsys.readouterr().out
    train(tiny_shards, tmp_path / "run", world, *more, stop=1)
    table = dict(np.load(tmp_path / "descriptors.npz"))
    np.savez(tmp_path / "descriptors.npz", **table | {"descriptor": table["descriptor"][::-1]})  # type: ignore[arg-type]
    train(tiny_shards, tmp_path / "run", world, *more)
    assert runs.log(tmp_path / "run") == runs.log(tmp_path / "straight")
    ends = [load_file(checkpoints.latest(tmp_path / name) / "model.safetensors") for name in ("run", "straight")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
    assert ends[0]["genes.descriptor"].shape == (genes, 6) and not ends[0]["genes.descriptor"][0].any()
    kept = [Trainer(load(RunConfig, None, runs.words(tiny_shards, tmp_path, 2, *more)), world).stream.loader.kept(i)
            for i in (0, 0, 1)]  # fmt: skip
    assert all(some is not None for some in kept)
    assert np.array_equal(kept[0], kept[1]) and not np.array_equal(kept[0], kept[2])  # type: ignore[arg-type]
    assert 0.6 < np.mean([some for some in kept if some is not None]) < 0.8


def test_going_back_removes_the_later_checkpoints(tiny_shards: Path, world: engine.World, tmp_path: Path) -> None:
    every = "checkpoint.every_steps=1"
    train(tiny_shards, tmp_path, world, "optim.steps=9", "checkpoint.keep_last=9", every, stop=4)
    first = checkpoints.complete(tmp_path)[0]
    more = ("optim.steps=9", "checkpoint.keep_last=2", every)
    train(tiny_shards, tmp_path, world, *more, resume=str(first), stop=2)
    assert [path.name for path in checkpoints.complete(tmp_path)] == ["step_0000001", "step_0000002"]
    assert checkpoint.find(tmp_path, "auto") == first.with_name("step_0000002")
    assert [line["step"] for line in runs.log(tmp_path)] == [1, 2]


def test_a_refused_checkpoint_removes_nothing(finished: Path, tiny_shards: Path, world: engine.World) -> None:
    before = checkpoints.complete(finished)
    with pytest.raises(ValueError, match="other values"):
        train(tiny_shards, finished, world, "optim.lr=0.001", resume=str(before[0]))
    assert checkpoints.complete(finished) == before


def test_a_killed_runs_temporary_folders_are_swept(stopped: Path, tiny_shards: Path, world: engine.World) -> None:
    kept = {path.name for path in (stopped / "checkpoints").iterdir()}
    for name in (".step_0000002.0123456789ab.tmp", ".step_0000001.0123456789ab.old"):
        (stopped / "checkpoints" / name).mkdir(parents=True)
    (stopped / "checkpoints" / "step_0000000").mkdir()  # of which retention had removed the marker
    (stopped / "checkpoints" / "step_0000009").symlink_to(stopped / "nowhere")
    (stopped / "checkpoints" / "step_notes").mkdir()  # the user's
    train(tiny_shards, stopped, world, stop=1)
    assert {path.name for path in (stopped / "checkpoints").iterdir()} == kept | {"step_notes"}


@pytest.mark.parametrize("step", [0, -3])
def test_a_stop_before_the_first_step_is_refused(tiny_shards: Path, tmp_path: Path, step: int) -> None:
    with pytest.raises(ValueError, match=rf"--stop-after-step {step}: .*give 1 or more"):
        pretrain(load(RunConfig, None, runs.words(tiny_shards, tmp_path / "run")), stop_after_step=step)
    assert not (tmp_path / "run").exists()


def test_retention(tiny_shards: Path, world: engine.World, tmp_path: Path) -> None:
    more = ("optim.steps=5", "checkpoint.every_steps=1", "checkpoint.keep_last=1", "checkpoint.keep_every=2")
    train(tiny_shards, tmp_path, world, *more)
    assert [checkpoints.step_of(path) for path in checkpoints.complete(tmp_path)] == [2, 4, 5]


def test_a_checkpoint_by_the_clock(
    tiny_shards: Path, world: engine.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_shards, tmp_path / "late", world, "checkpoint.every_minutes=1e-9", "checkpoint.keep_last=9")
    assert [checkpoints.step_of(path) for path in checkpoints.complete(tmp_path / "late")] == [1, 2, 3]
    spent = [json.loads(line)["perf/checkpoint_s"] for line in (tmp_path / "late/log.jsonl").read_text().splitlines()]
    assert spent[0] == 0 and min(spent[1:]) > 0, "what a save took is told by the record after it"
    schedule = checkpoint.Schedule(CheckpointConfig(every_minutes=2.0), world)
    began = schedule._since
    for minutes, due in ((0, False), (1.9, False), (2.1, True)):
        monkeypatch.setattr(time, "monotonic", lambda minutes=minutes: began + 60 * minutes)
        assert schedule.due(1) == due
    schedule.saved()
    assert not schedule.due(1) and schedule.due(500)


def test_deepspeed_takes_keys_that_are_not_derived(tiny_shards: Path, world: engine.World, tmp_path: Path) -> None:
    extra = "deepspeed.extra.zero_optimization.reduce_scatter=false"
    train(tiny_shards, tmp_path, world, extra, "deepspeed.extra.prescale_gradients=true", stop=1)
    settings = json.loads((tmp_path / "deepspeed.json").read_text())
    assert settings["prescale_gradients"] and not settings["zero_optimization"]["reduce_scatter"]
    assert settings["zero_optimization"]["stage"] == 1
    for key, cure in (
        ("zero_optimization.stage=2", "leave it out"),
        ("train_batch_size=8", "leave it out"),
        ("bf16.enabled=true", r"set engine\.precision"),
    ):
        config = load(RunConfig, None, runs.words(tiny_shards, tmp_path, 2, f"deepspeed.extra.{key}"))
        with pytest.raises(
            ValueError, match=rf"deepspeed\.extra\.{key.split('=')[0].removesuffix('.enabled')}.*{cure}"
        ):
            engine.settings(config, 2)


def test_a_finished_run_is_left_alone(finished: Path, tiny_shards: Path, capsys: pytest.CaptureFixture) -> None:
    before = (finished / "log.jsonl").read_bytes()
    words = runs.words(tiny_shards, finished, 2, "optim.steps=3", "checkpoint.every_steps=2")
    pretrain(load(RunConfig, None, words))
    assert "the run is finished" in capsys.readouterr().out and (finished / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("word", "fact"),
    [
        ("optim.steps=14", r"config\.yaml: the run is finished, and .*other values \(optim\.steps: 3 -> 14\); set"),
        ("model.space_depth=1", r"model\.json: the run is finished, and .* another model \(model\.space_depth: 2 -> 1"),
    ],
)
def test_a_finished_run_of_another_config_is_refused(finished: Path, tiny_shards: Path, word: str, fact: str) -> None:
    with pytest.raises(ValueError, match=fact):
        pretrain(load(RunConfig, None, runs.words(tiny_shards, finished, 2, "optim.steps=3", word)))


def test_a_finished_run_of_other_shards_is_refused(finished: Path, wide_shards: Path) -> None:
    with pytest.raises(ValueError, match=r"is finished, and was trained on other shards than .*data\.shards.; set it"):
        pretrain(load(RunConfig, None, runs.words(wide_shards, finished, 2, "optim.steps=3")))


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "rng_rank0.json", "optimizer_rank0.safetensors"])
def test_a_damaged_checkpoint_is_refused_before_it_is_read(
    stopped: Path, tiny_shards: Path, world: engine.World, name: str
) -> None:
    victim = checkpoints.latest(stopped) / name
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{victim.name}: its sha256 is not that of COMPLETE"):
        train(tiny_shards, stopped, world)


def test_a_damaged_newest_checkpoint_names_the_older_one(
    finished: Path, tiny_shards: Path, world: engine.World, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    older, newest = checkpoints.complete(run)
    with (newest / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=rf"use an older one \(--resume {older}\)"):
        train(tiny_shards, run, world)
    assert train(tiny_shards, run, world, resume=str(older)).step == 3 and runs.log(run) == runs.log(finished)


def test_a_torn_checkpoint_does_not_count(finished: Path, stopped: Path) -> None:
    (checkpoints.latest(stopped) / checkpoints.MARKER).unlink()
    assert checkpoint.find(stopped, "auto") is None
    with pytest.raises(ValueError, match="COMPLETE is absent"):
        checkpoints.verify(stopped / "checkpoints" / "step_0000001", [])


def test_a_checkpoint_of_another_model_is_refused(stopped: Path, tiny_shards: Path, world: engine.World) -> None:
    with pytest.raises(ValueError, match=r"model\.json: the checkpoint is of another model \(model\.space_depth: 2 ->"):
        train(tiny_shards, stopped, world, "model.space_depth=1")


def test_another_config_is_refused_with_the_keys(stopped: Path, tiny_shards: Path, world: engine.World) -> None:
    with pytest.raises(ValueError, match=r"config\.yaml: .*other values \(optim\.lr: 0\.002 -> 0\.001; seed: 0 -> 5\)"):
        train(tiny_shards, stopped, world, "optim.lr=0.001", "seed=5", "log_every=7")


def test_a_change_that_is_allowed(stopped: Path, tiny_shards: Path, world: engine.World) -> None:
    def resume(*allow: str) -> Trainer:
        words = runs.words(tiny_shards, stopped, 2, "optim.steps=3", "optim.lr=0.001", "engine.zero_stage=2")
        trainer = Trainer(load(RunConfig, None, words), world)
        trainer.start("auto", allow)
        return trainer

    with pytest.raises(ValueError, match=r"\(engine\.zero_stage: 1 -> 2\); .*name each with --allow-change"):
        resume("optim.lr")
    with pytest.raises(ValueError, match=r"--allow-change optim\.rate: is no key"):
        resume("optim.lr", "optim.rate")
    trainer = resume("optim.lr", "engine.zero_stage")
    trainer.train()
    assert trainer.step == 3 and runs.log(stopped)[2]["optim/lr"] <= 0.001


def test_which_checkpoint(finished: Path, tmp_path: Path) -> None:
    newest = checkpoints.latest(finished)
    assert checkpoint.find(finished, "auto") == newest and checkpoint.find(tmp_path, "auto") is None
    older = newest.with_name("step_0000002")
    assert checkpoint.find(finished, str(older)) == older and checkpoint.find(tmp_path, "never") is None
    with pytest.raises(ValueError, match="holds a run up to step_0000003"):
        checkpoint.find(finished, "never")
    with pytest.raises(ValueError, match="lies outside"):
        checkpoint.find(tmp_path, str(older))


def test_other_genes_are_refused(stopped: Path, tiny_shards: Path, world: engine.World) -> None:
    trainer = Trainer(load(RunConfig, None, runs.words(tiny_shards, stopped, 2, "optim.steps=3")), world)
    table = trainer.contents.genes
    fewer = GeneTable((*table.ids[:-1], "ENSG99999999999"), table.symbols, table.share)
    with pytest.raises(ValueError, match=r"genes\.tsv: not the genes of the shards"):
        checkpoint.check(
            checkpoints.latest(stopped), checkpoint.Contents(**{**vars(trainer.contents), "genes": fewer}), world
        )


def test_another_geometry_than_the_shards_is_refused(tiny_shards: Path) -> None:
    config = load(RunConfig, None, ["run_dir=x", f"data.shards={tiny_shards}", "model.tile_px=64"])
    with pytest.raises(ValueError, match=r"manifest\.json: tile_px is 112, the config asks for 64"):
        fit_model(config.model, ShardSet(tiny_shards))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_stops_the_run_and_is_named(
    tiny_shards: Path, world: engine.World, tmp_path: Path, workers: int
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards)
    tar = shards / "train" / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(
        RankError, match=r"^rank 0, step 1: .*000000\.tar: group .*: truncated; restore the shard [^\n]*$"
    ):
        train(shards, tmp_path / "run", world, f"data.workers={workers}")
