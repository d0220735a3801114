"""Level 1, morphology: a vision transformer over tiles, each tile once, however many profiles lie on it.

In: packed tile pixels. Out: a feature map and a summary per tile.
Shapes: T tiles packed, px tile side, P patches per tile (row by row), D image width.
"""

import torch
from torch import Tensor, nn

from storm.model.layers import Transformer, rotation
from storm.presets import ModelConfig

PIXEL_MEAN = (0.72, 0.55, 0.70)  # of red, green, blue in [0, 1]; typical of H&E, fixed so that exports agree
PIXEL_SD = (0.18, 0.22, 0.16)


class TileEncoder(nn.Module):
    """Patches of `patch_px`, linear embedding, blocks, mean.

    Position inside a tile is rotary and so relative: the map carries no grid phase (a profile reads it across tiles).
    """

    pixel_scale: Tensor
    pixel_shift: Tensor
    patch_xy_um: Tensor

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.patch_px, self.head_width = config.patch_px, config.head_width
        self.wavelengths_um = 2 * config.patch_um, 4 * config.tile_um
        self.embed = nn.Linear(3 * config.patch_px**2, config.image_width)
        self.blocks = Transformer(config.image_depth, config.image_width, config.head_width, activation_checkpointing)
        centre_um = (torch.arange(config.tile_px // config.patch_px) + 0.5) * config.patch_um
        y, x = torch.meshgrid(centre_um, centre_um, indexing="ij")
        self.register_buffer("patch_xy_um", torch.stack([x, y], -1).flatten(0, 1), persistent=False)
        mean, sd = torch.tensor(config.pixel_mean or PIXEL_MEAN), torch.tensor(config.pixel_sd or PIXEL_SD)
        self.register_buffer("pixel_scale", (1 / (255 * sd)).repeat(config.patch_px**2), persistent=False)
        self.register_buffer("pixel_shift", (-mean / sd).repeat(config.patch_px**2), persistent=False)

    def forward(self, tiles: Tensor, tile_weight_T: Tensor) -> tuple[Tensor, Tensor]:
        """Feature map [T, P, D] and summary [T, D] of uint8 tiles [T, px, px, 3]; zero where the weight is zero."""
        code = rotation(self.patch_xy_um, self.head_width, *self.wavelengths_um)
        map_TPD = self.blocks(self.embed(self._patches(tiles)), code)
        map_TPD = map_TPD * tile_weight_T[:, None, None]
        return map_TPD, map_TPD.mean(1)

    def _patches(self, tiles: Tensor) -> Tensor:
        """Standardised pixels [T, P, patch_px * patch_px * 3]."""
        p = self.patch_px
        grid = tiles.unflatten(1, (-1, p)).unflatten(3, (-1, p)).transpose(2, 3)  # [T, rows, cols, p, p, 3], uint8
        patches = grid.flatten(1, 2).flatten(2).to(self.pixel_scale.dtype)
        return torch.addcmul(self.pixel_shift, patches, self.pixel_scale)
