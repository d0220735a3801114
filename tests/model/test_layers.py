"""The block against a plain twin, the rotary code, the context rule, the initial weights."""

import math

import pytest
import torch
from torch import Tensor, nn

from storm.model import layers
from storm.model.layers import Block, Packing, Rotation, Transformer, ZeroLinear, initialise, rotate, rotation

WIDTH, HEAD = 16, 8


def random_block(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    block = Block(WIDTH, HEAD).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)
    return block


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x_LW: Tensor, code: Rotation) -> Tensor:
    """Rotary code by complex numbers."""
    half = x_LW.shape[-1] // 2
    z = torch.complex(x_LW[:, :half], x_LW[:, half:]) * torch.complex(*code)
    return torch.cat([z.real, z.imag], -1)


def plain_block(
    b: Block, x_LD: Tensor, code: Rotation, context_L: Tensor, bias_HLL: Tensor | None = None
) -> Tensor:  # fmt: skip
    """One sequence, one head after the other, softmax written out; `context_L` may hold any tokens."""
    n = rms(x_LD, b.attention_norm.weight)
    query, (key, value) = n @ b.query.weight.T, (n @ b.key_value.weight.T).chunk(2, -1)
    heads = []
    for h in range(0, WIDTH, HEAD):
        q = turned(rms(query[:, h : h + HEAD], b.query_norm.weight), code)
        k = turned(rms(key[:, h : h + HEAD], b.key_norm.weight), code)
        score = q @ k.T / math.sqrt(HEAD) + (0 if bias_HLL is None else bias_HLL[h // HEAD])
        weight = score.exp() * context_L
        heads.append(weight / weight.sum(-1, keepdim=True) @ value[:, h : h + HEAD])
    x_LD = x_LD + torch.cat(heads, -1) @ b.attended.weight.T
    gate, up = (rms(x_LD, b.mlp_norm.weight) @ b.gate_up.weight.T).chunk(2, -1)
    return x_LD + (gate / (1 + torch.exp(-gate)) * up) @ b.down.weight.T


def test_block_equals_its_plain_twin() -> None:
    block, x, xy = random_block(), torch.randn(2, 5, WIDTH).double(), 300 * torch.randn(2, 5, 2).double()
    context = torch.tensor([[True, True, True], [True, False, True]])
    code = rotation(xy, HEAD, 50.0, 6400.0)
    out = block(x, code, context)
    for s in range(2):
        seen = torch.cat([context[s], torch.zeros(2, dtype=torch.bool)])
        torch.testing.assert_close(out[s], plain_block(block, x[s], (code[0][s], code[1][s]), seen))


def test_block_with_a_bias_equals_its_plain_twin() -> None:
    block, x, bias = random_block(), torch.randn(1, 5, WIDTH).double(), torch.randn(1, 2, 5, 3).double()
    bias[..., 1] = -torch.inf
    straight = rotation(torch.zeros(5, 2).double(), HEAD, 50.0, 6400.0)
    whole = torch.nn.functional.pad(bias[0], (0, 2))
    out = block(x, None, bias)
    seen = torch.tensor([True, False, True, False, False])
    torch.testing.assert_close(out[0], plain_block(block, x[0], straight, seen, whole.nan_to_num(neginf=0.0)))


LENGTHS = [5, 5, 5, 3, 3, 1]


def packing() -> Packing:
    return Packing(torch.tensor([0, *LENGTHS]).cumsum(0), max(LENGTHS))


def by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed attention by the kernel for variable lengths, here on the CPU, or by runs of equal lengths."""
    if name == "jagged":
        monkeypatch.setattr(layers, "attend_packed", layers.attend_jagged)


@pytest.mark.parametrize("name", ["runs", "jagged"])
def test_packed_blocks_equal_a_loop_over_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, in float64."""
    by_name(name, monkeypatch)
    block, x = random_block(), torch.randn(1, sum(LENGTHS), WIDTH).double().requires_grad_()
    packed = block(x, None, packing())
    parts = []
    for x_LD in x[0].split(LENGTHS):
        straight = rotation(torch.zeros(len(x_LD), 2).double(), HEAD, 50.0, 6400.0)
        parts.append(plain_block(block, x_LD, straight, torch.ones(len(x_LD), dtype=torch.bool)))
    plain = torch.cat(parts)[None]
    torch.testing.assert_close(packed, plain)
    weight = torch.randn(packed.shape).double()
    inputs = [x, *block.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((packed * weight).sum(), inputs), torch.autograd.grad((plain * weight).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


def test_nobody_attends_to_a_query() -> None:
    block, x = random_block(), torch.randn(1, 5, WIDTH).double()
    context = torch.tensor([[True, False, True]])
    before = block(x, None, context)
    for token in range(5):
        moved = x.clone()
        moved[0, token] += 1
        changed = (block(moved, None, context) != before).any(-1)[0]
        attended = token in (0, 2)
        assert changed.tolist() == ([True] * 5 if attended else [i == token for i in range(5)])


def test_rotary_code_acts_by_differences_of_places() -> None:
    q, k = torch.randn(6, 1, HEAD).double(), torch.randn(6, 1, HEAD).double()
    xy = 500 * torch.randn(6, 2).double()

    def scores(places: Tensor) -> Tensor:
        code = rotation(places, HEAD, 50.0, 6400.0)
        return rotate(q, code)[:, 0] @ rotate(k, code)[:, 0].mT

    torch.testing.assert_close(scores(xy + torch.tensor([1234.5, -77.0])), scores(xy))
    assert (scores(1.05 * xy) - scores(xy)).abs().max() > 1e-3


def test_half_of_a_head_turns_with_x_half_with_y_at_the_stated_wavelengths() -> None:
    cos, sin = rotation(torch.tensor([[50.0, 6400.0], [6400.0, 50.0]]).double(), 16, 50.0, 6400.0)
    assert cos.shape == sin.shape == (2, 8)
    one = torch.ones((), dtype=torch.float64)
    for turn in (cos[0, 0], cos[0, 7], cos[1, 3], cos[1, 4]):  # shortest is 50 um, longest 6.4 mm, on both axes
        torch.testing.assert_close(turn, one)
    moved_x = rotation(torch.tensor([[57.0, 6400.0]]).double(), 16, 50.0, 6400.0)[1]
    assert (moved_x - sin[:1]).abs().gt(1e-6)[0].tolist() == [True] * 4 + [False] * 4


def test_a_new_stack_is_the_identity_up_to_its_norm() -> None:
    stack, x = Transformer(3, WIDTH, HEAD), torch.randn(2, 4, WIDTH)
    torch.testing.assert_close(stack(x), rms(x, torch.ones(WIDTH)))


def test_activation_checkpointing_changes_no_gradient() -> None:
    stacks = [Transformer(2, WIDTH, HEAD, activation_checkpointing=flag) for flag in (False, True)]
    x, context = torch.randn(2, 4, WIDTH), torch.ones(2, 2, dtype=torch.bool)
    for stack in stacks:
        initialise(stack, 0)
        for p in stack.parameters():
            with torch.no_grad():
                p.add_(0.1)
        stack(x, None, context).square().sum().backward()
    for a, b in zip(*(s.parameters() for s in stacks), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


def test_initial_weights_depend_on_seed_name_and_shape_alone() -> None:
    def built(seed: int, extra: bool) -> dict[str, Tensor]:
        parts = {"a": nn.Linear(64, 64), "z": ZeroLinear(4, 4), "table": nn.Embedding(300, 16)}
        model = nn.ModuleDict({**({"0": nn.Linear(3, 3)} if extra else {}), **parts})
        initialise(model, seed)
        return model.state_dict()

    first, again, other = built(0, False), built(0, True), built(1, False)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["a.weight"], other["a.weight"])
    assert not first["a.bias"].any() and not first["z.weight"].any()
    assert float(first["a.weight"].std()) == pytest.approx(1 / 8, rel=0.05)
    assert float(first["table.weight"].std()) == pytest.approx(1 / 4, rel=0.05)
