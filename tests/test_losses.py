"""The loss terms against values computed by hand, and their arithmetic as (sum, count)."""

import math

import pytest
import torch
from torch import Tensor

from storm import losses
from storm.config import MASK_MODES
from tests.model.batches import Batch, double, make_batch


def outputs_for(batch: Batch, seed: int = 0) -> dict[str, Tensor]:
    """Random outputs of the right shapes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"log_composition": "target_count", "log_dispersion": "target_count", "tile_stats": "tile_target"}
    shapes |= {"depth_mean": "depth_target", "depth_log_var": "depth_target"}
    return {
        name: torch.randn(batch[like].shape, generator=generator, dtype=batch[like].dtype)
        for name, like in shapes.items()
    }


@pytest.mark.parametrize(
    ("count", "mu", "r", "probability"),
    [
        (0, 1.0, 1.0, 0.5),  # geometric: 2 ** -(count + 1)
        (3, 1.0, 1.0, 0.0625),
        (2, 4.0, 2.0, 3 * (1 / 3) ** 2 * (2 / 3) ** 2),  # (x + 1) p^2 (1 - p)^2, p = r / (r + mu)
        (1, 3.0, 0.5, 0.5 * (1 / 7) ** 0.5 * (6 / 7)),
    ],
)
def test_negative_binomial_by_hand(count: int, mu: float, r: float, probability: float) -> None:
    log_mu, log_r = torch.tensor(mu).log(), torch.tensor(r).log()
    nll = losses.negative_binomial_nll(torch.tensor(float(count)), log_mu, log_r)
    assert float(nll) == pytest.approx(-math.log(probability), rel=1e-5)


def test_negative_binomial_over_its_whole_range() -> None:
    """Float32 against torch's distribution in float64: no counts to deep spots, r from e^-7 to e^7."""
    count = torch.tensor([0.0, 1.0, 7.0, 300.0, 3000.0])[:, None, None]
    log_mu, log_r = torch.linspace(-18, 10, 15)[:, None], torch.linspace(-7, 7, 9)
    found = losses.negative_binomial_nll(count, log_mu, log_r)
    logits = (log_mu - log_r).double()
    exact = -torch.distributions.NegativeBinomial(log_r.double().exp(), logits=logits).log_prob(count.double())
    torch.testing.assert_close(found.double(), exact, rtol=3e-4, atol=3e-3)


def test_negative_binomial_gradient() -> None:
    log_mu = torch.tensor([-3.0, 0.5, 4.0], dtype=torch.float64, requires_grad=True)
    log_r = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    count = torch.tensor([0.0, 2.0, 60.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m, r: losses.negative_binomial_nll(count, m, r), (log_mu, log_r))


def test_expr_by_hand() -> None:
    """Two profiles: one with two hidden genes of three, one with none. mu = L * composition; r = 1."""
    batch = {
        "target_count": torch.tensor([[[0.0, 3.0, 99.0], [1.0, 1.0, 1.0]]]),
        "target_mask": torch.tensor([[[True, True, False], [False, False, False]]]),
        "target_log_depth": torch.tensor([[math.log(4), 0.0]]),
    }
    composition = torch.tensor([0.25, 0.75, 0.5]).log().expand(1, 2, 3)
    total, count = losses.expr({"log_composition": composition, "log_dispersion": torch.zeros(1, 2, 3)}, batch)
    first = -math.log(1 / 2)  # mu 1, r 1, count 0
    second = -math.log((1 / 4) * (3 / 4) ** 3)  # mu 3, r 1, count 3
    assert float(total) == pytest.approx((first + second) / 2, rel=1e-5)
    assert float(count) == 1


def test_depth_by_hand() -> None:
    batch = {"depth_target": torch.tensor([[1.0, 5.0]]), "depth_mask": torch.tensor([[True, False]])}
    outputs = {"depth_mean": torch.tensor([[3.0, 0.0]]), "depth_log_var": torch.tensor([[math.log(2), 0.0]])}
    total, count = losses.depth(outputs, batch)
    assert float(total) == pytest.approx(0.5 * (math.log(2 * math.pi) + math.log(2) + 4 / 2))
    assert float(count) == 1


def test_image_by_hand() -> None:
    batch = {"tile_target": torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]), "tile_hidden": torch.tensor([[True, False]])}
    total, count = losses.image({"tile_stats": torch.tensor([[[2.0, 5.0], [7.0, 7.0]]])}, batch)
    assert (float(total), float(count)) == ((1 + 9) / 2, 1)


@pytest.mark.parametrize("images", [True, False])
def test_counts_are_those_of_the_terms(images: bool) -> None:
    batch = make_batch(regions=3, images=images)
    expected = {name: count for name, (_, count) in losses.terms(outputs_for(batch), batch).items()}
    assert losses.counts(batch) == expected
    assert expected["depth"] > 0 and expected["expr"] > 0


def test_terms_of_parts_add_up() -> None:
    batch = double(make_batch(regions=4))
    outputs = outputs_for(batch)
    whole = losses.terms(outputs, batch)
    per_region = {name for name, x in batch.items() if len(x) == 4}
    halves = []
    for part in (slice(0, 1), slice(1, 4)):
        rows = {name: x[part] if name in per_region else x for name, x in batch.items()}
        halves.append(losses.terms({name: x[part] for name, x in outputs.items()}, rows))
    for name, (total, count) in whole.items():
        torch.testing.assert_close(sum(half[name][0] for half in halves), total)
        assert sum(half[name][1] for half in halves) == count


def test_modes_partition_the_expression_term() -> None:
    batch = make_batch(regions=4)
    batch["mode"] = torch.tensor([0, 2, 2, 3])
    outputs = outputs_for(batch)
    modes, (total, count) = losses.expr_by_mode(outputs, batch), losses.expr(outputs, batch)
    assert list(modes) == list(MASK_MODES)
    torch.testing.assert_close(torch.stack([s for s, _ in modes.values()]).sum(), total)
    assert sum(int(c) for _, c in modes.values()) == int(count) and int(modes[MASK_MODES[1]][1]) == 0


def test_what_is_masked_has_no_part_and_no_gradient() -> None:
    batch = make_batch()
    outputs = {name: x.requires_grad_() for name, x in outputs_for(batch).items()}
    before = losses.terms(outputs, batch)
    torch.stack([s for s, _ in before.values()]).sum().backward()
    masks = {"log_composition": "target_mask", "log_dispersion": "target_mask", "depth_mean": "depth_mask"}
    for name, mask in (masks | {"depth_log_var": "depth_mask", "tile_stats": "tile_hidden"}).items():
        grad = outputs[name].grad
        assert grad is not None and not grad[~batch[mask]].any() and grad[batch[mask]].any()
    batch["target_count"][~batch["target_mask"]] += 5
    batch["depth_target"][~batch["depth_mask"]] += 5
    batch["tile_target"][~batch["tile_hidden"]] += 5
    for name, (total, _) in losses.terms(outputs, batch).items():
        assert torch.equal(total, before[name][0])


def test_sums_are_float32_under_bfloat16_outputs() -> None:
    batch = make_batch()
    outputs = {name: x.bfloat16() for name, x in outputs_for(batch).items()}
    assert {total.dtype for total, _ in losses.terms(outputs, batch).values()} == {torch.float32}
    assert {x.dtype for x in losses.counts(batch).values()} == {torch.float32}
