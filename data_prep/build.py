"""Slides and measurements -> slide stores.

    python -m data_prep.build MANIFEST --store DIR [--plan FILE --task K] [--workers N] [key=value ...]

In: a manifest; with a plan, one of its tasks. Out: `DIR/<slide_id>.zarr.zip` and `DIR/<slide_id>.record.json` for every
slide, the record last; before them the list of the manifest's slides, `DIR/<hash>.manifest.json`. A rerun builds only
what is missing or whose files, row or config changed. Exit code 0, 1 where slides failed, 2 for wrong usage.
"""

import argparse
import dataclasses
import functools
import math
import os
import sys
import time
import traceback
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep import inputs, manifest, progress, records, wanted, workers
from data_prep.manifest import ManifestRow
from data_prep.one_slide import build_slide
from data_prep.records import Record
from storm import files, store
from storm.commands import explain, guarded
from storm.config import load
from storm.prep_config import PrepConfig

# What a damaged or wrong input raises; anything else is a fault of ours, and is told as such.
INPUT_ERRORS = (ValueError, OSError, EOFError, zlib.error)
_STATES = ("built", "current", "failed")


def _made(row: ManifestRow, folder: Path, config: PrepConfig, scratch: Path | None) -> tuple[Record, bool]:
    """The record of a slide, and whether its store was built just now.

    Raises:
        any of INPUT_ERRORS: the slide cannot be built.
    """
    start, last = time.perf_counter(), records.read(folder, row.slide_id)
    mark, found = inputs.fingerprint(row, config, last)
    if last and last.fingerprint == mark and records.is_complete(folder, last) and _opens(folder, last):
        return dataclasses.replace(last, inputs=found), False
    path = build_slide(row, folder, config, scratch)
    return Record(
        row.slide_id, "built", fingerprint=mark, inputs=found, bytes=path.stat().st_size,
        sha256=files.sha256_file(path), seconds=round(time.perf_counter() - start, 3),
        peak_mb=peak_mb(), cost=_cost(path),
    ), True  # fmt: skip


def peak_mb() -> float:
    """Highest resident memory of this process. getrusage would also tell that of the one it was started from."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return round(int(line.split()[1]) * 1024 / 1e6, 1)


def _opens(folder: Path, record: Record) -> bool:
    """Whether a store of the right size is still one: a disk may have lost a part of it."""
    try:
        store.SlideStore(store.store_path(folder, record.slide_id))
    except ValueError:
        return False
    return True


def _other_tiles(rows: Sequence[ManifestRow], folder: Path, config: PrepConfig) -> dict[str, str]:
    """slide id -> the tiles of its store, where they are not those of the config: such a store is replaced."""
    found = {}
    for row in rows:
        try:
            info = store.SlideStore(store.store_path(folder, row.slide_id)).info
        except (ValueError, OSError):  # there is none, or none that opens
            continue
        if (info.tile_px, info.tile_mpp) != (config.tile_px, config.tile_mpp):
            found[row.slide_id] = f"{info.tile_px} px at {info.tile_mpp} um/px"
    return found


def _cost(path: Path) -> dict[str, float]:
    """What a store's time and bytes went into; `grid` is the number of tiles that cover the slide."""
    info = store.SlideStore(path).info
    tile_px0 = info.tile_um / info.mpp
    grid = math.ceil(info.width_px0 / tile_px0) * math.ceil(info.height_px0 / tile_px0) if info.image else 0
    return {name: float(info.facts.get(name, 0)) for name in ("tiles", "profiles", "counts")} | {"grid": float(grid)}


def _without_folders(text: str, row: ManifestRow, places: Sequence[Path | None]) -> str:
    """An error's text for a file that may be shared: the folders of this machine are cut off its paths.

    Args:
        places: that are named besides the row's own; of all of them the folders above are cut off, too, for a reader
            may look beside what the row names.
    """
    known = (row.image, row.measurement, row.spots, row.alignment, row.tissue, *places)
    above = {folder for path in known if path for folder in path.parents} - {Path(), Path(os.sep)}
    for folder in sorted(above, key=lambda folder: -len(str(folder))):
        text = text.replace(f"{folder}{os.sep}", "")
    return text


