"""Checkpoints: what else may lie in their folder, and a disk that is full."""

import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from storm import checkpoints
from storm.train import engine
from tests.train.runs import train


def test_a_checkpoint_that_was_moved_and_linked(stopped: Path, tiny_shards: Path, world: engine.World) -> None:
    link = checkpoints.latest(stopped)
    link.rename(stopped / "moved")
    link.symlink_to(stopped / "moved")
    train(tiny_shards, stopped, world, "checkpoint.every_steps=1", "checkpoint.keep_last=1")
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step_0000003"]
    assert (stopped / "moved" / checkpoints.MARKER).is_file(), "outside the run's folder nothing is removed"


def test_a_full_disk_ends_a_save_and_leaves_the_last_one(stopped: Path, tiny_shards: Path, world: engine.World) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # more than logs, less than weights
    try:
        with pytest.raises(OSError, match="step_0000003") as caught:
            train(tiny_shards, stopped, world)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(stopped / "checkpoints" / "step_0000003")
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step_0000001"]
    assert train(tiny_shards, stopped, world).step == 3


def test_a_file_that_the_marker_does_not_name_is_not_read(
    stopped: Path, tiny_shards: Path, world: engine.World
) -> None:
    path = checkpoints.latest(stopped)
    name, weight = next(iter(load_file(path / "model.safetensors").items()))
    save_file({name: torch.full_like(weight, 7.0)}, path / "more.safetensors")
    assert torch.equal(train(tiny_shards, stopped, world, stop=1).engine.weights()[name], weight)
    (path / checkpoints.MARKER).write_text("{}")
    with pytest.raises(ValueError, match="COMPLETE: names no files"):
        train(tiny_shards, stopped, world)
