"""Where ranks come from: what the environment tells of this process among the others. No torch, no mpi4py.

In: environment variables. Out: a `Place`, by the first of ROUTES that applies. It tells the same program the same under
`python`, `torchrun`, `deepspeed` and `srun`.
"""

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Env = Mapping[str, str]

_SET = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_TASK = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_STEPS_END = 2**32 - 16  # ids from here on stand for batch shells and the like, which are no steps of tasks
_PORTS = (12_000, 16_000)  # first, count: below the ports that systems give away by themselves
_DEEPSPEED_PORT = "29500"  # the launcher's default, on which two jobs of one node meet


@dataclass(frozen=True)
class Place:
    """This process among the ranks."""

    route: str
    rank: int
    size: int
    local_rank: int
    address: str  # of rank 0
    port: int
    host: str

    def variables(self) -> dict[str, str]:
        """What torch.distributed and DeepSpeed read."""
        return {
            "RANK": str(self.rank), "WORLD_SIZE": str(self.size), "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address, "MASTER_PORT": str(self.port),
        }  # fmt: skip

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class Route:
    """A way in which ranks are told; `variables` hold rank, number of ranks and rank on the node."""

    name: str
    where: str
    variables: tuple[str, ...]
    applies: Callable[[Env], bool]


def _launched(env: Env) -> bool:
    return all(name in env for name in _SET)


def _in_step(env: Env) -> bool:
    return int(env.get("SLURM_STEP_ID", _STEPS_END)) < _STEPS_END and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1


ROUTES = (
    Route("launcher", "these are set: by torchrun, deepspeed, by hand", _SET, _launched),
    Route("step", "in a SLURM step of several tasks: by srun", _TASK, _in_step),
    Route("alone", "everywhere else: python", (), lambda env: True),
)


def find(env: Env) -> Place:
    """This process's place.

    Raises:
        ValueError: variables that contradict each other, or do not say where rank 0 is.
    """
    route = next(route for route in ROUTES if route.applies(env))
    numbers = {name: _number(env, name) for name in route.variables}
    rank, size, local_rank = numbers.values() if numbers else (0, 1, 0)
    if not numbers and (half := [name for name in _SET[:2] if name in env]):
        raise ValueError(f"{half[0]} is set, but not all of {', '.join(_SET)}: set these three, or none")
    if not (0 <= rank < size and 0 <= local_rank <= rank):
        told = ", ".join(f"{name}={number}" for name, number in numbers.items())
        raise ValueError(f"{told}: no such rank; ranks count from 0, over all nodes and on the node")
    host = env.get("SLURMD_NODENAME") or socket.gethostname()
    return Place(route.name, rank, size, local_rank, _address(env, size), _port(env, size), host)


def _number(env: Env, name: str) -> int:
    if not re.fullmatch(r"\d+", env[name]):
        raise ValueError(f"{name}={env[name]}: is no number")
    return int(env[name])


def _has_store(env: Env) -> bool:
    """Whether torchrun listens at its port itself: then every rank is a client, also the only one."""
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _address(env: Env, size: int) -> str:
    """Where rank 0 listens: as set, else the first host of the step or job."""
    if size == 1 and not _has_store(env):
        return "127.0.0.1"
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    if address := env.get("MASTER_ADDR") or first_host(nodes):
        return address
    raise ValueError(f"WORLD_SIZE={size}, but MASTER_ADDR is not set: set it to the host of rank 0")


def _port(env: Env, size: int) -> int:
    """Where rank 0 listens: as set, else by the job's id, for nodes and users share ports; alone any that is free."""
    if size == 1 and not _has_store(env):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return int(free.getsockname()[1])
    port, job = env.get("MASTER_PORT"), env.get("SLURM_JOB_ID")
    # Several nodes keep the launcher's port: it does not hand the job's id to the others.
    of_launcher = port == _DEEPSPEED_PORT and env.get("LOCAL_SIZE") == str(size)
    if job and (port is None or of_launcher):
        return _PORTS[0] + int(job) % _PORTS[1]
    if port is None:
        raise ValueError(f"WORLD_SIZE={size}, but MASTER_PORT is not set: set it to a free port of rank 0's host")
    return _number(env, "MASTER_PORT")


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `gpu[03-07,9],login` -> `gpu03`, as `scontrol show hostnames` has it."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else ""


def unlaunched(env: Env) -> str:
    """A warning where an allocation has tasks that this process is not one of; else ''."""
    tasks = env.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" not in env or tasks == "1" or any(route.applies(env) for route in ROUTES[:-1]):
        return ""
    return (
        f"warning: job {env['SLURM_JOB_ID']} has {tasks} tasks and this is one process, outside of them; for all: "
        f"srun --ntasks={tasks} --kill-on-bad-exit=1 python launch/pretrain.py ..."
    )


def unequal(facts: list[tuple[str, dict[str, str]]]) -> str:
    """Which hosts differ in what; '' where all ranks are alike. `facts`: each rank's host, and what it has."""
    lines = []
    for name in facts[0][1]:
        hosts: dict[str, list[str]] = {}
        for host, own in facts:
            hosts.setdefault(own[name], []).append(host)
        if len(hosts) > 1:
            parts = (f"{value} on {', '.join(dict.fromkeys(found))}" for value, found in sorted(hosts.items()))
            lines.append(f"{name}: {'; '.join(parts)}")
    return " | ".join(lines)


def current() -> Place:
    """This process's place, by its environment."""
    return find(os.environ)