def attempt(row: ManifestRow, folder: Path, config: PrepConfig, scratch: Path | None = None) -> tuple[Record, bool]:
    """Build one slide where needed and write its record, whatever happens; (record, whether it was built just now)."""

    def failed(reason: str) -> Record:
        aliases = Path(config.aliases) if config.aliases else None
        places = (aliases, folder / "x", scratch / "x" if scratch else None)
        return Record(row.slide_id, "failed", _without_folders(reason, row, places))

    try:
        record, new = _made(row, folder, config, scratch)
    except INPUT_ERRORS as error:
        text = explain(error) if isinstance(error, OSError) else str(error)
        record, new = failed(text or type(error).__name__), False
    except Exception as error:  # noqa: BLE001  one slide must not stop the others, whatever it meets
        traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        record, new = failed(
            f"internal fault: {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno}); look for "
            "damage in the slide's files, and report it"
        ), False  # fmt: skip
    # Of files that were copied the new times are noted, lest every plan asks for the slide and every build reads them.
    known = record.state == "built" and not new and record == records.read(folder, row.slide_id)
    return record if known else _written(record, folder), new


def _written(record: Record, folder: Path) -> Record:
    """Write a record; where that cannot be, the slide failed."""
    try:
        records.write(folder, record)
    except OSError as error:
        reason = record.reason or "its store is built"
        return dataclasses.replace(record, state="failed", reason=f"{reason}; its record was not written: "
                                   f"{explain(error)}")  # fmt: skip
    return record


def _state(record: Record, new: bool) -> str:
    return "failed" if record.state == "failed" else "built" if new else "current"


def _line(record: Record, new: bool, folder: Path, was: str | None) -> str:
    if record.state == "failed":
        return f"{record.slide_id}: FAILED: {record.reason}"
    opened = store.SlideStore(store.store_path(folder, record.slide_id))
    info, facts = opened.info, opened.info.facts
    parts = [f"{len(opened)} tiles", f"mpp {info.mpp:.4f} ({info.mpp_source})"]
    if "profiles" in facts:
        parts += [f"{facts['profiles']} profiles", f"{facts['genes']} genes", f"mapped {facts['mapped_share']:.1%}"]
    if info.residual_px0 is not None:
        parts.append(f"lattice residual {info.residual_px0:.2f} px, {info.residual_px0 * info.mpp:.1f} um")
    if new:
        parts.append(f"{record.seconds:.1f} s")
    notes = "".join(f"\n    {note}" for note in facts["notes"])
    state = f"{_state(record, new)}{f' (replaced, was {was})' if was else ''}"
    return f"{record.slide_id}: {state}: {', '.join(parts)}{notes}"


def build(
    rows: Sequence[ManifestRow], folder: Path, config: PrepConfig, processes: int, scratch: Path | None = None
) -> list[tuple[Record, bool]]:
    """Build every slide that is not current, and print a line for each; (record, whether it was built just now)."""
    folder.mkdir(parents=True, exist_ok=True)
    for place in (folder, scratch) if scratch else (folder,):
        files.sweep(place)
    work = functools.partial(attempt, folder=folder, config=config, scratch=scratch)
    done, other = [], _other_tiles(rows, folder, config)
    if other:
        print(f"note: {len(other)} stores have other tiles than {config.tile_px} px at {config.tile_mpp} um/px and are "
              "replaced as they are built; name another --store to keep them")  # fmt: skip
    died = functools.partial(_died, folder=folder)
    answers: Iterator[tuple[Record, bool]] = workers.run(rows, work, died, processes)
    with progress.Progress(len(rows)) as shown:
        for record, new in answers:
            shown.step(_line(record, new, folder, other.get(record.slide_id)))
            done.append((record, new))
    return done


