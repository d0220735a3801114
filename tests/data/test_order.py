"""The order: each group once per epoch, or floor or ceil of its expectation; the same for any ranks and resumes."""

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storm.data.order import UNIT, Multiplicity, Order, Place, accumulation

SHARDS = st.lists(st.integers(1, 6), min_size=1, max_size=8)


def order(shards: list[int], batch: int, **changes) -> Order:
    """The order over shards of so many groups."""
    return Order(np.array(shards), **{"seed": 0, "global_batch_size": batch} | changes)


def flat(of: Order, step: int, world: int, micro: int) -> list[Place]:
    """The places of a global batch, put together again from all ranks' micro-batches."""
    dealt = [[p for m in of.micro_batches(step, r, world, micro) for p in m] for r in range(world)]
    assert len({len(own) for own in dealt}) == 1
    return [dealt[i % world][i // world] for i in range(of.global_batch_size)]


def times(draw: Callable, groups: int) -> Multiplicity:
    """Any multiplicity whose sum is the number of groups."""
    weights = np.array(draw(st.lists(st.integers(0, 50), min_size=groups, max_size=groups)), np.float64)
    weights[0] += 1
    expected = np.floor(weights / weights.sum() * groups * UNIT).astype(np.int64)
    expected[0] += groups * UNIT - expected.sum()
    return Multiplicity(np.array(draw(st.permutations(range(groups))), np.int32), expected)


@st.composite
def orders(draw: st.DrawFn) -> tuple[Order, int, int]:
    """(order, ranks, micro-batch size)."""
    shards = draw(SHARDS)
    world, micro, accumulate = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    batch = world * micro * accumulate
    policy = draw(st.sampled_from(["span", "drop"] if batch <= sum(shards) else ["span"]))
    mixed = times(draw, sum(shards)) if draw(st.booleans()) else None
    made = order(
        shards, batch, seed=draw(st.integers(0, 2**31)), window_shards=draw(st.integers(0, 9)), last_batch=policy,
        multiplicity=mixed,
    )  # fmt: skip
    assert accumulation(batch, micro, world) == accumulate
    return made, world, micro


@given(made=orders(), epochs=st.integers(1, 3))
def test_any_ranks_and_micro_batches_take_the_same_global_batches(made: tuple[Order, int, int], epochs: int) -> None:
    own, world, micro = made
    steps = -(-own.size * epochs // own.global_batch_size)
    taken = [flat(own, step, world, micro) for step in range(steps)]
    assert taken == [own.micro_batches(step, 0, 1, own.global_batch_size)[0] for step in range(steps)]
    row = [place for batch in taken for place in batch]
    for epoch in range(epochs):
        assert [p.number for p in row if p.epoch == epoch] == list(range(own.size))
        groups = [p.group for p in row if p.epoch == epoch]
        if own.multiplicity is None:
            assert len(set(groups)) == own.size and set(groups) <= set(range(own.groups))
        else:
            counted = np.bincount(own.epoch(epoch), minlength=own.groups)[own.multiplicity.line]
            low = own.multiplicity.expected // UNIT
            assert ((counted == low) | (counted == -(-own.multiplicity.expected // UNIT))).all()


@given(made=orders(), step=st.integers(0, 200), other=st.integers(1, 6))
def test_a_resume_anywhere_on_other_ranks_goes_on_with_the_next_batch(
    made: tuple[Order, int, int], step: int, other: int
) -> None:
    own, world, micro = made
    position = own.position(step, "hash")
    again = order(own.shards.tolist(), own.global_batch_size, seed=own.seed, window_shards=own.window_shards,
                  last_batch=own.last_batch, multiplicity=own.multiplicity)  # fmt: skip
    at = again.step_at(position)
    assert at == step and again.position(at, "hash") == position and position.groups < own.size
    if own.global_batch_size % other == 0:
        assert flat(again, at, other, 1) == flat(own, step, world, micro)


@given(shards=SHARDS, window=st.integers(1, 9), epoch=st.integers(0, 3), data=st.data())
def test_windows_hold_whole_shards_one_after_another(
    shards: list[int], window: int, epoch: int, data: st.DataObject
) -> None:
    mixed = times(data.draw, sum(shards)) if data.draw(st.booleans()) else None
    own = order(shards, 1, window_shards=window, multiplicity=mixed)
    shard = np.repeat(np.arange(len(shards)), shards)[own.epoch(epoch)]
    seen: list[int] = []
    for one in shard.tolist():
        if one not in seen:
            seen.append(one)
    blocks = [set(own._rank(epoch)[seen[i : i + window]].tolist()) for i in range(0, len(seen), window)]
    if mixed is None:
        assert all(len(block) == 1 for block in blocks) and sorted(own.epoch(epoch)) == list(range(sum(shards)))
    assert (np.diff(own._rank(epoch)[shard]) >= 0).all()
    at = data.draw(st.integers(0, own.size - 1))
    ahead = list(own.shards_ahead(epoch * own.size + at))
    assert set(shard[at:].tolist()) <= set(ahead[: -len(shards)])
    assert own._rank(epoch)[ahead[0]] == own._rank(epoch)[shard[at]]


def test_the_order_depends_on_seed_and_epoch_and_is_fixed() -> None:
    """A run that resumes with another version of this code must meet the same order."""
    first = order([20, 30], 1)
    assert sorted(first.epoch(0)) == list(range(50))
    assert (first.epoch(0) != first.epoch(1)).any() and (first.epoch(0) != order([20, 30], 1, seed=1).epoch(0)).any()
    windowed = order([7] * 7, 1, window_shards=3)
    half = Multiplicity(np.arange(48, dtype=np.int32), np.tile([UNIT // 2, 3 * UNIT // 2], 24))
    found = [one.epoch(2).astype("<i4").tobytes() for one in (first, windowed, order([6] * 8, 1, multiplicity=half))]
    assert [hashlib.sha256(data).hexdigest()[:12] for data in found] == ["d7664e384b98", "106ae412ab68", "367f1e2ec0b3"]


def test_a_stand_in_is_not_of_the_same_batch() -> None:
    own = order([9], 4)
    place = own.place(2)
    others = [own.another(place, k) for k in (1, 2)]
    assert [(o.epoch, o.number) for o in others] == [(0, 2)] * 2
    assert [o.group for o in others] == [own.epoch(0)[6], own.epoch(0)[1]]


@pytest.mark.parametrize(("groups", "batch"), [(4, 4), (8, 4), (6, 4), (3, 12), (1, 1)])
def test_in_a_small_corpus_every_group_may_stand_in(groups: int, batch: int) -> None:
    own = order([groups], batch)
    found = {own.another(own.place(0), k).group for k in range(groups)}
    assert found == set(range(groups))


def test_ranks_that_do_not_divide_are_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"cannot be dealt to 3 ranks.*use 1, 2, 4 ranks"):
        accumulation(8, 2, 3)
    with pytest.raises(ValueError, match="choose a micro_batch_size that divides it"):
        accumulation(4, 3, 1)
