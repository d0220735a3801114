"""The end of a pack: index, manifest and card of what its tasks wrote, and the set in its place.

In: the folder in which a set was made, its plan. Out: the shard set. The folder is renamed as a whole, so a set at its
place is the old one or the new one; nothing but the set is left.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from data_prep.packing import manifest as describe
from data_prep.packing import write
from data_prep.packing.card import dataset_card
from data_prep.packing.plan import Plan
from data_prep.packing.sources import named
from storm import files, genes, schema, shards
from storm.index import INDEX
from storm.prep_config import PrepConfig

PLAN = "plan.json"
_WORK = r"\.{}\.[0-9a-f]{{16}}\.packing"


def work_folder(out: Path, fingerprint: str) -> Path:
    """Where the set of a plan is made: beside its place, of a name that other plans do not share."""
    return out.with_name(f".{out.name}.{fingerprint[:16]}.packing")


def unfinished(out: Path) -> list[Path]:
    """What packs for this place have left, of any plan."""
    return sorted(path for path in out.parent.iterdir() if re.fullmatch(_WORK.format(re.escape(out.name)), path.name))


def clear(out: Path) -> None:
    """Remove what packs for this place have left."""
    for folder in unfinished(out):
        shutil.rmtree(folder, ignore_errors=True)
    files.sweep(out.parent, out.name)


def check_complete(work: Path, plan: Plan, tasks: int | None) -> None:
    """Raises ValueError where shards are missing, naming them and what to run again."""
    lacking = {n: found for n in range(len(plan.pools)) if (found := write.missing_shards(work, plan, n))}
    if lacking:
        names = [f"{plan.pools[n].split}/{shards.shard_name(s)}" for n, found in lacking.items() for s in found]
        again = sorted({n % tasks for n in lacking}) if tasks else []
        cure = f"run --task {', '.join(map(str, again))} of --tasks {tasks} again" if again else "run without --finish"
        raise ValueError(f"{len(names)} shards are missing: {named(names)}; {cure}, and then finish")


def finish(work: Path, out: Path, plan: Plan | None) -> dict[str, Any]:
    """Complete the set whose shards are all there, put it in its place, and return its manifest."""
    if plan and not (work / shards.MANIFEST).is_file():
        sidecars: dict[str, list[dict[str, Any]]] = {}
        for pool in plan.pools:
            for number in range(pool.first, pool.first + pool.shards):
                found = shards.read_sidecar(work / pool.split, number)
                assert found is not None, "check_complete comes before finish"
                sidecars.setdefault(pool.split, []).append(found)
        entries = {s: shards.join_split(work / s, sidecars[s]) for s in schema.SPLITS if s in sidecars}
        manifest = {**plan.manifest, "plan": plan.fingerprint, "splits": entries}
        for split, entry in entries.items():
            expected = sum(s["profiles"] for s in manifest["slides"].values() if s["split"] == split)
            assert entry["profiles"] == expected, "each profile is in exactly one group"
        table = genes.GeneTable.read(work / shards.GENES)
        card = dataset_card(manifest, len(table), PrepConfig().model_dump())
        files.write_bytes(work / shards.CARD, card.encode())
        manifest["card_sha256"] = files.sha256_of(card.encode())
        manifest["sha256"] = describe.digest(manifest)
        files.write_json(work / shards.MANIFEST, manifest)
    wanted = {shards.MANIFEST, shards.GENES, shards.CARD, *schema.SPLITS}
    for path in work.iterdir():
        if path.name not in wanted:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    for folder in (path for path in work.iterdir() if path.is_dir()):
        for path in folder.iterdir():
            if path.name != INDEX and not path.name.endswith(".tar"):
                path.unlink(missing_ok=True)  # another pack of the same set may finish it, too
    files.install_folder(work, out)
    clear(out)
    return dict(files.read_json(out / shards.MANIFEST))


def is_current(out: Path, fingerprint: str) -> bool:
    """Whether `out` holds the whole shard set of a plan.

    A shard of the right size that was not changed after the manifest, which is written last, is not read again.
    """
    if not ((out / shards.MANIFEST).is_file() and (out / shards.CARD).is_file()):
        return False
    written = (out / shards.MANIFEST).stat().st_mtime_ns
    try:
        opened = shards.ShardSet(out)
        if opened.manifest["plan"] != fingerprint or opened.manifest["sha256"] != describe.digest(opened.manifest):
            return False
        for split, entry in opened.manifest["splits"].items():
            opened.index(split)
            for shard in entry["shards"]:
                path = out / split / shard["name"]
                stat = path.stat()
                if stat.st_size != shard["bytes"]:
                    return False
                if stat.st_mtime_ns > written and files.sha256_file(path) != shard["sha256"]:
                    return False
    except (ValueError, KeyError, FileNotFoundError):
        return False  # damaged, or of an older schema: packed anew
    return True
