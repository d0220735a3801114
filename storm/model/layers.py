"""The transformer that serves every level: patches of a tile, parts of a profile, tokens of a region.

In: tokens and, optionally, the rotary code of their places and which of them are context. Out: tokens.
Shapes: S sequences, L tokens, M tokens at their front that can be attended to, H heads, W head width, D = H W.
Sequences of many lengths come packed, as one of L tokens with a `Packing` that tells their borders.
"""

import itertools
import math
import zlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from storm.model import fused

Rotation = tuple[Tensor, Tensor]  # cosine and sine, each [..., L, W / 2]


class Packing(NamedTuple):
    """Where sequences lie that are packed into one; each has a token at least, and attends to itself alone."""

    offsets: Tensor  # int64 [V + 1]: the first token of each, and the end of the last
    longest: int  # tokens


Context = Tensor | Packing | None  # what attention may see, see `Transformer.forward`


class ZeroLinear(nn.Linear):
    """A Linear that starts at zero: what it feeds starts without it, and learns to use it."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class Constant(nn.Embedding):
    """A table [rows, columns] that starts at one value everywhere."""

    def __init__(self, rows: int, columns: int, start: float = 0.0) -> None:
        self.start = start
        super().__init__(rows, columns)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.start)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Draw the weights of every Linear (biases zero) and Embedding with variance 1 / columns; zeros and constants stay.

    Each depends on (seed, its name, its shape) alone: equal on every rank, and not moved by a new neighbour.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not isinstance(module, ZeroLinear | Constant):
            weight = module.get_parameter("weight")
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # it keeps 32 bits
            weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1]))
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.get_parameter("bias"))


def rotation(xy_um: Tensor, head_width: int, shortest_um: float, longest_um: float) -> Rotation:
    """Rotary code of places [..., L, 2]: half of each head turns with x, half with y (RoPE, arXiv 2104.09864, in 2-D).

    Wavelengths are geometric from `shortest_um` to `longest_um`. Only differences of places act on attention.
    """
    steps = torch.linspace(0, 1, head_width // 4, device=xy_um.device, dtype=xy_um.dtype)
    wavelength = shortest_um * (longest_um / shortest_um) ** steps
    angle = (2 * math.pi * xy_um[..., None] / wavelength).flatten(-2)
    return angle.cos(), angle.sin()


def rotate(x_SLHW: Tensor, code: Rotation) -> Tensor:
    """Turn the pairs (w, w + W / 2) of every head by the angles of `code`."""
    cos, sin = (part.unsqueeze(-2) for part in code)
    a, b = x_SLHW.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


EPS = 1e-6  # of norms


class RMSNorm(nn.RMSNorm):
    """Computed in the precision of its input: under autocast a weight of another one would lose the fused kernel."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPS)

    def forward(self, x: Tensor, code: Rotation | None = None) -> Tensor:
        """x / rms(x) * weight over the last dimension; heads [S, L, H, W] then turn by the code of their places."""
        if fused.serves(x):
            return fused.norm(x, self.weight, EPS, *(part.unsqueeze(-2) for part in code or ()))
        x = F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        return x if code is None else rotate(x, code)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves of the last dimension."""
    if fused.serves(gate_up):
        return fused.gate(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def attend(query_SHLW: Tensor, key_SHMW: Tensor, value_SHMW: Tensor, context: Context) -> Tensor:
    """What each token reads of its context, [S, H, L, W]."""
    if isinstance(context, Packing):
        return attend_packed(query_SHLW, key_SHMW, value_SHMW, context)
    mask = context
    if mask is not None:
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask.type_as(query_SHLW)
    return F.scaled_dot_product_attention(query_SHLW, key_SHMW, value_SHMW, attn_mask=mask)


def attend_packed(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """`attend` for packed sequences, each [1, H, L, W], without padding.

    On a GPU by its kernel for variable lengths. The CPU has none: there a run of sequences of one length is a batch,
    so that whoever packs them by their lengths makes few of these.
    """
    if query.device.type != "cpu":
        return attend_jagged(query, key, value, packing)
    lengths = packing.offsets.diff().tolist()  # a CPU tensor: nothing waits
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
    parts = (x[0].split([length * n for length, n in runs], dim=1) for x in (query, key, value))  # [H, n length, W]
    found = []
    for (length, _), *run in zip(runs, *parts, strict=True):
        q, k, v = (x.unflatten(1, (-1, length)).transpose(0, 1) for x in run)
        found.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1, 2))
    return torch.cat(found, dim=1)[None]


def attend_jagged(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """`attend_packed` by jagged tensors; their bounds are told, or they would ask the device."""
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(
            x[0].transpose(0, 1).contiguous(), packing.offsets, min_seqlen=1, max_seqlen=packing.longest
        ).transpose(1, 2)
        for x in (query, key, value)
    )
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values().transpose(0, 1)[None]


def hidden_width(width: int) -> int:
    """Of SwiGLU: 8/3 of the width in steps of 16, as many weights as a plain MLP of 4 widths."""
    return 16 * math.ceil(width / 6)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, with RMSNorm on queries and keys and without biases.

    Both branches end in a ZeroLinear: a new block is the identity, so that the first gradients reach the embeddings
    undistorted at any depth.
    """

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        hidden = hidden_width(width)
        self.head_width = head_width
        self.attention_norm = RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.query_norm = RMSNorm(head_width)
        self.key_norm = RMSNorm(head_width)
        self.attended = ZeroLinear(width, width, bias=False)
        self.mlp_norm = RMSNorm(width)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = ZeroLinear(hidden, width, bias=False)

    def forward(self, x_SLD: Tensor, code: Rotation | None = None, context: Context = None) -> Tensor:
        """Tokens after one block. See `Transformer.forward`."""
        x_SLD = x_SLD + self._attend(self.attention_norm(x_SLD), code, context)
        return x_SLD + self.down(gated(self.gate_up(self.mlp_norm(x_SLD))))

    def _attend(self, x_SLD: Tensor, code: Rotation | None, context: Context) -> Tensor:
        seen, at = x_SLD, code
        if isinstance(context, Tensor) and context.shape[-1] < x_SLD.shape[1]:
            m = context.shape[-1]
            seen, at = x_SLD[:, :m], code and (code[0][..., :m, :], code[1][..., :m, :])
        key, value = self.key_value(seen).chunk(2, dim=-1)
        query_SLHW = self.query_norm(self._heads(self.query(x_SLD)), code)
        key_SMHW, value_SMHW = self.key_norm(self._heads(key), at), self._heads(value)
        # The code is float32 under autocast.
        query, key, value = (x.type_as(value).transpose(1, 2) for x in (query_SLHW, key_SMHW, value_SMHW))
        return self.attended(attend(query, key, value, context).transpose(1, 2).flatten(2))

    def _heads(self, x_SLD: Tensor) -> Tensor:
        """[S, L, D] -> [S, L, H, W]."""
        return x_SLD.unflatten(-1, (-1, self.head_width))


class Transformer(nn.Module):
    """`depth` blocks and a last RMSNorm."""

    def __init__(self, depth: int, width: int, head_width: int, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, head_width) for _ in range(depth))
        self.norm = RMSNorm(width)
        self.activation_checkpointing = activation_checkpointing

    def forward(self, x_SLD: Tensor, code: Rotation | None = None, context: Context = None) -> Tensor:
        """Tokens after all blocks.

        Args:
            x_SLD: tokens.
            code: `rotation` of their places; None where order and place mean nothing.
            context: bool [S, M], which of the first M tokens are attended to; nobody attends to a token after them,
                and each token reaches its own output on the residual alone. Or a float [S, H, L, M] that is added to
                the scores, -inf for a token that is not attended to. None: all attend to all. A `Packing`: all of a
                sequence attend to all of it.
        """
        x_SLD = x_SLD.to(self.norm.weight.dtype)  # the residual stream keeps full precision under autocast
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_SLD = checkpoint(block, x_SLD, code, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x_SLD = block(x_SLD, code, context)
        return self.norm(x_SLD)
