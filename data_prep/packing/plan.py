"""Which group goes into which shard, told before a pixel or a count is read.

In: the stores' metadata. Out: a `Plan`: the slides with their splits and the estimated bytes of their groups, the
genes, and pools: slides in a seeded order, taken together until they come to `pool_mb`. The groups of a pool are mixed
by a seeded permutation and divided into shards of about `shard_mb`. So a task that writes a pool reads each of its
slides once, from end to end; were the groups of all slides mixed, each would cost a search through a store.

A plan is a function of stores and config: every task may make it, or read it where another has written it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from data_prep import progress, vocabulary, workers
from data_prep.packing import groups
from data_prep.packing.sources import Source
from storm import files, genes, schema, store
from storm.commands import explain
from storm.prep_config import PrepConfig

_SLIDES, _DONORS = 32, 64  # per process and message
IN_MEMORY = 32_000_000  # counts of the slides that are open at a time, 256 MB

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Scanned:
    """What a plan needs of one store."""

    source: Source
    info: store.SlideInfo
    gene_list: str  # sha256 of its ids
    bytes: tuple[int, ...]  # of each group, as estimated
    counts: int = 0
    log_density: float = 0.0
    footprint_um: float = 0.0  # median
    footprint_kind: int = schema.DISC  # the most frequent, as the model reads it

    @property
    def profiles(self) -> int:
        """Number of profiles."""
        return int(self.info.facts.get("profiles", 0))


@dataclass(frozen=True)
class Pool:
    """Slides whose groups are mixed with each other, and the shards of their split that these fill."""

    split: str
    slides: list[str]
    first: int  # number of its first shard
    shards: int


@dataclass(frozen=True)
class Plan:
    """All that the tasks share."""

    fingerprint: str
    pools: list[Pool]
    bytes: dict[str, list[int]]  # slide id -> of each group, as estimated
    counts: dict[str, int]  # slide id -> number of counts
    log_density: dict[str, float]
    manifest: dict[str, Any] = field(default_factory=dict)  # of the shard set, without what only its shards tell

    def save(self, path: Path) -> None:
        """Write the plan, complete or not at all."""
        files.write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Plan | None":
        """A plan, or None where there is none that can be read."""
        try:
            values = files.read_json(path) if path.is_file() else None
            return values and cls(**{**values, "pools": [Pool(**pool) for pool in values["pools"]]})
        except (ValueError, TypeError, KeyError):
            return None

    def order(self, number: int) -> list[list[tuple[str, int, int]]]:
        """(slide id, group, shard) of a pool's groups in the order in which they are written, slides taken together.

        Slides are taken together as long as memory holds their counts, and their groups are mixed; one that it does
        not hold alone is gone through from end to end.
        """
        pool, prep = self.pools[number], self.manifest["prep"]
        named = [(slide, n) for slide in pool.slides for n in range(len(self.bytes[slide]))]
        mixed, shard = _dealt([self.bytes[slide] for slide in pool.slides], pool.split, pool.first, prep)
        entries = [(*named[i], s) for i, s in zip(mixed, shard, strict=True)]
        part, held = dict[str, int](), 0
        for slide in pool.slides:
            held += self.counts[slide]
            if part and held > IN_MEMORY:
                held = self.counts[slide]
                part[slide] = max(part.values()) + 1
            else:
                part[slide] = max(part.values(), default=0)
        together: list[list[tuple[str, int, int]]] = [[] for _ in set(part.values())]
        for entry in entries:
            together[part[entry[0]]].append(entry)
        return [sorted(own) if self.counts[own[0][0]] > IN_MEMORY else own for own in together]


def _dealt(sizes: Sequence[Sequence[int]], split: str, first: int, prep: dict[str, Any]) -> tuple[list[int], list[int]]:
    """(numbers of the groups of a pool in the order of its shards, the shard of each), from the groups' bytes.

    A shard is closed once it holds its share of the pool, so none is empty.
    """
    flat = [size for own in sizes for size in own]
    share = sum(flat) / max(1, round(sum(flat) / (prep["shard_mb"] * 1e6)))
    mixed = np.random.default_rng([prep["seed"], schema.SPLITS.index(split), first]).permutation(len(flat)).tolist()
    shard, number, held = [], first, 0
    for i in mixed:
        if held >= share:
            number, held = number + 1, 0
        shard.append(number)
        held += flat[i]
    return mixed, shard


def in_processes(
    items: Sequence[Item], work: Callable[[Item], Answer], processes: int, unit: str, done_text: str
) -> list[tuple[Item, Answer]]:
    """What `work` gives of each item, in the items' order; it gives a ValueError back in place of raising it.

    Raises:
        ValueError: one gave an error, or its process died.
    """
    done: dict[int, tuple[Item, Answer]] = {}
    numbered = list(enumerate(items))
    with progress.Progress(len(items), unit) as shown:
        for number, answer in workers.run(numbered, _Numbered(work), _died, max(1, min(processes, len(items)))):
            if isinstance(answer, ValueError):
                raise answer
            done[number] = (items[number], answer)
            shown.step(done_text if len(done) == len(items) else "")
    return [done[number] for number, _ in numbered]


@dataclass(frozen=True)
class _Numbered:
    """A function that keeps its items' numbers; an object, so that it can be sent to a process."""

    work: Callable[[Any], Any]

    def __call__(self, item: tuple[int, Any]) -> tuple[int, Any]:
        try:
            return item[0], self.work(item[1])
        except ValueError as error:
            return item[0], error
        except OSError as error:
            return item[0], ValueError(explain(error))


