"""The stream: the groups of a corpus in their order, dealt to ranks, read, shown and collated.

In: a corpus, what a batch is made with, the config. Out: the micro-batches of each step. Which groups they hold, and in
which order, says `storm.data.order`; the whole state is one `Position`. Loader processes are told the places they shall
load and hold no order of their own, so any number of them gives the same batches.
"""

import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from storm import schema
from storm.config import DataConfig, MaskConfig
from storm.data import mixture, places
from storm.data.batch import BatchSpec, collate, loss_genes
from storm.data.corpus import WINDOW_SHARDS, Corpus, Groups, window_shards
from storm.data.features import FeatureStore
from storm.data.order import Order, Place, Position, accumulation
from storm.data.remote import RemoteError
from storm.data.tile import decode_tiles
from storm.data.view import View, draw_sample

Batch = dict[str, torch.Tensor]

_GENES, _KEPT = 2, 5  # keep the generators of the loss genes and of the kept ones apart from those of the order
DROPPED = 0.3  # share of the genes whose own embedding a step leaves to their descriptors
OTHERS = 8  # groups that are tried in place of a damaged one
_NAMED = 4


class StreamError(ValueError):
    """The stream cannot go on; it names the groups that were waited for, or how many were damaged."""


class Work(NamedTuple):
    """A micro-batch to load: its step and its places; for each place those that stand in where its group is damaged."""

    step: int
    places: list[Place]
    others: list[list[Place]]


class Loaded(NamedTuple):
    """A micro-batch, why groups were skipped for it, and how long it took to load."""

    batch: Batch
    skipped: list[str]
    seconds: float


class Fault(NamedTuple):
    """Why a micro-batch was not loaded. As a value, since an error that leaves a loader process becomes a traceback."""

    text: str


class Loader(Dataset):
    """Work -> Loaded: reads, shows and collates groups. Pickled to loader processes."""

    def __init__(
        self, groups: Groups, spec: BatchSpec, mask: MaskConfig, seed: int, features: FeatureStore | None = None
    ) -> None:
        self.groups, self.spec, self.mask, self.seed, self.features = groups, spec, mask, seed, features

    def __getitem__(self, work: Work) -> Loaded | Fault:
        began = time.perf_counter()
        try:
            batch, skipped = self.load(work)
        except ValueError as error:
            return Fault(str(error))
        return Loaded(batch, skipped, time.perf_counter() - began)

    def load(self, work: Work) -> tuple[Batch, list[str]]:
        """(batch, faults of the groups that were replaced). Raises ValueError for a group that is not replaced."""
        try:
            numbers = [place.group for place in work.places]
            return self._collate(work, self.groups.read(numbers), numbers), []
        except RemoteError:
            raise
        except ValueError as error:
            if not work.others:
                raise self._named(work, error) from None
        found = [self.sound(place, others) for place, others in zip(work.places, work.others, strict=True)]
        faults = [fault for _, _, several in found for fault in several]
        return self._collate(work, [group for group, _, _ in found], [number for _, number, _ in found]), faults

    def _collate(self, work: Work, groups: list[schema.Group], numbers: list[int]) -> Batch:
        """The batch of `groups`, which have these numbers, at the places of `work`."""
        shown = [
            draw_sample(group, self.mask, (self.seed, place.epoch, place.number), self.spec.panel(group))
            for group, place in zip(groups, work.places, strict=True)
        ]
        pick = self.features.pick if self.features else lambda *_: 0
        keys = [(self.seed, place.epoch, place.number) for place in work.places]
        return self.with_features(
            [group for group, _ in shown], [view for _, view in shown], numbers, [pick(*key) for key in keys],
            self.genes(work.step), self.kept(work.step), keys if self.mask.feature_dropout else None,
        )  # fmt: skip

    def with_features(
        self, groups: list[schema.Group], views: list[View], numbers: list[int], variants: list[int],
        genes: npt.NDArray[np.int64], kept: npt.NDArray[np.bool_] | None = None,
        drop_keys: list[tuple[int, int, int]] | None = None,
    ) -> Batch:  # fmt: skip
        """The batch of groups in these variants of their cached features; without a cache, of their tiles.

        `drop_keys`: (seed, epoch, index) of each, by which columns of its features are left out; None = none is.
        """
        if self.features is None:
            return collate(groups, views, self.spec, genes, kept)
        shown = [self.features.show(*one) for one in zip(views, numbers, variants, strict=True)]
        cached = [one for _, one in shown]
        if drop_keys:
            share = self.mask.feature_dropout
            cached = [
                one.dropped(share, self.features.drop_rng(*key)) for one, key in zip(cached, drop_keys, strict=True)
            ]
        return collate(groups, [view for view, _ in shown], self.spec, genes, kept, cached)

    def _named(self, work: Work, error: ValueError) -> ValueError:
        """The error with the shard and key of the group at fault, where it is that of a group's tiles."""
        for place in work.places:
            (group,) = self.groups.read([place.group])
            try:
                decode_tiles(group, self.spec.tile_px)
            except ValueError as fault:
                return ValueError(f"{self.groups.source(place.group)}: {fault}")
        return error

    def sound(self, place: Place, others: list[Place]) -> tuple[schema.Group, int, list[str]]:
        """The group of a place, or the first sound one of those that stand in, its number, and the faults before it.

        Raises:
            StreamError: all are damaged.
        """
        faults: list[str] = []
        for one in [place, *others]:
            try:
                (group,) = self.groups.read([one.group])
            except RemoteError:
                raise
            except ValueError as error:
                faults.append(str(error))
                continue
            try:
                decode_tiles(group, self.spec.tile_px)
            except ValueError as error:
                faults.append(f"{self.groups.source(one.group)}: {error}")
            else:
                return group, one.group, faults
        raise StreamError(f"{len(faults)} groups in a row are damaged, the first: {faults[0]}")

    def genes(self, step: int) -> npt.NDArray[np.int64]:
        """[K] the loss genes of a step, the same on every rank."""
        return loss_genes(self.spec, self.mask.loss_genes, self._rng(step, _GENES))

    def kept(self, step: int) -> npt.NDArray[np.bool_] | None:
        """[G] the genes of a step whose own embedding takes part, the same on every rank; None without descriptors."""
        return self._rng(step, _KEPT).random(self.spec.n_genes) >= DROPPED if self.spec.descriptors else None

    def _rng(self, step: int, purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, step], spawn_key=(purpose,))))


