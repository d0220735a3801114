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


def _sweep(path: Path) -> None:
    """Remove what a killed write of `path` left beside it; a folder that it had moved aside goes back."""
    own = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.(tmp|old)")
    for left in [entry for entry in path.parent.iterdir() if own.fullmatch(entry.name)]:
        if left.suffix == ".old" and not path.exists():
            os.rename(left, path)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success fsync it and rename it to `path`, on error remove it.

    A path has one writer at a time: what an earlier one left beside it is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        if temporary.exists():
            temporary.unlink()


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary sibling folder; on success fsync every file in it and rename it to `path`.

    An existing `path` is moved aside before the rename and removed after it. The rename of a folder is one system
    call, so a reader sees the old folder, none, or the new one, never a mixture. One writer at a time, as above.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    token = uuid.uuid4().hex[:12]
    temporary = path.with_name(f".{path.name}.{token}.tmp")
    old = path.with_name(f".{path.name}.{token}.old")
    temporary.mkdir()
    try:
        yield temporary
        for child in sorted(temporary.rglob("*")):
            _sync(child)
        _sync(temporary)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
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
