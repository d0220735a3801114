"""What a run would be, before it is one: config, layout, sizes, memory, and one synthetic batch through the model.

In: a RunConfig and the number of ranks. Out: text. Nothing is written, no process group is joined. The batch has the
sizes of the largest group of the split. On a CPU it is cut, and said to be, where it would take minutes.
"""

import dataclasses
import math
import time

import numpy as np
import simplejpeg
import torch

from storm import losses
from storm.config import RunConfig, dump
from storm.data.batch import BatchSpec, collate, loss_genes, spec_of
from storm.data.corpus import Corpus, open_corpus
from storm.data.order import accumulation
from storm.data.stream import Batch
from storm.data.view import draw_view, view_rng
from storm.model import flops
from storm.model.flops import Sizes
from storm.model.storm import Storm
from storm.presets import ModelConfig
from storm.schema import DISC, Group, GroupMeta, Profiles, RegionMeta
from storm.train import capacity
from storm.train.trainer import NotFiniteError, fitted

_CPU_FLOPS, _CPU_TILES, _CPU_PROFILES = 2e11, 4, 16
_GENES_SEEN = 0.2  # share of the panel's genes with counts in a profile of the synthetic batch
_SPOT_UM = 55.0


def dry_run(config: RunConfig, ranks: int) -> str:
    """The whole text.

    Raises:
        ValueError: of config or shards; it names the file, the fact and the cure.
        NotFiniteError: the synthetic batch gave no finite loss or gradient.
    """
    shards = open_corpus(config.data)
    config = fitted(config, shards)
    tiles, profiles = (np.concatenate([getattr(part.index, name) for part in shards.groups.parts])
                       for name in ("tiles", "profiles"))  # fmt: skip
    micro = config.data.micro_batch_size
    rounds = accumulation(config.data.global_batch_size, micro, ranks)
    genes = len(shards.genes)
    asked = min(config.mask.loss_genes, genes)
    biggest = times(sizes_of(config.model, int(tiles.max()), int(profiles.max()), asked), micro)
    mean = sizes_of(config.model, float(tiles.mean()), float(profiles.mean()), asked)
    parts = [
        "# config\n" + dump(config).rstrip(),
        "# layout\n" + layout(config, shards, ranks, rounds),
        "# model\n" + model_table(config.model, genes),
        "# one step\n" + step_table(config.model, times(mean, config.data.global_batch_size)),
        "# memory per GPU\n" + memory_table(config, genes, biggest, ranks),
        "# one synthetic batch\n",
    ]
    made = synthetic(config, shards, int(tiles.max()), int(profiles.max()), biggest)
    return "\n\n".join(parts) + made


def layout(config: RunConfig, shards: Corpus, ranks: int, rounds: int) -> str:
    """Ranks, accumulation and micro-batches; what is streamed; how long the schedule is."""
    data = config.data
    groups, indices = len(shards.groups), [part.index for part in shards.groups.parts]
    epoch = groups / data.global_batch_size
    return (
        f"{data.global_batch_size} groups per step = {ranks} ranks x {rounds} micro-batches x {data.micro_batch_size} "
        f"groups; ZeRO stage {config.engine.zero_stage}, {config.engine.precision}\n"
        f"split {data.split}: {len(shards.shard_groups)} shards, {groups} groups, "
        f"{sum(int(index.profiles.sum()) for index in indices)} profiles, "
        f"{sum(int(index.tiles.sum()) for index in indices)} tiles\n"
        f"an epoch is {epoch:.1f} steps, the schedule of {config.optim.steps} steps "
        f"{config.optim.steps / epoch:.1f} epochs"
    )


def model_table(model: ModelConfig, genes: int) -> str:
    """Parameters of each level."""
    found = flops.parameters(model, genes)
    rows = [f"{level:<12}{number:>14,}" for level, number in (found | {"all": sum(found.values())}).items()]
    return "\n".join([f"{'parameters':<12}{'':>14}", *rows])


def sizes_of(model: ModelConfig, tiles: float, profiles: float, genes: int) -> Sizes:
    """Sizes of one group of one region, half of whose profiles are visible, with all tokens that they may have."""
    visible = profiles / 2
    tokens, context = model.registers + tiles + profiles, model.registers + tiles + visible
    expressed = visible if model.expression == "tokens" else 0.0
    shown = model.expression_genes + model.expression_zeros
    return Sizes(
        tiles, tiles, profiles, tokens, context, tokens * context, genes, expressed, expressed * shown,
        expressed * shown**2,
    )  # fmt: skip


def times(size: Sizes, groups: int) -> Sizes:
    """The sizes of so many such groups; the loss genes are the same for all."""
    grown = {name: value * groups for name, value in vars(size).items() if name != "genes"}
    return dataclasses.replace(size, **grown)


