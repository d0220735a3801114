"""One step of one rank: how it is divided changes neither loss nor gradients; what is not finite stops it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from storm import losses
from storm.config import RunConfig, load
from storm.model.layers import Block
from storm.train import engine
from storm.train.trainer import NotFiniteError, Trainer
from tests.train import runs
from tests.train.runs import agree


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(
    tiny_shards: Path, world: engine.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = losses.terms

    def broken(outputs: dict[str, Tensor], batch: dict[str, Tensor], align_over: str) -> dict[str, losses.Term]:
        found = honest(outputs, batch, align_over)
        return found | {"depth": (found["depth"][0] * torch.nan, found["depth"][1])}

    monkeypatch.setattr(losses, "terms", broken)
    trainer = Trainer(load(RunConfig, None, runs.words(tiny_shards, tmp_path, 2)), world)
    trainer.start("never")
    before = trainer.engine.weights()
    keys = trainer.stream.keys(0)
    with pytest.raises(
        NotFiniteError,
        match=rf"step 1 is not finite \(rank 0: depth of groups {', '.join(keys)}.*start again with a lower optim\.lr",
    ):
        trainer.train()
    after = trainer.engine.weights()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_stops_too(
    tiny_shards: Path, world: engine.World, tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one term in the second micro-batch, whose loss is finite."""
    trainer = Trainer(load(RunConfig, None, runs.words(tiny_shards, tmp_path, 2, f"engine.zero_stage={stage}")), world)
    trainer.start("never")
    wrong, honest = trainer.stream[1]["target_log_depth"], losses.terms

    def broken(outputs: dict[str, Tensor], batch: dict[str, Tensor], align_over: str) -> dict[str, losses.Term]:
        found = honest(outputs, batch, align_over)
        return runs.steep(found) if torch.equal(batch["target_log_depth"], wrong) else found

    monkeypatch.setattr(losses, "terms", broken)
    before, keys = trainer.engine.weights(), trainer.stream.keys(1)
    with pytest.raises(NotFiniteError) as caught:
        trainer.train()
    assert "gradient norm nan, in morphology.embed.weight, " in str(caught.value)
    assert str(caught.value).count("rank") == 1 and f"rank 0: gradient of depth of groups {', '.join(keys)})" in str(
        caught.value
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.engine.weights().items())


def test_stages_activation_checkpointing_and_bf16(tiny_shards: Path, world: engine.World, tmp_path: Path) -> None:
    def first(*more: str) -> dict[str, np.ndarray]:
        return runs.first_step(load(RunConfig, None, runs.words(tiny_shards, tmp_path, 4, *more)), world)

    full = first()
    agree(full, first("engine.zero_stage=0"))
    agree(full, first("engine.zero_stage=3", runs.DIVIDED, "engine.activation_checkpointing=true"))
    for stage in (1, 3):
        half = first("engine.precision=bf16", f"engine.zero_stage={stage}", runs.DIVIDED)
        for name in ("loss", "norm"):
            assert half[name] != full[name] and half[name] == pytest.approx(full[name], rel=2e-2)


def test_compilation_is_of_the_blocks(tiny_shards: Path, world: engine.World, tmp_path: Path) -> None:
    """The compiler itself takes a minute here: it is told to run what it is given as it stands."""
    config = load(RunConfig, None, runs.words(tiny_shards, tmp_path, 4))
    plain, compiled = config, config.model_copy(update={"engine": config.engine.model_copy(update={"compile": True})})
    trainer = Trainer(compiled, world)
    found = {type(module) for module in trainer.engine.model.modules() if module._compiled_call_impl is not None}
    assert found == {Block}
    with torch.compiler.set_stance("force_eager"):
        agree(runs.first_step(plain, world), runs.first_step(compiled, world))


def test_accumulation_changes_neither_losses_nor_gradients(
    tiny_shards: Path, world: engine.World, tmp_path: Path
) -> None:
    one, two, four = (
        runs.first_step(load(RunConfig, None, runs.words(tiny_shards, tmp_path, micro)), world) for micro in (4, 2, 1)
    )
    for other in (two, four):
        agree(one, other)


def test_accumulation_changes_nothing_with_all_terms_on(wide_shards: Path, world: engine.World, tmp_path: Path) -> None:
    at_once, one_by_one = (
        runs.first_step(load(RunConfig, None, runs.all_terms(wide_shards, tmp_path, micro)), world) for micro in (8, 1)
    )
    assert all(np.isfinite(at_once[term]) for term in losses.TERMS if term != "anchor")
    agree(at_once, one_by_one)


def test_terms_begin_when_the_config_says(wide_shards: Path, world: engine.World, tmp_path: Path) -> None:
    """The loss of a step is that of its terms with the weights of the step; a term that has not begun moves nothing."""
    config = load(RunConfig, None, runs.all_terms(wide_shards, tmp_path, 8))
    late = config.model_copy(update={"loss": config.loss.model_copy(update={"corr_from": 0.5, "align_from": 0.5})})
    without = config.model_copy(update={"loss": config.loss.model_copy(update={"corr": 0.0, "align": 0.0})})
    found = [runs.first_step(one, world) for one in (config, late, without)]
    for terms, begun in zip(found, (1, 0, 0), strict=True):
        weights = {"expr": 1, "depth": 0.1, "image": 0.2, "spatial": 0.5, "corr": 0.1 * begun, "align": 0.05 * begun}
        assert terms["loss"] == pytest.approx(sum(weights[term] * np.nan_to_num(terms[term]) for term in weights))
    assert all(np.array_equal(found[1][name], found[2][name], equal_nan=True) for name in found[1])
    aligned = {name for name in found[0] if name.startswith("align.")}
    assert len(aligned) == 3 and all(found[0][name].any() and not found[1][name].any() for name in aligned)
