"""Other ways in which an exported model may read its profiles, with the same weights, for comparison.

In: a model. Out: the same model, which within a `with` reads otherwise what it reads of a profile (the features under
its footprint and over the window around it), or is told another size of footprints. All else stays: tiles, context,
heads.

    grid       as it is: from the feature maps of the slide's tiles, each of which is encoded once for all its profiles
    own tile   from the map of a tile of its own, centred on the profile to half a pixel and encoded for it alone. Its
               pixels are those of the region's tiles; white where none is stored.
    tile mean  the mean of the grid's tile that holds the centre, whatever the footprint is

Shapes: R regions, N profiles, T tiles, P patches per tile, D image width, n profiles at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storm.model.footprint import FootprintReader
from storm.model.storm import Storm

Batch = dict[str, Tensor]
Read = Callable[[Storm, Tensor, Batch], tuple[Tensor, Tensor]]

GRID, OWN_TILE, TILE_MEAN = "grid", "own tile", "tile mean"
_AT_ONCE = 64  # tiles


def own_tile(model: Storm, map_TPD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Features [R, N, 2, D] and valid shares [R, N, 2], as FootprintReader gives them, of a tile for each profile."""
    reader, px = FootprintReader(model.config).to(map_TPD.device), model.config.tile_px
    picture = _white_around(_regions(batch["tiles"], batch["tile_at"]), px)
    feature = map_TPD.new_zeros(*batch["profile"].shape, 2, map_TPD.shape[-1])
    valid = batch["xy_um"].new_zeros(*batch["profile"].shape, 2)
    for region, slot in zip(*(rows.split(_AT_ONCE) for rows in torch.where(batch["profile"])), strict=True):
        centre_n2 = batch["xy_um"][region, slot]
        corner_n2 = (centre_n2 / model.config.tile_mpp - px / 2).round().long()
        x, y = (corner_n2[:, axis, None] + torch.arange(px, device=corner_n2.device) + px for axis in (0, 1))
        map_nPD, _ = model.morphology(picture[region[:, None, None], y[:, :, None], x[:, None, :]], x.new_ones(len(x)))
        alone = {
            "xy_um": (centre_n2 - corner_n2 * model.config.tile_mpp)[:, None],
            "tile_at": torch.arange(len(x), device=x.device)[:, None, None],
            **{name: batch[name][region, slot][:, None] for name in ("footprint_um", "footprint_points")},
        }
        found = reader(map_nPD, alone)
        feature[region, slot], valid[region, slot] = found[0][:, 0].to(feature.dtype), found[1][:, 0].to(valid.dtype)
    return feature, valid


def _regions(tiles: Tensor, tile_at: Tensor) -> Tensor:
    """Pixels [R, rows * px, cols * px, 3] of regions, white where no tile is."""
    tiles = torch.cat([tiles, torch.full_like(tiles[:1], 255)])  # the last one: where tile_at is -1
    return tiles[tile_at].transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _white_around(picture: Tensor, px: int) -> Tensor:
    """With `px` more white pixels on every side."""
    return F.pad(picture, (0, 0, px, px, px, px), value=255)


def tile_mean(model: Storm, map_TPD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """As `own_tile`: both features are the mean of the tile of the grid that holds the centre."""
    return FootprintReader(replace(model.config, reads="tile"))(map_TPD, batch)


READS: dict[str, Read | None] = {GRID: None, OWN_TILE: own_tile, TILE_MEAN: tile_mean}


@contextmanager
def reading(model: Storm, name: str) -> Iterator[None]:
    """Within it the model reads its profiles in one of the ways of READS."""
    read = READS[name]

    def instead(module: nn.Module, given: tuple[Tensor, Batch], output: object) -> tuple[Tensor, Tensor] | None:
        return read(model, *given) if read else None

    hook = model.footprint.register_forward_hook(instead)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def told_size(model: Storm, log_um: float) -> Iterator[None]:
    """Within it the model is told one size (log um) of all footprints; they are read where they are."""

    def changed(module: nn.Module, given: tuple[Batch]) -> tuple[Batch]:
        return ({**given[0], "footprint_input": torch.full_like(given[0]["footprint_input"], log_um)},)

    hook = model.register_forward_pre_hook(changed)
    try:
        yield
    finally:
        hook.remove()
