"""The loss curve of a small run is the one under version control."""

import os
from pathlib import Path

import numpy as np
import pytest

from storm.config import RunConfig, load
from storm.train import engine
from storm.train.trainer import Trainer
from tests.train import golden, runs

# Another CPU sums in another order: torch's vector and scalar kernels give curves that differ by 5e-7. The rest is room
# for another libjpeg, which may round a pixel otherwise. Half a percent of the learning rate is seen (the last test).
RELATIVE = 1e-4
REPO = Path(__file__).resolve().parents[2]


def curve(shards: Path, world: engine.World, run_dir: Path, *more: str, stop: int | None = None) -> list[dict]:
    trainer = Trainer(load(RunConfig, None, runs.words(shards, run_dir, 2, *more)), world)
    trainer.start("never")
    trainer.train(stop)
    return runs.log(run_dir)


def numbers(records: list[dict]) -> np.ndarray:
    return np.array([[record[tag] or 0.0 for tag in golden.TAGS.values()] for record in records])


def test_the_curve_is_the_golden_one(tiny_shards: Path, world: engine.World, tmp_path: Path) -> None:
    found = curve(tiny_shards, world, tmp_path)
    if os.environ.get("STORM_WRITE_GOLDEN") == "1":
        golden.PATH.write_text(golden.text(found))
        pytest.skip("written anew")
    name, rows = golden.read()
    np.testing.assert_allclose(numbers(found), rows, rtol=RELATIVE)
    assert name in (REPO / "CHANGELOG.md").read_text(), f"say in CHANGELOG.md why the curve is now {name}"


def test_a_small_change_leaves_the_golden_curve(tiny_shards: Path, world: engine.World, tmp_path: Path) -> None:
    found = numbers(curve(tiny_shards, world, tmp_path, "optim.lr=2.01e-3", stop=6))
    assert not np.allclose(found, golden.read()[1][:6], rtol=3 * RELATIVE)
