"""Norm, rotary code and gate for the CPU, in few passes over memory, with their derivatives by hand.

In: what storm.model.layers has written plainly, for devices whose compiler or kernels join the passes. Out: the same.
A CPU runs each operation over the whole tensor, and these cost as much as half of the matrix products. First
derivatives alone.
Shapes: D a width, the last dimension; C code dimensions that broadcast to those before it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS = 256  # at a time, so that what lies between two operations stays in a cache


def serves(x: Tensor) -> bool:
    """Whether this room is for `x`: on a CPU, in full precision, where nothing compiles."""
    return x.device.type == "cpu" and x.dtype.itemsize >= 4 and not torch.compiler.is_compiling()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A new tensor: pairs (w, w + D / 2) turned by angles [C, D / 2]; backwards with -sin."""
    half = x.shape[-1] // 2
    out = x * torch.cat([cos, cos], dim=-1)
    out[..., :half].addcmul_(x[..., half:], sin, value=-1)
    out[..., half:].addcmul_(x[..., :half], sin)
    return out


class _Norm(torch.autograd.Function):
    """x / rms(x) * weight, and then, with a code, `turn`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, *code: Tensor) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale, *code)
        out = x * weight
        return (turn(out, *code) if code else out).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, *code = ctx.saved_tensors
        if code:
            grad = turn(grad, code[0], -code[1])
        pull = (grad * x).mul_(scale)  # of the weight, row by row
        away = (pull @ weight)[..., None].div_(-x.shape[-1]).mul_(scale).mul_(scale)
        grad_x = (grad * weight).mul_(scale).addcmul_(x, away)
        return grad_x, pull.flatten(0, -2).sum(0), None, *[None] * len(code)


class _Gate(torch.autograd.Function):
    """silu(gate) * up of the two halves of the last dimension. The derivative is written where they lay: new memory of
    that size costs more than the arithmetic. Whoever else needs them, or a second backward pass, is told so by torch.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        rows = gate_up.flatten(0, -2)
        gates, ups = rows.chunk(2, dim=-1)
        for gate, up, pull in zip(*(x.split(_ROWS) for x in (gates, ups, grad.flatten(0, -2))), strict=True):
            through, opened = pull * up, F.silu(gate)
            torch.ops.aten.silu_backward.grad_input(through, gate, grad_input=gate)
            torch.mul(pull, opened, out=up)
        return rows.view_as(gate_up)


def norm(x: Tensor, weight: Tensor, eps: float, *code: Tensor) -> Tensor:
    """x / rms(x) * weight over the last dimension, then turned by `code`, a cosine and a sine [C, D / 2]."""
    return _Norm.apply(x, weight, eps, *code)  # type: ignore[no-any-return,no-untyped-call]


def gate(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension; `gate_up` is of no use after a backward pass."""
    return _Gate.apply(gate_up)  # type: ignore[no-any-return,no-untyped-call]
