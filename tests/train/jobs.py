"""Jobs of several ranks for the tests: by DeepSpeed's launcher, and as plain processes that can be killed."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
LIMIT_S = 300


_PORTS = itertools.cycle(range(20_000 + os.getpid() % 120 * 100, 20_000 + os.getpid() % 120 * 100 + 100))


def free_port() -> str:
    """A port that nothing listens on, below those that the kernel gives to any connection, and of this process's own:
    between this look and the start of the ranks nobody else may take it."""
    while True:
        port = next(_PORTS)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return str(port)


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


class Ranks:
    """`python WORDS` as so many ranks without a launcher; what they print goes into one file."""

    def __init__(self, words: list[str], size: int, log: Path) -> None:
        port, self.log = free_port(), log
        self.processes = []
        with log.open("ab") as out:
            for rank in map(str, range(size)):
                own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(size)}
                env = environment() | own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                command = [sys.executable, *words]
                self.processes.append(
                    subprocess.Popen(command, cwd=REPO, env=env, stdout=out, stderr=out, start_new_session=True)
                )

    def wait(self) -> None:
        """Until all have ended, successfully."""
        try:
            codes = [process.wait(LIMIT_S) for process in self.processes]
        finally:
            self.kill()
        assert codes == [0] * len(codes), self.log.read_text()

    def running(self) -> bool:
        """Whether all still run."""
        return all(process.poll() is None for process in self.processes)

    def kill(self) -> None:
        """kill -9 of every rank and its loaders."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
