"""Decoder arithmetic, bounds of the heads, and the expected log1p of a count."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from storm.model.heads import START_ZERO_LOGIT, Decoder, DepthHead, expected_log1p, log_partition, soft_clamp
from storm.schema import PLATFORMS
from tests.model.batches import CONFIG, N_GENES, Batch, double, make_batch


def decoder(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    out = Decoder(CONFIG, N_GENES).double()
    for p in out.parameters():
        nn.init.normal_(p, std=0.5)
    return out


def asked(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, gene rows, log composition, log dispersion."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 6, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(len(batch["genes"]), 16, generator=generator, dtype=torch.float64, requires_grad=True)
    found = model(h, rows, batch)
    return h, rows, found["log_composition"], found["log_dispersion"]


def test_composition_equals_its_formula() -> None:
    model, batch = decoder(), double(make_batch())
    batch["platform"] = torch.tensor([0, 2])
    h, rows, log_composition, log_dispersion = asked(model, batch)
    for r, n, k in [(0, 0, 3), (1, 4, 0), (1, 5, 11)]:
        platform, gene = int(batch["platform"][r]), batch["genes"]

        def score(i: int, r: int = r, n: int = n, platform: int = platform, gene: Tensor = gene) -> Tensor:
            told = model.platform_bias.weight[gene[i], platform - 1] if platform else 0
            return (model.ask.weight @ h[r, n]) @ rows[i] + model.gene_bias.weight[gene[i], 0] + told

        z = sum(batch["gene_weight"][r, i] * score(i).exp() for i in range(len(gene)))
        torch.testing.assert_close(log_composition[r, n, k], score(k) - torch.log(torch.as_tensor(z)))
        area = math.exp(batch["log_area"][r, n])
        shift = model.dispersion.weight[0, -1] * math.log(area / (math.pi / 4 * 55**2))
        shift = shift + (model.dispersion.weight[0, platform - 1] if platform else 0)
        expected = soft_clamp(model.gene_dispersion.weight[gene[k], 0] + shift, 7.0)
        torch.testing.assert_close(log_dispersion[r, n, k], expected)


def test_each_likelihood_has_what_it_needs_and_no_more() -> None:
    batch, expected = double(make_batch()), {"poisson": set(), "nb": {"log_dispersion"}, "lognorm": {"lognorm"}}
    expected |= {"zinb": {"log_dispersion", "zero_logit"}}
    for likelihood, more in expected.items():
        model = Decoder(dataclasses.replace(CONFIG, likelihood=likelihood), N_GENES).double()
        h, rows = torch.randn(2, 6, 32).double(), torch.randn(12, 16).double()
        found = model(h, rows, batch)
        assert found.keys() == {"log_composition"} | more
        assert all(x.shape == (2, 6, 12) for x in found.values())
        torch.stack([x.sum() for x in found.values()]).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        if likelihood == "zinb":
            assert torch.equal(found["zero_logit"], torch.full((2, 6, 12), START_ZERO_LOGIT).double())
        if likelihood == "lognorm":
            torch.testing.assert_close(found["lognorm"], torch.log1p(1e4 * found["log_composition"].exp()))


def test_composition_over_the_panel_sums_to_one() -> None:
    batch = double(make_batch())
    *_, log_composition, _ = asked(decoder(), batch)
    total = (log_composition.exp() * batch["gene_weight"][:, None]).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_a_constant_in_the_platform_biases_cancels() -> None:
    batch, model = double(make_batch()), decoder()
    *_, before, _ = asked(model, batch)
    with torch.no_grad():
        model.platform_bias.weight += torch.arange(len(PLATFORMS) - 1)
    *_, after, _ = asked(model, batch)
    torch.testing.assert_close(after, before)


def test_a_gene_outside_the_panel_has_exactly_no_gradient() -> None:
    model, batch = decoder(), double(make_batch())
    batch["gene_weight"][:, ::3] = 0
    _, rows, log_composition, log_dispersion = asked(model, batch)
    inside = (batch["gene_weight"] > 0)[:, None].expand_as(log_composition)
    (torch.where(inside, log_composition * torch.randn(2, 6, 12), 0).sum() + log_dispersion[inside].sum()).backward()
    outside = torch.ones(N_GENES, dtype=torch.bool)
    outside[batch["genes"][batch["gene_weight"][0] > 0]] = False
    tables = [model.gene_bias, model.platform_bias, model.gene_dispersion]
    for grad in [t.weight.grad for t in tables]:
        assert grad is not None and not grad[outside].any() and grad[~outside].any()
    assert rows.grad is not None and not rows.grad[::3].any() and rows.grad[1::3].all()


def test_partition_is_stable_and_finite() -> None:
    score = torch.tensor([[[1000.0, 999.0, -1e30]], [[3.0, 4.0, 5.0]]], requires_grad=True)
    weight = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])  # the second region has no gene on its panel
    log_z = log_partition(score, weight)
    assert float(log_z[0].detach()) == pytest.approx(1000 + math.log(1 + 2 / math.e))
    log_z.sum().backward()
    assert score.grad is not None and torch.isfinite(score.grad).all() and float(score.grad[0, 0, 2]) == 0


def test_the_start_is_the_mean_composition_and_moderate_noise() -> None:
    model, batch = Decoder(CONFIG, N_GENES).double(), double(make_batch())
    share = torch.rand(N_GENES, dtype=torch.float64)
    with torch.no_grad():
        model.gene_bias.weight.copy_(share.log()[:, None])
    *_, log_composition, log_dispersion = asked(model, batch)
    panel = share[batch["genes"]] / (share[batch["genes"]] * batch["gene_weight"][0]).sum()
    torch.testing.assert_close(log_composition.exp(), panel.expand_as(log_composition))
    assert (log_dispersion.exp() > 2).all() and (log_dispersion.exp() < 10).all()


def test_depth_variance_is_bounded_and_starts_at_one() -> None:
    head, h = DepthHead(CONFIG), torch.randn(2, 6, 32)
    mean, log_var = head(h, torch.tensor([0, 3]))
    assert not mean.any() and not log_var.any()
    nn.init.constant_(head.out.bias, -1e4)
    assert float(head(h, torch.tensor([0, 3]))[1].min().detach()) >= -6


@pytest.mark.parametrize("mu", [1e-3, 0.3, 4.0, 80.0])
@pytest.mark.parametrize("r", [0.2, 3.0, 500.0])
@pytest.mark.parametrize("scale", [0.5, 1.0, 10.0])
def test_expected_log1p_equals_the_sum_over_the_counts(mu: float, r: float, scale: float) -> None:
    x = torch.arange(60_000, dtype=torch.float64)
    log_p = torch.lgamma(x + r) - math.lgamma(r) - torch.lgamma(x + 1)
    log_p = log_p + r * math.log(r / (r + mu)) + x * math.log(mu / (r + mu))
    exact = float((log_p.exp() * torch.log1p(scale * x)).sum())
    found = expected_log1p(torch.tensor(mu), torch.tensor(r), scale)
    assert float(found) == pytest.approx(exact, rel=1e-4)


def test_expected_log1p_equals_sampling() -> None:
    rng = np.random.default_rng(0)
    mu, r, scale = np.array([[0.5, 20.0]]), np.array([[1.0, 3.0]]), np.array([[2.0], [0.1]])
    counts = rng.poisson(rng.gamma(r, mu / r, (200_000, 2)))
    sampled = np.log1p(scale[:, :, None] * counts.T[None]).mean(-1)
    found = expected_log1p(torch.from_numpy(mu), torch.from_numpy(r), torch.from_numpy(scale))
    np.testing.assert_allclose(found.numpy(), sampled, rtol=0.01)


@pytest.mark.parametrize("mu", [1e-4, 0.3, 4.0, 80.0])
def test_expected_log1p_of_a_poisson(mu: float) -> None:
    x = torch.arange(2000, dtype=torch.float64)
    exact = float(((x * math.log(mu) - mu - torch.lgamma(x + 1)).exp() * torch.log1p(2 * x)).sum())
    found = expected_log1p(torch.tensor(mu), torch.tensor(math.inf), 2.0)
    assert float(found) == pytest.approx(exact, rel=1e-4)
