"""What a machine has for training, as facts, and which of them will make a run fail, with the cure.

In: folders to look at, what the run needs. Out: `Facts` of this process's node, a table of many, a list of faults.
"""

import os
import re
import resource
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SHM, DRIVER = Path("/dev/shm"), Path("/proc/driver/nvidia/version")
_SHM_PER_WORKER = 256e6  # bytes: a loader process hands on two micro-batches ahead, through shared memory
_FILES, _FILES_PER_WORKER = 512, 64  # open files
_INODES = 10_000  # a few checkpoints and logs
_SKEW_S = 1.0


@dataclass(frozen=True)
class Disk:
    """A folder's file system."""

    name: str  # what the folder is for
    folder: str  # the folder, or the nearest one above it that exists
    kind: str
    free_bytes: int
    free_inodes: int | None  # None where the file system does not count them
    writable: bool
    there: bool = True  # the folder itself exists


@dataclass(frozen=True)
class Facts:
    """One rank's view of its node."""

    rank: int
    host: str
    device: str
    bf16: bool
    driver: str
    torch: str
    collectives: str
    cores: frozenset[int]  # the affinity mask
    open_files: int
    shm_bytes: int
    disks: tuple[Disk, ...]
    skew_s: float = 0.0  # of the clock against rank 0's


@dataclass(frozen=True)
class Needs:
    """What a run asks of every node."""

    workers: int = 0  # loader processes per rank
    run_bytes: float = 0.0  # of the run folder
    bf16: bool = False


def look(folders: dict[str, Path], rank: int = 0) -> Facts:
    """The facts of this process's node; what is not there is '-'."""
    device, bf16, torch_version, collectives = _torch()
    return Facts(
        rank, socket.gethostname(), device, bf16, _driver(), torch_version, collectives,
        frozenset(os.sched_getaffinity(0)), resource.getrlimit(resource.RLIMIT_NOFILE)[0], _free(SHM),
        tuple(look_at(name, folder) for name, folder in folders.items()),
    )  # fmt: skip


def _torch() -> tuple[str, bool, str, str]:
    """(device, whether it computes in bf16, torch's version, the collective library)."""
    try:
        import torch
    except ModuleNotFoundError:
        return "-", False, "-", "-"
    if not torch.cuda.is_available():
        gloo = "gloo" if torch.distributed.is_available() and torch.distributed.is_gloo_available() else "-"
        return "cpu", True, torch.__version__, gloo
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cuda.get_device_name(), bf16, torch.__version__, f"nccl {nccl}"


def _driver() -> str:
    text = DRIVER.read_text() if DRIVER.is_file() else ""
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", text)
    return found[1] if found else "-"


