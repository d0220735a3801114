"""Validation: held-out donors, the same figures for every number of ranks, and a training that does not notice it."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from storm.config import RunConfig, load
from storm.evaluate import statistics
from storm.shards import ShardSet
from storm.train import engine, validate
from storm.train.engine import World
from storm.train.trainer import Trainer, cache_features
from storm.train.validate import Validation
from tests.conftest import PREP_TINY
from tests.train import encoder, runs
from tests.train.jobs import REPO, environment, free_port


@pytest.fixture(scope="module")
def held_out(synthetic_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shard set of the tiny corpus with its test donor as val."""
    from data_prep import build, pack

    folder = tmp_path_factory.mktemp("held_out")
    rows = list(csv.DictReader((synthetic_tiny / "manifest.csv").open()))
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows([row | {"split": row["split"].replace("test", "val")} for row in rows])
    words = ["--store", str(folder / "store"), "--config", str(PREP_TINY)]
    assert build.main([str(folder / "manifest.csv"), "--root", str(synthetic_tiny), *words, "--workers", "1"]) == 0
    assert pack.main([*words, "--out", str(folder / "shards")]) == 0
    assert ShardSet(folder / "shards").manifest["splits"].keys() == {"train", "val"}
    return folder / "shards"


def trainer(shards: Path, run_dir: Path, world: World, *more: str) -> Trainer:
    config = load(RunConfig, None, runs.words(shards, run_dir, 2, "optim.steps=3", *more))
    return Trainer(config, world)


def test_training_does_not_notice_it(held_out: Path, world: World, tmp_path: Path) -> None:
    logs = []
    for name, more in (("with", ["validation.every_steps=2", "log_every=2"]), ("without", [])):
        run = trainer(held_out, tmp_path / name, world, *more)
        run.start("never")
        torch.manual_seed(5)
        run.train()
        assert run.engine.model.training
        logs.append((runs.log(tmp_path / name), torch.get_rng_state(), run.engine.weights()))
    watched, plain = logs
    assert [line["step"] for line in watched[0]] == [2, 3]  # every second step, and the last
    own = [{tag: v for tag, v in line.items() if not tag.startswith(("val/", "data/"))} for line in watched[0]]
    other = [{tag: v for tag, v in line.items() if not tag.startswith("data/")} for line in plain[0][1:]]
    assert own == other and torch.equal(watched[1], plain[1])
    assert all(torch.equal(watched[2][name], tensor) for name, tensor in plain[2].items())
    for line in watched[0]:
        assert line["val/expr"] > 0 and -1 <= line["val/pearson"] <= 1
    assert watched[0][0]["val/loss"] != watched[0][1]["val/loss"]


