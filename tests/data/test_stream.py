"""The stream: each group once per epoch, the same batches for any ranks and micro-batches, resume by position."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storm import files, schema
from storm.config import MaskConfig
from storm.data.stream import GroupStream, Order, Position, accumulation, batches, permutation
from storm.genes import GeneTable, pack_panel
from storm.shards import GENES, MANIFEST, ShardSet, ShardWriter, join_split, read_sidecar
from tests.data import samples

GROUPS, BATCH = 7, 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Seven hand-made groups in two small tars."""
    folder = tmp_path_factory.mktemp("shards")
    for number, members in enumerate((range(4), range(4, GROUPS))):
        writer = ShardWriter(folder, number)
        for i in members:
            writer.add(f"s1_{i:05d}", samples.group(i, regions=1, panel="p" if i % 2 else "all"))
        writer.close(folder / "train")
    entry = join_split(folder / "train", [found for n in range(2) if (found := read_sidecar(folder / "train", n))])
    ids = tuple(f"ENSG{i:011d}" for i in range(samples.GENES))
    table = GeneTable(ids, ids, samples.SHARE)
    files.write_bytes(folder / GENES, table.to_tsv())
    panels = {name: {"mask": pack_panel(mask)} for name, mask in samples.spec().panels.items()}
    manifest = {
        "schema_version": schema.SCHEMA_VERSION, "genes_sha256": files.sha256_file(folder / GENES), "panels": panels,
        "gene_hash": table.hash, "splits": {"train": entry},
    }  # fmt: skip
    files.write_json(folder / MANIFEST, manifest)
    return ShardSet(folder)


def stream(shards: ShardSet, seed: int = 3, micro: int = 1, rank: int = 0, world: int = 1) -> GroupStream:
    """A stream over all of them."""
    return GroupStream(shards, "train", samples.spec(), MaskConfig(), 20, seed, BATCH, micro, rank, world)


