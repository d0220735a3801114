"""The arithmetic of scaling: its limits, its page, and the configs it speaks of."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

from storm.config import RunConfig, load
from storm.model import flops
from storm.presets import resolve_model
from storm.shards import ShardSet
from storm.train import capacity, scaling
from storm.train.scaling import Assumptions, step

REPO = Path(__file__).resolve().parents[2]


def test_the_page_holds_what_the_command_prints() -> None:
    done = subprocess.run(
        [sys.executable, str(REPO / "launch/benchmark.py"), "scaling"], capture_output=True, text=True, cwd=REPO,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"```\n{done.stdout}```" in (REPO / "launch/SCALING.md").read_text()


@pytest.mark.parametrize("preset", list(scaling.RUNS))
def test_it_speaks_of_the_shipped_configs(preset: str) -> None:
    shipped = load(RunConfig, REPO / "configs" / f"pretrain_{preset}.yaml")
    assert scaling.RUNS[preset] == (shipped.data.micro_batch_size, shipped.engine.activation_checkpointing)


def test_without_costs_around_the_model_nothing_is_lost() -> None:
    free = dataclasses.replace(
        Assumptions(), spread=0.0, nvlink_bytes_s=math.inf, network_bytes_s=math.inf, latency_s=0.0, host_step_s=0.0,
        host_micro_s=0.0,
    )  # fmt: skip
    assert all(step("base", stage, 512, 8, free).efficiency == 1 for stage in capacity.STAGES)
    given = Assumptions()
    found = [step("base", 1, ranks, 1, given).efficiency for ranks in scaling.RANKS]
    assert found == sorted(found, reverse=True) and found[-1] < found[0] < 1
    assert step("base", 3, 64, 8, given).efficiency < step("base", 1, 64, 8, given).efficiency


def test_the_network_by_hand() -> None:
    given = dataclasses.replace(Assumptions(), latency_s=0.0)
    parameters = sum(flops.parameters(resolve_model({"preset": "base"}), given.genes).values())
    assert step("base", 1, 8, 1, given).network_s == pytest.approx(8 * parameters * 7 / 8 / given.nvlink_bytes_s)
    assert step("base", 1, 64, 1, given).network_s == pytest.approx(8 * parameters * 63 / 64 / given.network_bytes_s)


def test_the_mean_group_of_a_shard_set(tiny_shards: Path) -> None:
    given = scaling.from_shards(tiny_shards)
    index = ShardSet(tiny_shards).index("train")
    assert given.tiles == pytest.approx(index.tiles.mean()) and given.profiles == pytest.approx(index.profiles.mean())
    assert given.genes == given.loss_genes == len(ShardSet(tiny_shards).genes) and 0 < given.spread < 2
    assert 1e4 < given.group_bytes < 1e7
    assert "mean of 3 groups of a set" in scaling.report(given)
