"""What a corpus will take, and who builds which slide: the step before `data_prep.build`.

    python -m data_prep.plan MANIFEST --store DIR [--out plan.json] [--tasks N | --task-minutes M] [--dry-run]

In: a manifest. Every input is opened, headers and sizes only; of a slide that is to be built, a measurement of less
than 50 MB (and any h5ad) is also read and placed without its counts, and of a larger Xenium or CosMx the files that
tell its space (data_prep.precheck): a missing alignment or pixel size, or names that are no genes, are found before
the build. Out: all faults at once, counts per platform and organ, bytes, files and time against the room there is, and
the list of tasks, balanced by cost, each slide in one. Slides that are complete are left out, so planning again after a
failure plans what is missing. Exit code 1 where a slide has a fault or the room is too small, 2 for wrong usage.
"""

import argparse
import heapq
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from data_prep import align, cost, inputs, manifest, one_slide, platforms, precheck, progress, records, slides, splits
from data_prep.cost import Model, Work
from data_prep.manifest import IMAGE_ONLY, ManifestRow
from storm import files
from storm.commands import explain, guarded
from storm.config import load
from storm.prep_config import PrepConfig
from storm.store import SlideInfo

_MPP = 0.5  # taken for the grid where only the build can find it
_MOST_FILES = 3  # per slide, store, record and shards together
_FAULTS = precheck.FAULTS


@dataclass
class Checked:
    """One slide as its headers tell it."""

    row: ManifestRow
    work: Work = field(default_factory=Work)
    faults: list[str] = field(default_factory=list)
    complete: bool = False  # built, from these very files and this config
    found: list[Path] = field(default_factory=list)  # its inputs
    before: str = ""  # why it failed last time, where its files are still the same


def _is_complete(row: ManifestRow, folder: Path, config: PrepConfig, found: Sequence[Path]) -> bool:
    """Whether a slide's store is there and made from these files; no file is read."""
    last = records.read(folder, row.slide_id)
    if last is None or not records.is_complete(folder, last):
        return False
    facts = {tuple(entry[1:3]) for entry in last.inputs}
    if any((stat.st_size, stat.st_mtime_ns) not in facts for stat in (path.stat() for path in found)):
        return False
    return inputs.fingerprint(row, config, last)[0] == last.fingerprint


def _image_work(row: ManifestRow, image: Path, slide: slides.Header, found: Sequence[Path], config: PrepConfig) -> Work:
    """The grid of a slide's image, beside the files of its measurement. Raises one of _FAULTS where it is no slide."""
    told = {"manifest": row.mpp, "embedded": slide.embedded_mpp}
    if row.platform == IMAGE_ONLY:
        try:
            mpp = align.choose_mpp(told, config).value
        except ValueError as error:
            raise ValueError(f"{image}: {error}") from error
        one_slide.check_resolution(row, mpp, None, config)
    else:  # what a measurement's lattice tells is known to the build alone; only the manifest's word is final here
        low, high = align.EMBEDDED_MPP
        usable = [v for v in (row.mpp, cost.told_mpp(found), slide.embedded_mpp, _MPP) if v and low <= v <= high]
        mpp = usable[0]
        if row.mpp:
            one_slide.check_resolution(row, row.mpp, None, config)
    grid = slides.Grid.over(slide, config.tile_px * config.tile_mpp / mpp)
    grid.check(slide, image, config.max_tiles, config.max_px_per_byte)
    return Work(grid=grid.rows * grid.cols)


def _measurement_files(row: ManifestRow) -> list[Path]:
    """The files of a slide's measurement. Raises one of _FAULTS where one is missing."""
    found = platforms.reader(row.reader).inputs(row.source) if row.source else []
    for path in found:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; correct the manifest")
    return found


