"""What the model costs by formula, beside torch's own count of a real model: parameters, FLOPs, saved tensors."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from storm import losses
from storm.model import flops
from storm.model import storm as whole
from storm.model.storm import Storm
from storm.presets import EXPRESSIONS, LIKELIHOODS, POSITIONS, ModelConfig, resolve_model
from tests.model.batches import CONFIG, Batch, completed, make_batch

LEVELS = ["morphology", "expression", "space", "heads"]


def preset(name: str) -> ModelConfig:
    return dataclasses.replace(resolve_model({"preset": name}), tile_px=64, organs=("breast", "colon"))


def counted(model: Storm, batch: Batch, backward: bool) -> float:
    """FLOPs that torch counts; the plain attention, because the counter does not know the fused one of the CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outputs = model(batch)
        if backward:
            torch.stack([output.sum() for output in outputs.values()]).sum().backward()
    return counter.get_total_flops()


SWITCHES: list[dict[str, Any]] = [
    {"expression": expression, "position": position, "descriptor_width": columns}
    for expression in EXPRESSIONS
    for position in POSITIONS
    for columns in (0, 24)
]


@pytest.mark.parametrize(
    ("name", "switches"), [*(("tiny", some) for some in SWITCHES), ("small", SWITCHES[0]), ("small", SWITCHES[-1])]
)
def test_flops_are_those_torch_counts(name: str, switches: dict[str, Any]) -> None:
    config = dataclasses.replace(preset(name), **switches)
    model, batch = Storm(config, 40), make_batch(regions=3, side=3, n=20, k=30, config=config)
    size = flops.sizes(batch, config.registers, padded=True)
    assert list(flops.forward(config, size)) == LEVELS
    assert sum(flops.forward(config, size).values()) == pytest.approx(counted(model, batch, False), rel=0.01)
    assert sum(flops.training(config, size).values()) == pytest.approx(counted(model, batch, True), rel=0.01)


def test_sizes_without_padding_are_those_of_the_samples() -> None:
    batch = make_batch(regions=2, side=2, n=6, k=12, hidden_tiles=1)
    assert flops.sizes(batch, 4) == flops.Sizes(6, 8, 11, 2 * 4 + 8 + 11, 2 * 4 + 6 + 6, 14 * 10 + 13 * 10, 12)
    padded = flops.sizes(batch, 4, padded=True)
    assert padded == flops.Sizes(6, 8, 12, 28, 20, 28 * 10, 12)
    dark = make_batch(regions=2, side=2, n=6, k=12, images=False)
    assert flops.sizes(dark, 4).tiles == 0 and flops.sizes(dark, 4, padded=True).tiles == 1  # the dummy


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_parameters_of_a_likelihood(likelihood: str) -> None:
    config = dataclasses.replace(preset("tiny"), likelihood=likelihood, align_width=8)
    assert sum(flops.parameters(config, 30).values()) == sum(p.numel() for p in Storm(config, 30).parameters())


def test_sizes_of_tokens_are_those_of_the_visible_profiles() -> None:
    config = dataclasses.replace(CONFIG, expression="tokens")
    batch = make_batch(config=config)
    lengths = batch["input_offsets"].diff(append=torch.tensor([len(batch["input_gene"])]))[batch["visible"].flatten()]
    size, own = flops.sizes(batch, 4), lengths + 2  # two zeros each
    assert (size.expressed, size.shown, size.shown_pairs) == (6, int(own.sum()), int(own.square().sum()))
    batch["visible"][:] = False
    blind = completed(batch | {"input_gene": torch.arange(0), "input_value": torch.zeros(0)} | {
        "input_offsets": torch.zeros_like(batch["input_offsets"])
    })  # fmt: skip
    assert flops.sizes(blind, 4).shown == 0 and flops.sizes(blind, 4, padded=True).shown == 1  # the dummy


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large"])
def test_parameters_are_those_of_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "initialise", lambda model, seed: None)  # tensors on the meta device hold no values
    for switches in ({}, *SWITCHES, {"space_depth": 0, "position": "distance_bias"}):
        config = dataclasses.replace(preset(name), **switches)
        with torch.device("meta"):
            model = Storm(config, 300)
        found = flops.parameters(config, 300)
        assert list(found) == LEVELS and sum(found.values()) == sum(p.numel() for p in model.parameters())
        assert found["morphology"] == sum(p.numel() for p in model.morphology.parameters())


def saved_bytes(model: Storm, batch: Batch, bf16: bool) -> int:
    """Bytes that autograd keeps between forward and backward, weights, their copies and the batch itself apart."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *batch.values()]}
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and not (bf16 and tuple(tensor.shape) in shapes):
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = model(batch)
        total = torch.stack([term for term, _ in losses.terms(outputs, batch).values()]).sum()
    assert total.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize(("bf16", "checkpointing"), [(False, False), (True, False), (False, True)])
def test_the_estimate_of_activations_is_near_what_autograd_keeps(
    bf16: bool, checkpointing: bool, expression: str
) -> None:
    config = dataclasses.replace(preset("tiny"), image_depth=6, image_width=128)
    if expression == "tokens":
        config = dataclasses.replace(config, image_depth=1, expression="tokens", expression_depth=6)
    batch = make_batch(regions=3, side=3, n=20, k=300, config=config)
    size = flops.sizes(batch, config.registers, padded=True)
    estimate = flops.activation_bytes(config, size, bf16, checkpointing)
    saved = saved_bytes(Storm(config, 400, 0, checkpointing), batch, bf16)
    if checkpointing:  # autograd holds the inputs of the blocks; one whole block comes and goes in the backward pass
        assert saved < estimate < flops.activation_bytes(config, size, bf16, False)
    else:
        assert estimate == pytest.approx(saved, rel=0.2)


def test_levels_scale_as_they_should() -> None:
    size = flops.Sizes(tiles=10, slots=12, profiles=64, tokens=80, context=20, pairs=1600, genes=100)
    one, two = flops.forward(CONFIG, size), flops.forward(CONFIG, dataclasses.replace(size, tiles=20))
    assert two["morphology"] == 2 * one["morphology"] and two["heads"] == one["heads"]
