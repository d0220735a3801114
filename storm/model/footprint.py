"""From tiles to profiles: the mean of the feature map under each footprint and over a tile-wide window around it.

In: the packed feature maps of the encoded tiles, where they lie (`tile_at`), centres and footprints in um. Out: two
features per profile, and the share of each that could be read. The cost grows with the profiles, not with the tiles.

A footprint is those points of a square lattice that lie in it (`footprint_points`, of a disc, a square or a polygon);
flips and quarter turns map it onto itself. A point is read between the centres of its four nearest patches,
(i + 0.5) * patch_um, also across the border between tiles. A patch that is outside the region or not encoded weighs
nothing, and the mean is taken over the rest.

Shapes: R regions, N profiles, T tiles, P patches per tile, D image width, S points along a side (F for a footprint),
A = 2 S patches read along it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storm.presets import ModelConfig
from storm.schema import FOOTPRINT_SIDE


def lattice(side: int) -> Tensor:
    """[S] places of `side` points along a length of 1, centred on 0."""
    return (torch.arange(side) + 0.5) / side - 0.5


def nearest_patches(at_um: Tensor, patch_um: float, n_patches: int) -> tuple[Tensor, Tensor]:
    """Along one axis: the two patches around each point [..., S] and their linear weights, each [..., A].

    Indices outside 0..n_patches - 1 have weight 0 and are moved inside.
    """
    place = at_um / patch_um - 0.5
    low = place.floor()
    index = torch.stack([low, low + 1], dim=-1).flatten(-2)
    weight = torch.stack([low + 1 - place, place - low], dim=-1).flatten(-2)
    inside = (index >= 0) & (index < n_patches)
    return index.clamp(0, n_patches - 1).long(), weight * inside


class FootprintReader(nn.Module):
    """Reads feature maps; has no parameters."""

    footprint_points: Tensor
    window_points: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.side = config.tile_px // config.patch_px  # patches along a tile
        self.patch_um, self.tile_um = config.patch_um, config.tile_um
        self.whole_tile = config.reads == "tile"
        self.register_buffer("footprint_points", lattice(FOOTPRINT_SIDE), persistent=False)
        window_side = math.ceil(self.side / 2)  # so that a window reads each of its patches
        self.register_buffer("window_points", lattice(window_side), persistent=False)

    def forward(self, map_TPD: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Features [R, N, 2, D] under the footprint and over the window, and the valid fraction [R, N, 2] of each.

        A feature without a valid point is 0.
        """
        centre_RN2 = batch["xy_um"]
        if self.whole_tile:
            return self._tile_mean(map_TPD, batch["tile_at"], centre_RN2)
        shape_RNFF = batch["footprint_points"].to(centre_RN2.dtype)
        shape_RNAA = shape_RNFF.repeat_interleave(2, -2).repeat_interleave(2, -1)
        offset_RNS = batch["footprint_um"][..., None] * self.footprint_points
        window_S = self.tile_um * self.window_points
        footprint = self._read(map_TPD, batch["tile_at"], centre_RN2, offset_RNS, shape_RNAA)
        window = self._read(map_TPD, batch["tile_at"], centre_RN2, window_S, centre_RN2.new_ones(()))
        return torch.stack([footprint[0], window[0]], dim=2), torch.stack([footprint[1], window[1]], dim=2)

    def _read(
        self, map_TPD: Tensor, tile_at: Tensor, centre_RN2: Tensor, offset_S: Tensor, shape_AA: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean feature [R, N, D] over the lattice centre + offset x offset, weighted by `shape_AA`; valid fraction."""
        _, rows, cols = tile_at.shape
        x, weight_x = nearest_patches(centre_RN2[..., :1] + offset_S, self.patch_um, cols * self.side)
        y, weight_y = nearest_patches(centre_RN2[..., 1:] + offset_S, self.patch_um, rows * self.side)
        y, x = y[..., :, None], x[..., None, :]
        place_RNAA = (y // self.side) * cols + x // self.side  # of the tile in the region
        tile_RNAA = tile_at.flatten(1).gather(1, place_RNAA.flatten(1)).view_as(place_RNAA)
        patch_RNAA = tile_RNAA.clamp_min(0) * self.side**2 + (y % self.side) * self.side + x % self.side

        weight_RNAA = weight_y[..., :, None] * weight_x[..., None, :] * shape_AA * (tile_RNAA >= 0)
        read_RN = weight_RNAA.sum((-2, -1))
        points_RN = shape_AA.expand_as(weight_RNAA).sum((-2, -1)) / 4  # a point is four patches of summed weight 1
        share_RNAA = weight_RNAA / read_RN.clamp_min(1e-12)[..., None, None]
        map_MD = map_TPD.flatten(0, 1).to(share_RNAA.dtype)
        bags, shares = (a.flatten(0, 1).flatten(1) for a in (patch_RNAA, share_RNAA))  # a bag is a profile's patches
        mean = F.embedding_bag(bags, map_MD, per_sample_weights=shares, mode="sum")
        return mean.unflatten(0, centre_RN2.shape[:2]), read_RN / points_RN.clamp_min(1)  # a padded place has no point

    def _tile_mean(self, map_TPD: Tensor, tile_at: Tensor, centre_RN2: Tensor) -> tuple[Tensor, Tensor]:
        """The ablation: both features are the mean of the tile that holds the centre, whatever the footprint is."""
        _, rows, cols = tile_at.shape
        col_RN, row_RN = (centre_RN2 / self.tile_um).floor().long().unbind(-1)
        inside_RN = (row_RN >= 0) & (row_RN < rows) & (col_RN >= 0) & (col_RN < cols)
        place_RN = row_RN.clamp(0, rows - 1) * cols + col_RN.clamp(0, cols - 1)
        tile_RN = tile_at.flatten(1).gather(1, place_RN)
        read_RN = (inside_RN & (tile_RN >= 0)).to(centre_RN2.dtype)
        mean_RND = map_TPD.mean(1)[tile_RN.clamp_min(0)] * read_RN[..., None]
        return torch.stack([mean_RND] * 2, dim=2), torch.stack([read_RN] * 2, dim=2)