def alone(run: Trainer, world: World, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """What one rank of `world` hands to the exchange, which is not made."""
    found: list[torch.Tensor] = []

    def keep(values: torch.Tensor) -> torch.Tensor:
        found.append(values.clone())
        return values

    with monkeypatch.context() as patch:
        patch.setattr(engine, "sum_over_ranks", keep)
        Validation(run.stream.corpus, run.stream.loader.spec, run.config, world).run(run.engine)
    return found[0]


def test_it_is_the_same_for_every_number_of_ranks_and_depends_on_no_step(
    held_out: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(held_out, tmp_path, world, "validation.every_steps=1", "data.micro_batch_size=1")
    forwards: list[int] = []
    honest = run.engine.forward

    def counting(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        forwards.append(1)
        return honest(batch)

    monkeypatch.setattr(run.engine, "forward", counting)
    one = alone(run, world, monkeypatch)
    whole = len(forwards)
    groups = len(ShardSet(held_out).index("val"))
    assert whole == 2 * groups == 4
    for size in (2, 3):  # three ranks, two batches: one rank only keeps step
        forwards.clear()
        parts = [alone(run, World(rank, size, world.device), monkeypatch) for rank in range(size)]
        assert len(forwards) == 2 * size
        assert torch.allclose(torch.stack(parts).sum(0), one, rtol=1e-12, atol=0)
    run.step = 7
    assert torch.equal(alone(run, world, monkeypatch), one)


def test_a_job_of_two_ranks_has_the_figures_of_one(held_out: Path, world: World, tmp_path: Path) -> None:
    words = runs.words(held_out, tmp_path / "two", 1, "optim.steps=2", "validation.every_steps=1")
    command = [sys.executable, str(REPO / "launch/pretrain.py"), *words, "engine.zero_stage=3"]
    port, jobs = free_port(), []
    for rank in ("0", "1"):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        jobs.append(subprocess.Popen(command, cwd=REPO, env=environment() | ranks))
    one = trainer(held_out, tmp_path / "one", world, "data.micro_batch_size=1", *words[-2:])
    one.start("never")
    one.train()
    try:
        assert [job.wait(240) for job in jobs] == [0, 0]
    finally:
        for job in jobs:
            job.kill()
    for mine, other in zip(runs.log(tmp_path / "one"), runs.log(tmp_path / "two"), strict=True):
        assert mine.keys() == other.keys() and "val/pearson" in mine
        for tag, value in mine.items():
            assert other[tag] == (None if value is None else pytest.approx(value, rel=1e-4)), tag


def test_the_mean_correlation_is_that_of_the_report() -> None:
    rng = np.random.default_rng(0)
    predicted, measured = rng.normal(size=(2, 2, 30, 4))
    measured[0] += predicted[0]
    predicted[1, :, 2] = 1.0  # does not vary: counts 0
    expected = np.mean([statistics.pearson(x, y) for x, y in zip(predicted, measured, strict=True)])
    x, y = torch.from_numpy(predicted), torch.from_numpy(measured)
    moments = torch.stack([term.sum(1) for term in (torch.ones_like(x), x, y, x * x, y * y, x * y)], dim=1)
    assert validate.mean_pearson(moments) == pytest.approx(expected)
    moments[1] = 0  # a section that was not looked at
    assert validate.mean_pearson(moments) == pytest.approx(statistics.pearson(predicted[0], measured[0]).mean())
    assert validate.mean_pearson(torch.zeros(2, 6, 4)) is None


def test_on_cached_features_it_tells_what_the_live_encoder_would(held_out: Path, world: World, tmp_path: Path) -> None:
    shards = shutil.copytree(held_out, tmp_path / "shards")
    weights = encoder.write_weights(tmp_path / "w.safetensors", 3)
    more = ["validation.every_steps=1", "mask.recut=0", "mask.crop=0", "mask.pool_cells=0"]
    live = encoder.config(shards, tmp_path / "live", weights, "frozen", *more)
    with pytest.raises(ValueError, match="hold no features of this encoder"):
        Trainer(encoder.config(shards, tmp_path / "none", weights, "frozen", *more, "data.features=auto"), world)
    cache_features(live, 1, ["train", "val"])
    cached = encoder.config(shards, tmp_path / "cached", weights, "frozen", *more, "data.features=auto")
    found = []
    for config in (live, cached):
        run = Trainer(config, world)
        found.append(run.validation.run(run.engine))  # type: ignore[union-attr]
    assert found[0].keys() == found[1].keys() and found[1]["val/expr"] is not None
    for tag in ("val/pearson", "val/expr", "val/depth"):
        assert found[1][tag] == pytest.approx(found[0][tag], rel=0.02), tag


def test_a_damaged_group_is_an_error_or_replaced(
    held_out: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    damaged = tmp_path / "one, damaged"  # a name that looks like two
    shutil.copytree(held_out, damaged)
    span = ShardSet(held_out).index("val").span(0)
    with next((damaged / "val").glob("*.tar")).open("r+b") as tar:
        tar.seek(span.offset + span.size // 2)
        tar.write(b"damage")
    with pytest.raises(ValueError, match=rf"group {span.key}: damaged"):
        run = trainer(damaged, tmp_path / "fail", world, "validation.every_steps=1")
        run.validation.run(run.engine)  # type: ignore[union-attr]
    run = trainer(damaged, tmp_path / "skip", world, "validation.every_steps=1", "data.on_error=skip")
    found = [run.validation.run(run.engine) for _ in range(2)]  # type: ignore[union-attr]
    assert found[0] == found[1] and found[0]["val/loss"] and found[0]["val/pearson"] is not None
    assert capsys.readouterr().err.count(f"skipped in validation: {tmp_path}") == 1


def test_shards_without_held_out_donors_are_refused(tiny_shards: Path, world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no group of split 'val' to validate on; .*validation\.every_steps=0"):
        trainer(tiny_shards, tmp_path, world, "validation.every_steps=1")
