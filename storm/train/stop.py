"""Why a run stops, and with which exit code: one table, and what asks for a stop before the schedule's end.

In: signals, a STOP file in the run folder, the time at which the job ends. Out: the reason that all ranks agree on, at
the end of one step. A signal sets a flag and nothing else.
"""

import datetime
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path

from storm import files
from storm.commands import INTERRUPTED
from storm.config import StopConfig

DONE, FAULT, USAGE, GAVE_UP, AGAIN = 0, 1, 2, 3, 75  # 75 is EX_TEMPFAIL: the same command goes on
STOP, RESTARTS = "STOP", "restarts.json"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
HOLD_S = 600.0  # how long a preempted job waits to be killed, which SLURM does after its GraceTime


@dataclass(frozen=True)
class Reason:
    """A row of the table."""

    name: str
    does: str
    code: int
    requeued_by: str = "nobody"


FINISHED = Reason("the schedule is done", "checkpoint, FINISHED", DONE)
AFTER_STEP = Reason("`--stop-after-step N`", "checkpoint", DONE)
STOP_FILE = Reason("a file `STOP` in the run folder", "checkpoint; the file is removed", DONE)
PREEMPTED = Reason(
    "TERM in a SLURM job: preemption, `scancel`", "checkpoint, then waits to be killed, at most 10 minutes", AGAIN,
    "SLURM after preemption; after 10 minutes the job itself; nobody after `scancel`",
)  # fmt: skip
TERMINATED = Reason("TERM outside a SLURM job: somebody asked the program to end", "checkpoint", AGAIN, "who sent it")
SIGNALLED = Reason("USR1 or USR2: `--signal=USR2@300` before the time limit", "checkpoint", AGAIN, "the job itself")
TIME_LIMIT = Reason("the job ends within `stop.margin_s`", "checkpoint", AGAIN, "the job itself")
REQUESTS = (STOP_FILE, PREEMPTED, TERMINATED, SIGNALLED, TIME_LIMIT)  # where several are asked for: the first
TABLE = (
    FINISHED, AFTER_STEP, *REQUESTS,
    Reason("Ctrl-C", "nothing", INTERRUPTED),
    Reason("a loss or gradient is not finite", "names rank, term and groups; the weights stay", FAULT),
    Reason("a rank left, or fails alone", "names it; all ranks end", FAULT, "nobody; SLURM where a node failed"),
    Reason("any other error of the program", "its traceback; all ranks end", FAULT),
    Reason("wrong usage, config or data", "says file, fact and cure", USAGE),
    Reason("`stop.max_restarts` restarts without a new checkpoint", "says so", GAVE_UP),
)  # fmt: skip


class GaveUpError(ValueError):
    """The run was restarted by a machine again and again, and came no further."""

    code = GAVE_UP


class RankLeftError(RuntimeError):
    """Another rank is no longer there."""

    code = FAULT


class ToldError(Exception):
    """The job ends for a reason that another rank tells."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


_received: set[signal.Signals] = set()


def listen() -> None:
    """From now on SIGNALS ask for a stop. To be called early: before, they end the process."""
    for number in SIGNALS:
        signal.signal(number, lambda got, _: _received.add(signal.Signals(got)))


def end_listening() -> None:
    """Signals are ignored. Python's last act gives them their default back, with which one ends the process: a launcher
    sends TERM to all ranks as soon as the first has ended, and the exit code would be that of the signal."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def deferred() -> Iterator[None]:
    """Signals wait; processes that are started meanwhile never get them, for they are for the rank alone."""
    resource_tracker.ensure_running()  # its start would let TERM through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Requests:
    """What asks this rank to stop, and what all ranks have agreed on."""

    def __init__(self, run_dir: Path, rank: int, config: StopConfig) -> None:
        self.file = run_dir / STOP
        self.agreed: Reason | None = None
        self._first = rank == 0  # one rank looks at file and clock, so a step asks the file system once
        self._deadline = Deadline(config, os.environ) if self._first else None

    def votes(self) -> list[float]:
        """1 for each of REQUESTS that is asked for here."""
        in_job = "SLURM_JOB_ID" in os.environ
        asked = {
            STOP_FILE: self._first and self.file.exists(),
            PREEMPTED: in_job and signal.SIGTERM in _received,
            TERMINATED: not in_job and signal.SIGTERM in _received,
            SIGNALLED: bool(_received & {signal.SIGUSR1, signal.SIGUSR2}),
            TIME_LIMIT: self._deadline is not None and self._deadline.near(),
        }
        return [float(asked[reason]) for reason in REQUESTS]

    def decide(self, votes: list[float]) -> None:
        """Agree, given the sum of all ranks' votes: the same everywhere."""
        self.agreed = self.agreed or next((reason for reason, n in zip(REQUESTS, votes, strict=True) if n), None)

    def conclude(self, reason: Reason) -> None:
        """After the checkpoint: take the request back; a preempted job waits to be killed, for one that ends by itself
        is not requeued."""
        if self.agreed is STOP_FILE and self._first:
            self.file.unlink(missing_ok=True)
        if reason is PREEMPTED:
            end = time.monotonic() + HOLD_S
            while time.monotonic() < end:
                time.sleep(1)


class Deadline:
    """When the job ends, by its clock."""

    def __init__(self, config: StopConfig, env: Mapping[str, str]) -> None:
        self._began, self._config, self._env = time.time(), config, env
        self.end_s = float("inf")
        self.end_s = self._ask()
        # A tenth of a short job is enough: with all of it the run would stop after each step.
        self.margin_s = min(config.margin_s, 0.1 * max(0.0, self.end_s - self._began))

    def near(self) -> bool:
        """Whether the margin has begun; then the scheduler is asked again, for limits are prolonged."""
        if time.time() < self.end_s - self.margin_s:
            return False
        self.end_s = self._ask()
        return time.time() >= self.end_s - self.margin_s

    def _ask(self) -> float:
        ends = [self._began + self._config.time_limit_s] if self._config.time_limit_s else []
        if job := self._env.get("SLURM_JOB_ID"):
            # Newer versions set the variable; without an answer what was known stands.
            ends.append(end_of_job(job) or float(self._env.get("SLURM_JOB_END_TIME", self.end_s)))
        return min(ends, default=float("inf"))


def end_of_job(job: str) -> float | None:
    """When a SLURM job ends, in seconds since 1970; None where squeue is absent or does not know."""
    if not shutil.which("squeue"):
        return None
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%e"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=False,
            env=os.environ | {"SLURM_TIME_FORMAT": "standard"},
        )  # fmt: skip
        return datetime.datetime.fromisoformat(done.stdout.strip()).timestamp()
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def count_restart(run_dir: Path, step: int, limit: int, env: Mapping[str, str]) -> None:
    """Count a start from `step` that no person made. One rank calls it.

    Raises:
        GaveUpError: `limit` restarts began at this step.
    """
    path, restarts = run_dir / RESTARTS, 0
    by_machine = any(int(env.get(name, "0")) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    if by_machine and path.is_file():
        before = files.read_json(path)
        if not isinstance(before, dict) or not all(isinstance(before.get(key), int) for key in ("step", "restarts")):
            raise ValueError(f"{path}: holds no count of restarts; remove it")
        restarts = before["restarts"] + 1 if before["step"] == step else 0
    if restarts > limit:
        raise GaveUpError(
            f"{run_dir}: {limit} restarts came no further than step {step}; read the log, then start it by hand, which "
            "begins a new count"
        )
    files.write_json(path, {"step": step, "restarts": restarts})