def _end_table(rows: Sequence[ManifestRow], done: Sequence[tuple[Record, bool]]) -> str:
    """How many slides of each platform were built, were current or failed, and what is in their stores."""
    platform = {row.slide_id: row.platform for row in rows}
    names = sorted(set(platform.values()))
    lines = []
    for name in [*names, "all"] if len(names) > 1 else names:
        mine = [(record, new) for record, new in done if name in ("all", platform[record.slide_id])]
        states = [_state(record, new) for record, new in mine]
        counted = [f"{sum(record.cost.get(key, 0) for record, _ in mine):.0f}" for key in ("tiles", "profiles")]
        seconds = sum(record.seconds for record, new in mine if new)
        lines.append([name, *(states.count(state) for state in _STATES), *counted,
                      progress.size(sum(record.bytes for record, _ in mine)), f"{seconds:.1f}"])  # fmt: skip
    return progress.table(["platform", *_STATES, "tiles", "profiles", "store", "seconds"], lines)


def _died(row: ManifestRow, reason: str, folder: Path) -> tuple[Record, bool]:
    return _written(Record(row.slide_id, "failed", reason), folder), False


def _tasks(plan: Path) -> list[list[str]]:
    """Raises ValueError where a file is no plan."""
    told = files.read_json(plan)
    tasks = told.get("tasks") if isinstance(told, dict) else None
    sound = isinstance(tasks, list) and all(isinstance(task, list) for task in tasks)
    if not sound or not all(isinstance(name, str) for task in tasks or () for name in task):
        raise ValueError(f"{plan}: is no plan; write it with python -m data_prep.plan")
    return tasks or []


def task_rows(rows: Sequence[ManifestRow], plan: Path | None, task: int | None) -> list[ManifestRow]:
    """The rows of one task of a plan; all rows without a plan.

    Raises:
        ValueError: no such plan or task, or the plan is of another manifest.
    """
    if plan is None:
        if task is not None:
            raise ValueError(f"--task {task} is of a plan; name it with --plan")
        return list(rows)
    if not plan.is_file():
        raise ValueError(f"{plan}: no such plan; write it with python -m data_prep.plan")
    tasks = _tasks(plan)
    if not tasks:
        raise ValueError(f"{plan}: has no task, nothing was left to build; plan again where that changed")
    if task is None or not 0 <= task < len(tasks):
        raise ValueError(f"{plan}: has tasks 0 to {len(tasks) - 1}; name one of them with --task")
    by_id = {row.slide_id: row for row in rows}
    strange = [name for name in tasks[task] if name not in by_id]
    if strange:
        raise ValueError(f"{plan}: slide {strange[0]!r} is not in the manifest; plan again")
    return [by_id[name] for name in tasks[task]]


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.build", description="Slides -> slide stores.")
    parser.add_argument("manifest", type=Path, help="csv with a row per slide")
    parser.add_argument("--store", type=Path, required=True, help="folder of the slide stores")
    parser.add_argument("--root", type=Path, help="folder that relative paths start from (default: the manifest's)")
    parser.add_argument("--config", type=Path, help="YAML of what differs from PrepConfig's defaults")
    parser.add_argument("--plan", type=Path, help="what data_prep.plan wrote: build one of its tasks")
    parser.add_argument("--task", type=int, help="number of the task, from 0")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="slides at a time")
    parser.add_argument("--scratch", type=Path, help="folder for tiled copies of images that cannot be read in parts")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="over the config; the keys are those of PrepConfig in storm/prep_config.py",
    )
    args = parser.parse_intermixed_args(words)
    return guarded(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: give 1 or more")
    config = load(PrepConfig, args.config, args.overrides)
    every = manifest.read(args.manifest, args.root, config.split_by)
    rows = task_rows(every, args.plan, args.task)
    wanted.write(args.store, args.manifest, (row.slide_id for row in every))
    if args.plan and files.read_json(args.plan).get("manifest_sha256") != files.sha256_file(args.manifest):
        print(f"note: {args.manifest} changed since {args.plan} was made: rows that are new are in none of its tasks")
    start = time.monotonic()
    done = build(rows, args.store, config, max(1, min(args.workers, len(rows))), args.scratch)
    print(f"\n{_end_table(rows, done)}\n")
    failed = sorted((record.slide_id, record.reason) for record, _ in done if record.state == "failed")
    if failed:
        print("\n".join(["failed:", *(f"  {slide}: {reason}" for slide, reason in failed), ""]))
    states = [_state(record, new) for record, new in done]
    counts = ", ".join(f"{states.count(state)} {state}" for state in _STATES)
    print(f"{args.store}: {counts}, in {progress.clock(time.monotonic() - start)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
