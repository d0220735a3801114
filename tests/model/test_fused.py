"""The CPU's norm, code and gate beside the plain forms: values and derivatives, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from storm.model import fused
from storm.model.layers import RMSNorm, gated, rotate, rotation

EPS = 1e-6


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("places", [(5,), (3, 5)])  # of every sequence the same, or its own
def test_norm_and_code(places: tuple[int, ...]) -> None:
    code = rotation(300 * drawn(*places, 2), 8, 50.0, 6400.0)
    heads = drawn(3, 5, 2, 16)[..., 8:]  # rows that do not lie side by side
    weight, pull = drawn(8), drawn(3, 5, 2, 8)
    found = []
    for way in (
        lambda x, w: fused.norm(x, w, EPS, *(part.unsqueeze(-2) for part in code)),
        lambda x, w: rotate(F.rms_norm(x, (8,), w, EPS), code),
    ):
        x, w = heads.clone().requires_grad_(), weight.clone().requires_grad_()
        y = way(x, w)
        found.append((y, *torch.autograd.grad((y * pull).sum(), (x, w))))
    torch.testing.assert_close(found[0], found[1])


def test_norm_alone_and_of_zeros() -> None:
    x, weight, pull = drawn(2, 3, 8), drawn(8), drawn(2, 3, 8)
    x[0, 0] = 0
    found = []
    for way in (lambda x, w: fused.norm(x, w, EPS), lambda x, w: F.rms_norm(x, (8,), w, EPS)):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = way(a, w)
        found.append((y, *torch.autograd.grad((y * pull).sum(), (a, w))))
    torch.testing.assert_close(found[0], found[1])


def test_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_ROWS", 4)
    x, pull = drawn(2, 3, 16), drawn(2, 3, 8)
    found = []
    for way in (fused.gate, lambda x: F.silu(x[..., :8]) * x[..., 8:]):
        a = x.clone().requires_grad_()
        y = way(1 * a)  # what it is given is its own
        found.append((y, *torch.autograd.grad((y * pull).sum(), (a,))))
    torch.testing.assert_close(found[0], found[1])


def test_a_second_backward_pass_through_a_gate_is_refused() -> None:
    y = fused.gate(1 * drawn(2, 16).requires_grad_()).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_it_serves_full_precision_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused.serves(drawn(2)) and not fused.serves(drawn(2).bfloat16())
    assert not fused.serves(torch.empty(2, device="meta"))
    half, norm = drawn(2, 8).bfloat16(), RMSNorm(8)
    monkeypatch.setattr(fused, "norm", None)
    monkeypatch.setattr(fused, "gate", None)
    assert norm(half).dtype == gated(half).dtype == torch.bfloat16
