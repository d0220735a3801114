"""Level 3, space: what is known of a region is context, everything else is a query that only reads it.

In: tile summaries and profile vectors with their places in um. Out: both, informed by the region.
Shapes: R regions, C tiles, N profiles, L = registers + C + N tokens, M = largest context of a region, D space width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storm.model.layers import Constant, Context, Transformer, rotation
from storm.presets import ModelConfig

WAVELENGTHS_UM = 50.0, 6400.0  # from a spot to a section


def take(x: Tensor, order_RL: Tensor) -> Tensor:
    """Tokens [R, L, ...] in another order."""
    return torch.take_along_dim(x, order_RL.view(*order_RL.shape, *[1] * (x.ndim - 2)), dim=1)


class DistanceBias(nn.Module):
    """-slope_h * distance, added to the scores of head h (ALiBi, arXiv 2108.12409, in 2-D): nearer is never less.

    At the start the heads' slopes fall by 1 over lengths that are geometric in WAVELENGTHS_UM; one factor of each is
    learned, positive by softplus.
    """

    length_um: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        shortest, longest = WAVELENGTHS_UM
        self.factor = Constant(1, heads, start=math.log(math.e - 1))  # its softplus is 1
        length_um = shortest * (longest / shortest) ** torch.linspace(0, 1, heads)
        self.register_buffer("length_um", length_um, persistent=False)

    def forward(self, xy_um: Tensor, context_RM: Tensor) -> Tensor:
        """[R, H, L, M] of places [R, L, 2], the first M of which are context where `context_RM` says so; else -inf."""
        slope_H = F.softplus(self.factor(xy_um.new_zeros(1, dtype=torch.long))[0]) / self.length_um
        apart_RLM = torch.linalg.vector_norm(xy_um[:, :, None] - xy_um[:, None, : context_RM.shape[1]], dim=-1)
        bias_RHLM = -slope_H[:, None, None] * apart_RLM[:, None]
        return bias_RHLM.masked_fill(~context_RM[:, None, None, :], -torch.inf)


class Space(nn.Module):
    """Every token attends to the context and to nothing else, at every block.

    A context token and a query obey the same equations; the only difference is that nobody attends to a query. So an
    answer does not depend on what else is asked, and a profile that is both is one token. Registers (learned, at the
    region's centre) are always context, so that it is never empty.
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.head_width, self.rotary = config.head_width, config.position == "rotary"
        biased = config.position == "distance_bias" and config.space_depth > 0
        self.distance = DistanceBias(config.space_width // config.head_width) if biased else None
        self.registers = nn.Embedding(config.registers, config.space_width)
        self.blocks = Transformer(config.space_depth, config.space_width, config.head_width, activation_checkpointing)

    def forward(
        self, tiles_RCD: Tensor, profiles_RND: Tensor, context_RL: Tensor, place_um_RL2: Tensor, slots_M: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tiles [R, C, D] and profiles [R, N, D] after the last block.

        Args:
            tiles_RCD: summaries, or a mask token, per tile.
            profiles_RND: profile vectors.
            context_RL: which tiles and profiles (in this order) are context; L = C + N here.
            place_um_RL2: their centres, centred per region.
            slots_M: as long as the largest context of a region. Its length alone is read: a sum over `context_RL`
                would have to be waited for.
        """
        regions, n_tiles, n = len(tiles_RCD), tiles_RCD.shape[1], self.registers.num_embeddings
        registers = self.registers(torch.arange(n, device=tiles_RCD.device)).expand(regions, -1, -1)
        x_RLD = torch.cat([registers.to(tiles_RCD.dtype), tiles_RCD, profiles_RND], dim=1)
        context_RL = torch.cat([context_RL.new_ones(regions, n), context_RL], dim=1)
        place_um_RL2 = torch.cat([place_um_RL2.new_zeros(regions, n, 2), place_um_RL2], dim=1)

        # Context before queries: the keys are then the first m tokens, and the cost is tokens x context.
        first_RL = (~context_RL).byte().argsort(dim=1, stable=True)
        context: Context = take(context_RL, first_RL)[:, : n + len(slots_M)]
        place_um_RL2 = take(place_um_RL2, first_RL)
        code = rotation(place_um_RL2, self.head_width, *WAVELENGTHS_UM) if self.rotary else None
        if self.distance:
            context = self.distance(place_um_RL2, context)
        x_RLD = self.blocks(take(x_RLD, first_RL), code, context)
        x_RLD = take(x_RLD, first_RL.argsort(dim=1))
        return x_RLD[:, n : n + n_tiles], x_RLD[:, n + n_tiles :]
