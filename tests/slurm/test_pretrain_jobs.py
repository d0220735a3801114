"""pretrain.sbatch on a real SLURM of two nodes: asked to stop, preempted, killed, refused; and the other launchers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from storm import checkpoints
from storm.train import ranks, stop
from storm.train.trainer import FINISHED
from tests.slurm.cluster import GPUS, NODES, Cluster, until

REPO = Path(__file__).resolve().parents[2]
SUBMIT, PROGRAM, BIN = REPO / "slurm" / "submit", REPO / "launch" / "pretrain.py", Path(sys.executable).parent
STEPS, LIMIT_S = 40, 300
ENV = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPO)}


def words(shards: Path, run_dir: Path) -> list[str]:
    return [
        f"run_dir={run_dir}", f"data.shards={shards}", "data.global_batch_size=2", "data.micro_batch_size=1",
        f"optim.steps={STEPS}", "optim.lr=2e-3", "checkpoint.every_steps=1000", "mask.loss_genes=200",
    ]  # fmt: skip


def curve(run_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) of each logged step; a line that is being written does not count."""
    path = run_dir / "log.jsonl"
    lines = path.read_text().splitlines(True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(r["step"], r.get("train/loss", r.get("loss"))) for r in records if "event" not in r]


def after(step: int, run_dir: Path) -> Callable[[], bool]:
    return lambda: bool(curve(run_dir)) and curve(run_dir)[-1][0] > step


def submitted(cluster: Cluster, cwd: Path, *options: object, **env: str) -> str:
    """The id of a job of pretrain.sbatch on both nodes."""
    cwd.mkdir(exist_ok=True)
    sized = (f"--nodes={len(NODES)}", "--cpus-per-task=1", *options)
    done = cluster.run(SUBMIT, "pretrain.sbatch", *sized, cwd=cwd, **ENV, **env)
    assert re.fullmatch(r"\d+\n", done.stdout), done
    return done.stdout.strip()


def log_of(cwd: Path, job: str) -> str:
    return (cwd / "logs" / f"storm-pretrain_{job}.out").read_text()