def step_table(model: ModelConfig, size: Sizes) -> str:
    """Tokens and FLOPs of a step over all ranks."""
    patches = (model.tile_px // model.patch_px) ** 2
    work = flops.training(model, size)
    rows = [
        ("patches of tiles", size.tiles * patches, "morphology"),
        ("parts of profiles, genes", size.profiles * flops.PARTS + size.shown, "expression"),
        ("tokens of regions", size.tokens, "space"),
        ("loss genes x profiles", size.genes * size.profiles, "heads"),
    ]
    lines = [f"{name:<24}{tokens:>16,.0f}{work[level] / 1e12:>12.3f} TFLOP" for name, tokens, level in rows]
    return "\n".join([*lines, f"{'all':<24}{'':>16}{sum(work.values()) / 1e12:>12.3f} TFLOP, forward and backward"])


def memory_table(config: RunConfig, genes: int, micro: Sizes, ranks: int) -> str:
    """GB per GPU in each ZeRO stage; the stage of the config is marked."""
    parameters = sum(flops.parameters(config.model, genes).values())
    half = config.engine.precision == "bf16"
    kept = flops.activation_bytes(config.model, micro, half, config.engine.activation_checkpointing)
    lines = ["GB     parameters  gradients  optimizer  buffers  bf16 copies  activations     all"]
    for stage in capacity.STAGES:
        found = capacity.state(parameters, stage, ranks, half)
        cells = (*dataclasses.astuple(found), kept, found.total + kept)
        numbers = "".join(f"{c / 1e9:>{width}.2f}" for c, width in zip(cells, (10, 11, 11, 9, 13, 13, 8), strict=True))
        mark = "  <- engine.zero_stage" if stage == config.engine.zero_stage else ""
        lines.append(f"ZeRO {stage} {numbers}{mark}")
    return "\n".join([*lines, "activations are an estimate, for a micro-batch of the largest groups of the split"])


def synthetic(config: RunConfig, shards: Corpus, tiles: int, profiles: int, whole: Sizes) -> str:
    """Run one forward and one backward pass on made-up groups, on the device that this process would train on.

    Raises:
        NotFiniteError: a loss or gradient is not finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    groups, cut = config.data.micro_batch_size, ""
    work = sum(flops.training(config.model, whole).values())
    if device.type == "cpu" and work > _CPU_FLOPS:
        cut = f" (cut from {groups} groups of {tiles} tiles and {profiles} profiles: {work / 1e12:.1f} TFLOP on a CPU)"
        tiles, profiles, groups = min(tiles, _CPU_TILES), min(profiles, _CPU_PROFILES), 1
    half = config.engine.precision == "bf16" and device.type == "cuda"
    batch = make_batch(config, shards, tiles, profiles, groups)
    network = Storm(config.model, len(shards.genes), config.seed, config.engine.activation_checkpointing)
    network = network.to(device)
    began = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        found = losses.terms(network(moved), moved)
    loss = torch.stack([total / count.clamp_min(1) for total, count in found.values()]).sum()
    loss.backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None]))
    value = float(loss.detach())
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise NotFiniteError(f"the synthetic batch gave a loss of {value} and a gradient norm of {norm}")
    peak = f", at most {torch.cuda.max_memory_allocated() / 1e9:.2f} GB of the device" if device.type == "cuda" else ""
    return (
        f"{groups} groups of {tiles} tiles and {profiles} profiles{cut}, on {device.type} in "
        f"{'bf16' if half else 'fp32'}: loss {value:.3f}, gradient norm {norm:.3f}, "
        f"{time.perf_counter() - began:.1f} s forward and backward{peak}"
    )


def make_batch(config: RunConfig, shards: Corpus, tiles: int, profiles: int, groups: int) -> Batch:
    """A micro-batch of made-up groups, shown as in training."""
    share = shards.genes.share
    if share is None:
        raise ValueError(f"{shards.name}: the gene table has no column `share`; pack again")
    spec = spec_of(config.model, shards.panels, share)
    made = [make_group(config.model, spec, tiles, profiles, view_rng(config.seed, 0, i)) for i in range(groups)]
    views = [draw_view(g, config.mask, view_rng(config.seed, 1, i), spec.panel(g)) for i, g in enumerate(made)]
    return collate(made, views, spec, loss_genes(spec, config.mask.loss_genes, view_rng(config.seed, 2, 0)))


def make_group(model: ModelConfig, spec: BatchSpec, tiles: int, profiles: int, rng: np.random.Generator) -> Group:
    """One region of noise: `tiles` of a square, spots at random places on it."""
    panel, mask = max(spec.panels.items(), key=lambda item: int(item[1].sum()))
    side = math.ceil(math.sqrt(max(1, tiles)))
    places = [(0, i // side, i % side) for i in range(tiles)]
    noise = rng.integers(0, 256, (model.tile_px, model.tile_px, 3), dtype=np.uint8)
    measured = np.flatnonzero(mask)
    seen = max(1, round(_GENES_SEEN * len(measured)))
    gene = np.concatenate([np.sort(rng.choice(measured, seen, replace=False)) for _ in range(profiles)])
    table = Profiles(
        [f"p{i}" for i in range(profiles)], rng.uniform(0, side * model.tile_um, (profiles, 2)),
        np.full(profiles, _SPOT_UM, np.float32), np.full(profiles, DISC, np.uint8),
        np.arange(profiles + 1) * seen, gene.astype(np.int32), (1 + rng.poisson(1.0, len(gene))).astype(np.int32),
    )  # fmt: skip
    meta = GroupMeta(
        "synthetic", "synthetic", "none", "none", "none", "none", "visium", "spot", panel, 0.0, model.tile_mpp,
        model.tile_px, model.tile_mpp, (RegionMeta((0.0, 0.0), side, side),),
    )  # fmt: skip
    jpeg = simplejpeg.encode_jpeg(noise, quality=90)
    return Group(meta, table, np.zeros(profiles, np.int32), dict.fromkeys(places, jpeg))
