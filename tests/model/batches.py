"""Valid random batches, straight from `schema.BATCH`, for the tests of the model and the losses."""

import math

import numpy as np
import torch
from torch import Tensor

from storm.data import tokens
from storm.model.storm import Storm
from storm.presets import ModelConfig
from storm.schema import APART_UM, BATCH, FOOTPRINT_SIDE, PLATFORMS, TILE_STATS

Batch = dict[str, Tensor]
CONFIG = ModelConfig(
    tile_px=32, tile_mpp=1.0, patch_px=8, image_width=16, gene_width=16, fusion_width=32, space_width=32, head_width=8,
    align_width=8,    organs=("breast", "colon"),
)  # fmt: skip
N_GENES = 40


def make_batch(
    regions: int = 2, side: int = 2, n: int = 6, k: int = 12, hidden_tiles: int = 1, images: bool = True, seed: int = 0,
    config: ModelConfig = CONFIG,
) -> Batch:  # fmt: skip
    """A batch of `regions` squares of side x side tiles, each with `n` profiles of which about half are visible.

    The last region has one profile less (padding); the last `hidden_tiles` tiles of each region are hidden, and with
    images=False all of them.
    """
    rng = np.random.default_rng(seed)
    out: dict[str, np.ndarray] = {}
    tiles(out, rng, regions, side, hidden_tiles if images else side * side, config)
    profiles(out, rng, regions, side * config.tile_um, n)
    counts(out, rng, regions, n, k)
    contrast(out, regions)
    out["context_slots"] = np.zeros(0)
    assert out.keys() == BATCH.keys()
    batch = {name: torch.from_numpy(np.asarray(out[name]).astype(dtype)) for name, (dtype, _) in BATCH.items()}
    if config.descriptor_width:
        batch["gene_kept"] = torch.from_numpy(rng.random(N_GENES) < 0.7)
    return completed(batch, config.expression == "tokens")


def completed(batch: Batch, with_tokens: bool | None = None) -> Batch:
    """The batch with the entries that follow from its others: the slots of the context, and the tokens where it has
    them: each visible entry one, and two zeros of each visible profile."""
    encoded = batch["tile_present"] & ~batch["tile_hidden"]
    most = int((encoded.sum(1) + batch["visible"].sum(1)).max())
    batch = batch | {"context_slots": torch.arange(most)}
    if not ("token_gene" in batch if with_tokens is None else with_tokens):
        return batch
    starts, shown = batch["input_offsets"].tolist(), batch["visible"].flatten().numpy()
    row = np.repeat(np.arange(len(starts)), np.diff([*starts, len(batch["input_gene"])]))
    value = batch["input_value"].double().numpy()
    zeros = np.repeat(np.flatnonzero(shown), 2)
    found = tokens.Chosen(
        np.concatenate([row, zeros]), np.concatenate([batch["input_gene"].numpy(), 20 + np.arange(len(zeros)) % 2]),
        np.concatenate([np.stack([value, value / 2, value / 4], -1), np.zeros((len(zeros), 3))]),
    )  # fmt: skip
    return batch | {name: torch.from_numpy(array) for name, array in tokens.pack([found]).items()}


def tiles(out: dict, rng: np.random.Generator, regions: int, side: int, hidden: int, config: ModelConfig) -> None:
    c = side * side
    encoded = np.tile(np.arange(c) < c - hidden, (regions, 1))
    packed = np.full((regions, c), -1)
    packed[encoded] = np.arange(encoded.sum())
    slots = np.flatnonzero(encoded) if encoded.any() else np.array([-1])
    px = config.tile_px
    out["tiles"] = rng.integers(0, 256, (len(slots), px, px, 3))
    out["tile_weight"] = np.full(len(slots), float(encoded.any()))
    out["tile_at"] = packed.reshape(regions, side, side)
    out["tile_slot"] = slots
    out["tile_present"] = np.ones((regions, c), dtype=bool)
    out["tile_hidden"] = ~encoded
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    centre = (np.stack([x, y], -1).reshape(1, c, 2) + 0.5 - side / 2) * config.tile_um
    out["tile_pos_um"] = np.tile(centre, (regions, 1, 1))
    out["tile_target"] = rng.normal(size=(regions, c, len(TILE_STATS)))


def profiles(out: dict, rng: np.random.Generator, regions: int, extent_um: float, n: int) -> None:
    out["region_group"] = np.arange(regions)
    out["platform"] = rng.integers(0, len(PLATFORMS), regions)
    out["organ"] = rng.integers(0, 3, regions)
    out["mode"] = rng.integers(0, 4, regions)
    exists = np.ones((regions, n), dtype=bool)
    exists[-1, -1] = n == 1
    visible = (np.arange(n) % 2 == 0) & exists
    out |= {"profile": exists, "visible": visible, "query": exists, "wholly_hidden": exists & ~visible}
    out["xy_um"] = rng.uniform(0, extent_um, (regions, n, 2)) * exists[..., None]
    out["pos_um"] = (out["xy_um"] - extent_um / 2) * exists[..., None]
    out["footprint_um"] = rng.uniform(5, 60, (regions, n)) * exists
    out["footprint_points"] = rng.random((regions, n, FOOTPRINT_SIDE, FOOTPRINT_SIDE)) < 0.7
    out["footprint_points"] &= exists[..., None, None]
    out["log_area"] = 2 * np.log(rng.uniform(5, 60, (regions, n))) * exists
    out["footprint_input"] = np.log(np.maximum(out["footprint_um"], 1))


