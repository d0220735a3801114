"""The shards of a pool, written from the stores.

In: a plan, the number of a pool, the folder in which a set is made. Out: the pool's shards with their sidecars. Only
what is missing is written; each shard is complete or absent, and the same bytes whoever writes it, so two tasks that
meet in one pool do no harm.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep import vocabulary
from data_prep.packing import groups
from data_prep.packing.plan import IN_MEMORY, Plan
from storm import files, genes, schema, shards, store
from storm.prep_config import PrepConfig

SCRATCH = "pool"


def missing_shards(work: Path, plan: Plan, number: int) -> list[int]:
    """Numbers of a pool's shards that are not complete."""
    pool = plan.pools[number]
    numbers = range(pool.first, pool.first + pool.shards)
    return [n for n in numbers if shards.read_sidecar(work / pool.split, n) is None]


def write_pool(work: Path, plan: Plan, number: int, store_dir: Path, config: PrepConfig) -> int:
    """Write the shards of a pool that are missing; returns their bytes.

    Raises:
        ValueError: a store is damaged, or is not the one that was planned.
    """
    missing = missing_shards(work, plan, number)
    if not missing:
        return 0
    pool = plan.pools[number]
    table = genes.GeneTable.read(work / shards.GENES)
    with files.scratch_folder(work / f"{SCRATCH}{number}") as scratch:
        writers = {shard: shards.ShardWriter(scratch, shard) for shard in missing}
        for together in plan.order(number):
            wanted = [entry for entry in together if entry[2] in writers]
            for (slide_id, group_number, shard), group in zip(
                wanted, _read(wanted, store_dir, plan, table, config), strict=True
            ):
                writers[shard].add(f"{slide_id}_{group_number:05d}", group)
        return sum(writer.close(work / pool.split) for writer in writers.values())


def _read(
    wanted: list[tuple[str, int, int]], store_dir: Path, plan: Plan, table: genes.GeneTable, config: PrepConfig
) -> Iterator[schema.Group]:
    """The groups of slides that are taken together."""
    slides = dict.fromkeys(slide_id for slide_id, _, _ in wanted)
    readers = {name: _open(store.store_path(store_dir, name), plan, table, config) for name in slides}
    if any(plan.counts[name] > IN_MEMORY for name in slides):
        (reader,) = readers.values()
        yield from reader.groups([group for _, group, _ in wanted])
    else:
        for slide_id, group, _ in wanted:
            yield readers[slide_id].group(group)


def _open(path: Path, plan: Plan, table: genes.GeneTable, config: PrepConfig) -> groups.SlideReader:
    opened = store.SlideStore(path)
    slide_id, places = opened.info.slide_id, opened.places()
    planned = groups.plan(opened, places, config)
    if [one.bytes for one in planned] != plan.bytes[slide_id]:
        raise ValueError(f"{path}: is not the store that was planned; let builds end before packing, and pack again")
    column = vocabulary.columns(opened.genes(), table)
    panel = plan.manifest["slides"][slide_id]["panel"]
    return groups.SlideReader(opened, places, planned, column, panel, plan.log_density[slide_id])
