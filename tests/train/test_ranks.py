"""Two ranks, by DeepSpeed's own launcher: stopped and resumed against a job that ran on, and against one rank."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from storm import checkpoints
from storm.config import RunConfig, load
from storm.train import engine
from storm.train.trainer import FINISHED
from tests.train import runs
from tests.train.test_trainer import agree

REPO = Path(__file__).resolve().parents[2]
LIMIT_S = 240


def free_port() -> str:
    """A port nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def environment() -> dict[str, str]:
    """The variables of a job: one thread per rank, the checkout importable, no rank of ours."""
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in ranks}
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPO)}


def launch(words: list[str]) -> subprocess.CompletedProcess[str]:
    """`deepspeed --num_gpus 2 launch/pretrain.py`."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", free_port()]
    command = [*launcher, str(REPO / "launch/pretrain.py"), *words]
    return subprocess.run(
        command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


@pytest.fixture(scope="module")
def straight(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks from start to end, without launcher; its first gradients lie beside it."""
    folder = tmp_path_factory.mktemp("straight")
    port = free_port()
    command = [sys.executable, "-m", "tests.train.runs", str(folder / "first.npz")]
    command += runs.words(tiny_shards, folder / "run", 1)
    jobs = []
    for rank in ("0", "1"):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        jobs.append(subprocess.Popen(command, cwd=REPO, env=environment() | ranks))
    try:
        assert [job.wait(LIMIT_S) for job in jobs] == [0, 0]
    finally:
        for job in jobs:
            job.kill()
    return folder


def test_stopped_and_resumed_under_the_launcher_equals_a_run_that_went_on(
    straight: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    words = runs.words(tiny_shards, tmp_path / "run", 1)
    done = launch([*words, "--stop-after-step", str(runs.STOP)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in checkpoints.complete(tmp_path / "run")] == [f"step_{runs.STOP:07d}"]
    done = launch([*words, "--resume", "auto"])
    assert done.returncode == 0 and (tmp_path / "run" / FINISHED).is_file(), done.stdout + done.stderr
    assert f"continues from step_{runs.STOP:07d}" in done.stdout
    assert runs.log(tmp_path / "run") == runs.log(straight / "run") and len(runs.log(straight / "run")) == runs.STEPS
    ends = [load_file(checkpoints.latest(run) / "model.safetensors") for run in (tmp_path / "run", straight / "run")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_two_ranks_have_the_losses_and_gradients_of_one(
    straight: Path, tiny_shards: Path, world: engine.World, tmp_path: Path
) -> None:
    with np.load(straight / "first.npz") as arrays:
        two = {name: arrays[name] for name in arrays.files}
    one = runs.first_step(load(RunConfig, None, runs.words(tiny_shards, tmp_path, 1)), world)
    agree(one, two)


def test_the_command_on_one_rank_names_what_is_wrong_in_one_line(tiny_shards: Path, tmp_path: Path) -> None:
    words = runs.words(tiny_shards, tmp_path, 3)
    command = [sys.executable, str(REPO / "launch/pretrain.py"), "--local_rank=0", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr
    assert "data.global_batch_size=4 cannot be dealt to 1 ranks" in errors[0]
