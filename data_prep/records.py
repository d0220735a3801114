"""How each slide of a store folder went: `<slide_id>.record.json` beside its store, written last.

In: the outcome of a build. Out: a small file per slide, so that many tasks may write at once and a rerun, a report or
pack knows what is complete, what failed and why. Nothing of it enters the store: that depends on its inputs alone.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storm import files, store

SUFFIX = ".record.json"
STATES = ("built", "failed")
_ENDLESS = 1e18  # bytes or seconds


@dataclass(frozen=True)
class Record:
    """What is known of one build. Paths are names without folders: the file may be shared."""

    slide_id: str
    state: str  # built or failed
    reason: str = ""  # why it failed, with the cure
    fingerprint: str = ""  # of all that the store is made from
    inputs: list[list[Any]] = field(default_factory=list)  # [hash of path, bytes, mtime_ns, sha256] of each
    bytes: int = 0  # of the store
    sha256: str = ""  # of the store
    seconds: float = 0.0
    peak_mb: float = 0.0  # resident memory of the process, its highest
    cost: dict[str, float] = field(default_factory=dict)  # what the time went into: tiles, profiles, counts


def record_path(folder: Path, slide_id: str) -> Path:
    """Where a slide's record lies."""
    return folder / f"{slide_id}{SUFFIX}"


def write(folder: Path, record: Record) -> None:
    """Write a record, complete or not at all."""
    files.write_json(record_path(folder, record.slide_id), dataclasses.asdict(record))


def read(folder: Path, slide_id: str) -> Record | None:
    """A slide's record; None where there is none, or a damaged one: then the slide is built anew."""
    path = record_path(folder, slide_id)
    try:
        record = Record(**files.read_json(path)) if path.is_file() else None
    except (ValueError, TypeError):
        return None
    return record if record and record.slide_id == slide_id and _is_sound(record) else None


def _is_sound(record: Record) -> bool:
    """Whether a record holds what it says it holds: people edit files."""

    def counts(value: object) -> bool:
        return isinstance(value, int | float) and 0 <= value < _ENDLESS

    return (
        record.state in STATES
        and all(isinstance(text, str) for text in (record.reason, record.fingerprint, record.sha256))
        and all(map(counts, (record.bytes, record.seconds, record.peak_mb)))
        and isinstance(record.cost, dict) and all(map(counts, record.cost.values()))
        and isinstance(record.inputs, list)
        and all(isinstance(entry, list) and list(map(type, entry)) == [str, int, int, str] for entry in record.inputs)
    )  # fmt: skip


def is_complete(folder: Path, record: Record | None) -> bool:
    """Whether a record's store is there, in its size."""
    if record is None or record.state != "built":
        return False
    path = store.store_path(folder, record.slide_id)
    return path.is_file() and path.stat().st_size == record.bytes


def every(folder: Path) -> list[Record]:
    """All readable records of a folder, by slide id."""
    names = sorted(path.name.removesuffix(SUFFIX) for path in folder.glob(f"*{SUFFIX}"))
    return [record for name in names if (record := read(folder, name))]


def failures(folder: Path) -> dict[str, str]:
    """slide_id -> reason of every slide of a folder that failed."""
    return {record.slide_id: record.reason for record in every(folder) if record.state == "failed"}
