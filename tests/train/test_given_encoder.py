"""An encoder that trains from given weights: held near them by the term anchor, exported, and on two ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from storm import checkpoints, export
from storm.data.stream import batches
from storm.train import engine, trainer
from tests.train import encoder, jobs, runs


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder.write_weights(tmp_path_factory.mktemp("weights") / "w.safetensors", 3)


def trained(shards: Path, run_dir: Path, weights: Path, world: engine.World, *more: str) -> trainer.Trainer:
    run = trainer.Trainer(encoder.config(shards, run_dir, weights, *more), world)
    run.start("never")
    run.train()
    return run


@pytest.mark.parametrize("train", ["full", "lora"])
def test_the_anchor_acts_and_an_export_predicts_as_its_run(
    tiny_shards: Path, weights: Path, world: engine.World, tmp_path: Path, train: str
) -> None:
    free = trained(tiny_shards, tmp_path / "free", weights, world, train, "loss.anchor=0")
    run = trained(tiny_shards, tmp_path / "run", weights, world, train, "loss.anchor=100")
    far, near = ([line["train/loss/anchor"] for line in runs.log(one.run_dir)] for one in (free, run))
    assert abs(far[0]) < 1e-5 and abs(near[0]) < 1e-5 and 0 < near[2] < far[2] < 1

    micro = run.take(batches(run.stream, 0, 1, workers=0))
    loss, parts = run.backward(micro)
    told = [run.engine.model(batch)["tile_anchor"][batch["tile_weight"] > 0].detach() for batch in micro]
    assert parts["anchor"] == pytest.approx(float((1 - torch.cat(told)).mean()), rel=1e-4)
    assert loss == pytest.approx(sum(run.weights()[term] * (parts[term] or 0) for term in run.weights()), rel=1e-5)

    loaded = export.load(export.export(checkpoints.latest(run.run_dir), tmp_path / "out")).model
    with torch.no_grad():
        expected, found = run.engine.model.eval()(micro[0]), loaded(micro[0])
    assert expected.keys() - found.keys() == {"tile_anchor"}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_two_ranks_divide_an_adapted_encoder(
    tiny_shards: Path, weights: Path, world: engine.World, tmp_path: Path
) -> None:
    """ZeRO 3 on two ranks: what is frozen stays to the bit, adapters move; losses as of one rank in ZeRO 1."""
    trained(tiny_shards, tmp_path / "alone", weights, world, "lora", "optim.steps=2")
    words = [*runs.words(tiny_shards, tmp_path / "two", 2, *encoder.ENCODER), f"encoder.weights={weights}",
             "model.encoder_train=lora", "optim.steps=2", "engine.zero_stage=3", runs.DIVIDED]  # fmt: skip
    jobs.Ranks(["launch/pretrain.py", *words], 2, tmp_path / "out.txt").wait()
    saved = load_file(tmp_path / "two" / "checkpoints" / "step_0000002" / "model.safetensors")
    for name, tensor in load_file(weights).items():
        assert torch.equal(saved[f"morphology.model.{name}"], tensor), name
    adapters = [tensor for name, tensor in saved.items() if "lora_b" in name]
    assert adapters and all(tensor.any() for tensor in adapters)
    first, second = ([line["train/loss"] for line in runs.log(tmp_path / name)] for name in ("alone", "two"))
    np.testing.assert_allclose(first, second, rtol=1e-4)