def check(row: ManifestRow, folder: Path, config: PrepConfig, scratch: Path | None = None) -> Checked:
    """Open all inputs of a slide; every fault is kept, none is raised."""
    checked = Checked(row)
    found: list[Path] = []
    headers: list[slides.Header] = []

    def measurement() -> Work:
        found.extend(_measurement_files(row))
        return Work(0, *cost.measured(found))

    def image() -> Work:
        if row.image is None:
            return Work()
        headers.append(slides.header(row.image, config.max_image_mpx, scratch))
        return _image_work(row, row.image, headers[0], found, config)

    def aligned() -> Work:
        if row.alignment:
            align.read_alignment(row.alignment)
        return Work()

    def whole() -> Work:
        if checked.faults:
            return Work()
        checked.found = inputs.files_of(row, config)
        checked.complete = _is_complete(row, folder, config, checked.found)
        exact = counted()  # what the size of a table of text told is only about right
        bytes_in = sum(path.stat().st_size for path in checked.found)
        return Work(profiles=0 if exact is None else exact - checked.work.profiles, bytes_in=bytes_in)

    def counted() -> float | None:
        last = records.read(folder, row.slide_id)
        if last and checked.complete:
            return last.cost.get("profiles")
        checked.before = _before(row, folder, checked.found)
        return precheck.check(row, headers[0] if headers else None, found, config)

    for step in (measurement, image, aligned, whole):
        try:
            checked.work += step()
        except _FAULTS as error:
            checked.faults.append(_text(error))
        except Exception as error:  # noqa: BLE001  one slide must not stop the others, whatever it holds
            checked.faults.append(f"does not read ({type(error).__name__}: {error}); look for damage in its files")
    return checked


def _before(row: ManifestRow, folder: Path, found: Sequence[Path]) -> str:
    """Why the last build of a slide failed, where no file of it changed since; else blank."""
    last = records.read(folder, row.slide_id)
    if last is None or last.state != "failed":
        return ""
    written_ns = records.record_path(folder, row.slide_id).stat().st_mtime_ns
    return "" if any(path.stat().st_mtime_ns > written_ns for path in found) else last.reason


def _text(error: Exception) -> str:
    return explain(error) if isinstance(error, OSError) else str(error)


def shared_inputs(checked: Sequence[Checked], config: PrepConfig) -> list[str]:
    """A line for each group of slides that are made from the same files; one section in several units is no fault."""
    users: dict[tuple[int, int], tuple[Path, dict[str, Checked]]] = {}
    for one in checked:
        for path in one.found:
            if str(path) != config.aliases:
                stat = path.stat()
                users.setdefault((stat.st_dev, stat.st_ino), (path, {}))[1][one.row.slide_id] = one
    groups: dict[tuple[str, ...], tuple[list[Path], list[ManifestRow]]] = {}
    for path, mine in users.values():
        if len(mine) > 1:
            groups.setdefault(tuple(mine), ([], [one.row for one in mine.values()]))[0].append(path)
    # Cells and squares of a section share most files, and a part of those that share the section share all of them.
    units = {names for names, (_, rows) in groups.items() if _is_in_units(rows)}
    lines = []
    for names, (paths, rows) in groups.items():
        told = f"{', '.join(names[:4])}{', ...' * (len(names) > 4)}"
        if names not in units:
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            verb = "are inputs" if more else "is an input"
            lines.append(f"warning: {paths[0]}{more} {verb} of {len(names)} slides ({told}); is one of them a "
                         "duplicate?")  # fmt: skip
        elif not any(set(names) < set(other) for other in units):
            kinds = ", ".join(row.unit or "its usual unit" for row in rows[:4])
            lines.append(f"note: {told} are one section in {len(names)} units ({kinds})")
    return lines


def _is_in_units(rows: Sequence[ManifestRow]) -> bool:
    """Whether rows are one section of one measurement and image, each in a unit of its own."""
    return len({(row.measurement, row.image) for row in rows}) == 1 and len({row.unit for row in rows}) == len(rows)


def balanced(seconds: dict[str, float], count: int) -> list[list[str]]:
    """Slides dealt to `count` tasks, the longest first, each to the task with the least to do; no task is empty."""
    count = min(count, len(seconds))
    tasks: list[list[str]] = [[] for _ in range(count)]
    heap = [(0.0, k) for k in range(count)]
    for name in sorted(seconds, key=lambda name: (-seconds[name], name)):
        load_s, k = heapq.heappop(heap)
        tasks[k].append(name)
        heapq.heappush(heap, (load_s + seconds[name], k))
    return tasks


def _task_count(args: argparse.Namespace, seconds: dict[str, float]) -> tuple[int, str]:
    """How many tasks, and a note where the array's limit makes them fewer than asked."""
    wanted = args.tasks or math.ceil(sum(seconds.values()) / args.workers / (60 * args.task_minutes))
    count = max(1, min(wanted, len(seconds)))
    if count > args.max_array:
        return args.max_array, f"{count} tasks would be more than an array may have; they are {args.max_array}"
    return count, ""


