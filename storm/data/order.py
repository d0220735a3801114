"""The order of groups: a pure function of (seed, epoch), the same for every number of ranks, workers and micro-batches.

In: how many groups each shard holds, the seed, the global batch size, and what else the order depends on. Out: which
group lies at each place of the endless row of all epochs.

Global batch b holds the places [b * B, (b + 1) * B) of the row, and of these rank r of W takes r, r + W, ... So a batch
may span the end of an epoch, nothing is dropped and nothing is padded (`last_batch: span`); or each epoch gives up the
groups at its end that fill no batch, others in every epoch (`drop`). All epochs have the same length, so a position
tells the step by arithmetic.

The order within an epoch is a full permutation; or, where reading far apart is dear, shards are permuted, cut into
windows of some shards, and the groups of a window permuted.
"""

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
UNIT = 1 << 20  # expected multiplicities are multiples of 1 / UNIT, so that their sums are exact

_ORDER, _SHARDS, _TIMES = 1, 3, 4  # keep the generators of different purposes apart (2: the loss genes)


def words(seed: int, epoch: int, purpose: int, number: int) -> npt.NDArray[np.uint64]:
    """[number] random words of one purpose in an epoch. Raw ones: what numpy makes of them may change, they may not."""
    key = np.random.SeedSequence([seed, epoch], spawn_key=(purpose,))
    return np.random.Philox(key).random_raw(number)


def permutation(seed: int, epoch: int, purpose: int, number: int) -> Ints:
    """[number] a random permutation: the numbers, sorted by the upper bits of a random word each.

    A number stands in the lower bits of its word, so that no two words are equal and a plain sort does it.
    """
    low = np.uint64(max(1, (number - 1).bit_length()))
    found = (words(seed, epoch, purpose, number) >> low << low) | np.arange(number, dtype=np.uint64)
    found.sort()
    return (found & np.uint64((1 << int(low)) - 1)).astype(np.int64)


@dataclass(frozen=True)
class Position:
    """Where a stream stands: `groups` places were taken of `epoch`, in the order that `order_hash` names."""

    seed: int
    epoch: int
    groups: int
    order_hash: str


class Place(NamedTuple):
    """A place of the row: its epoch, its number there, and the group that lies at it."""

    epoch: int
    number: int
    group: int


@dataclass(frozen=True, eq=False)
class Multiplicity:
    """How often each group is expected in an epoch; the sum is the number of groups."""

    line: npt.NDArray[np.int32]  # [n] the groups, those of a study, a donor and a slide side by side
    expected: Ints  # [n] of the groups of `line`, in 1 / UNIT

    def draw(self, word: int) -> npt.NDArray[np.int32]:
        """[n] groups, each floor or ceil of its expected number of times.

        One random offset, and then equal steps along the running sum: so a slide, a donor and a study come floor or
        ceil of their own expected number of times too, and the total is always the same.
        """
        reached = (np.cumsum(self.expected) + word % UNIT) // UNIT
        return np.repeat(self.line, np.diff(reached, prepend=0))


@dataclass(frozen=True, eq=False)
class Order:
    """Which groups each step takes. S shards, n groups."""

    shards: Ints  # [S] groups of each shard; group numbers run through the shards
    seed: int
    global_batch_size: int
    window_shards: int = 0  # 0: all groups are permuted together
    last_batch: Literal["span", "drop"] = "span"
    multiplicity: Multiplicity | None = None  # None: each group exactly once per epoch

    @functools.cached_property
    def groups(self) -> int:
        """Places of a whole epoch; as many as there are groups, also where some come several times and some not."""
        return int(self.shards.sum())

    @property
    def size(self) -> int:
        """Places of an epoch that are taken."""
        rest = self.groups % self.global_batch_size if self.last_batch == "drop" else 0
        return self.groups - rest

    def hash(self, data: str) -> str:
        """sha256 of what the order depends on beside seed and epoch; `data` names the groups in their order."""
        facts = [data, self.global_batch_size, self.window_shards, self.last_batch]
        digest = hashlib.sha256(" ".join(map(str, facts)).encode())
        if self.multiplicity:
            digest.update(self.multiplicity.line.astype("<i4").tobytes())
            digest.update(self.multiplicity.expected.astype("<i8").tobytes())
        return digest.hexdigest()

    @functools.lru_cache(maxsize=4)  # noqa: B019  # a process has an order or two, as long as it lives
    def epoch(self, epoch: int) -> npt.NDArray[np.int32]:
        """[groups] the group at each place of an epoch."""
        if self.multiplicity:
            groups = self.multiplicity.draw(int(words(self.seed, epoch, _TIMES, 1)[0]))
        else:
            groups = np.arange(self.groups, dtype=np.int32)
        groups = groups[permutation(self.seed, epoch, _ORDER, len(groups))]
        if not self.window_shards or self.window_shards >= len(self.shards):
            return groups
        rank = self._rank(epoch)
        window = np.repeat(rank.astype(np.uint16 if len(rank) < 1 << 16 else np.int64), self.shards)
        return groups[np.argsort(window[groups], kind="stable")]

    def _rank(self, epoch: int) -> Ints:
        """[S] the window of each shard in an epoch."""
        return permutation(self.seed, epoch, _SHARDS, len(self.shards)) // self.window_shards

    def shards_ahead(self, at: int) -> Iterator[int]:
        """The shards that are read from a place of the row on, in the order of their windows, and of the next epoch."""
        if not self.window_shards:
            yield from range(len(self.shards))
            return
        place = self.place(at)
        rank = self._rank(place.epoch)
        now = rank[np.searchsorted(np.cumsum(self.shards), place.group, side="right")]
        ahead = np.flatnonzero(rank >= now)
        yield from ahead[np.argsort(rank[ahead], kind="stable")].tolist()
        yield from np.argsort(self._rank(place.epoch + 1), kind="stable").tolist()

    def place(self, at: int) -> Place:
        """A place of the endless row."""
        epoch, index = divmod(at, self.size)
        return Place(epoch, index, int(self.epoch(epoch)[index]))

    def another(self, place: Place, attempt: int) -> Place:
        """The place itself with another group: that of the same slot some batches on, in the same epoch; of the next
        slot where these lead back to it, which they do soon in a corpus of few batches."""
        laps = attempt // (self.groups // math.gcd(self.groups, self.global_batch_size))
        index = (place.number + attempt * self.global_batch_size + laps) % self.groups
        return place._replace(group=int(self.epoch(place.epoch)[index]))

    def micro_batches(self, step: int, rank: int, world: int, micro: int) -> list[list[Place]]:
        """The places of a rank in a step, divided into its micro-batches of `micro` groups."""
        first = step * self.global_batch_size
        mine = [self.place(at) for at in range(first + rank, first + self.global_batch_size, world)]
        return [mine[i : i + micro] for i in range(0, len(mine), micro)]

    def position(self, step: int, order_hash: str) -> Position:
        """The position after `step` steps."""
        epoch, groups = divmod(step * self.global_batch_size, self.size)
        return Position(self.seed, epoch, groups, order_hash)

    def step_at(self, position: Position) -> int:
        """The number of whole steps up to a position."""
        return (position.epoch * self.size + position.groups) // self.global_batch_size


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
