"""The tile encoder: patches in their places, tiles apart, weights of zero."""

import pytest
import torch

from storm.model.layers import initialise
from storm.model.morphology import PIXEL_MEAN, PIXEL_SD, TileEncoder
from storm.presets import ModelConfig
from tests.model.batches import CONFIG


def tiles(n: int, px: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, px, px, 3), dtype=torch.uint8, generator=generator)


def awake_encoder() -> TileEncoder:
    """One whose attention is not zero."""
    encoder = TileEncoder(CONFIG)
    initialise(encoder, 0)
    torch.nn.init.normal_(encoder.get_parameter("blocks.blocks.0.attended.weight"))
    return encoder


@pytest.mark.parametrize(("tile_px", "patches"), [(112, 49), (224, 196)])
def test_patches_of_any_tile_size(tile_px: int, patches: int) -> None:
    encoder = TileEncoder(ModelConfig(tile_px=tile_px))
    feature_map, summary = encoder(tiles(2, tile_px), torch.ones(2))
    assert feature_map.shape == (2, patches, 64)
    torch.testing.assert_close(summary, feature_map.mean(1))


def test_pixels_are_cut_row_by_row_and_standardised() -> None:
    pixels = tiles(1, 32)
    patches = TileEncoder(CONFIG)._patches(pixels)
    row, col = 2, 1  # patch 2 * 4 + 1
    cut = pixels[0, 8 * row : 8 * row + 8, 8 * col : 8 * col + 8].float() / 255
    expected = (cut - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_SD)
    torch.testing.assert_close(patches[0, 4 * row + col], expected.flatten())


def test_a_tile_is_encoded_by_itself_and_weighted() -> None:
    encoder = awake_encoder()
    pixels = tiles(3, 32)
    together, _ = encoder(pixels, torch.tensor([1.0, 1.0, 0.0]))
    alone, _ = encoder(pixels[1:2], torch.ones(1))
    torch.testing.assert_close(together[1:2], alone)
    assert not together[2].any() and together[:2].any()


def test_a_patch_sees_its_whole_tile_by_relative_place() -> None:
    """Equal patches differ by their neighbours only: a tile of one colour has a map of one vector."""
    encoder = awake_encoder()
    feature_map, _ = encoder(torch.full((1, 32, 32, 3), 77, dtype=torch.uint8), torch.ones(1))
    torch.testing.assert_close(feature_map, feature_map[:, :1].expand_as(feature_map), rtol=1e-4, atol=1e-5)
    pixels = tiles(1, 32)
    before, _ = encoder(pixels, torch.ones(1))
    pixels[0, 31, 31] = 255 - pixels[0, 31, 31]
    after, _ = encoder(pixels, torch.ones(1))
    assert (before != after).any(-1).all()
