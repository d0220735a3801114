"""What a forward and a backward pass of the model cost on a CPU: beside matrix products and timm, and beside one tile
per profile.

In: model configs, sizes of a sample, turns. Out: tables in Markdown. The contenders take turns, so that what else the
machine does meets all alike; figures are medians over the turns, and those of ratios within a turn. Pixels and counts
are noise, fp32, losses included. FLOPs are those of storm.model.flops, of timm's model those that torch counts.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from storm import losses
from storm.data.batch import collate, loss_genes, spec_of
from storm.data.view import plain_view
from storm.markdown import table
from storm.model import flops
from storm.model.storm import Storm
from storm.presets import ModelConfig
from storm.schema import DISC, Group, GroupMeta, Profiles, RegionMeta

Batch = dict[str, Tensor]
Work = Mapping[str, Callable[[], object]]
VIT = "vit_small_patch16_224"
GENES = 18_000  # of the vocabulary
_LOSS_GENES, _UM_APART = 2000, 10_000.0
_PRODUCTS = 5  # of a turn, of which the best counts


@dataclass(frozen=True)
class Sample:
    """What one batch holds: a group of square regions with as many profiles each."""

    name: str
    platform: str
    kind: str
    regions: int
    side: int  # tiles
    profiles: int
    footprint_um: float
    panel: int  # genes
    seen: int  # genes with counts of a profile


GROUP = Sample("Visium-like group", "visium", "spot", 2, 5, 36, 55.0, GENES, 3000)
SPOTS = replace(GROUP, name="Visium-like region", regions=1)
CELLS = Sample("Xenium-like region", "xenium", "cell", 1, 5, 1000, 10.0, 400, 60)
SHOWN = ("H&E only", "bag", "tokens")  # nobody's counts, or those of every second profile


def make_group(sample: Sample, model: ModelConfig, rng: np.random.Generator) -> Group:
    """Noise."""
    side_um, number = sample.side * model.tile_um, sample.regions * sample.profiles
    metas = tuple(RegionMeta((_UM_APART * g, 0.0), sample.side, sample.side) for g in range(sample.regions))
    region = np.repeat(np.arange(sample.regions), sample.profiles).astype(np.int32)
    xy_um = rng.uniform(0, side_um, (number, 2)) + _UM_APART * np.stack([region, 0 * region], -1)
    gene = np.concatenate([np.sort(rng.permutation(sample.panel)[: sample.seen]) for _ in range(number)])
    profiles = Profiles(
        [str(i) for i in range(number)], xy_um, np.full(number, sample.footprint_um, np.float32),
        np.full(number, DISC, np.uint8), np.arange(number + 1) * sample.seen, gene.astype(np.int32),
        (rng.poisson(2, len(gene)) + 1).astype(np.int32),
    )  # fmt: skip
    meta = GroupMeta(
        "s", "s", "d", "t", "none", "none", sample.platform, sample.kind, "p", 0.0, model.tile_mpp, model.tile_px,
        model.tile_mpp, metas,
    )  # fmt: skip
    places = [(g, y, x) for g in range(sample.regions) for y in range(sample.side) for x in range(sample.side)]
    px = model.tile_px
    return Group(meta, profiles, region, {at: rng.integers(0, 256, (px, px, 3), dtype=np.uint8) for at in places})


def make_batch(sample: Sample, model: ModelConfig, genes: int = GENES, shown: bool = True) -> Batch:
    """The batch of a group of noise; the counts of every second profile are shown, or of none, all profiles asked."""
    rng = np.random.default_rng(0)
    group = make_group(sample, model, rng)
    spec = spec_of(model, {"p": np.arange(genes) < sample.panel}, np.full(genes, 1 / genes))
    visible = (np.arange(len(group.profiles)) % 2 == 0) & shown
    return collate([group], [plain_view(group, visible)], spec, loss_genes(spec, _LOSS_GENES, rng))


def train(network: Storm, batch: Batch) -> Tensor:
    """Forward, losses, backward; the loss."""
    found = losses.terms(network(batch), batch)
    loss = torch.stack([total / count.clamp_min(1) for total, count in found.values()]).sum()
    loss.backward()
    return loss.detach()


def in_turns(work: Work, turns: int) -> dict[str, list[float]]:
    """Seconds of each work, turn by turn, after one turn to warm up."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(turns + 1):
        for name, call in work.items():
            began = time.perf_counter()
            call()
            if turn:
                found[name].append(time.perf_counter() - began)
    return found


def conditions(turns: int) -> str:
    """Under which a table was made."""
    return (
        f"fp32, {torch.get_num_threads()} threads, medians of {turns} turns, torch {torch.__version__}, load "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the end"
    )


# Beside matrix products and timm


def _encode(network: Storm, tiles: Tensor) -> None:
    network.morphology(tiles, torch.ones(len(tiles)))[1].sum().backward()