def _free(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def look_at(name: str, folder: Path) -> Disk:
    """The file system of a folder that need not exist yet."""
    near = folder.absolute()
    while not near.exists():
        near = near.parent
    found = os.statvfs(near)
    free, inodes = found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None
    return Disk(name, str(near), mount_kind(near), free, inodes, os.access(near, os.W_OK), near == folder.absolute())


def mount_kind(folder: Path, mounts: str | None = None) -> str:
    """The type of the file system that holds a folder, from the text of /proc/mounts; '-' where it tells none."""
    text = Path("/proc/mounts").read_text() if mounts is None else mounts
    kind, longest = "-", -1
    for line in text.splitlines():
        _, place, name, *_ = line.split(" ")
        root = Path(place.replace("\\040", " "))
        if folder.resolve().is_relative_to(root) and len(root.parts) >= longest:
            kind, longest = name, len(root.parts)
    return kind


def faults(ranks: Sequence[Facts], needs: Needs) -> list[str]:
    """What will make the run fail, a line each, with the host and the cure."""
    found = _unequal(ranks)
    for host in dict.fromkeys(facts.host for facts in ranks):
        here = [facts for facts in ranks if facts.host == host]
        found += [f"{host}: {line}" for line in _of_host(here, needs)]
    return found


def _unequal(ranks: Sequence[Facts]) -> list[str]:
    lines = []
    for name, cure in (
        ("torch", "install one environment on every node"),
        ("collectives", "install one environment on every node"),
        ("driver", "leave these nodes out, or have the driver updated"),
        ("device", "ask the scheduler for one kind of device, or leave these nodes out"),
    ):
        hosts: dict[str, list[str]] = {}
        for facts in ranks:
            hosts.setdefault(getattr(facts, name), []).append(facts.host)
        if len(hosts) > 1:
            told = "; ".join(f"{value} on {', '.join(sorted(set(names)))}" for value, names in hosts.items())
            lines.append(f"{name} differs between ranks ({told}): {cure}")
    return lines


def _of_host(here: Sequence[Facts], needs: Needs) -> list[str]:
    one, lines = here[0], []
    cores = frozenset().union(*(facts.cores for facts in here))
    asked = len(here) * (1 + needs.workers)
    if needs.workers and len(cores) < asked:
        lines.append(
            f"{len(cores)} cores for {len(here)} ranks with {needs.workers} loader processes each: give a task more "
            "cores (--cpus-per-task, and SRUN_CPUS_PER_TASK), or lower data.workers"
        )
    shm = len(here) * needs.workers * _SHM_PER_WORKER
    if one.shm_bytes < shm:
        lines.append(
            f"/dev/shm has {one.shm_bytes / 1e9:.2f} GB free, loaders may take {shm / 1e9:.2f}: start the container "
            "with a larger one (--shm-size), empty it, or lower data.workers"
        )
    files = _FILES + _FILES_PER_WORKER * needs.workers
    if one.open_files != resource.RLIM_INFINITY and one.open_files < files:
        lines.append(f"only {one.open_files} files may be open, {files} are needed: ulimit -n {4 * files}")
    if needs.bf16 and not one.bf16:
        lines.append(f"{one.device} has no bf16: set engine.precision=fp32, or leave the node out")
    late = max(here, key=lambda facts: abs(facts.skew_s))
    if abs(late.skew_s) > _SKEW_S:
        lines.append(
            f"the clock of rank {late.rank} is {late.skew_s:+.1f} s off that of rank 0: have it synchronised "
            "(chrony, ntp)"
        )
    return lines + [line for disk in one.disks for line in _of_disk(disk, needs)]


def _of_disk(disk: Disk, needs: Needs) -> list[str]:
    if disk.name != "run_dir":  # the others are only read
        there = [f"{disk.name}: no such folder (the nearest is {disk.folder}): name the folder of a shard set"]
        return [] if disk.there else there
    lines = []
    if not disk.writable:
        lines.append(f"run_dir {disk.folder}: not writable: choose another run_dir")
    if disk.free_bytes < needs.run_bytes:
        lines.append(
            f"run_dir {disk.folder}: {disk.free_bytes / 1e9:.1f} GB free, checkpoints take "
            f"{needs.run_bytes / 1e9:.1f}: free some, or lower checkpoint.keep_last"
        )
    if disk.free_inodes is not None and disk.free_inodes < _INODES:
        lines.append(f"run_dir {disk.folder}: {disk.free_inodes} inodes free: remove files, or choose another run_dir")
    return lines


def table(ranks: Sequence[Facts]) -> str:
    """The nodes and their file systems as text, a row each."""
    rows = [["host", "ranks", "device", "driver", "torch", "collectives", "cores", "open files", "/dev/shm", "clock"]]
    disks = [["host", "folder", "of", "type", "free GB", "free inodes"]]
    for host in dict.fromkeys(facts.host for facts in ranks):
        here = [facts for facts in ranks if facts.host == host]
        one, late = here[0], max((facts.skew_s for facts in here), key=abs)
        cores = len(frozenset().union(*(facts.cores for facts in here)))
        rows.append(
            [host, str(len(here)), one.device, one.driver, one.torch, one.collectives, str(cores), str(one.open_files),
             f"{one.shm_bytes / 1e9:.1f} GB", f"{late:+.3f} s"]
        )  # fmt: skip
        for disk in one.disks:
            inodes = "-" if disk.free_inodes is None else str(disk.free_inodes)
            disks.append([host, disk.folder, disk.name, disk.kind, f"{disk.free_bytes / 1e9:.1f}", inodes])
    return columns(rows) + ("\n\n" + columns(disks) if len(disks) > 1 else "")


def columns(rows: list[list[str]]) -> str:
    """Rows of cells as aligned text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
