"""Durable files: a path is either complete or absent, and never leaves its root.

In: bytes, JSON values or a function that writes. Out: a file or folder under its final name, fsynced, or nothing.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_BLOCK_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SLURM_SECONDS = 10  # for an answer; without one nothing is removed


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _started(pid: int) -> str:
    """When a process of this machine started, in the kernel's ticks; '' where there is none. Tells a pid used again."""
    try:
        # The second field, the command's name, may hold anything, also blanks and brackets.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]


def _job() -> tuple[str, int]:
    """The SLURM job that this process is of, as cluster-number, and how often it was started again; else ('0', 0)."""
    of = os.environ
    if not of.get("SLURM_JOB_ID"):
        return "0", 0
    cluster = re.sub(r"[^A-Za-z0-9-]", "-", of.get("SLURM_CLUSTER_NAME", ""))
    return f"{cluster}-{of['SLURM_JOB_ID']}", int(of.get("SLURM_RESTART_COUNT", "0"))


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", os.uname().nodename)


_TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.(?P<host>[A-Za-z0-9-]+)\.(?P<job>[A-Za-z0-9-]+)r(?P<restart>\d+)\.(?P<pid>\d+)\.(?P<started>\d+)"
    r"\.[0-9a-f]{8}\.(?P<kind>tmp|old)"
)


def temporary(path: Path, kind: str = "tmp") -> Path:
    """A new name beside `path` that tells whose it is: host, SLURM job and its restart, pid, start."""
    job, restart = _job()
    owner = f"{_host()}.{job}r{restart}.{os.getpid()}.{_started(os.getpid())}"
    return path.with_name(f".{path.name}.{owner}.{uuid.uuid4().hex[:8]}.{kind}")


def _ended(jobs: set[str]) -> set[str]:
    """Those of some jobs, cluster-number, that neither wait nor run any more; of other clusters one cannot tell."""
    cluster = _job()[0].rpartition("-")[0]
    asked = {number for job in jobs for of, _, number in [job.rpartition("-")] if cluster and of == cluster}
    if not asked:
        return set()
    command = ["squeue", "--noheader", "--format=%A", f"--jobs={','.join(sorted(asked))}"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_SLURM_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return set()
    # A single job that SLURM has forgotten is an error to it, one of several is not.
    if told.returncode and "Invalid job id" not in told.stderr:
        return set()
    return {f"{cluster}-{number}" for number in asked - set(told.stdout.split())}


def _dead(found: list[re.Match[str]]) -> list[re.Match[str]]:
    """The temporary names whose owners are known to be gone: a process of this machine that is no more; elsewhere one
    of a job that has ended, or that SLURM has started again since."""
    host, (job, restart) = _host(), _job()
    ended = _ended({left["job"] for left in found if left["host"] != host})

    def is_dead(left: re.Match[str]) -> bool:
        if left["host"] == host:
            return _started(int(left["pid"])) != left["started"]
        again = left["job"] == job != "0" and int(left["restart"]) < restart
        return again or left["job"] in ended

    return [left for left in found if is_dead(left)]


def sweep(folder: Path, name: str | None = None) -> list[Path]:
    """Remove what dead owners left in a folder (of one path's temporaries where `name` is its name); what a live one
    is writing stays. A folder that had been moved aside goes back. Returns what was found."""
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    found = [left for entry in entries if (left := _TEMPORARY.fullmatch(entry)) and name in (None, left["name"])]
    swept = [(left, folder / left.string) for left in _dead(found)]
    for left, path in swept:
        with contextlib.suppress(FileNotFoundError):  # another process sweeps the same folder
            if left["kind"] == "old" and not (folder / left["name"]).exists():
                os.rename(path, folder / left["name"])
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
    return [path for _, path in swept]


class Leftover(NamedTuple):
    """A temporary name in a folder, whose it is, and whether that process is known to be gone."""

    path: Path
    owner: str
    dead: bool


def leftovers(folder: Path) -> list[Leftover]:
    """What `sweep` would look at, by name; nothing is removed."""
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    found = [left for entry in entries if (left := _TEMPORARY.fullmatch(entry))]
    dead = {left.string for left in _dead(found)}
    return [
        Leftover(
            folder / left.string,
            f"process {left['pid']} of host {left['host']}" + (f", job {left['job']}" if left["job"] != "0" else ""),
            left.string in dead,
        )
        for left in found
    ]


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Where a disk or a quota is full, name what was being written: the system's error tells no file, or a temporary
    one."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success fsync it and rename it to `path`, on error remove it.

    Two processes may write one path: each has a name of its own, and the last rename counts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    new = temporary(path)
    try:
        with _naming(path):
            yield new
            put(new, path)
    finally:
        if new.exists():
            new.unlink()


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which need not exist; it is removed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    new = temporary(path)
    try:
        with _naming(path):
            new.mkdir()
            yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary sibling folder; on success fsync every file in it and rename it to `path`.

    An existing `path` is moved aside before the rename and removed after it. The rename of a folder is one system
    call, so a reader sees the old folder, none, or the new one, never a mixture.
    """
    with scratch_folder(path) as new:
        yield new
        install_folder(new, path)


def install_folder(new: Path, path: Path) -> None:
    """Fsync every file in the folder `new` and rename it to its sibling `path`, which is moved aside before."""
    old = temporary(path, "old")
    for child in sorted(new.rglob("*")):
        _sync(child)
    _sync(new)
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:  # another process has taken `new` away: the old one stays
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def put(new: Path, path: Path) -> None:
    """Fsync a complete file of the same file system and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sync(new)
    os.replace(new, path)
    _sync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, complete or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def dump_json(value: Any) -> bytes:
    """`value` as canonical JSON bytes: sorted keys, indented, one trailing newline, NaN refused."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as canonical JSON, complete or not at all."""
    write_bytes(path, dump_json(value))


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises ValueError naming the file where it is not JSON."""
    return parse_json(path.read_bytes(), str(path))


def parse_json(data: bytes, source: str) -> Any:
    """The value of JSON bytes. Raises ValueError naming their source where they are none."""
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not only of syntax: a number of 5,000 digits, 10,000 brackets
        raise ValueError(f"{source}: not readable as JSON ({error}); restore or rebuild the file") from error


def sha256_of(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def inside(root: Path, relative: str) -> Path:
    """`root / relative`, refused where it is absolute or leaves `root` (also through links).

    Raises:
        ValueError: naming the path and the root.
    """
    root = root.resolve()
    try:
        path = (root / relative).resolve()
    except (RuntimeError, ValueError) as error:  # links that lead to each other, a NUL character
        raise ValueError(f"{relative!r} is no path ({error}); give one below {root.name!r}") from None
    if Path(relative).is_absolute() or not path.is_relative_to(root):
        raise ValueError(f"{relative!r} leaves its root {root.name!r}; give a path below that folder")
    return path
