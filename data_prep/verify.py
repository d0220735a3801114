"""Read everything again: is a folder of slide stores, or a shard set, what was written?

    python -m data_prep.verify PATH [--workers N]

In: a store, a folder of stores, or a shard set. Out: a line per fault with its cure, and a table. Exit code 0 where all
is well, 1 with faults, 2 where the path is none of these.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep import check_shards, check_store, progress, records, wanted, workers
from data_prep.packing.finish import unfinished
from storm import shards, store
from storm.commands import guarded


@dataclass
class Verdict:
    """What was read, and what is wrong with it."""

    kind: str
    items: int
    bytes: int
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # no faults, but worth knowing
    told: int = 0  # of the faults, the first so many have been shown


@dataclass(frozen=True)
class _Each:
    """Work on (number, bytes, item); an object, so that it can be sent to a process."""

    work: Callable[[Any], Any]

    def __call__(self, item: tuple[int, int, Any]) -> tuple[int, int, Any]:
        number, size, what = item
        return number, size, self.work(what)


def _died(item: tuple[int, int, Any], reason: str) -> tuple[int, int, Any]:
    return item[0], item[1], reason


def _all(
    kind: str,
    items: Sequence[tuple[int, Any]],
    work: Callable[[Any], Any],
    faults_of: Callable[[Any], list[str]],
    processes: int,
) -> tuple[Verdict, list[Any]]:
    """The verdict on some (bytes, item), their faults shown as they come, and what `work` found where it ended."""
    numbered = [(number, size, item) for number, (size, item) in enumerate(items)]
    found: dict[int, Any] = {}
    with progress.Progress(sum(size for size, _ in items), "B", scaled=True) as shown:
        for number, size, answer in workers.run(numbered, _Each(work), _died, max(1, min(processes, len(items)))):
            found[number] = answer
            faults = [answer] if isinstance(answer, str) else faults_of(answer)
            shown.step("\n".join(faults), size)
    answers = [found[number] for number in range(len(items))]
    faults = [fault for one in answers for fault in ([one] if isinstance(one, str) else faults_of(one))]
    verdict = Verdict(kind, len(items), sum(size for size, _ in items), faults, told=len(faults))
    return verdict, [one for one in answers if not isinstance(one, str)]


def verify_stores(paths: Sequence[Path], processes: int = 1) -> Verdict:
    """Read stores again."""
    items = [(path.stat().st_size, path) for path in paths]
    return _all("stores", items, check_store.check_store, lambda faults: faults, processes)[0]


def verify_folder(folder: Path, processes: int = 1) -> Verdict:
    """Read all stores of a folder again, and look at what else lies there."""
    verdict = verify_stores(sorted(folder.glob(f"*{store.SUFFIX}")), processes)
    faults, notes = check_store.check_folder(folder)
    verdict.faults += faults
    verdict.notes += notes
    return verdict


def verify_shards(folder: Path, processes: int = 1) -> Verdict:
    """Read a shard set again.

    Raises:
        ValueError: it does not open (see storm.shards.ShardSet).
    """
    changed = check_shards.check_manifest(folder)
    if changed:  # nothing that it tells is to be believed
        return Verdict("shards", 0, 0, [changed])
    opened = shards.ShardSet(folder)
    unread, items = list[str](), []
    for split, entry in opened.manifest["splits"].items():
        try:
            opened.index(split)
        except ValueError as error:
            unread.append(str(error))
            continue
        items += [(shard["bytes"], (split, number)) for number, shard in enumerate(entry["shards"])]
    work = check_shards.CheckShard(folder, opened.manifest)
    verdict, read = _all("shards", items, work, lambda checked: checked.faults, processes)
    verdict.faults += unread + check_shards.check_card(folder, opened.manifest)
    if not verdict.faults:  # else what is missing has been told
        verdict.faults += check_shards.check_profiles(opened.manifest, read)
    strangers = {p.name for p in folder.iterdir()} - {shards.MANIFEST, shards.GENES, shards.CARD}
    strangers -= set(opened.manifest["splits"])
    verdict.notes += [f"{name}: is no part of the set" for name in sorted(strangers)]
    verdict.notes += [f"{path.name}: a pack of this set that did not end" for path in unfinished(folder)]
    return verdict


def verify(path: Path, processes: int = 1) -> Verdict:
    """Read a store, a folder of stores or a shard set again.

    Raises:
        ValueError: the path is none of these.
    """
    if path.is_file() and path.name.endswith(store.SUFFIX):
        return verify_stores([path])
    if (path / shards.MANIFEST).is_file():
        return verify_shards(path, processes)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; name a slide store, a folder of them or a shard set")
    if any(any(path.glob(f"*{suffix}")) for suffix in (store.SUFFIX, records.SUFFIX, wanted.SUFFIX)):
        return verify_folder(path, processes)
    raise ValueError(f"{path}: is no slide store, no folder of them (*{store.SUFFIX}) and no shard set "
                     f"({shards.MANIFEST}); name one")  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.verify", description="Read everything against hashes.")
    parser.add_argument("path", type=Path, help="a slide store, a folder of stores, or a shard set")
    parser.add_argument("--workers", type=int, default=1, help="files at a time")
    args = parser.parse_args(words)
    return guarded(lambda: _run(args.path, max(1, args.workers)))


def _run(path: Path, processes: int) -> int:
    start = time.perf_counter()
    verdict = verify(path, processes)
    seconds = time.perf_counter() - start
    for note in verdict.notes:
        print(f"note: {note}")
    for fault in verdict.faults[verdict.told :]:
        print(fault)
    speed = progress.size(verdict.bytes / max(seconds, 1e-3))
    row = [verdict.kind, verdict.items, progress.size(verdict.bytes), progress.clock(seconds), f"{speed}/s"]
    print(progress.table(["read", "files", "size", "time", "speed", "faults"], [[*row, len(verdict.faults)]]))
    return 1 if verdict.faults else 0


if __name__ == "__main__":
    sys.exit(main())
