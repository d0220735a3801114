"""Kills: a process that streams and writes down what it took is killed at random moments, and goes on by its position,
on another number of ranks; every group of every epoch was taken exactly once, with the bits of an undisturbed stream.

STORM_TEST_KILLS sets the number of kills (200 takes about two minutes).
"""

import collections
import hashlib
import json
import multiprocessing
import os
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from storm import files
from storm.data.order import Position
from storm.data.stream import GroupStream, batches
from tests.data.corpora import BATCH, stream, write

KILLS = int(os.environ.get("STORM_TEST_KILLS", "8"))
GROUPS = 22  # batches of 4 span the epochs


def line(own: GroupStream, item: int, batch: dict) -> str:
    """What was taken: place, key and a hash of every tensor of a micro-batch of one group."""
    (place,) = own.work(item).places
    digest = hashlib.sha256(b"".join(batch[name].numpy().tobytes() for name in sorted(batch))).hexdigest()
    return f"{place.epoch} {place.number} {own.corpus.groups.key(place.group)} {digest[:16]}\n"


def ranks(shards: Path, world: int, stage: Path, window: int) -> list[GroupStream]:
    """The streams of all ranks, one group per micro-batch."""
    return [stream(shards, rank, world, window_shards=window, stage_dir=str(stage)) for rank in range(world)]


def take(shards: Path, folder: Path, world: int, window: int, last: int) -> None:
    """Go on from the stored position: log what each step takes; after every second step store the position and how long
    the log is up to it, as a checkpoint would."""
    own, state, log = ranks(shards, world, folder / "stage", window), folder / "state.json", folder / "log"
    step = 0
    if state.is_file():
        stored = json.loads(state.read_text())
        step = own[0].step_at(Position(**stored["position"]))
        os.truncate(log, stored["log_bytes"])
    elif log.is_file():
        log.unlink()
    sources = [batches(one, step, last, workers=0) for one in own]
    with log.open("ab", buffering=0) as handle:
        while step < last:
            found = [
                [line(one, step * one.accumulation + i, next(source)) for i in range(one.accumulation)]
                for one, source in zip(own, sources, strict=True)
            ]
            for i in range(BATCH):  # in the order of the global batch
                handle.write(found[i % world][i // world].encode())
            step += 1
            if step % 2 == 0 or step == last:
                position = asdict(own[0].position(step))
                files.write_json(state, {"position": position, "log_bytes": handle.tell()})


@pytest.mark.parametrize("window", [0, 2])
def test_kills_and_resumes_on_other_ranks_lose_and_repeat_nothing(tmp_path: Path, window: int) -> None:
    shards = write(tmp_path / "set", [(f"s{i % 3}", i // 3) for i in range(GROUPS)])
    context, rng = multiprocessing.get_context("fork"), np.random.default_rng(window)
    hits, resumed = 0, set()
    for _ in range(KILLS // 2):
        process = context.Process(target=take, args=(shards, tmp_path, int(rng.choice([1, 2, 4])), window, 10**9))
        process.start()
        time.sleep(float(rng.uniform(0.02, 0.6)))
        process.kill()
        process.join()
        hits += process.exitcode == -9
        if (tmp_path / "state.json").is_file():
            stored = json.loads((tmp_path / "state.json").read_text())["position"]
            resumed.add((stored["epoch"], stored["groups"]))
    assert hits == KILLS // 2
    state = tmp_path / "state.json"
    done = json.loads(state.read_text())["position"] if state.is_file() else {"epoch": 0}
    epochs = done["epoch"] + 2
    last = epochs * GROUPS // BATCH + 1
    take(shards, tmp_path, 2, window, last)
    log = (tmp_path / "log").read_text().splitlines(keepends=True)
    assert len(log) == last * BATCH
    taken = collections.Counter((row.split()[0], row.split()[2]) for row in log)
    assert set(taken.values()) == {1}, "no group twice in an epoch"
    per_epoch = collections.Counter(epoch for epoch, _ in taken)
    assert all(per_epoch[str(epoch)] == GROUPS for epoch in range(epochs)), "and none left out"
    (alone,) = ranks(shards, 1, tmp_path / "other", window)
    told = [line(alone, item, batch) for item, batch in enumerate(batches(alone, 0, last, workers=0))]
    assert log == told
    print(
        f"window {window}: {hits} kills, {len(log)} groups, {epochs} epochs, {len(resumed)} different places of resume"
    )
