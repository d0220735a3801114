"""The batch: shapes, geometry under flips and turns, what is visible, targets and weights."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from storm.config import MaskConfig
from storm.data.batch import collate, loss_genes, top_genes
from storm.data.view import View, draw_view, plain_view, view_rng
from storm.schema import BATCH, TILE_STATS, Group
from tests.data import samples

TARGETS = {"target_count", "target_log_depth", "depth_target"}
MODES = ("image_only", "in_context", "gene_level", "gene_only")


def only(mode: str, **changes: Any) -> MaskConfig:
    """A mask config of one mode."""
    shares: dict[str, Any] = {name: float(name == mode) for name in MODES}
    return MaskConfig(**shares | changes)


def drawn(group: Group, mask: MaskConfig, index: int = 0) -> View:
    """A view of a group with its own generator."""
    return draw_view(group, mask, view_rng(0, 0, index), samples.spec().panel(group))


def two_groups() -> list[Group]:
    """Different panels, extents and numbers of profiles."""
    return [samples.group(0), samples.group(1, regions=1, side=2, per_region=5, panel="all", platform="st")]


@pytest.mark.parametrize("mode", MODES)
def test_the_batch_is_what_the_contract_says(mode: str) -> None:
    groups = two_groups()
    for index in range(5):
        views = [drawn(group, only(mode), index) for group in groups]
        batch = collate(groups, views, samples.spec(), loss_genes(samples.spec(), 20, view_rng(0, 0, index)))
        assert batch.keys() == BATCH.keys()
        sizes: dict[str, int] = {"3": 3, "2": 2, "S": len(TILE_STATS), "px": samples.TILE_PX}
        for name, (dtype, shape) in BATCH.items():
            assert str(batch[name].dtype) == f"torch.{dtype}", name
            if name != "input_offsets":
                for letter, size in zip(shape.split(), batch[name].shape, strict=True):
                    assert sizes.setdefault(letter, size) == size, name
            assert batch[name].is_floating_point() is False or bool(batch[name].isfinite().all()), name
        assert len(batch["input_offsets"]) == sizes["R"] * sizes["N"]
        assert (sizes["R"], sizes["N"], sizes["C"]) == (3, 12, 9)


def test_collate_and_views_are_deterministic() -> None:
    batches = [
        collate(groups, [drawn(g, MaskConfig(), 7) for g in groups], samples.spec())
        for groups in (two_groups(), two_groups())
    ]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in BATCH)


def recount(group: Group, view: View, rng: np.random.Generator) -> Group:
    """The group with other counts wherever the view hides them."""
    counts = dense(group)
    panel = samples.spec().panel(group)
    genes = panel if view.visible_genes is None else panel & view.visible_genes
    hidden = ~(view.visible[:, None] & genes[None]) & panel[None]
    counts[hidden] = rng.poisson(rng.lognormal(1, 2, counts.shape))[hidden]
    return dataclasses.replace(group, profiles=samples.profiles(group.profiles.xy_um, counts))


def dense(group: Group) -> np.ndarray:
    """[N, G] counts."""
    p = group.profiles
    counts = np.zeros((len(p), samples.GENES), dtype=np.int64)
    counts[np.repeat(np.arange(len(p)), np.diff(p.indptr)), p.gene] = p.count
    return counts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("index", range(6))
def test_hidden_counts_change_no_input(mode: str, index: int) -> None:
    """Drawn again from the same generator, with other hidden counts: every input is bit-identical."""
    group, mask = samples.group(2), only(mode, thinning=0.7, panel_subsampling=0.5)
    view = drawn(group, mask, index)
    other = recount(group, view, np.random.default_rng(index))
    genes = loss_genes(samples.spec(), 24, view_rng(0, 0, index))
    before = collate([group], [view], samples.spec(), genes)
    after = collate([other], [drawn(other, mask, index)], samples.spec(), genes)
    # A profile without any count has no target, so the masks of targets may follow the hidden counts too.
    for name in BATCH.keys() - TARGETS - {"target_mask", "depth_mask"}:
        assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["target_log_depth"], after["target_log_depth"])


def test_the_hidden_count_test_sees_a_leak() -> None:
    """A visible count does change inputs: the test above compares something that moves."""
    group = samples.group(2)
    view = plain_view(group, True)
    counts = dense(group)
    counts[0, 0] += 5
    other = dataclasses.replace(group, profiles=samples.profiles(group.profiles.xy_um, counts))
    before, after = (collate([g], [plain_view(g, True)], samples.spec()) for g in (group, other))
    assert not torch.equal(before["input_log_depth"], after["input_log_depth"]) and view.visible.all()


def test_modes_hide_what_they_say() -> None:
    group = samples.group(3)
    panel = torch.from_numpy(samples.PANEL)
    mask = {"thinning": 0.0, "panel_subsampling": 0.0, "hide_tiles": 1.0}
    batch = {m: collate([group], [drawn(group, only(m, **mask))], samples.spec()) for m in MODES}
    image = batch["image_only"]
    assert not image["visible"].any() and image["query"].all() and image["depth_mask"].all()
    assert torch.equal(image["target_mask"], panel.expand_as(image["target_mask"]))
    assert len(image["input_gene"]) == 0 and not image["tile_hidden"].any()
    context = batch["in_context"]
    assert not (context["query"] & context["visible"]).any()  # overlapping footprints are neither
    assert context["visible"].any() and context["query"].any()
    assert not context["target_mask"][context["visible"]].any() and context["tile_hidden"].any()
    genes = batch["gene_level"]
    assert genes["visible"].all() and genes["query"].all() and not genes["depth_mask"].any()
    hidden = genes["target_mask"].any(dim=(0, 1))
    assert 0.15 * 32 - 1 <= int(hidden.sum()) <= 0.6 * 32 + 1
    assert not hidden[genes["input_gene"]].any()
    dark = batch["gene_only"]
    assert torch.equal(dark["tile_hidden"], dark["tile_present"]) and (dark["tile_at"] == -1).all()
    assert dark["tile_weight"].tolist() == [0.0] and dark["tile_slot"].tolist() == [-1]


def test_shares_of_the_modes() -> None:
    modes = [drawn(samples.group(0, regions=1, per_region=3), MaskConfig(), i).mode for i in range(600)]
    assert np.bincount(modes, minlength=4) / 600 == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.07)
    with pytest.raises(ValueError, match="are all 0"):
        drawn(samples.group(0), MaskConfig(image_only=0, in_context=0, gene_level=0, gene_only=0))


def test_a_blob_is_contiguous_and_cells_are_kept_apart() -> None:
    group = samples.group(4, regions=1, per_region=60, kind="cell", platform="xenium")
    for index in range(10):
        view = drawn(group, only("in_context"), index)
        left_out = ~view.visible & ~view.query
        shown, asked = group.profiles.xy_um[view.visible], group.profiles.xy_um[view.query]
        if len(shown) and len(asked):
            gap = np.linalg.norm(shown[:, None] - asked[None], axis=-1).min() - 40
            assert gap >= 30 and left_out.any()


def value_at(batch: dict[str, torch.Tensor], region: int, profile: int) -> np.ndarray:
    """The pixel under a profile's centre, by the batch's own geometry."""
    tile_um = samples.TILE_UM
    x, y = batch["xy_um"][region, profile].double().numpy()
    packed = int(batch["tile_at"][region, int(y // tile_um), int(x // tile_um)])
    row, col = (int(v % tile_um / tile_um * samples.TILE_PX) for v in (y, x))
    return batch["tiles"][packed, row, col].numpy() if packed >= 0 else np.full(3, -1)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_flips_and_turns_move_tiles_profiles_and_positions_together(flip: bool, turns: int) -> None:
    group = samples.group(5, side=3)
    # Whole pixels and their centres, so that no rounding decides.
    pixel = samples.TILE_UM / samples.TILE_PX
    group.profiles.xy_um[:] = (np.floor(group.profiles.xy_um / pixel) + 0.5) * pixel
    plain = plain_view(group, True)
    before = collate([group], [plain], samples.spec())
    after = collate([group], [dataclasses.replace(plain, flip=flip, turns=turns)], samples.spec())
    for region in range(2):
        for profile in range(12):
            assert (value_at(before, region, profile) == value_at(after, region, profile)).all()
    everything = [torch.cat([b["tile_pos_um"], b["pos_um"]], 1).double() for b in (before, after)]
    apart, turned = (torch.cdist(places, places) for places in everything)
    assert torch.allclose(apart, turned, atol=1e-3)
    assert torch.allclose(after["pos_um"], after["xy_um"] - 1.5 * samples.TILE_UM, atol=1e-4)


def test_an_oblong_region_turns_with_its_grid() -> None:
    group = samples.group(6, regions=1, side=2)
    meta = dataclasses.replace(group.meta.regions[0], cols=3)
    tiles = {(0, r, c): group.tiles[0, r, c % 2] for r in range(2) for c in range(3) if (0, r, c % 2) in group.tiles}
    group = dataclasses.replace(group, meta=dataclasses.replace(group.meta, regions=(meta,)), tiles=tiles)
    batch = collate([group], [dataclasses.replace(plain_view(group, True), turns=1)], samples.spec())
    assert batch["tile_at"].shape == (1, 3, 2) and int((batch["tile_at"] >= 0).sum()) == len(tiles)


def test_the_position_code_alone_is_rotated_and_scaled() -> None:
    group = samples.group(7)
    plain = plain_view(group, True)
    before, after = (
        collate([group], [view], samples.spec()) for view in (plain, dataclasses.replace(plain, angle=0.7, scale=1.05))
    )
    assert torch.equal(before["xy_um"], after["xy_um"]) and torch.equal(before["tiles"], after["tiles"])
    ratio = after["pos_um"].norm(dim=-1) / before["pos_um"].norm(dim=-1)
    assert torch.allclose(ratio, torch.full_like(ratio, 1.05), atol=1e-4)
    assert not torch.allclose(before["pos_um"] * 1.05, after["pos_um"], atol=1.0)


def test_values_by_hand() -> None:
    """One profile, two genes: v = log1p(count * s / depth), s = 1e4 times the share of the visible genes."""
    counts = np.zeros((1, samples.GENES), dtype=np.int64)
    counts[0, [2, 7]] = 3, 9
    group = samples.group(0, regions=1, per_region=1)
    group = dataclasses.replace(group, profiles=samples.profiles(group.profiles.xy_um, counts))
    batch = collate([group], [plain_view(group, True)], samples.spec())
    scale = 1e4 * samples.SHARE[samples.PANEL].sum()
    assert batch["input_value"].tolist() == pytest.approx([np.log1p(3 * scale / 12), np.log1p(9 * scale / 12)])
    assert batch["input_gene"].tolist() == [2, 7]
    assert float(batch["input_log_depth"][0, 0]) == pytest.approx(np.log(13))
    assert float(batch["input_log_genes"][0, 0]) == pytest.approx(np.log(3))
    area = np.pi / 4 * 40**2
    assert float(batch["depth_target"][0, 0]) == pytest.approx(np.log(12 / area) + 1.5, abs=1e-6)


def test_what_a_group_shows_is_told_with_what_is_expected_of_it() -> None:
    """The visible measured genes of each group, once; nothing of a group without a visible profile."""
    groups, spec = [samples.group(0), samples.group(1, panel="all"), samples.group(2)], samples.spec()
    some = samples.PANEL & (np.arange(samples.GENES) % 2 == 0)
    views = [plain_view(groups[0], True), plain_view(groups[1], False), plain_view(groups[2], True)]
    views[2] = dataclasses.replace(views[2], visible_genes=some)
    batch = collate(groups, views, spec)
    expected = [np.flatnonzero(samples.PANEL), np.flatnonzero(some)]
    assert batch["shown_gene"].tolist() == np.concatenate(expected).tolist()
    assert batch["shown_offsets"].tolist() == [0, len(expected[0]), len(expected[0]), sum(map(len, expected))]
    np.testing.assert_allclose(batch["shown_value"], np.log1p(1e4 * spec.share[batch["shown_gene"]]), rtol=1e-6)


def test_who_has_a_part_in_the_contrast_and_how_many_are_far() -> None:
    """Pair by pair in the slide's frame, whatever flips and turns do to the region's; without tiles nobody."""
    for index, mode in enumerate(("in_context", "gene_level", "gene_only") * 4):
        group = samples.group(20 + index)
        view = drawn(group, only(mode, hide_tiles=0.5), index)
        batch = collate([samples.group(1, regions=1), group], [plain_view(samples.group(1, regions=1), False), view],
                        samples.spec())  # fmt: skip
        shown = np.zeros(24, bool)
        shown[np.repeat(np.arange(24), np.diff(group.profiles.indptr))[view.entry]] = True
        xy = group.profiles.xy_um
        for i in range(24):
            origin = np.array(group.meta.regions[group.region[i]].origin_um)
            col, row = ((xy[i] - origin) // samples.TILE_UM).astype(int)
            shown[i] &= (group.region[i], row, col) in group.tiles.keys() - view.hidden_tiles
        apart = np.linalg.norm(xy[:, None] - xy[None], axis=-1) >= 150
        expected = np.where(shown, (apart & shown).sum(1), -1)
        assert batch["negatives"][1:].flatten().tolist() == expected.tolist()
        assert (batch["negatives"][0] == -1).all()  # nothing visible there
        np.testing.assert_allclose(batch["place_um"][1:].flatten(0, 1).numpy(), xy - [0, 500], atol=1e-3)
        assert (expected > 0).any() == (mode == "gene_level") or mode == "in_context"


def test_thinning_keeps_a_share_of_the_molecules_and_leaves_targets() -> None:
    group = samples.group(8)
    mask = only("gene_level", thinning=1.0, panel_subsampling=0.0)
    thin, full = (drawn(group, m) for m in (mask, mask.model_copy(update={"thinning": 0.0})))
    assert 0 < thin.count.sum() < full.count.sum() and (thin.count > 0).all()
    batches = [collate([group], [view], samples.spec()) for view in (thin, full)]
    assert torch.equal(batches[0]["target_count"], batches[1]["target_count"])


def test_loss_genes_stand_for_their_panel() -> None:
    spec = samples.spec()
    groups = two_groups()
    for step in range(5):
        genes = loss_genes(spec, 12, view_rng(0, 1, step))
        batch = collate(groups, [plain_view(g, False) for g in groups], spec, genes)
        assert len(set(genes)) == 12 and set(top_genes(spec, 12)) <= set(genes) and len(top_genes(spec, 12)) == 3
        sizes = batch["gene_weight"].sum(-1).tolist()
        assert sizes == pytest.approx([32, 32, 40])
        outside = ~torch.from_numpy(samples.PANEL)[batch["genes"]]
        assert (batch["gene_weight"][0, outside] == 0).all() and not batch["target_mask"][0, :, outside].any()
    assert loss_genes(spec, 40, view_rng(0, 1, 0)).tolist() == list(range(40))


def test_a_target_panel_of_its_own() -> None:
    group = samples.group(9)
    reference = np.arange(samples.GENES) < 10
    batch = collate([group], [plain_view(group, False)], samples.spec(target_panel=reference))
    assert batch["gene_weight"][0].tolist() == reference.astype(float).tolist()
    inside = dense(group)[0][reference].sum()
    assert float(batch["target_log_depth"][0, 0]) == pytest.approx(np.log(max(inside, 1)), abs=1e-6)


def test_tile_targets_are_of_the_tile_as_it_is() -> None:
    group = samples.group(10)
    mask = only("gene_only", stain_jitter=0.0, flips=False)
    jittered = only("gene_only", stain_jitter=0.5)
    before, after = (collate([group], [drawn(group, m)], samples.spec()) for m in (mask, jittered))
    assert torch.equal(before["tile_target"], after["tile_target"]) and before["tile_target"].abs().sum() > 0


def test_stain_jitter_changes_pixels_alone() -> None:
    group = samples.group(11)
    plain = plain_view(group, True)
    stained = dataclasses.replace(plain, stain=np.array([1.2, 0.9, 1.0]))
    before, after = (collate([group], [view], samples.spec()) for view in (plain, stained))
    red, green, blue = (after["tiles"].int() - before["tiles"].int()).unbind(-1)
    assert (red <= 0).all() and (green >= 0).all() and (blue == 0).all() and (red < 0).any()
    assert all(torch.equal(before[name], after[name]) for name in BATCH if name != "tiles")


def test_a_tile_of_another_size_and_an_unknown_panel_are_named() -> None:
    group = samples.group(12)
    with pytest.raises(ValueError, match=r"slide s1: tile .* is 32 x 32 px, not 64"):
        collate([group], [plain_view(group, True)], samples.spec(tile_px=64))
    stranger = dataclasses.replace(group, meta=dataclasses.replace(group.meta, panel="q"))
    with pytest.raises(ValueError, match="slide s1: panel 'q'"):
        collate([stranger], [plain_view(stranger, True)], samples.spec())


def test_a_region_without_profiles_and_a_group_without_tiles() -> None:
    group = samples.group(13)
    empty = dataclasses.replace(group, tiles={}, region=np.zeros_like(group.region))
    batch = collate([empty], [plain_view(empty, True)], samples.spec())
    assert batch["profile"].sum(-1).tolist() == [24, 0] and batch["tile_weight"].tolist() == [0.0]
