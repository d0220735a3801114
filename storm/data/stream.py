"""The stream: groups of a shard set in an order that is a pure function of (seed, epoch), dealt to ranks, as batches.

In: a split of a shard set, the seed, the global batch size. Out: the collated micro-batches of each step.

The order is the endless row of all epochs' permutations; global batch b holds its places [b * B, (b + 1) * B). So each
group comes exactly once per epoch, a batch may span the end of an epoch, nothing is dropped and nothing is padded. Of
each global batch rank r of W takes the places r, r + W, ...: the batches are the same for every number of ranks,
workers and micro-batches, and the whole state is one `Position`.
"""

import dataclasses
import functools
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from storm.config import MaskConfig
from storm.data.batch import BatchSpec, collate, loss_genes
from storm.data.view import draw_view, view_rng
from storm.shards import Index, ShardSet

Batch = dict[str, torch.Tensor]

_ORDER, _GENES = 1, 2  # keep the generators of different purposes apart


@dataclass(frozen=True)
class Position:
    """Where a stream stands: `groups` were taken of `epoch`, in the order that `order_hash` names."""

    seed: int
    epoch: int
    groups: int
    order_hash: str


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    """[size] the group at each place of an epoch's order."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch], spawn_key=(_ORDER,))))
    return rng.permutation(size)


@dataclass(frozen=True)
class Order:
    """Which groups each step takes."""

    size: int  # groups of the split
    seed: int
    global_batch_size: int

    def place(self, at: int) -> tuple[int, int, int]:
        """(epoch, index in the epoch, group) of a place of the endless row."""
        epoch, index = divmod(at, self.size)
        return epoch, index, int(permutation(self.seed, epoch, self.size)[index])

    def micro_batches(self, step: int, rank: int, world: int, micro: int) -> list[list[tuple[int, int, int]]]:
        """The places of a rank in a step, divided into its micro-batches of `micro` groups."""
        first = step * self.global_batch_size
        mine = [self.place(at) for at in range(first + rank, first + self.global_batch_size, world)]
        return [mine[i : i + micro] for i in range(0, len(mine), micro)]


def accumulation(global_batch_size: int, micro_batch_size: int, world: int) -> int:
    """Micro-batches per rank and step.

    Raises:
        ValueError: the global batch cannot be dealt evenly; the numbers of ranks for which it can are named.
    """
    per_rank, rest = divmod(global_batch_size, world * micro_batch_size)
    if rest or not per_rank:
        share = global_batch_size // micro_batch_size
        valid = [w for w in range(1, share + 1) if global_batch_size % (w * micro_batch_size) == 0]
        cure = f"use {', '.join(map(str, valid))} ranks" if valid else "choose a micro_batch_size that divides it"
        raise ValueError(
            f"data.global_batch_size={global_batch_size} cannot be dealt to {world} ranks in micro-batches of "
            f"{micro_batch_size} groups: {cure}, or change data.global_batch_size or data.micro_batch_size"
        )
    return per_rank


class GroupStream(Dataset):
    """Item i = micro-batch i % A of step i // A, collated; a pure function of i. A = micro-batches per step.

    Pickled to loader processes, so it holds the folder's index and no open file.
    """

    def __init__(
        self, shards: ShardSet, split: str, spec: BatchSpec, mask: MaskConfig, number_of_genes: int, order_seed: int,
        global_batch_size: int, micro_batch_size: int, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        """Open a split.

        Raises:
            ValueError: the split is empty, or the global batch cannot be dealt to `world` ranks.
        """
        self.shards, self.split, self.spec, self.mask = shards, split, spec, mask
        self.index: Index = shards.index(split)
        if not len(self.index):
            raise ValueError(f"{shards.folder}: split {split!r} holds no group; pack with slides in that split")
        self.order = Order(len(self.index), order_seed, global_batch_size)
        self.number_of_genes, self.micro_batch_size = number_of_genes, micro_batch_size
        self.rank, self.world = rank, world
        self.accumulation = accumulation(global_batch_size, micro_batch_size, world)

    def __len__(self) -> int:
        """Micro-batches of one rank in an epoch, rounded up; the row itself has no end."""
        return -(-len(self.index) // self.order.global_batch_size) * self.accumulation

    @property
    def order_hash(self) -> str:
        """sha256 of what the order depends on beside seed and epoch: the groups and the global batch size."""
        text = f"{self.index.hash} {self.order.global_batch_size}"
        return hashlib.sha256(text.encode()).hexdigest()

    def position(self, step: int) -> Position:
        """The position after `step` steps."""
        epoch, groups = divmod(step * self.order.global_batch_size, self.order.size)
        return Position(self.order.seed, epoch, groups, self.order_hash)

    def step_at(self, position: Position) -> int:
        """The number of steps that led to a position.

        Raises:
            ValueError: the position is of another seed, other data, or no step of this stream ends there.
        """
        taken = position.epoch * self.order.size + position.groups
        step = taken // self.order.global_batch_size
        if self.position(step) != position:
            mine = dataclasses.asdict(self.position(step))
            other = [name for name, value in dataclasses.asdict(position).items() if mine[name] != value]
            raise ValueError(
                f"{self.shards.folder}: not the stream of the stored position ({', '.join(other)} differ); resume "
                "with the shards, seed and global batch size of the run"
            )
        return step

    def genes(self, step: int) -> npt.NDArray[np.int64]:
        """[K] the loss genes of a step, the same on every rank."""
        key = np.random.SeedSequence([self.order.seed, step], spawn_key=(_GENES,))
        return loss_genes(self.spec, self.number_of_genes, np.random.Generator(np.random.Philox(key)))

    def keys(self, item: int) -> list[str]:
        """Shard keys of the groups of a micro-batch, to name them in an error."""
        return [self.index.keys[group] for _, _, group in self._places(item)]

    def _places(self, item: int) -> list[tuple[int, int, int]]:
        step, micro = divmod(item, self.accumulation)
        return self.order.micro_batches(step, self.rank, self.world, self.micro_batch_size)[micro]

    def __getitem__(self, item: int) -> Batch:
        groups, views = [], []
        for epoch, index, at in self._places(item):
            group = self.shards.read(self.split, self.index, at)
            rng = view_rng(self.order.seed, epoch, index)
            groups.append(group)
            views.append(draw_view(group, self.mask, rng, self.spec.panel(group)))
        return collate(groups, views, self.spec, self.genes(item // self.accumulation))


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


def batches(stream: GroupStream, first_step: int, last_step: int, workers: int, pin: bool = False) -> Iterator[Batch]:
    """The micro-batches of the steps [first_step, last_step) in their order, made in `workers` processes (0: here)."""
    items = range(first_step * stream.accumulation, last_step * stream.accumulation)
    # Spawned, not forked: a fork would copy signal handlers, threads and sockets of the process group.
    spawned: dict[str, Any] = {"multiprocessing_context": "spawn", "persistent_workers": True} if workers else {}
    loader = DataLoader(
        stream, batch_size=None, sampler=items, num_workers=workers, worker_init_fn=_quiet_worker, pin_memory=pin,
        generator=torch.Generator(), **spawned,  # a generator of its own: the model's draws stay what they were
    )  # fmt: skip
    return iter(loader)
