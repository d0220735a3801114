"""Context and queries: what each token of a region depends on."""

import torch
from torch import Tensor

from storm.model.layers import initialise
from storm.model.spatial import Space
from tests.model.batches import CONFIG

TILES, PROFILES = 3, 5
CONTEXT = torch.tensor([[True, False, True, True, False, True, False, False], [False] * 8])
SLOTS = torch.arange(4)  # the first region has four


def space() -> Space:
    model = Space(CONFIG)
    initialise(model, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (2, TILES, 32), (2, PROFILES, 32), (2, TILES + PROFILES, 2)
    tiles, profiles, place = (torch.randn(shape, generator=generator) for shape in shapes)
    return tiles, profiles, 200 * place


def answers(model: Space, tiles: Tensor, profiles: Tensor, place: Tensor) -> Tensor:
    return torch.cat(model(tiles, profiles, CONTEXT, place, SLOTS), dim=1)


def test_tokens_come_back_at_their_places() -> None:
    """Blocks that are the identity give each token its own norm, whatever the order inside."""
    model, (tiles, profiles, place) = Space(CONFIG), inputs()
    out_tiles, out_profiles = model(tiles, profiles, CONTEXT, place, SLOTS)
    torch.testing.assert_close(out_tiles, model.blocks.norm(tiles))
    torch.testing.assert_close(out_profiles, model.blocks.norm(profiles))


def test_only_context_is_read() -> None:
    model, (tiles, profiles, place) = space(), inputs()
    before = answers(model, tiles, profiles, place)
    for token in range(TILES + PROFILES):
        moved_tiles, moved_profiles = tiles.clone(), profiles.clone()
        changed = moved_tiles[0, token] if token < TILES else moved_profiles[0, token - TILES]
        changed += 1.0
        difference = (answers(model, moved_tiles, moved_profiles, place) != before).any(-1)
        assert not difference[1].any()  # another region
        everyone = bool(CONTEXT[0, token])
        assert difference[0].tolist() == [everyone or other == token for other in range(TILES + PROFILES)]


def test_a_region_without_context_reads_its_registers() -> None:
    model, (tiles, profiles, place) = space(), inputs()
    before = answers(model, tiles, profiles, place)
    assert torch.isfinite(before).all()
    with torch.no_grad():
        model.registers.weight += 1
    assert (answers(model, tiles, profiles, place) != before).any(-1).all()


def test_places_matter_only_to_those_who_read_them() -> None:
    model, (tiles, profiles, place) = space(), inputs()
    before = answers(model, tiles, profiles, place)
    place[0, -1] += 30.0  # a query moves
    difference = (answers(model, tiles, profiles, place) != before).any(-1)[0]
    assert difference.tolist() == [False] * 7 + [True]
