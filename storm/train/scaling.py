"""Past this machine, by arithmetic: what a step reads, computes, keeps and sends, and what of 1 to 512 GPUs it uses.

In: assumptions, each with its source; optionally a shard set, whose mean group takes the place of the assumed one. Out:
text. Nothing in it was measured on a GPU.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from storm.model import flops
from storm.model.flops import Sizes
from storm.presets import ModelConfig, resolve_model
from storm.shards import ShardSet
from storm.train import capacity
from storm.train.dry_run import sizes_of, times
from storm.train.node import columns

RANKS, ROUNDS = (1, 8, 64, 512), (1, 8)
# preset -> groups per micro-batch, activation checkpointing; as in configs/pretrain_*.yaml
RUNS = {"tiny": (1, False), "small": (2, False), "base": (1, True), "large": (1, True)}


@dataclass(frozen=True)
class Assumptions:
    """What the arithmetic stands on. A group is the mean one; its FLOPs vary by `spread`."""

    tiles: float = 50
    profiles: float = 72
    group_bytes: float = 2.7e6
    spread: float = 0.15
    genes: int = 18_000
    loss_genes: int = 2048
    peak_flops: float = 989e12
    mfu: float = 0.30
    gpus_per_node: int = 8
    nvlink_bytes_s: float = 360e9
    network_bytes_s: float = 40e9
    latency_s: float = 30e-6
    decoded_per_core: float = 3600
    host_step_s: float = 4e-3
    host_micro_s: float = 12e-3
    corpus_profiles: float = 1.2e6
    told: str = "assumed: Visium, two regions of 5 x 5 tiles; 20 kB a JPEG, 3,000 genes x 8 bytes a profile"

    def lines(self) -> list[str]:
        """Each with its source."""
        told = [
            ("group", f"{self.tiles:.0f} tiles, {self.profiles:.0f} profiles, {self.group_bytes / 1e6:.1f} MB"),
            ("", self.told),
            ("spread", f"FLOPs of a group vary by {self.spread:.0%} (standard deviation / mean)"),
            ("genes", f"{self.genes:,} in the vocabulary, {self.loss_genes:,} in the loss of a step"),
            ("GPU", f"H100, {self.peak_flops / 1e12:.0f} TFLOP/s dense bf16 (data sheet)"),
            ("MFU", f"{self.mfu:.0%} of it while a GPU computes; published vision transformers reach 13 to 45 %"),
            ("in a node", f"{self.gpus_per_node} GPUs, {self.nvlink_bytes_s / 1e9:.0f} GB/s each way (80 % of NVLink)"),
            ("between nodes", f"{self.network_bytes_s / 1e9:.0f} GB/s each way per GPU (80 % of 400 Gbit/s each)"),
            ("collectives", f"fp32, not overlapped; {self.latency_s * 1e6:.0f} us x log2(GPUs) per call"),
            ("decoding", f"{self.decoded_per_core:,.0f} tiles per second and core (measured, simplejpeg)"),
            ("host", f"{self.host_step_s * 1e3:.0f} ms per step, {self.host_micro_s * 1e3:.0f} ms per micro-batch, not "
             "overlapped (measured on a CPU by `overhead`,"),
            ("", "tiny preset; of the latter 9 ms are taking a batch over from a loader process)"),
            ("corpus", f"{self.corpus_profiles / 1e6:.1f} M profiles"),
        ]  # fmt: skip
        return [f"{name:<15}{text}" for name, text in told]


def from_shards(folder: Path, split: str = "train") -> Assumptions:
    """The assumptions with the mean group, its spread (of tiles) and the genes of a shard set.

    Raises:
        ValueError: no such set or split.
    """
    shards = ShardSet(folder)
    index = shards.index(split)
    entry = shards.manifest["splits"][split]
    size = sum(shard["bytes"] for shard in entry["shards"]) / entry["groups"]
    tiles = np.asarray(index.tiles, np.float64)
    return replace(
        Assumptions(), tiles=float(tiles.mean()), profiles=entry["profiles"] / entry["groups"], group_bytes=size,
        spread=float(tiles.std() / max(1.0, tiles.mean())), genes=len(shards.genes),
        loss_genes=min(Assumptions.loss_genes, len(shards.genes)), told=f"mean of {entry['groups']} groups of a set",
    )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One optimizer step of a preset on a number of GPUs; seconds."""

    compute_s: float
    network_s: float
    waiting_s: float  # for the rank with the most work
    host_s: float

    @property
    def efficiency(self) -> float:
        """The share of the step in which a GPU computes."""
        return self.compute_s / (self.compute_s + self.network_s + self.waiting_s + self.host_s)

    def largest(self) -> str:
        """What costs most beside computing."""
        costs = {
            "the network": self.network_s, "waiting for the rank with the most work": self.waiting_s,
            "the host around the model": self.host_s,
        }  # fmt: skip
        name = max(costs, key=lambda key: costs[key])
        return f"{name} ({costs[name] * 1e3:.0f} ms beside {self.compute_s * 1e3:.0f} ms of computing)"


def micro_batch(preset: str, given: Assumptions) -> tuple[ModelConfig, Sizes]:
    """The model of a preset, and the sizes of a micro-batch."""
    model = resolve_model({"preset": preset})
    return model, times(sizes_of(model, given.tiles, given.profiles, given.loss_genes), RUNS[preset][0])