def _died(item: tuple[int, Any], reason: str) -> tuple[int, Any]:
    return item[0], ValueError(reason)


@dataclass(frozen=True)
class _Scan:
    """Scans some stores; (what was found, their gene lists by id)."""

    config: PrepConfig

    def __call__(self, sources: Sequence[Source]) -> tuple[list[Scanned], dict[str, genes.GeneTable]]:
        tables: dict[str, genes.GeneTable] = {}
        return [self._one(source, tables) for source in sources], tables

    def _one(self, source: Source, tables: dict[str, genes.GeneTable]) -> Scanned:
        opened = store.SlideStore(source.path)
        info, config = opened.info, self.config
        if not info.facts.get("profiles"):
            return Scanned(source, info, "", ())
        if (info.tile_px, info.tile_mpp) != (config.tile_px, config.tile_mpp):
            raise ValueError(
                f"{source.path}: tiles of {info.tile_px} px at {info.tile_mpp} um, the config says {config.tile_px} px "
                f"at {config.tile_mpp} um; give pack the config of build, or build again"
            )
        name, places = opened.genes_hash(), opened.places(bare=True)
        if name not in tables:
            tables[name] = opened.genes()
        sizes = tuple(planned.bytes for planned in groups.plan(opened, places, config))
        squares = float((places.footprint_kind == schema.SQUARE).mean())
        kind = schema.SQUARE if squares > 0.5 else schema.DISC
        median = float(np.median(places.footprint_um))
        return Scanned(source, info, name, sizes, int(opened.indptr[-1]), opened.log_density(places), median, kind)


def scan(
    sources: Sequence[Source], config: PrepConfig, processes: int
) -> tuple[list[Scanned], dict[str, genes.GeneTable]]:
    """What is known of every store, in the order of `sources`, and their gene lists by id.

    Raises:
        ValueError: a store does not open, or has tiles of another size than the config.
    """
    parts = [sources[i : i + _SLIDES] for i in range(0, len(sources), _SLIDES)]
    found: list[Scanned] = []
    tables: dict[str, genes.GeneTable] = {}
    for _, (scanned, own) in in_processes(
        parts, _Scan(config), processes, "batch", f"{len(sources)} stores read for the plan"
    ):
        found += scanned
        tables = own | tables  # the first slide that has a list gives its symbols
    return found, {one.gene_list: tables[one.gene_list] for one in found if one.gene_list}


@dataclass(frozen=True)
class _Compositions:
    """The merged compositions of some donors, each a list of (store, gene list)."""

    column: dict[str, npt.NDArray[np.int32]]
    size: int

    def __call__(self, donors: Sequence[Sequence[tuple[Path, str]]]) -> list[vocabulary.Composition]:
        named = [[(path, self.column[name]) for path, name in stores] for stores in donors]
        return vocabulary.merged(vocabulary.donor_composition(stores, self.size) for stores in named)


def with_shares(
    found: vocabulary.Vocabulary, tables: dict[str, genes.GeneTable], train: Sequence[Scanned], processes: int
) -> vocabulary.Vocabulary:
    """The vocabulary with the shares of its genes on training donors."""
    of_donor: dict[tuple[str, str], list[tuple[Path, str]]] = {}
    for one in train:
        of_donor.setdefault((one.info.study, one.info.donor), []).append((one.source.path, one.gene_list))
    donors = [of_donor[name] for name in sorted(of_donor)]
    column = {name: vocabulary.columns(table, found.table) for name, table in tables.items()}
    parts = [donors[i : i + _DONORS] for i in range(0, len(donors), _DONORS)]
    answers = in_processes(
        parts, _Compositions(column, len(found.table)), processes, "batch", f"genes of {len(donors)} donors counted"
    )
    share = vocabulary.shares(vocabulary.merged(part for _, own in answers for part in own))
    table = genes.GeneTable(found.table.ids, found.table.symbols, share)
    return dataclasses.replace(found, table=table)


def pools(scanned: Sequence[Scanned], split_of: dict[str, str], config: PrepConfig) -> list[Pool]:
    """The slides of each split in a seeded order, taken together to pools; shards are numbered through a split."""
    found = []
    for split in schema.SPLITS:
        own = [one for one in scanned if split_of[one.source.slide_id] == split]
        rng = np.random.default_rng([config.seed, schema.SPLITS.index(split)])
        mixed = [own[i] for i in rng.permutation(len(own)).tolist()]
        sizes = np.array([sum(one.bytes) for one in mixed], np.int64)
        number = max(1, round(float(sizes.sum()) / (config.pool_mb * 1e6)))
        of = (np.cumsum(sizes) - sizes) * number // max(1, int(sizes.sum()))
        first = 0
        for pool in np.unique(of).tolist():
            members = np.flatnonzero(of == pool)
            slides = sorted((mixed[i] for i in members), key=lambda one: one.source.slide_id)
            shard = _dealt([one.bytes for one in slides], split, first, config.model_dump())[1]
            found.append(Pool(split, [one.source.slide_id for one in slides], first, shard[-1] + 1 - first))
            first = shard[-1] + 1
    return found