def process_of(job: str, rank: int) -> int:
    """The process of a job's task that runs the program."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            env, words = ((folder / name).read_bytes().split(b"\0") for name in ("environ", "cmdline"))
            wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode(), b"SLURM_STEP_ID=0"}
            if wanted <= set(env) and words[1:2] == [str(PROGRAM).encode()]:
                return int(folder.name)
        except OSError:  # it has ended, or is another user's
            continue
    raise AssertionError(f"job {job} has no process of task {rank}")


@pytest.fixture(scope="module")
def undisturbed(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks by torchrun, from start to end."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [f"{BIN}/torchrun", "--standalone", "--nproc_per_node=2", str(PROGRAM), *words(tiny_shards, run_dir)]
    ours = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(command, env=env | ENV, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0 and (run_dir / FINISHED).is_file(), done.stderr
    return run_dir


def test_a_job_asked_to_stop_and_then_preempted_ends_as_an_undisturbed_one(
    cluster: Cluster, undisturbed: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    # With a loader process, for SLURM sends its signals to all processes of a task.
    job = submitted(cluster, tmp_path, "--", *words(tiny_shards, run_dir), "data.workers=1")
    until(after(1, run_dir), "the first steps", LIMIT_S, pause=0.05)
    cluster.tell("scancel", "--signal=USR2", job)  # as SLURM does before the time limit
    until(lambda: checkpoints.complete(run_dir), "a checkpoint", LIMIT_S)
    first = int(checkpoints.latest(run_dir).name.rpartition("_")[2])
    until(after(first, run_dir), "the second start", LIMIT_S, pause=0.05)
    urgent = ("--partition=urgent", f"--nodes={len(NODES)}", "--ntasks-per-node=8", "--output=/dev/null", "--wrap=true")
    assert cluster.run("sbatch", *urgent, cwd=tmp_path).returncode == 0
    assert cluster.waited(job, LIMIT_S) == {"": "COMPLETED:0"}
    log = log_of(tmp_path, job)
    assert log.count("== job ") == 3 and "2 nodes x 1 tasks x 1 CPUs, start 3" in log, log
    assert stop.SIGNALLED.name in log and stop.PREEMPTED.name in log and "DUE TO PREEMPTION" in log, log
    assert f"continues from step_{first:07d}" in log and (run_dir / FINISHED).is_file(), log
    assert curve(run_dir) == curve(undisturbed) and len(curve(run_dir)) == STEPS
    ends = [load_file(checkpoints.latest(run) / "model.safetensors") for run in (run_dir, undisturbed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_a_killed_rank_is_named_and_ends_the_job_for_good(cluster: Cluster, tiny_shards: Path, tmp_path: Path) -> None:
    job = submitted(cluster, tmp_path, "--", *words(tiny_shards, tmp_path / "run"))
    until(after(0, tmp_path / "run"), "the first step", LIMIT_S, pause=0.05)
    os.kill(process_of(job, 1), signal.SIGKILL)
    ((_, state),) = cluster.waited(job, LIMIT_S).items()
    log = log_of(tmp_path, job)
    assert state.startswith("FAILED:") and not (tmp_path / "run" / FINISHED).exists()
    assert re.search(rf"^0: error: no sign for \d+ s of rank 1 on {NODES[1]} ", log, re.MULTILINE), log
    assert log.count("== job ") == 1 and " Restarts=0 " in cluster.tell("scontrol", "--oneliner", "show", "job", job)


def test_an_error_is_told_once_and_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    job = submitted(cluster, tmp_path, "--", *words(tmp_path / "nowhere", tmp_path / "run"))
    assert cluster.waited(job, LIMIT_S) == {"": "FAILED:2"}
    log = log_of(tmp_path, job)
    assert len(re.findall(r"^\d: error: .*nowhere", log, re.MULTILINE)) == 1 and "Traceback" not in log, log
    assert " Restarts=0 " in cluster.tell("scontrol", "--oneliner", "show", "job", job)


def test_a_stop_file_under_the_deepspeed_launcher(cluster: Cluster, tiny_shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    line = " ".join([f"{BIN}/deepspeed --num_gpus 2 {PROGRAM}", *words(tiny_shards, run_dir)])
    with socket.socket() as taken:  # the launcher's default port, on which other jobs of the node may be
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 29500))
        taken.listen()
        batch = ("sbatch", "--parsable", "--nodes=1", "--ntasks=2", "--output=out", f"--wrap={line}")
        job = cluster.run(*batch, cwd=tmp_path, **ENV)
        until(after(1, run_dir), "the first steps", LIMIT_S, pause=0.05)
        (run_dir / stop.STOP).touch()
        assert cluster.waited(job.stdout.strip(), LIMIT_S) == {"": "COMPLETED:0"}
    assert not (run_dir / FINISHED).exists() and not (run_dir / stop.STOP).exists()
    assert checkpoints.latest(run_dir).name == f"step_{curve(run_dir)[-1][0]:07d}"
    assert stop.STOP_FILE.name in (tmp_path / "out").read_text()


def test_a_task_for_each_gpu_and_all_gpus_for_each_task(cluster: Cluster, tmp_path: Path) -> None:
    wrapper = tmp_path / "wrapper"
    said = "$SLURMD_NODENAME $SLURM_LOCALID $SLURM_CPUS_PER_TASK $CUDA_VISIBLE_DEVICES: $*"
    wrapper.write_text(f'#!/bin/sh\necho "{said}"\n')
    wrapper.chmod(0o755)
    options = (f"--gres=gpu:{GPUS}", f"--ntasks-per-node={GPUS}", "--", "a=b")
    job = submitted(cluster, tmp_path, *options, STORM_RUN=str(wrapper))
    assert cluster.waited(job) == {"": "COMPLETED:0"}
    tasks = sorted(line for line in log_of(tmp_path, job).splitlines() if line[1] == ":")
    assert tasks == [
        f"{node * GPUS + task}: {NODES[node]} {task} 1 0,1: python {PROGRAM} a=b"
        for node in range(len(NODES)) for task in range(GPUS)
    ]  # fmt: skip
    bare = ("--nodes=2", "--gres=gpu:1", f"--output={tmp_path}/bare", "slurm/pretrain.sbatch", "a=b")
    done = cluster.run("sbatch", "--parsable", *bare, cwd=REPO, STORM_RUN=str(wrapper))
    assert cluster.waited(done.stdout.strip()) == {"": "COMPLETED:0"}
    tasks = sorted(line for line in (tmp_path / "bare").read_text().splitlines() if line[1] == ":")
    assert [line.split()[:2] for line in tasks] == [[f"{node}:", NODES[node]] for node in range(len(NODES))]
    done = cluster.run(SUBMIT, "embed.sbatch", "--gres=gpu:1", "--", "-o", "b", cwd=tmp_path, STORM_RUN=str(wrapper))
    assert cluster.waited(done.stdout.strip()) == {"": "COMPLETED:0"}
    log = (tmp_path / "logs" / f"storm-embed_{done.stdout.strip()}.out").read_text()
    assert log == f"{NODES[0]} 0 4 0: python {REPO / 'launch' / 'embed.py'} -o b\n"


def test_what_is_asked_of_slurm(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for nodes in ("a", "gpu[03-07,9],login", "r[1-2]n[01-04]", "127.0.0.[1-2]"):
        assert ranks.first_host(nodes) == cluster.tell("scontrol", "show", "hostnames", nodes).split()[0]
    sleeping = cluster.run("sbatch", "--parsable", "--time=90", "--output=/dev/null", "--wrap=sleep 1000", cwd=tmp_path)
    job = sleeping.stdout.strip()
    until(lambda: "RUNNING" in cluster.tell("squeue", "--noheader", f"--jobs={job}", "--format=%T"), "a running job")
    monkeypatch.setattr(os, "environ", cluster.env)
    (end,) = re.findall(r" EndTime=(\S+)", cluster.tell("scontrol", "--oneliner", "show", "job", job))
    assert stop.end_of_job(job) == datetime.fromisoformat(end).timestamp()
    assert stop.end_of_job("999999") is None
    cluster.tell("scancel", job)