def step(preset: str, stage: int, ranks: int, rounds: int, given: Assumptions) -> Step:
    """Arithmetic of a step in which each GPU takes `rounds` micro-batches: the global batch grows with the GPUs."""
    model, size = micro_batch(preset, given)
    parameters = sum(flops.parameters(model, given.genes).values())
    compute_s = rounds * sum(flops.training(model, size).values()) / (given.mfu * given.peak_flops)
    speed = given.nvlink_bytes_s if ranks <= given.gpus_per_node else given.network_bytes_s
    calls = {0: 1, 1: 2, 2: rounds + 1, 3: 3 * rounds}[stage] * math.ceil(parameters / capacity.BUCKET)
    sent = capacity.sent_bytes(parameters, stage, ranks, rounds)
    # The largest of many draws is about sqrt(2 ln n) standard deviations above the mean.
    late = given.spread / math.sqrt(RUNS[preset][0] * rounds) * math.sqrt(2 * math.log(ranks))
    return Step(
        compute_s, sent / speed + calls * given.latency_s * math.log2(ranks), compute_s * late,
        given.host_step_s + rounds * given.host_micro_s,
    )  # fmt: skip


def report(given: Assumptions) -> str:
    """All tables."""
    parts = (
        ("assumptions", "\n".join(given.lines())),
        ("read and computed by a GPU that never waits", read_table(given)),
        ("sent by each of 64 GPUs per step, MB", network_table(given)),
        ("kept by each of 64 GPUs, GB, activations (an estimate) included", memory_table(given)),
        ("share of a step in which a GPU computes", efficiency_table(given)),
        ("what breaks first on 512 GPUs, ZeRO 1", breaks(given)),
    )
    return "\n\n".join(f"# {title}\n{text}" for title, text in parts)


def read_table(given: Assumptions) -> str:
    """Per preset: parameters, FLOPs, groups, tiles and bytes per second, cores that decode them."""
    rows = [["preset", "parameters", "TFLOP/group", "groups/step", "groups/s", "tiles/s", "cores to decode", "MB/step",
             "MB/s", "GB/s on 512"]]  # fmt: skip
    for preset, (groups, _) in RUNS.items():
        model, size = micro_batch(preset, given)
        work = sum(flops.training(model, size).values())
        rate = groups / step(preset, 1, 1, 1, given).compute_s
        rows.append(
            [preset, f"{sum(flops.parameters(model, given.genes).values()) / 1e6:.1f} M", f"{work / groups / 1e12:.3f}",
             str(groups), f"{rate:.1f}", f"{rate * given.tiles:.0f}",
             f"{rate * given.tiles / given.decoded_per_core:.1f}", f"{groups * given.group_bytes / 1e6:.1f}",
             f"{rate * given.group_bytes / 1e6:.0f}", f"{512 * rate * given.group_bytes / 1e9:.1f}"]
        )  # fmt: skip
    return columns(rows)


def network_table(given: Assumptions) -> str:
    """Per preset and stage, for one and for eight micro-batches per step."""
    rows = [["preset", "micro-batches", *(f"ZeRO {stage}" for stage in capacity.STAGES)]]
    for preset in RUNS:
        parameters = sum(flops.parameters(resolve_model({"preset": preset}), given.genes).values())
        for rounds in ROUNDS:
            sent = [capacity.sent_bytes(parameters, stage, 64, rounds) / 1e6 for stage in capacity.STAGES]
            rows.append([preset, str(rounds), *(f"{volume:,.0f}" for volume in sent)])
    return columns(rows)


def memory_table(given: Assumptions) -> str:
    """Per preset and stage: everything, and what of it is activations."""
    rows = [["preset", "activations", *(f"ZeRO {stage}" for stage in capacity.STAGES)]]
    for preset, (_, checkpointing) in RUNS.items():
        model, size = micro_batch(preset, given)
        parameters = sum(flops.parameters(model, given.genes).values())
        kept = flops.activation_bytes(model, size, True, checkpointing)
        found = [capacity.state(parameters, stage, 64, True).total + kept for stage in capacity.STAGES]
        rows.append([preset, f"{kept / 1e9:.2f}", *(f"{total / 1e9:.2f}" for total in found)])
    return columns(rows)


def efficiency_table(given: Assumptions) -> str:
    """Per preset, micro-batches per step and stage, for each number of GPUs."""
    rows = [["preset", "micro-batches", "stage", *(f"{ranks} GPUs" if ranks > 1 else "1 GPU" for ranks in RANKS)]]
    for preset in RUNS:
        for rounds in ROUNDS:
            for stage in capacity.STAGES:
                found = [step(preset, stage, ranks, rounds, given).efficiency for ranks in RANKS]
                rows.append([preset, str(rounds), f"ZeRO {stage}", *(f"{share:.1%}" for share in found)])
    return columns(rows)


def breaks(given: Assumptions) -> str:
    """Per preset what costs most, and the batch."""
    lines = [
        f"{preset:<7}{rounds} micro-batches  {step(preset, 1, 512, rounds, given).largest()}"
        for preset in RUNS
        for rounds in ROUNDS
    ]
    profiles = 512 * RUNS["base"][0] * given.profiles
    return "\n".join([
        *lines,
        f"batch  512 GPUs with a group each take {profiles:,.0f} profiles per step, "
        f"{given.corpus_profiles / profiles:.0f} steps per epoch of the corpus:",
        "       no schedule of such batches has been tried, and a smaller one leaves GPUs without a group",
    ])  # fmt: skip
