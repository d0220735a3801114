"""One process group of one rank, for the tests that train in this process; and runs that several test files look at."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storm.train import engine
from storm.train.trainer import Trainer
from tests.conftest import PREP_TINY
from tests.train import jobs, runs


@pytest.fixture(scope="session")
def world() -> Iterator[engine.World]:
    """This process as the only rank. The environment is left as it was, for the tests that start jobs; LOCAL_RANK
    alone stays, which DeepSpeed asks for again and which makes no process a rank."""
    before = dict(os.environ)
    alone = engine.connect()
    after = dict(os.environ)
    os.environ.clear()
    os.environ.update(before | {"LOCAL_RANK": "0"})
    assert after["WORLD_SIZE"] == "1"
    yield alone
    engine.disconnect()
    os.environ.pop("LOCAL_RANK")


@pytest.fixture(scope="session")
def alone(tiny_shards: Path, world: engine.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank from start to end."""
    trainer = Trainer(runs.kept(tiny_shards, tmp_path_factory.mktemp("alone") / "run"), world)
    trainer.start("never")
    trainer.train()
    return trainer.run_dir


@pytest.fixture(scope="session")
def wide_shards(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shard set of the tiny store with a group per slide, one of which has the 64 profiles of corr and align."""
    from data_prep import pack

    folder = tmp_path_factory.mktemp("wide") / "shards"
    words = ["--store", str(tiny_store), "--out", str(folder), "--config", str(PREP_TINY), "min_profiles=112"]
    assert pack.main(words) == 0
    return folder


@pytest.fixture(scope="session")
def two(
    alone: Path, tiny_shards: Path, wide_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """stage -> folder of `runs.main` by two ranks, where `other` began on one rank in ZeRO 1."""
    done: dict[int, Path] = {}

    def of(stage: int) -> Path:
        if stage not in done:
            folder = done[stage] = tmp_path_factory.mktemp(f"stage{stage}")
            runs.carry(alone, folder / "other")
            (folder / "wide").symlink_to(wide_shards)
            runs.descriptors(tiny_shards, folder)
            words = runs.words(tiny_shards, folder, 1, *runs.KEEP, f"engine.zero_stage={stage}", runs.DIVIDED)
            jobs.Ranks(["-m", "tests.train.runs", str(folder), *words], 2, folder / "out.txt").wait()
        return done[stage]

    return of


@pytest.fixture
def stopped(tiny_shards: Path, world: engine.World, tmp_path: Path) -> Path:
    """A run stopped after its first step."""
    runs.train(tiny_shards, tmp_path / "run", world, stop=1)
    return tmp_path / "run"
