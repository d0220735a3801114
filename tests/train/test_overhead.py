"""The benchmark of what lies around the model: its parts add up, and it leaves the trainer as it was."""

from pathlib import Path

import pytest
import torch

from storm import losses
from storm.config import RunConfig, load
from storm.train import engine, overhead
from storm.train.metrics import RunLog
from tests.train import runs


def test_the_parts_add_up_to_the_step(
    tiny_shards: Path, world: engine.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "connect", lambda: world)  # the process group of all tests stays
    monkeypatch.setattr(engine, "disconnect", lambda: None)
    honest = losses.terms, RunLog.write
    config = load(RunConfig, None, runs.words(tiny_shards, tmp_path / "run", 2))
    found = overhead.measure(config, steps=2)
    assert (losses.terms, RunLog.write) == honest
    assert [line["step"] for line in runs.log(tmp_path / "run")] == [1, 2, 3, 4]
    parts = {part: seconds for part, seconds in found.items() if part != "step"}
    assert parts.keys() == {*overhead.INSIDE, *overhead.AROUND, overhead.REST}
    for i in range(2):
        assert sum(seconds[i] for seconds in parts.values()) == pytest.approx(found["step"][i])
        assert all(seconds[i] >= 0 for seconds in parts.values())
    assert found["forward"][0] > found["log"][0] > 0
    wall, processor = overhead.shares(found)
    assert 0 < wall < 1 and 0 < processor < 1
    assert "around forward, backward and optimizer: " in overhead.text(config, found, 2)


def test_it_is_for_one_rank(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "connect", lambda: engine.World(0, 2, torch.device("cpu")))
    with pytest.raises(ValueError, match="measured on one rank, this job has 2: start one process"):
        overhead.measure(load(RunConfig, None, runs.words(tiny_shards, tmp_path)), 1)
