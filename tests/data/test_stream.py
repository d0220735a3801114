"""The stream: the same batches for any ranks, workers and micro-batches; resume by position; what is damaged."""

import dataclasses
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storm import files
from storm.data.order import Position
from storm.data.stream import Batches, StreamError, batches
from storm.index import INDEX, Index
from storm.shards import MANIFEST, Tars
from tests.data import corpora, samples
from tests.data.corpora import BATCH, GROUPS, stream, write


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven hand-made groups of three slides in two small tars."""
    return write(tmp_path_factory.mktemp("shards") / "set", [(f"s{i % 3}", i // 3) for i in range(GROUPS)])


@given(step=st.integers(0, 1000))
def test_a_position_leads_back_to_its_step(shards: Path, step: int) -> None:
    whole = stream(shards)
    position = whole.position(step)
    assert position.epoch * GROUPS + position.groups == step * BATCH and position.groups < GROUPS
    assert whole.step_at(position) == step


@pytest.mark.parametrize("change", [{"seed": 4}, {"order_hash": "0" * 64}, {"groups": 3}])
def test_a_position_of_another_stream_is_refused(shards: Path, change: dict) -> None:
    position = Position(**{"seed": 3, "epoch": 0, "groups": 4, "order_hash": stream(shards).order_hash} | change)
    with pytest.raises(ValueError, match=rf"not the stream of the stored position.*{next(iter(change))}"):
        stream(shards).step_at(position)


def test_the_order_hash_names_what_the_order_depends_on(shards: Path) -> None:
    changes: list[dict] = [
        {}, {"global_batch_size": 2}, {"window_shards": 1}, {"last_batch": "drop"}, {"mixture": {"power": 0.5}},
        {"mixture": {"power": 0.6}},
    ]  # fmt: skip
    assert len({stream(shards, **change).order_hash for change in changes}) == len(changes)
    assert stream(shards, rank=1, world=2, micro_batch_size=2).order_hash == stream(shards).order_hash


def test_an_auto_window_follows_the_position(shards: Path) -> None:
    """A run that began on a network file system goes on with its windows where the shards are local."""
    far = stream(shards, window_shards=32)
    here = stream(shards)
    assert here.step_at(far.position(3)) == 3 and here.order.window_shards == 32
    with pytest.raises(ValueError, match="order_hash differ"):
        stream(shards, window_shards=0).step_at(far.position(3))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Same names, same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_resume_in_the_middle_gives_the_same_batches(shards: Path) -> None:
    whole = list(batches(stream(shards, micro_batch_size=2), 0, 4, workers=0))
    assert len(whole) == 8
    for step in (1, 3):
        rest = list(batches(stream(shards, micro_batch_size=2), step, 4, workers=0))
        assert all(equal(a, b) for a, b in zip(whole[2 * step :], rest, strict=True))
    assert not equal(whole[0], whole[2])


def test_worker_processes_give_the_same_batches_and_leave_the_generator_alone(shards: Path) -> None:
    before = torch.get_rng_state()
    here, there = (list(batches(stream(shards), 0, 1, workers)) for workers in (0, 2))
    assert len(here) == BATCH and all(equal(a, b) for a, b in zip(here, there, strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_drawn_does_not_depend_on_ranks_or_micro_batches(shards: Path) -> None:
    """Any split of a global batch holds the same profiles with the same targets and inputs."""
    whole = stream(shards, micro_batch_size=4)[0]
    for micro, world in ((1, 1), (2, 1), (1, 2), (2, 2)):
        parts = {rank: stream(shards, micro_batch_size=micro, rank=rank, world=world) for rank in range(world)}
        pieces = [[part[i] for i in range(part.accumulation)] for part in parts.values()]
        assert all(torch.equal(piece["genes"], whole["genes"]) for own in pieces for piece in own)
        for name in ("mode", "platform", "gene_weight"):
            dealt = [torch.cat([piece[name] for piece in own]) for own in pieces]
            assert torch.equal(torch.stack(dealt, 1).flatten(0, 1), whole[name])
        for name in ("target_mask", "query", "input_log_depth", "target_log_depth"):
            sums = [piece[name].double().sum() for own in pieces for piece in own]
            assert float(sum(sums)) == pytest.approx(float(whole[name].double().sum()), rel=1e-12)


def test_the_loss_genes_change_with_the_step(shards: Path) -> None:
    one, two = (stream(shards).genes(step) for step in (0, 1))
    assert len(one) == len(two) == 20 and (one != two).any() and (one == stream(shards).genes(0)).all()
    assert (stream(shards, rank=1, world=2).genes(0) == one).all()


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split 'train' holds no group"):
        stream(write(tmp_path / "set", []))


def test_a_corpus_smaller_than_a_batch(shards: Path) -> None:
    assert len(stream(shards, global_batch_size=16)) == 16
    with pytest.raises(ValueError, match=r"7 groups fill no batch of data\.global_batch_size=16; lower it"):
        stream(shards, global_batch_size=16, last_batch="drop")


def test_keys_name_the_groups(shards: Path) -> None:
    own = stream(shards, micro_batch_size=2)
    named = [key for item in range(2) for key in own.keys(item)]
    assert named == [f"s{g % 3}_{g // 3:05d}" for g in own.order.epoch(0)[:BATCH].tolist()]


def test_resume_opens_only_the_shards_of_the_next_batch(shards: Path) -> None:
    whole = stream(shards)
    item = 5 * whole.accumulation
    next(batches(whole, 5, 6, workers=0))
    (part,) = whole.corpus.groups.parts
    needed = {int(part.index.shard[place.group]) for place in whole.work(item).places}
    assert isinstance(part.reader, Tars) and set(part.reader._open) == needed and len(needed) == 1


def damage(shards: Path, folder: Path, *groups: int) -> Path:
    """A copy in which some groups are damaged."""
    copy = Path(shutil.copytree(shards, folder))
    entry = files.read_json(copy / MANIFEST)["splits"]["train"]
    index = Index.load(copy / "train" / INDEX, entry["slides"])
    for i in groups:
        with (copy / "train" / entry["shards"][index.shard[i]]["name"]).open("r+b") as tar:
            tar.seek(int(index.offset[i]) + 700)
            tar.write(b"damaged")
    return copy


def test_a_damaged_group_is_an_error_that_names_it(shards: Path, tmp_path: Path) -> None:
    spoiled = stream(damage(shards, tmp_path / "copy", 5))
    with pytest.raises(StreamError, match=r"train/000001\.tar: group s2_00001: damaged \(xxh3\); restore"):
        list(batches(spoiled, 0, 2, workers=0))


def test_skipping_counts_tells_and_replaces_by_the_place_alone(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The replacement is the same for any ranks and micro-batches, and all other groups are shown as before."""
    copy = damage(shards, tmp_path / "copy", 5)
    sound, whole = (stream(path, micro_batch_size=4, on_error="skip") for path in (shards, copy))
    found = batches(whole, 0, 2, workers=0)
    taken = [next(found), next(found)]
    assert found.skipped == 1 and "skipped 1: " in capsys.readouterr().err
    where = [place.group for item in range(2) for place in sound.work(item).places].index(5)
    for item, batch in enumerate(taken):
        assert equal(batch, sound[item]) == (item != where // BATCH)
    for world in (2, 4):
        parts = [stream(copy, rank, world, on_error="skip") for rank in range(world)]
        pieces = [[part[i] for i in range(2 * part.accumulation)] for part in parts]
        dealt = [pieces[at % BATCH % world][at // world] for at in range(2 * BATCH)]
        for name in ("query", "target_log_depth"):
            sums = [float(piece[name].double().sum()) for piece in dealt]
            assert sum(sums) == pytest.approx(sum(float(batch[name].double().sum()) for batch in taken))


@pytest.mark.parametrize("again", [0.0, 1.0])
def test_a_tile_that_was_packed_damaged_is_named_with_its_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, again: float
) -> None:
    """Its hash holds, so only the decoder finds it: in the batch, or before that where the region is cut again."""
    made = samples.group

    def spoil(seed: int, **of: Any) -> Any:
        group = made(seed, **of | {"side": 3})
        return dataclasses.replace(group, tiles={**group.tiles, (0, 1, 0): b"no picture"}) if seed == 2 else group

    monkeypatch.setattr(samples, "group", spoil)
    monkeypatch.setattr(corpora, "MASK", corpora.MASK.model_copy(update={"recut": again, "crop": 0.0}))
    shards = write(tmp_path / "set", [("s0", i) for i in range(GROUPS)])
    told = r"train/000000\.tar: group s0_00002: slide s0: tile \(0, 1, 0\) is damaged"
    with pytest.raises(StreamError, match=told):
        list(batches(stream(shards, micro_batch_size=2), 0, 2, workers=0))
    found = batches(stream(shards, micro_batch_size=2, on_error="skip"), 0, 2, workers=0)
    assert len(list(found)) == 4 and found.skipped == 1 and re.search(told, capsys.readouterr().err)


def test_too_many_skips_fail(shards: Path, tmp_path: Path) -> None:
    copy = damage(shards, tmp_path / "copy", 1, 5)
    with pytest.raises(StreamError, match=r"2 groups are damaged, data\.skip_most=1; the last: .*000"):
        list(batches(stream(copy, on_error="skip", skip_most=1), 0, 2, workers=0))
    with pytest.raises(StreamError, match="9 groups in a row are damaged"):
        list(batches(stream(damage(shards, tmp_path / "all", *range(GROUPS)), on_error="skip"), 0, 2, workers=0))


class Slow(torch.utils.data.Dataset):
    """A loader that never answers, or dies."""

    def __init__(self, dies: bool) -> None:
        self.dies = dies

    def __getitem__(self, work: object) -> None:
        if self.dies:
            os._exit(9)
        time.sleep(600)


@pytest.mark.parametrize(("dies", "fact"), [(False, "nothing for 2 s"), (True, "exited unexpectedly")])
def test_a_loader_that_stalls_or_dies_is_an_error_that_names_the_groups(shards: Path, dies: bool, fact: str) -> None:
    stalled = stream(shards, micro_batch_size=2, timeout_s=60.0 if dies else 2.0)
    stalled.loader = Slow(dies)  # type: ignore[assignment]
    with pytest.raises(StreamError, match=rf"{fact}.*waited for .*00000\d\.tar: group s\d_0000\d, .*timeout_s"):
        next(Batches(stalled, range(2), 1, pin=False))