class GroupStream:
    """Item i = micro-batch i % A of step i // A; a pure function of i. A = `accumulation`, micro-batches per step."""

    def __init__(
        self, corpus: Corpus, spec: BatchSpec, mask: MaskConfig, data: DataConfig, seed: int,
        rank: int = 0, world: int = 1, features: FeatureStore | None = None,
    ) -> None:  # fmt: skip
        """Fix the order.

        Raises:
            ValueError: the global batch cannot be dealt to `world` ranks, or the mixture cannot hold.
        """
        self.corpus, self.config, self.rank, self.world = corpus, data, rank, world
        self.accumulation = accumulation(data.global_batch_size, data.micro_batch_size, world)
        plain = mixture.is_plain(data.mixture)
        times = None if plain else mixture.multiplicity(*corpus.slides(), data.mixture)
        size = data.global_batch_size
        self.order = Order(corpus.shard_groups, seed, size, window_shards(data), data.last_batch, times)
        if not self.order.size:
            raise ValueError(
                f"{corpus.name}: {self.order.groups} groups fill no batch of data.global_batch_size={size}; lower it, "
                "or set data.last_batch=span"
            )
        self.loader = Loader(corpus.groups, spec, mask, seed, features)

    def __len__(self) -> int:
        """Micro-batches of one rank in an epoch, rounded up; the row itself has no end."""
        return -(-self.order.size // self.order.global_batch_size) * self.accumulation

    @functools.cached_property
    def _hashes(self) -> dict[int, str]:
        """window_shards -> order hash, of the orders that the config leaves open."""
        windows = (0, WINDOW_SHARDS) if self.config.window_shards == "auto" else (self.order.window_shards,)
        found = self.corpus.groups_hash
        return {w: dataclasses.replace(self.order, window_shards=w).hash(found) for w in windows}

    @property
    def order_hash(self) -> str:
        """sha256 of what the order depends on beside seed and epoch: groups, mixture, window, batch size and policy."""
        return self._hashes[self.order.window_shards]

    def position(self, step: int) -> Position:
        """The position after `step` steps."""
        return self.order.position(step, self.order_hash)

    def step_at(self, position: Position) -> int:
        """The number of steps that led to a position; where `window_shards` is auto, the stream takes the window of the
        position, whatever file system the shards now lie on.

        Raises:
            ValueError: the position is of another seed, other data, or no step of this stream ends there.
        """
        for window, order_hash in self._hashes.items():
            if order_hash == position.order_hash:
                self.order = dataclasses.replace(self.order, window_shards=window)
        step = self.order.step_at(position)
        if self.position(step) != position:
            mine = dataclasses.asdict(self.position(step))
            other = [name for name, value in dataclasses.asdict(position).items() if mine[name] != value]
            raise ValueError(
                f"{self.corpus.name}: not the stream of the stored position ({', '.join(other)} differ); resume with "
                "the shards, seed, mixture, window and global batch size of the run"
            )
        return step

    def genes(self, step: int) -> npt.NDArray[np.int64]:
        """[K] the loss genes of a step, the same on every rank."""
        return self.loader.genes(step)

    def keys(self, item: int) -> list[str]:
        """Shard keys of the groups of a micro-batch, to name them in an error."""
        return [self.corpus.groups.key(place.group) for place in self.work(item).places]

    def work(self, item: int) -> Work:
        """What a loader needs to make a micro-batch."""
        step, micro = divmod(item, self.accumulation)
        found = self.order.micro_batches(step, self.rank, self.world, self.config.micro_batch_size)[micro]
        skip = self.config.on_error == "skip"
        others = [[self.order.another(place, k + 1) for k in range(OTHERS)] for place in found] if skip else []
        return Work(step, found, others)

    def __getitem__(self, item: int) -> Batch:
        return self.loader.load(self.work(item))[0]


def _quiet_worker(_: int) -> None:
    """Ctrl-C and a scheduler's signals are for the rank, which ends its workers itself: by TERM, heeded of it alone."""
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_with_rank, daemon=True).start()


