"""kill -9 of a job at random moments, also inside a checkpoint: what is left resumes, and ends as if nothing had been.

STORM_TEST_KILLS=20 for more than the one kill of every day, half of them with another number of ranks each time.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from storm import checkpoints
from storm.train.trainer import FINISHED
from tests.train import jobs, runs

KILLS = int(os.environ.get("STORM_TEST_KILLS", "1"))


def lines(run: Path) -> int:
    return (run / "log.jsonl").read_bytes().count(b"\n") if (run / "log.jsonl").exists() else 0


def saving(run: Path) -> bool:
    """Whether a checkpoint is being written, or was when the job was killed."""
    return any((run / checkpoints.FOLDER).glob(".step_*"))


def kill(job: jobs.Ranks, run: Path, rng: np.random.Generator, inside: bool) -> None:
    """Let the job get a step or two further, then kill it at some moment, or in the middle of a checkpoint."""
    more = lines(run) + int(rng.integers(1, 3))
    began = time.monotonic()
    while job.running() and (lines(run) < more or (inside and not saving(run))):
        assert time.monotonic() - began < jobs.LIMIT_S, job.log.read_text()
        time.sleep(0.002)
    time.sleep(float(rng.uniform(0, 0.01 if inside else 0.5)))
    job.kill()


def disturbed(shards: Path, folder: Path, kills: int, worlds: list[int]) -> tuple[Path, int]:
    """A run that is killed so often, and ended by two ranks; how many kills hit a checkpoint half-written."""
    run, rng, torn = folder / "run", np.random.default_rng(kills), 0
    words = runs.words(shards, run, 1, "checkpoint.every_steps=1", "checkpoint.keep_last=3")
    command = [str(jobs.REPO / "launch/pretrain.py"), *words]
    for i in range(kills):
        kill(jobs.Ranks(command, worlds[i % len(worlds)], folder / "out.txt"), run, rng, inside=i % 2 == 0)
        torn += saving(run)
        for path in checkpoints.complete(run):
            checkpoints.verify(path, sorted(checkpoints.verify(path, [])["files"]))
    jobs.Ranks(command, 2, folder / "out.txt").wait()
    assert (run / FINISHED).is_file() and not saving(run)
    return run, torn


def test_killed_and_resumed_by_as_many_ranks(two: Callable[[int], Path], tiny_shards: Path, tmp_path: Path) -> None:
    run, torn = disturbed(tiny_shards, tmp_path, max(1, KILLS // 2), [2])
    print(f"{torn} kills hit a checkpoint")
    assert torn, "the first kill waits for a checkpoint"
    straight = two(1) / "run"
    assert runs.log(run) == runs.log(straight)
    ends = [load_file(checkpoints.latest(of) / "model.safetensors") for of in (run, straight)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


@pytest.mark.skipif(KILLS < 2, reason="only with more than one kill: STORM_TEST_KILLS=20")
def test_killed_and_resumed_by_other_ranks(two: Callable[[int], Path], tiny_shards: Path, tmp_path: Path) -> None:
    run, torn = disturbed(tiny_shards, tmp_path, KILLS // 2, [1, 2, 4])
    print(f"{torn} kills hit a checkpoint")
    found, expected = ([line["train/loss"] for line in runs.log(of)] for of in (run, two(1) / "run"))
    np.testing.assert_allclose(found, expected, rtol=2e-5)