def _counts_table(checked: Sequence[Checked], model: Model) -> str:
    """Slides, work and cost per platform and organ."""
    groups: dict[tuple[str, str], list[Checked]] = defaultdict(list)
    for one in checked:
        groups[one.row.platform, one.row.organ].append(one)
    entries = [(platform, organ, groups[platform, organ]) for platform, organ in sorted(groups)]
    if len(entries) > 1:
        entries.append(("all", "", list(checked)))
    return progress.table(
        ["platform", "organ", "slides", "complete", "faulty", "profiles", "counts", "tiles", "read", "store", "core-h"],
        [[platform, organ, *_counts_row(group, model)] for platform, organ, group in entries],
    )


def _counts_row(group: Sequence[Checked], model: Model) -> list[object]:
    work = sum((one.work for one in group), Work())
    return [
        len(group), sum(one.complete for one in group), sum(bool(one.faults) for one in group),
        f"{work.profiles:.0f}", _short(work.counts), f"{work.grid * model.tissue:.0f}", progress.size(work.bytes_in),
        progress.size(model.store_bytes(work)), _hours(model.seconds(work, len(group))),
    ]  # fmt: skip


def _hours(seconds: float) -> str:
    """Hours in two digits at least, for small corpora too."""
    hours = seconds / 3600
    if 0 < hours < 0.001:
        return "<0.001"
    return f"{hours:.1f}" if hours >= 10 else f"{hours:.2g}" if hours < 1 else f"{hours:.2f}"