def _end_with_rank() -> None:
    rank = multiprocessing.parent_process()
    while rank is None or signal.sigwaitinfo([signal.SIGTERM]).si_pid != rank.pid:
        pass
    os._exit(128 + signal.SIGTERM)


class Batches(Iterator[Batch]):
    """The micro-batches of some steps in their order. `skipped` groups so far; `load_s` of the last micro-batch, in its
    loader process."""

    def __init__(self, stream: GroupStream, items: range, workers: int, pin: bool) -> None:
        self._stream, self._items = stream, iter(items)
        self.skipped, self.load_s = 0, 0.0
        # Spawned, not forked: a fork would copy signal handlers, threads and sockets of the process group.
        spawned: dict[str, Any] = {"multiprocessing_context": "spawn", "persistent_workers": True} if workers else {}
        self._found: Iterator[Loaded | Fault] = iter(DataLoader(
            stream.loader, batch_size=None, sampler=map(stream.work, items), num_workers=workers,  # type: ignore[arg-type]
            worker_init_fn=_quiet_worker, pin_memory=pin, timeout=stream.config.timeout_s if workers else 0,
            generator=torch.Generator(), **spawned,  # a generator of its own: the model's draws stay what they were
        ))  # fmt: skip

    def __next__(self) -> Batch:
        item = next(self._items)
        if self._stream.corpus.stager:
            self._stream.corpus.stager.follow(self._stream.order, item // self._stream.accumulation)
        fact = ""
        try:
            found = next(self._found)
        except RuntimeError as error:  # torch's word for a timeout, and for a process that died
            fact = str(error)
        if fact:  # out of the handler: the error would keep the processes
            self._found = iter(())
            raise StreamError(self._waited(item, fact))
        if isinstance(found, Fault):
            raise StreamError(found.text)
        self.load_s = found.seconds
        self._count(found.skipped)
        return dict(found.batch)

    def _waited(self, item: int, fact: str) -> str:
        groups = [self._stream.corpus.groups.source(place.group) for place in self._stream.work(item).places]
        named = ", ".join(groups[:_NAMED]) + (f" and {len(groups) - _NAMED} more" if len(groups) > _NAMED else "")
        if "timed out" in fact:
            fact = f"nothing for {self._stream.config.timeout_s:.0f} s"
        return (
            f"loader processes: {' '.join(fact.split())}; waited for {named}; see to the file system, memory and "
            "/dev/shm of this node, or raise data.timeout_s"
        )

    def _count(self, faults: list[str]) -> None:
        for fault in faults:
            self.skipped += 1
            print(f"skipped {self.skipped}: {fault}", file=sys.stderr, flush=True)
        if self.skipped > self._stream.config.skip_most:
            raise StreamError(
                f"{self.skipped} groups are damaged, data.skip_most={self._stream.config.skip_most}; the last: "
                f"{faults[-1]}"
            )


def batches(
    stream: GroupStream, first_step: int, last_step: int, workers: int | str, pin: bool = False
) -> Batches:  # fmt: skip
    """The micro-batches of the steps [first_step, last_step), made in `workers` processes (0: here; auto: by cores).

    Raises (on the way):
        StreamError: a group is damaged and not skipped, too many were skipped, a loader process died or stalled.
    """
    items = range(first_step * stream.accumulation, last_step * stream.accumulation)
    return Batches(stream, items, places.loader_processes(workers), pin)
