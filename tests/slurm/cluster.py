"""A throw-away SLURM on this machine: munged, slurmctld and two slurmd, without systemd, all of it in one folder.

In: an empty folder with a short path. Out: a cluster that jobs are sent to, and what became of them.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo", "setpriv")
MAX_ARRAY, GPUS = 4, 2  # gpus: of a node, made up
NODES = ("127.0.0.1", "127.0.0.2")  # names that are addresses: they resolve on every machine
_PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_SETTINGS = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool_%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd_%n.pid
PlugStackConfig={root}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,sched_interval=1,batch_sched_delay=0,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=8
MaxArraySize={max_array}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName={nodes[0]} Port={ports[0]} CPUs=8 RealMemory=64000 Gres=gpu:{gpus} State=UNKNOWN
NodeName={nodes[1]} Port={ports[1]} CPUs=8 RealMemory=64000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=8 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF State=UP
"""


def missing() -> list[str]:
    """The programs that a cluster needs and that are not installed."""
    return [name for name in PROGRAMS if not shutil.which(name, path=_PATH)]


def until(true: Callable[[], object], what: str, seconds: float = 60, pause: float = 0.2) -> None:
    """Wait for something. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(pause)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(contextlib.closing(socket.socket())) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


@dataclass
class Cluster:
    """A running cluster; `env` is the environment that its users have."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        """Start the daemons and wait until the node takes jobs."""
        for name in ("state", *(f"spool_{node}" for node in NODES)):
            (self.root / name).mkdir()
        for name in ("cgroup.conf", "plugstack.conf"):
            (self.root / name).touch()
        for i in range(GPUS):  # numbers that are given out, and no devices
            (self.root / f"gpu{i}").symlink_to("/dev/null")
        lines = [f"Name=gpu File={self.root}/gpu{i}\n" for i in range(GPUS)]
        (self.root / "gres.conf").write_text("".join(lines))
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        host = os.uname().nodename.split(".")[0]
        controller, *ports = _free_ports(1 + len(NODES))
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        facts = {"host": host, "controller": controller, "ports": ports, "user": user, "root": self.root}
        (self.root / "slurm.conf").write_text(_SETTINGS.format(**facts, nodes=NODES, gpus=GPUS, max_array=MAX_ARRAY))
        clean = {k: v for k, v in os.environ.items() if not re.match(r"SLURM|SBATCH|SALLOC|STORM_(?!TEST)", k)}
        self.env = clean | {"PATH": _PATH, "SLURM_CONF": str(self.root / "slurm.conf")}
        own = ["--key-file", str(key), "--pid-file", str(self.root / "munge.pid"), "--socket",
               str(self.root / "munge.sock"), "--seed-file", str(self.root / "munge.seed")]  # fmt: skip
        self._daemon("munged", "--force", "--foreground", *own)
        until((self.root / "munge.sock").exists, "munged")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        until(lambda: set(self.tell("sinfo", "--noheader", "--Node", "--format=%T").split()) == {"idle"}, "idle nodes")

    def _daemon(self, name: str, *words: str) -> None:
        command = ["setpriv", "--pdeathsig", "TERM", name, *words]  # it ends with the tests, also where they are killed
        with (self.root / f"{name}_{len(self.daemons)}.log").open("wb") as log:
            self.daemons.append(subprocess.Popen(command, stdout=log, stderr=log, env=self.env, start_new_session=True))

    def stop(self) -> None:
        """End all jobs and then the daemons, the last started first."""
        self.tell("scancel", f"--user={os.getuid()}")
        with contextlib.suppress(TimeoutError):
            until(lambda: not self.tell("squeue", "--noheader").strip(), "an empty queue", seconds=10)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.send_signal(signal.SIGKILL)
                daemon.wait()

    def tell(self, *command: str) -> str:
        """What a command of SLURM prints, '' where it fails."""
        return subprocess.run(command, capture_output=True, text=True, env=self.env, timeout=60).stdout

    def run(self, *command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
        """A command of a user of the cluster in a folder, with more variables."""
        return subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, cwd=cwd, env=self.env | env, timeout=60
        )

    def waited(self, job: str, seconds: float = 120) -> dict[str, str]:
        """`array index (or '') -> state:exit code` of a job once all of it has ended."""
        until(lambda: not self.tell("squeue", "--noheader", f"--jobs={job}").strip(), f"job {job}", seconds)
        return dict(sorted(self._outcomes(job)))

    def _outcomes(self, job: str) -> Iterator[tuple[str, str]]:
        for line in self.tell("scontrol", "--oneliner", "show", "job", job).splitlines():
            fact = dict(word.split("=", 1) for word in line.split() if "=" in word)
            yield fact.get("ArrayTaskId", ""), f"{fact['JobState']}:{fact['ExitCode'].split(':')[0]}"