def _counted(work: Callable[[], object]) -> float:
    """FLOPs of a call; the plain attention, because the counter does not know the fused one of the CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def timm_models(model: ModelConfig, vit: str = VIT) -> dict[str, torch.nn.Module]:
    """timm's plain `vit`, and timm's transformer of our own block and size: SwiGLU, RMSNorm, also on queries and keys,
    rotary places, no biases."""
    import timm
    from timm.layers.norm import RmsNorm
    from timm.models.eva import Eva

    same = Eva(
        img_size=model.tile_px, patch_size=model.patch_px, num_classes=0, embed_dim=model.image_width,
        depth=model.image_depth, num_heads=model.image_width // model.head_width, mlp_ratio=8 / 3, swiglu_mlp=True,
        qkv_bias=False, qk_norm=True, norm_layer=RmsNorm, class_token=False, use_abs_pos_emb=False,
        use_rot_pos_emb=True, attn_type="rope",
    )  # fmt: skip
    return {
        f"timm {vit}": timm.create_model(vit, pretrained=False, num_classes=0, img_size=model.tile_px),
        "timm of the same block": same,
    }


def gemm_share(model: ModelConfig, sample: Sample, turns: int, vit: str = VIT, side: int = 3072) -> str:
    """The table of GFLOP/s: products of matrices of that side, the whole model, its tile encoder, `timm_models`."""
    batch, network = make_batch(sample, model), Storm(model, GENES)
    tiles, size = batch["tiles"], flops.sizes(batch, model.registers, padded=True)
    images = tiles.permute(0, 3, 1, 2).float().div(255).contiguous()
    a, b = torch.randn(2, side, side)
    theirs: Work = {name: lambda n=n: n(images).sum().backward() for name, n in timm_models(model, vit).items()}  # type: ignore[misc]
    products: Work = {f"product {i}": lambda: a @ b for i in range(_PRODUCTS)}
    ours: Work = {"STORM": lambda: train(network, batch), "its tile encoder": lambda: _encode(network, tiles)}
    levels = flops.training(model, size)
    done = dict.fromkeys(products, 2.0 * side**3) | {name: _counted(call) for name, call in theirs.items()}
    done |= {"STORM": sum(levels.values()), "its tile encoder": levels["morphology"]}
    seconds = in_turns({**products, **ours, **theirs}, turns)
    rate = {name: [done[name] / s for s in seconds[name]] for name in seconds}
    peak = [max(turn) for turn in zip(*(rate[name] for name in products), strict=True)]
    rows = [[f"matrix product, best of {_PRODUCTS}", f"{2e-9 * side**3:.0f}", f"{_middle(peak) / 1e9:.0f}", "1"]]
    rows[0] += [""] * len(theirs)
    for name in [*ours, *theirs]:
        against = [f"{_ratio(rate[name], of):.3f}" for of in (peak, *(rate[other] for other in theirs))]
        rows.append([name, f"{done[name] / 1e9:.0f}", f"{_middle(rate[name]) / 1e9:.0f}", *against])
    head = f"{sample.name}: {len(tiles)} tiles of {model.tile_px} px, {batch['profile'].sum()} profiles, "
    columns = ["forward and backward", "GFLOP", "GFLOP/s", "/ product", *(f"/ {name}" for name in theirs)]
    return f"{head}{size.genes} loss genes; {conditions(turns)}\n\n" + table(columns, rows)


def _middle(values: list[float]) -> float:
    return statistics.median(values)


def _ratio(of: list[float], to: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(of, to, strict=True))


# Beside one tile per profile


def with_features(batch: Batch, width: int) -> Batch:
    """The batch with features in place of pixels, which take a gradient: what is left of a step without the encoder."""
    regions, n = batch["profile"].shape
    rest = {name: tensor for name, tensor in batch.items() if name != "tiles"}
    return rest | {
        "profile_feature": torch.randn(regions, n, 2, width, requires_grad=True),
        "profile_valid": torch.ones(regions, n, 2),
        "tile_feature": torch.randn(len(batch["tiles"]), width, requires_grad=True),
    }


def profile_rates(model: ModelConfig, samples: tuple[Sample, ...], turns: int) -> str:
    """The table of profiles per second, ours and with a tile of its own for each profile.

    The latter is reckoned: the encoder's time for the tiles of the region, scaled to one tile per profile, and what
    the step takes beside it, with features given (so without reading feature maps).
    """
    networks = {name: Storm(replace(model, expression=name), GENES) for name in SHOWN[1:]}
    batches: dict[tuple[str, str], Batch] = {}
    work: dict[str, Callable[[], object]] = {}
    for sample in samples:
        for shown in SHOWN:
            network = networks.get(shown, networks["bag"])
            batch = make_batch(sample, network.config, shown=shown != SHOWN[0])
            features, key = with_features(batch, model.image_width), f"{sample.name} {shown}"
            batches[sample.name, shown] = batch
            work[f"{key} encoder"] = lambda n=network, b=batch: _encode(n, b["tiles"])  # type: ignore[misc]
            work[f"{key} whole"] = lambda n=network, b=batch: train(n, b)  # type: ignore[misc]
            work[f"{key} rest"] = lambda n=network, b=features: train(n, b)  # type: ignore[misc]
    seconds = in_turns(work, turns)
    rows = []
    for (name, shown), batch in batches.items():
        encoder, whole, rest = (seconds[f"{name} {shown} {part}"] for part in ("encoder", "whole", "rest"))
        number, tiles = int(batch["profile"].sum()), len(batch["tiles"])
        plain = [r + e * number / tiles for r, e in zip(rest, encoder, strict=True)]
        rows.append([name, shown, number, tiles, f"{_middle(encoder):.2f}", f"{_middle(rest):.2f}",
                     f"{_middle(whole):.2f}", f"{number / _middle(whole):.1f}", f"{number / _middle(plain):.1f}",
                     f"{_ratio(plain, whole):.2f}"])  # fmt: skip
    columns = ["", "shown", "profiles", "tiles", "encoder s", "rest s", "STORM s", "STORM profiles/s",
               "a tile each, profiles/s", "ratio"]  # fmt: skip
    return f"{conditions(turns)}; a tile each = rest + encoder x profiles / tiles\n\n" + table(columns, rows)