def _time(seconds: float) -> str:
    """A time to plan by: 40 s, 14 min, 2.5 h."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _short(count: float) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:.0f}"


def _scales(good: Sequence[Checked], model: Model, config: PrepConfig, slides_: Sequence[int]) -> str:
    """What so many slides like these would take."""
    work = sum((one.work for one in good), Work())
    rows: list[list[object]] = []
    for n in [len(good), *slides_]:
        more = work.times(n / len(good))
        shards = math.ceil(model.shard_files(more, config))
        files_ = cost.FILES_PER_SLIDE * n + shards
        rows.append([
            n, f"{more.profiles:.0f}", f"{more.grid * model.tissue:.0f}", _hours(model.seconds(more, n)),
            progress.size(more.bytes_in), progress.size(model.store_bytes(more)),
            progress.size(model.shard_bytes(more)), shards, files_, f"{files_ / n:.2f}",
        ])  # fmt: skip
    return progress.table(
        ["slides", "profiles", "tiles", "core-h", "read", "stores", "shards", "tars", "files", "files/slide"], rows
    )


def _room_lines(planned: Sequence[Checked], model: Model, config: PrepConfig, folder: Path) -> tuple[list[str], bool]:
    """What the planned slides need against what there is, and whether it is enough."""
    work = sum((one.work for one in planned), Work())
    store_bytes, shard_bytes = model.store_bytes(work), model.shard_bytes(work)
    files_ = cost.FILES_PER_SLIDE * len(planned) + math.ceil(model.shard_files(work, config))
    room = cost.room(folder)
    needs = f"needs {progress.size(store_bytes)} for stores, {progress.size(shard_bytes)} for shards, {files_} files"
    lines = [f"{needs} ({files_ / max(1, len(planned)):.2f} per slide, at most {_MOST_FILES})"]
    if files_ > _MOST_FILES * len(planned):
        fewer = math.ceil(shard_bytes / len(planned) / (_MOST_FILES - cost.FILES_PER_SLIDE) / 1e6)
        lines.append(f"note: these slides are large; shard_mb={fewer} keeps them at {_MOST_FILES} files each")
    enough = True
    for what, bytes_, count in (
        ("free", room.free_bytes, room.free_files),
        ("left of your quota", room.quota_bytes, room.quota_files),
    ):
        told = [progress.size(bytes_)] if bytes_ is not None else []
        told += [f"{count} files"] if count is not None else []
        if told:
            short = (bytes_ is not None and bytes_ < store_bytes) or (count is not None and count < files_)
            enough = enough and not short
            lines.append(f"{what}: {', '.join(told)}{': TOO LITTLE for the stores' * short}")
    return lines, enough


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.plan", description="What a corpus will take, and tasks.")
    parser.add_argument("manifest", type=Path, help="csv with a row per slide")
    parser.add_argument("--store", type=Path, required=True, help="folder of the slide stores")
    parser.add_argument("--out", type=Path, help="plan to write (default: plan.json in the store folder)")
    parser.add_argument("--root", type=Path, help="folder that relative paths start from (default: the manifest's)")
    parser.add_argument("--config", type=Path, help="YAML of what differs from PrepConfig's defaults")
    parser.add_argument("--scratch", type=Path, help="as for build")
    tasks = parser.add_mutually_exclusive_group()
    tasks.add_argument("--tasks", type=_positive, help="how many tasks")
    tasks.add_argument("--task-minutes", type=_positive, default=60, help="how long a task may take (default 60)")
    parser.add_argument("--workers", type=_positive, default=1, help="slides that a task builds at a time (default 1)")
    parser.add_argument("--max-array", type=_positive, default=1000, help="most tasks of an array (MaxArraySize)")
    parser.add_argument("--all", action="store_true", help="plan complete slides too")
    parser.add_argument("--dry-run", action="store_true", help="check and tell everything, write nothing")
    parser.add_argument("--extrapolate", type=_positive, action="append", metavar="N", default=[],
                        help="also tell what N slides like these would take; may be given again")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the config, as for build")
    args = parser.parse_intermixed_args(words)
    return guarded(lambda: _run(args))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _checked(rows: Sequence[ManifestRow], args: argparse.Namespace, config: PrepConfig) -> list[Checked]:
    found = []
    with progress.Progress(len(rows)) as shown:
        for row in rows:
            found.append(check(row, args.store, config, args.scratch))
            shown.step("" if not found[-1].faults else f"{row.slide_id}: {_many(len(found[-1].faults), 'fault')}")
    return found


def _run(args: argparse.Namespace) -> int:
    config = load(PrepConfig, args.config, args.overrides)
    checked = _checked(manifest.read(args.manifest, args.root, config.split_by), args, config)
    model = cost.fitted(records.every(args.store), config)
    good = [one for one in checked if not one.faults]
    planned = [one for one in good if args.all or not one.complete]
    print(f"\n{_counts_table(checked, model)}\n")
    seconds = {one.row.slide_id: model.seconds(one.work) for one in planned}
    tasks, enough = _tell_tasks(args, seconds), True
    if planned:
        lines, enough = _room_lines(planned, model, config, args.store)
        print("\n".join(lines))
    source = f"{model.records} records of the store" if model.records else "the constants of data_prep/cost.py"
    print(f"costs from {source}; a tile has {config.tile_px} px, {100 * model.tissue:.0f} % of a slide become tiles")
    if args.extrapolate and good:
        print(f"\nslides like these:\n{_scales(good, model, config, args.extrapolate)}")
    rows = cast(list[SlideInfo], [one.row for one in checked])  # a row has what is read of it, under the same names
    for line in [*splits.empty_lines(rows, config), *shared_inputs(checked, config)]:
        print(line)
    for one in checked:
        if one.before and not one.faults:
            print(f"warning: {one.row.slide_id} failed last time, and none of its files changed since: {one.before}")
    _tell_faults(checked)
    if not args.dry_run:
        out = args.out or args.store / "plan.json"
        files.write_json(out, {"tasks": tasks, "manifest_sha256": files.sha256_file(args.manifest)})
        print(f"{out}: {_many(len(tasks), 'task')}, {_many(len(planned), 'slide')}")
    return 0 if len(good) == len(checked) and enough else 1


def _tell_tasks(args: argparse.Namespace, seconds: dict[str, float]) -> list[list[str]]:
    if not seconds:
        print("nothing is left to build")
        return []
    count, note = _task_count(args, seconds)
    tasks = balanced(seconds, count)
    loads = [sum(seconds[name] for name in task) / args.workers for task in tasks]
    low, high = (_time(load) for load in (min(loads), max(loads)))
    each = f"{low} to {high} each" if low != high else f"{low}{' each' * (len(tasks) > 1)}"
    print(f"{_many(len(seconds), 'slide')} in {_many(len(tasks), 'task')}, {args.workers} at a time: {each}, "
          f"{_hours(sum(seconds.values()))} core-hours in all")  # fmt: skip
    if note:
        print(f"note: {note}")
    return tasks


def _tell_faults(checked: Sequence[Checked]) -> None:
    faulty = [one for one in checked if one.faults]
    if faulty:
        print(f"\n{len(faulty)} of {_many(len(checked), 'slide')} cannot be built:")
        for one in faulty:
            print("\n".join(f"  {one.row.slide_id}: {fault}" for fault in one.faults))


if __name__ == "__main__":
    sys.exit(main())
