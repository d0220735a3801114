"""Slide stores -> shards.

    python -m data_prep.pack --store DIR --out DIR [--config FILE] [--workers N] [key=value ...]
    python -m data_prep.pack --store DIR --out DIR ... --task K --tasks N     one of N that share the work
    python -m data_prep.pack --store DIR --out DIR ... --finish               when all of them are through

In: a folder of slide stores. Out: a shard set (storm/shards.py tells its layout): groups of many slides mixed, each
exactly once; the vocabulary with the genes' shares on training donors; a card; the manifest, written last. The set is
made beside its place and then put there, so an older one stays whole until then. The same command again writes only the
shards that are missing; on a complete set of the same stores and config it does nothing. With --append OLD the slides
that OLD does not hold become a set of their own, over OLD's genes. Exit code 0, or 2 where it is refused.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import manifest as manifests
from data_prep import progress
from data_prep.manifest import ManifestRow
from data_prep.packing import finish, write
from data_prep.packing import manifest as describe
from data_prep.packing import sources as found_by
from data_prep.packing.manifest import Options
from data_prep.packing.plan import Plan, in_processes
from storm import files, schema, shards
from storm.commands import guarded
from storm.config import load
from storm.prep_config import PrepConfig


@dataclass(frozen=True)
class Job:
    """One shard set to be made."""

    store_dir: Path
    out: Path
    config: PrepConfig
    options: Options
    sources: list[found_by.Source]
    held: found_by.Held
    left_out: dict[str, str]  # slide id -> why it is missing
    fingerprint: str

    @property
    def work(self) -> Path:
        """The folder in which the set is made."""
        return finish.work_folder(self.out, self.fingerprint)

    def is_current(self) -> bool:
        """Whether the set is at its place already."""
        return finish.is_current(self.out, self.fingerprint)

    def plan(self) -> Plan:
        """The plan, as another task has written it, or made and written now."""
        path = self.work / finish.PLAN
        known = Plan.load(path)
        if known and (self.work / shards.GENES).is_file():
            return known
        plan, table, notes = describe.make(
            self.fingerprint, self.sources, self.held, self.config, self.options, len(self.left_out)
        )
        for note in notes:
            print(note)
        files.write_bytes(self.work / shards.GENES, table)
        plan.save(path)
        return plan


def _check_out(out: Path) -> None:
    """Raises ValueError where `out` holds anything that is no shard set: packing replaces the whole folder."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; name a new folder")
    files.sweep(out)  # what a pack of the same set left when another overtook it
    known = {shards.MANIFEST, shards.GENES, shards.CARD, shards.FEATURES, *schema.SPLITS}
    strange = {p.name for p in out.iterdir()} - known if out.is_dir() else set()
    if strange:
        raise ValueError(f"{out}: holds {sorted(strange)[0]!r}, which is no part of a shard set; name a new folder")


def open_job(
    store_dir: Path, out: Path, config: PrepConfig, options: Options | None = None, rows: Sequence[ManifestRow] = ()
) -> Job:
    """What is to be packed, from the records of the stores alone.

    Raises:
        ValueError: nothing to pack, slides missing or built from other rows, a folder that is no shard set, or a set to
            append to that is none.
    """
    options = options or Options()
    if not store_dir.is_dir():
        raise ValueError(f"{store_dir}: no such folder; name the one that data_prep.build wrote to")
    _check_out(out)
    if out.resolve() in {folder.resolve() for folder in options.append}:
        raise ValueError(f"{out}: is a set that is appended to, which stays as it is; name a new folder")
    files.sweep(out.parent, out.name)  # a set that a killed pack had moved aside goes back
    left_out = found_by.missing(store_dir, rows)
    if left_out and not options.allow_missing:
        found_by.check_missing(store_dir, left_out)
    listed, held = found_by.listed(store_dir, left_out), found_by.held(options.append)
    # What an older set holds stays where it is, whatever store and manifest say.
    found_by.check_rows(store_dir, [source for source in listed if source.slide_id not in held.slides], rows)
    name = describe.fingerprint(listed, held, config, len(left_out))
    job = Job(store_dir, out, config, options, listed, held, left_out, name)
    if (out / shards.FEATURES).exists() and not job.is_current():
        raise ValueError(
            f"{out / shards.FEATURES}: cached features of the shards that packing would replace; remove them, or "
            "name a new folder"
        )
    return job


@dataclass(frozen=True)
class _WritePool:
    """Writes a pool; an object, so that it can be sent to a process."""

    work: Path
    plan: Plan
    store_dir: Path
    config: PrepConfig

    def __call__(self, number: int) -> int:
        return write.write_pool(self.work, self.plan, number, self.store_dir, self.config)


def write_pools(job: Job, plan: Plan, numbers: Sequence[int]) -> int:
    """Write the missing shards of some pools; returns how many bytes.

    Raises:
        ValueError: a store is damaged, or was built anew meanwhile.
    """
    wanting = [n for n in numbers if write.missing_shards(job.work, plan, n)]
    if not wanting:
        return 0
    try:
        written = in_processes(
            wanting, _WritePool(job.work, plan, job.store_dir, job.config), job.options.workers, "pool", "pools written"
        )
    except ValueError:
        if job.is_current():  # another task wrote the same shards and finished the set
            return 0
        raise
    return sum(size for _, size in written)


