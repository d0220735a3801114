"""The shipped configs load, name their preset, and can be dealt to the ranks their headers promise."""

from pathlib import Path

import pytest

from storm.config import RunConfig, load
from storm.data.order import accumulation
from storm.presets import resolve_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(("preset", "ranks"), [("tiny", 2), ("small", 8), ("base", 32), ("large", 64)])
def test_shipped_configs(preset: str, ranks: int) -> None:
    config = load(RunConfig, CONFIGS / f"pretrain_{preset}.yaml")
    assert config.model == resolve_model({"preset": preset})
    data = config.data
    worlds = [w for w in (1, 2, 4, 8, 16, 32, 64) if w <= ranks]
    assert all(accumulation(data.global_batch_size, data.micro_batch_size, world) >= 1 for world in worlds)
