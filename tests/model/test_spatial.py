"""Context and queries: what each token of a region depends on, and how it knows where the others lie."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from storm.model.layers import initialise, rotation
from storm.model.spatial import WAVELENGTHS_UM, Space
from storm.presets import POSITIONS
from tests.model.batches import CONFIG
from tests.model.test_layers import plain_block, rms

TILES, PROFILES = 3, 5
CONTEXT = torch.tensor([[True, False, True, True, False, True, False, False], [False] * 8])
SLOTS = torch.arange(4)  # the first region has four


def space(**switches: str | int) -> Space:
    model = Space(dataclasses.replace(CONFIG, **switches))  # type: ignore[arg-type]
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


def plain(model: Space, tiles: Tensor, profiles: Tensor, place: Tensor, region: int, position: str) -> Tensor:
    """Tokens of one region in their own order, attention and bias written out."""
    registers = model.registers.weight
    x = torch.cat([registers, tiles[region], profiles[region]])
    n = len(registers)
    xy = torch.cat([place.new_zeros(n, 2), place[region]])
    seen = torch.cat([torch.ones(n, dtype=torch.bool), CONTEXT[region]])
    code = rotation(xy if position == "rotary" else torch.zeros_like(xy), CONFIG.head_width, *WAVELENGTHS_UM)
    bias = None
    if model.distance:
        slope = F.softplus(model.distance.factor.weight[0]) / model.distance.length_um
        apart = torch.tensor([[float(torch.dist(a, b)) for b in xy] for a in xy]).double()
        bias = -slope[:, None, None] * apart
    for block in model.blocks.blocks:
        x = plain_block(block, x, code, seen, bias)  # type: ignore[arg-type]
    return rms(x, model.blocks.norm.weight)[n:]


@pytest.mark.parametrize("position", POSITIONS)
def test_every_position_code_equals_its_plain_twin(position: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.model.test_layers.WIDTH", CONFIG.space_width)
    monkeypatch.setattr("tests.model.test_layers.HEAD", CONFIG.head_width)
    model = space(position=position).double()
    tiles, profiles, place = (x.double() for x in inputs())
    out = answers(model, tiles, profiles, place)
    for region in range(2):
        torch.testing.assert_close(out[region], plain(model, tiles, profiles, place, region, position))


def test_nearer_is_never_less_and_places_act_only_where_they_are_told() -> None:
    biased, blind = space(position="distance_bias"), space(position="none")
    tiles, profiles, place = inputs()
    assert torch.equal(answers(blind, tiles, profiles, place), answers(blind, tiles, profiles, 3 * place))
    assert not torch.equal(answers(biased, tiles, profiles, place), answers(biased, tiles, profiles, 3 * place))
    assert biased.distance is not None
    with torch.no_grad():
        biased.distance.factor.weight.copy_(torch.linspace(-9, 9, 4)[None])
    line = torch.stack([torch.linspace(0, 9000, 50), torch.zeros(50)], -1)[None]
    bias = biased.distance(line, torch.ones(1, 50, dtype=torch.bool))[0, :, 0]
    assert (bias.diff(dim=-1) < 0).all() and not bias[:, 0].any()


@pytest.mark.parametrize("position", POSITIONS)
def test_1024_profiles_of_context_and_3000_queries_in_chunks(position: str) -> None:
    """The answers of all at once, to 1e-5."""
    model = space(position=position)
    generator = torch.Generator().manual_seed(2)
    tiles = torch.randn(1, 25, 32, generator=generator)
    profiles = torch.randn(1, 1024 + 3000, 32, generator=generator)
    place = 300 * torch.randn(1, 25 + 4024, 2, generator=generator)
    context = (torch.arange(25 + 4024) < 25 + 1024)[None]
    slots = torch.arange(25 + 1024)
    with torch.no_grad():
        _, whole = model(tiles, profiles, context, place, slots)
        for start in range(1024, 4024, 700):
            asked = torch.cat([torch.arange(1024), torch.arange(start, min(start + 700, 4024))])
            chosen = torch.cat([torch.arange(25), 25 + asked])
            _, part = model(tiles, profiles[:, asked], context[:, chosen], place[:, chosen], slots)
            torch.testing.assert_close(part[:, 1024:], whole[:, asked[1024:]], rtol=1e-5, atol=1e-5)
        assert (
            whole[:, 1024:] - model(tiles, profiles, context & False, place, slots[:0])[1][:, 1024:]
        ).abs().max() > 0.1


def test_without_a_block_each_token_is_itself() -> None:
    model, (tiles, profiles, place) = space(space_depth=0, position="distance_bias"), inputs()
    torch.testing.assert_close(
        answers(model, tiles, profiles, place), model.blocks.norm(torch.cat([tiles, profiles], 1))
    )