def pack(
    store_dir: Path, out: Path, config: PrepConfig, options: Options | None = None, rows: Sequence[ManifestRow] = ()
) -> dict[str, Any]:
    """Pack all stores of a folder and return the shard manifest.

    Raises:
        ValueError: naming file, fact and cure; an older shard set at `out` is then left as it was.
    """
    job = open_job(store_dir, out, config, options, rows)
    if job.left_out:
        print(found_by.told(job.left_out))
    if job.is_current():
        print(f"{out}: current, nothing to do")
        finish.clear(out)
        return dict(files.read_json(out / shards.MANIFEST))
    try:
        plan = None
        if not (job.work / shards.MANIFEST).is_file():  # there where the last pack ended between it and the rename
            plan = job.plan()
            write_pools(job, plan, range(len(plan.pools)))
        return finished(job, plan, None)
    except (ValueError, OSError):
        if not job.is_current():
            raise
        print(f"{out}: another pack of the same stores has just made it")  # and taken the folder away
        return dict(files.read_json(out / shards.MANIFEST))


def finished(job: Job, plan: Plan | None, tasks: int | None) -> dict[str, Any]:
    """Check that all shards are there, and put the set in its place.

    Raises:
        ValueError: shards are missing; they are named, and what to run again.
    """
    if plan:
        finish.check_complete(job.work, plan, tasks)
    manifest = finish.finish(job.work, job.out, plan)
    print(_table(manifest))
    return manifest


def _table(manifest: dict[str, Any]) -> str:
    rows = []
    for split, entry in manifest["splits"].items():
        slides = [slide for slide in manifest["slides"].values() if slide["split"] == split]
        donors = len({(slide["study"], slide["donor"]) for slide in slides})
        size = progress.size(sum(shard["bytes"] for shard in entry["shards"]))
        rows.append([split, len(slides), donors, entry["groups"], entry["profiles"], len(entry["shards"]), size])
    lines = [progress.table(["split", "slides", "donors", "groups", "profiles", "shards", "size"], rows)]
    if manifest["split_by"] == "section":
        lines.append("SPLIT BY SECTION: a donor's sections may be in several splits; results say nothing on new donors")
    if manifest["genes_left_out"]:
        why = "that the older set does not hold" if manifest["appended_to"] else "that withheld_genes names"
        lines.append(f"{manifest['genes_left_out']} genes {why} are left out")
    if "test" not in manifest["splits"] and not manifest["appended_to"]:
        lines.append(
            "NO TEST SPLIT: nothing to evaluate on; before training name test donors in the manifest's column split, "
            "and build and pack again (or give pack test_share)"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep.pack", description="Slide stores -> shards.")
    parser.add_argument("--store", type=Path, required=True, help="folder of the slide stores")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shard set; replaced as a whole")
    parser.add_argument("--manifest", type=Path, help="the stores' manifest: every slide must be built, as it says")
    parser.add_argument("--root", type=Path, help="folder that the manifest's paths start from")
    parser.add_argument("--allow-missing", action="store_true", help="pack without the slides that are missing")
    parser.add_argument("--allow-duplicates", action="store_true", help="pack although splits share a section")
    parser.add_argument(
        "--append", type=Path, action="append", default=[], metavar="OLD",
        help="pack what this shard set does not hold, over its genes; name all sets of a chain, the oldest first",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="pools at a time")
    parser.add_argument("--plan", action="store_true", help="only write the plan, before the tasks start")
    parser.add_argument("--task", type=int, help="write the shards of one task of --tasks, from 0")
    parser.add_argument("--tasks", type=int, help="tasks that share the work")
    parser.add_argument("--finish", action="store_true", help="only complete what the tasks have written")
    parser.add_argument("--config", type=Path, help="YAML of what differs from PrepConfig's defaults")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="over the config; the keys are those of PrepConfig in storm/prep_config.py",
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    args = _parser().parse_intermixed_args(words)
    return guarded(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.plan + args.finish + (args.task is not None) > 1:
        raise ValueError("--plan, --task and --finish are three parts of the work; name one of them, or none for all")
    if args.task is not None and not (args.tasks and 0 <= args.task < args.tasks):
        raise ValueError("--task K goes with --tasks N, and K is 0 to N - 1")
    config = load(PrepConfig, args.config, args.overrides)
    rows = manifests.read(args.manifest, args.root, config.split_by) if args.manifest else []
    options = Options(args.allow_missing, args.allow_duplicates, tuple(args.append), max(1, args.workers))
    if not (args.plan or args.finish or args.task is not None):
        pack(args.store, args.out, config, options, rows)
        return 0
    return _part(args, open_job(args.store, args.out, config, options, rows))


def _part(args: argparse.Namespace, job: Job) -> int:
    """Run one part of the work."""
    if job.left_out and args.task is None:  # once, not in the log of every task
        print(found_by.told(job.left_out))
    if job.is_current():
        print(f"{job.out}: current, nothing to do")
        return 0
    whole = (job.work / shards.MANIFEST).is_file()
    if args.finish and not (whole or (job.work / finish.PLAN).is_file()):
        raise ValueError(f"{job.out}: no task has packed these stores with this config; run the tasks, and then finish")
    plan = None if whole else job.plan()
    if args.finish:
        finished(job, plan, args.tasks)
    elif plan and args.plan:
        count = sum(pool.shards for pool in plan.pools)
        print(f"{job.out}: {len(plan.bytes)} slides in {len(plan.pools)} pools, {count} shards; as many tasks as pools")
    elif plan:
        numbers = range(args.task, len(plan.pools), args.tasks)
        size = write_pools(job, plan, numbers)
        print(f"{job.out}: task {args.task} of {args.tasks}: {len(numbers)} pools, {progress.size(size)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
