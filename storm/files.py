"""Durable files: a path is either complete or absent, and never leaves its root.

In: bytes, JSON values or a function that writes. Out: a file or folder under its final name, fsynced, or nothing.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 20


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


def _owner() -> str:
    """This process, as temporary names carry it: host, SLURM job and its restart, pid, start."""
    host = re.sub(r"[^A-Za-z0-9-]", "-", os.uname().nodename)
    job = f"{os.environ.get('SLURM_JOB_ID', '0')}r{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return f"{host}.{job}.{os.getpid()}.{_started(os.getpid())}"


_TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.(?P<host>[A-Za-z0-9-]+)\.(?P<job>\w+)r(?P<restart>\d+)\.(?P<pid>\d+)\.(?P<started>\d+)"
    r"\.[0-9a-f]{8}\.(?P<kind>tmp|old)"
)


def _is_dead(left: re.Match[str]) -> bool:
    """Whether the owner of a temporary name is known to be gone; of a process on another machine one cannot tell,
    except that a job which SLURM has started again no longer runs as it ran before."""
    host, job, _, _ = _owner().split(".")
    if left["host"] == host:
        return _started(int(left["pid"])) != left["started"]
    own, _, restart = job.rpartition("r")
    return own != "0" and left["job"] == own and int(left["restart"]) < int(restart)


def temporary(path: Path, kind: str = "tmp") -> Path:
    """A new name beside `path` that tells whose it is."""
    return path.with_name(f".{path.name}.{_owner()}.{uuid.uuid4().hex[:8]}.{kind}")


def sweep(folder: Path, name: str | None = None) -> list[Path]:
    """Remove what dead owners left in a folder (of one path's temporaries where `name` is its name); what a live one
    is writing stays. A folder that had been moved aside goes back. Returns what was found."""
    found = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        left = _TEMPORARY.fullmatch(entry.name)
        if not left or (name is not None and left["name"] != name) or not _is_dead(left):
            continue
        found.append(entry)
        if left["kind"] == "old" and not (folder / left["name"]).exists():
            os.rename(entry, folder / left["name"])
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    return found


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success fsync it and rename it to `path`, on error remove it.

    Two processes may write one path: each has a name of its own, and the last rename counts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    new = temporary(path)
    try:
        yield new
        _sync(new)
        os.replace(new, path)
        _sync(path.parent)
    finally:
        if new.exists():
            new.unlink()


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which need not exist; it is removed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    new = temporary(path)
    new.mkdir()
    try:
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
        old = temporary(path, "old")
        yield new
        for child in sorted(new.rglob("*")):
            _sync(child)
        _sync(new)
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)


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
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); restore or rebuild the file") from error


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
    path = (root / relative).resolve()
    if Path(relative).is_absolute() or not path.is_relative_to(root):
        raise ValueError(f"{relative!r} leaves its root {root.name!r}; give a path below that folder")
    return path
