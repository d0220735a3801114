"""Two ranks against one plain process, in ZeRO 1 and 3; runs carried from one number of ranks and stage to another; and
DeepSpeed's own launcher, stopped and resumed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from storm import checkpoints
from storm.config import RunConfig, load
from storm.losses import TERMS
from storm.train import engine
from storm.train.trainer import FINISHED, Trainer
from tests.train import jobs, plain, runs
from tests.train.runs import agree

# Sums of other orders differ in their last bits, and AdamW carries that on: seen 2e-7 of a loss, 2e-6 of the weights.
LOSS, WEIGHT = 2e-6, 1e-4


def losses(run: Path) -> np.ndarray:
    assert [line["step"] for line in runs.log(run)] == list(range(1, runs.STEPS + 1))
    return np.array([line["train/loss"] for line in runs.log(run)])


@pytest.fixture(scope="module")
def twin(tiny_shards: Path) -> plain.Twin:
    return plain.train(runs.kept(tiny_shards, Path("unused")))


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_train_as_one_plain_process(two: Callable, twin: plain.Twin, stage: int) -> None:
    np.testing.assert_allclose(losses(two(stage) / "run"), twin.losses, rtol=LOSS)
    assert plain.apart(load_file(checkpoints.latest(two(stage) / "run") / "model.safetensors"), twin) < WEIGHT
    pairs = twin.dark.reshape(-1, 2)  # rank 0's and rank 1's group of each micro-batch
    assert (pairs[:, 0] != pairs[:, 1]).any(), "one of two ranks without a tile"


def first_of(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Losses and gradients of the first step that two ranks wrote."""
    with np.load(folder / f"{name}.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_have_the_losses_and_gradients_of_one(
    two: Callable, tiny_shards: Path, world: engine.World, tmp_path: Path, stage: int
) -> None:
    found = first_of(two(stage), "first")
    agree(runs.first_step(runs.kept(tiny_shards, tmp_path), world), found)


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_have_the_losses_and_gradients_of_one_with_all_terms_on(
    two: Callable, wide_shards: Path, world: engine.World, tmp_path: Path, stage: int
) -> None:
    found = first_of(two(stage), "all_terms")
    assert all(np.isfinite(found[term]) for term in TERMS if term != "anchor")
    agree(runs.first_step(load(RunConfig, None, runs.all_terms(wide_shards, tmp_path, 1)), world), found)


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_have_the_gradients_of_one_with_every_switch(
    two: Callable, tiny_shards: Path, world: engine.World, tmp_path: Path, stage: int
) -> None:
    """Tokens, descriptors, distance bias; on one of two ranks a group without a tile, and one without expression."""
    found = first_of(two(stage), "switched")
    config = runs.kept(tiny_shards, tmp_path, *runs.SWITCHED, runs.descriptors(tiny_shards, tmp_path))
    agree(runs.first_step(config, world), found)
    stream = Trainer(config, world).stream
    for absent in ("tile_weight", "visible"):
        pairs = np.array([bool(stream[item][absent].any()) for item in range(runs.BATCH)]).reshape(-1, 2)
        assert (pairs[:, 0] != pairs[:, 1]).any(), absent


@pytest.mark.parametrize("stage", [1, 3])
def test_from_one_rank_to_two(two: Callable, alone: Path, stage: int) -> None:
    other = two(stage) / "other"
    before = runs.log(other)[: runs.STOP]
    assert before == runs.log(alone)[: runs.STOP] and runs.log(other) != runs.log(alone)
    np.testing.assert_allclose(losses(other), losses(alone), rtol=LOSS)
    marks = [checkpoints.verify(path, [])["ranks"] for path in checkpoints.complete(other)]
    assert marks == [1, 2]


@pytest.mark.parametrize("stage", [1, 3])
def test_from_two_ranks_to_one(
    two: Callable, tiny_shards: Path, world: engine.World, tmp_path: Path, stage: int
) -> None:
    run = runs.carry(two(stage) / "run", tmp_path / "run")
    trainer = Trainer(runs.kept(tiny_shards, run, f"engine.zero_stage={stage}", runs.DIVIDED), world)
    trainer.start("auto")
    assert trainer.step == runs.STOP
    trainer.train()
    np.testing.assert_allclose(losses(run), losses(two(stage) / "run"), rtol=LOSS)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_gradient_of_one_rank_that_is_not_finite_is_named_by_all(two: Callable, stage: int) -> None:
    first, second = ((two(stage) / f"said{rank}.txt").read_text() for rank in range(2))
    keys = (two(stage) / "groups.txt").read_text().splitlines()
    assert first == second and "rank 0" not in first
    assert keys and all(f"rank 1: gradient of depth of groups {key}" in first for key in keys)


def test_stopped_and_resumed_under_the_launcher_equals_a_run_that_went_on(
    two: Callable, tiny_shards: Path, tmp_path: Path
) -> None:
    words = runs.words(tiny_shards, tmp_path / "run", 1, "engine.zero_stage=3", runs.DIVIDED)
    done = jobs.launch([*words, "--stop-after-step", "7"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in checkpoints.complete(tmp_path / "run")] == ["step_0000007"]
    done = jobs.launch([*words, "--resume", "auto"])
    assert done.returncode == 0 and (tmp_path / "run" / FINISHED).is_file(), done.stdout + done.stderr
    assert "continues from step_0000007" in done.stdout
    straight = two(3) / "run"
    assert runs.log(tmp_path / "run") == runs.log(straight)
    ends = [load_file(checkpoints.latest(run) / "model.safetensors") for run in (tmp_path / "run", straight)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_the_command_on_one_rank_names_what_is_wrong_in_one_line(tiny_shards: Path, tmp_path: Path) -> None:
    words = runs.words(tiny_shards, tmp_path, 3)
    command = [sys.executable, str(jobs.REPO / "launch/pretrain.py"), "--local_rank=0", *words]
    done = subprocess.run(command, cwd=tmp_path, env=jobs.environment(), capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr
    assert "data.global_batch_size=4 cannot be dealt to 1 ranks" in errors[0]
