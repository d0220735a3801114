"""Ranks that leave, fail and stall, in jobs of three plain processes: who ends, with which code, and what is told."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storm.train import ranks

REPO = Path(__file__).resolve().parents[2]
RANKS, LIMIT_S = 3, 60  # within a minute, says the guide; a busy machine may take longer to start them
START_S = 300


@contextmanager
def started(word: str, folder: Path, stall_s: float = 1000) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The ranks of a job; what they print goes to `<rank>.log`."""
    place, jobs = ranks.find({}), []  # a free port
    for rank in range(RANKS):
        mine = dataclasses.replace(place, rank=rank, size=RANKS, local_rank=rank).variables()
        env = os.environ | mine | {"SLURMD_NODENAME": f"n{rank}", "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        with (folder / f"{rank}.log").open("wb") as log:
            command = [sys.executable, "-m", "tests.train.watched", word, str(stall_s)]
            jobs.append(subprocess.Popen(command, cwd=REPO, env=env, stdout=log, stderr=log))
    try:
        yield jobs
    finally:
        for job in jobs:
            job.kill()
            job.wait()


def said(folder: Path) -> list[str]:
    """The lines of all ranks that are ours."""
    lines = [line for rank in range(RANKS) for line in (folder / f"{rank}.log").read_text().splitlines()]
    return [line for line in lines if line.startswith(("error: ", "warning: "))]


def wait_for(folder: Path, rank: int, pattern: str) -> None:
    end = time.monotonic() + START_S
    while not re.search(pattern, (folder / f"{rank}.log").read_text()):
        assert time.monotonic() < end, (folder / f"{rank}.log").read_text()
        time.sleep(0.1)


def test_the_fault_of_one_rank_is_told_once_and_ends_all_with_its_code(tmp_path: Path) -> None:
    with started("fails", tmp_path) as jobs:
        assert [job.wait(START_S) for job in jobs] == [2] * RANKS
    assert said(tmp_path) == ["error: its disk is full"]


@pytest.mark.parametrize(("word", "killed"), [("stalls", 1), ("hangs", 2), ("hangs", 0)])
def test_a_killed_rank_is_named_and_the_others_end(tmp_path: Path, word: str, killed: int) -> None:
    with started(word, tmp_path, stall_s=2) as jobs:
        if word == "stalls":
            wait_for(tmp_path, 0, r"(no step ended[^\n]*\n.*){5}")  # longer than LOST_BEATS: slow is not gone
            assert [job.poll() for job in jobs] == [None] * RANKS
            assert re.fullmatch(
                "warning: no step ended for 2 s after step 3: rank 0 on n0, rank 2 on n2 waits for the other ranks; "
                "rank 1 on n1 waits for its loader",
                said(tmp_path)[0],
            )
        else:
            for rank in range(RANKS):
                wait_for(tmp_path, rank, "pid")
        jobs[killed].send_signal(signal.SIGKILL)
        assert [job.wait(LIMIT_S) for job in jobs] == [-9 if rank == killed else 1 for rank in range(RANKS)]
    errors = [line for line in said(tmp_path) if line.startswith("error")]
    if killed:  # rank 0 holds the store; where it goes, each says so
        assert len(errors) == 1 and f" of rank {killed} on n{killed} " in errors[0]
    else:
        assert errors == [errors[0]] * 2 and errors[0].startswith("error: no sign of rank 0: its store at 127.0.0.1:")