def flat(order: Order, step: int, world: int, micro: int) -> list[tuple[int, int, int]]:
    """The places of a global batch, put together again from all ranks' micro-batches."""
    dealt = [[p for m in order.micro_batches(step, r, world, micro) for p in m] for r in range(world)]
    return [dealt[i % world][i // world] for i in range(order.global_batch_size)]


@given(
    size=st.integers(1, 40), seed=st.integers(0, 2**31), micro=st.integers(1, 4), world=st.integers(1, 5),
    accumulate=st.integers(1, 3), epochs=st.integers(1, 3),
)  # fmt: skip
def test_every_group_once_per_epoch_on_any_ranks(
    size: int, seed: int, micro: int, world: int, accumulate: int, epochs: int
) -> None:
    order = Order(size, seed, micro * world * accumulate)
    assert accumulation(order.global_batch_size, micro, world) == accumulate
    steps = -(-size * epochs // order.global_batch_size)
    taken = [place for step in range(steps) for place in flat(order, step, world, micro)]
    alone = [p for step in range(steps) for m in order.micro_batches(step, 0, 1, order.global_batch_size) for p in m]
    assert taken == alone
    for epoch in range(epochs):
        groups = [group for e, _, group in taken if e == epoch]
        assert sorted(groups) == list(range(size))
        assert [i for e, i, _ in taken if e == epoch] == list(range(size))


def test_the_order_depends_on_seed_and_epoch() -> None:
    first = permutation(0, 0, 50)
    assert sorted(first) == list(range(50))
    assert (first != permutation(0, 1, 50)).any() and (first != permutation(1, 0, 50)).any()
    assert (first == permutation.__wrapped__(0, 0, 50)).all()


@given(step=st.integers(0, 1000))
def test_a_position_leads_back_to_its_step(shards: ShardSet, step: int) -> None:
    whole = stream(shards)
    position = whole.position(step)
    assert position.epoch * GROUPS + position.groups == step * BATCH and position.groups < GROUPS
    assert whole.step_at(position) == step


@pytest.mark.parametrize("change", [{"seed": 4}, {"order_hash": "0" * 64}, {"groups": 3}])
def test_a_position_of_another_stream_is_refused(shards: ShardSet, change: dict) -> None:
    position = Position(**{"seed": 3, "epoch": 0, "groups": 4, "order_hash": stream(shards).order_hash} | change)
    with pytest.raises(ValueError, match=rf"not the stream of the stored position.*{next(iter(change))}"):
        stream(shards).step_at(position)


def test_the_order_hash_names_data_and_batch_size(shards: ShardSet) -> None:
    other = GroupStream(shards, "train", samples.spec(), MaskConfig(), 20, 3, 2, 1)
    assert other.order_hash != stream(shards).order_hash


def test_ranks_that_do_not_divide_are_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"cannot be dealt to 3 ranks.*use 1, 2, 4 ranks"):
        accumulation(8, 2, 3)
    with pytest.raises(ValueError, match="choose a micro_batch_size that divides it"):
        accumulation(4, 3, 1)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Same names, same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_resume_in_the_middle_gives_the_same_batches(shards: ShardSet) -> None:
    whole = list(batches(stream(shards, micro=2), 0, 4, workers=0))
    assert len(whole) == 8
    for step in (1, 3):
        rest = list(batches(stream(shards, micro=2), step, 4, workers=0))
        assert all(equal(a, b) for a, b in zip(whole[2 * step :], rest, strict=True))
    assert not equal(whole[0], whole[2])


def test_worker_processes_give_the_same_batches_and_leave_the_generator_alone(shards: ShardSet) -> None:
    before = torch.get_rng_state()
    here, there = (list(batches(stream(shards), 0, 1, workers)) for workers in (0, 1))
    assert len(here) == BATCH and all(equal(a, b) for a, b in zip(here, there, strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_drawn_does_not_depend_on_ranks_or_micro_batches(shards: ShardSet) -> None:
    """Any split of a global batch holds the same profiles with the same targets and inputs."""
    whole = stream(shards, micro=4)[0]
    for micro, world in ((1, 1), (2, 1), (1, 2), (2, 2)):
        parts = {rank: stream(shards, micro=micro, rank=rank, world=world) for rank in range(world)}
        pieces = [[part[i] for i in range(part.accumulation)] for part in parts.values()]
        assert all(torch.equal(piece["genes"], whole["genes"]) for own in pieces for piece in own)
        for name in ("mode", "platform", "gene_weight"):
            dealt = [torch.cat([piece[name] for piece in own]) for own in pieces]
            assert torch.equal(torch.stack(dealt, 1).flatten(0, 1), whole[name])
        for name in ("target_mask", "query", "input_log_depth", "target_log_depth"):
            sums = [piece[name].double().sum() for own in pieces for piece in own]
            assert float(sum(sums)) == pytest.approx(float(whole[name].double().sum()), rel=1e-12)


def test_the_loss_genes_change_with_the_step(shards: ShardSet) -> None:
    one, two = (stream(shards).genes(step) for step in (0, 1))
    assert len(one) == len(two) == 20 and (one != two).any() and (one == stream(shards).genes(0)).all()
    assert (stream(shards, rank=1, world=2).genes(0) == one).all()


def test_an_empty_split_is_refused(shards: ShardSet, tmp_path: Path) -> None:
    (tmp_path / GENES).write_bytes((shards.folder / GENES).read_bytes())
    manifest = {**shards.manifest, "splits": {"train": join_split(tmp_path / "train", [])}}
    files.write_json(tmp_path / MANIFEST, manifest)
    with pytest.raises(ValueError, match="split 'train' holds no group"):
        stream(ShardSet(tmp_path))


def test_keys_name_the_groups(shards: ShardSet) -> None:
    own = stream(shards, micro=2)
    named = [key for item in range(2) for key in own.keys(item)]
    assert named == [f"s1_{g:05d}" for g in np.asarray(permutation(3, 0, GROUPS)[:BATCH])]
