"""Feature maps that are remembered are those that an encoder gives."""

from dataclasses import replace

import torch
from torch import Tensor

from storm.model.storm import Storm
from storm.presets import ModelConfig
from storm.tile_maps import TileMaps
from storm.train import benchmark_model

CONFIG = ModelConfig(tile_px=32, image_depth=1)
CPU = torch.device("cpu")


def batch(tiles: Tensor, weight: list[float]) -> dict[str, Tensor]:
    return {"tiles": tiles, "tile_weight": torch.tensor(weight), "other": torch.ones(2)}


def pixels(count: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_a_tile_is_encoded_once_and_its_map_is_the_encoders() -> None:
    model, tiles = Storm(CONFIG, 5), pixels(6, 0)
    maps, weight = TileMaps(model, CPU), [1.0, 1.0, 0.0, 1.0]
    for some in (tiles[:4], tiles[[3, 2, 1, 0]], tiles[[4, 4, 0, 5]]):
        found = maps(batch(some, weight))
        assert found["tiles"] is some and found["other"].equal(torch.ones(2))
        torch.testing.assert_close(found["tile_map"], model.morphology(some, torch.tensor(weight))[0])
    assert maps.encoded == 6


@torch.inference_mode()
def test_the_least_lately_met_is_forgotten() -> None:
    model, tiles = Storm(CONFIG, 5), pixels(3, 1)
    one = 4 * (32 // CONFIG.patch_px) ** 2 * CONFIG.image_width  # bytes of a map
    maps = TileMaps(model, CPU, limit_bytes=2 * one)
    for i in (0, 1, 0, 2, 0, 1):  # 1 goes when 2 comes, 2 when 1 comes
        maps(batch(tiles[[i]], [1.0]))
    assert maps.encoded == 4 and len(maps.known) == 2


@torch.inference_mode()
def test_a_model_answers_alike_from_pixels_and_from_maps() -> None:
    model = Storm(CONFIG, benchmark_model.GENES)
    plain = benchmark_model.make_batch(replace(benchmark_model.GROUP, side=2, profiles=3, seen=9), CONFIG)
    expected, found = model(plain), model(TileMaps(model, CPU)(plain))
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)