def counts(out: dict, rng: np.random.Generator, regions: int, n: int, k: int) -> None:
    """Visible profiles show genes 0..19 of the vocabulary, the loss asks for `k` genes from gene 10 on."""
    shown: list[np.ndarray | list[int]] = [
        rng.choice(20, rng.integers(1, 9), replace=False) if v else [] for v in out["visible"].flat
    ]
    sizes = np.array([len(genes) for genes in shown])
    out["input_gene"] = np.concatenate(shown)
    out["input_value"] = rng.uniform(0.1, 4, sizes.sum())
    out["input_offsets"] = np.cumsum(sizes) - sizes
    groups = np.flatnonzero(out["visible"].any(1))  # each region is one
    out["shown_gene"] = np.tile(np.arange(20), len(groups))
    out["shown_value"] = rng.uniform(0.1, 1, len(out["shown_gene"]))
    out["shown_offsets"] = np.cumsum([0, *(20 * out["visible"].any(1))])
    out["input_log_genes"] = np.log1p(sizes).reshape(regions, n)
    out["input_log_depth"] = 2 * out["input_log_genes"]
    out["genes"] = np.arange(10, 10 + k)
    weight = np.where(np.arange(k) < k - 3, 1.0, 2.5) * np.ones((regions, 1))
    weight[:, 0] = 0  # the first loss gene is on no panel
    out["gene_weight"] = weight
    out["target_count"] = rng.poisson(2.0, (regions, n, k))
    hidden = out["wholly_hidden"][..., None] | (rng.random((regions, n, k)) < 0.3)
    out["target_mask"] = hidden & (weight > 0)[:, None] & out["profile"][..., None]
    out["target_log_depth"] = np.where(out["profile"], math.log(100), 0)
    out["depth_target"] = rng.normal(size=(regions, n))
    out["depth_mask"] = out["wholly_hidden"]


def contrast(out: dict, regions: int) -> None:
    """Regions of other groups are 10 mm apart; profiles that show a gene have a part."""
    out["place_um"] = (out["xy_um"] + 1e4 * np.arange(regions)[:, None, None]).astype(np.float32)
    part = out["visible"] & (out["input_log_genes"] > 0)
    apart = np.linalg.norm(out["place_um"][:, :, None] - out["place_um"][:, None], axis=-1) >= APART_UM
    out["negatives"] = np.where(part, (apart & part[:, None]).sum(-1), -1)


def awake(model: Storm, scale: float = 0.3) -> Storm:
    """The model with every parameter moved, so that no branch is still zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale / parameter.shape[-1] ** 0.5)
    return model


def double(batch: Batch) -> Batch:
    """The batch with its floats in float64."""
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


def choose_profiles(batch: Batch, rows: list[int]) -> Batch:
    """The batch with the profiles `rows` of each region in that order; -1 is a padded place."""
    regions, n = batch["profile"].shape
    keep = torch.tensor(rows)
    out = dict(batch)
    for name, (_, shape) in BATCH.items():
        if shape.startswith("R N"):
            out[name] = batch[name][:, keep.clamp_min(0)].clone()
            out[name][:, keep < 0] = 0
    starts = batch["input_offsets"].view(regions, n)
    ends = torch.cat([batch["input_offsets"][1:], torch.tensor([len(batch["input_gene"])])]).view(regions, n)
    empty = torch.arange(0)
    entries = [
        torch.arange(int(starts[r, i]), int(ends[r, i])) if i >= 0 else empty for r in range(regions) for i in rows
    ]
    sizes = torch.tensor([len(e) for e in entries])
    chosen, offsets = torch.cat(entries), sizes.cumsum(0) - sizes
    out |= {"input_gene": batch["input_gene"][chosen], "input_value": batch["input_value"][chosen]}
    return completed(out | {"input_offsets": offsets})


def pad_tiles(batch: Batch, extra: int) -> Batch:
    """The batch with `extra` absent tiles per region, and a grid with one more row and column."""
    out = dict(batch)
    regions, c = batch["tile_present"].shape
    for name, (_, shape) in BATCH.items():
        if shape.startswith("R C"):
            out[name] = torch.cat([batch[name], batch[name].new_zeros(regions, extra, *batch[name].shape[2:])], dim=1)
    out["tile_slot"] = batch["tile_slot"] // c * (c + extra) + batch["tile_slot"] % c
    return out | {"tile_at": torch.nn.functional.pad(batch["tile_at"], (0, 1, 0, 1), value=-1)}
