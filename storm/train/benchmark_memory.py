"""The memory that one region takes in training, measured beside the estimate of storm.model.flops.

In: a model config, a sample. Out: a table in Markdown. Each case runs in a process of its own, on the CPU in fp32:
the peak of its resident memory (VmHWM) over a forward and a backward pass, less what it held before with the model and
the batch. Gradients lie there from the start, as in any micro-batch but the first, and count.
"""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import torch

from storm.markdown import table
from storm.model import flops
from storm.model.storm import Storm
from storm.presets import EXPRESSIONS, ModelConfig
from storm.train.benchmark_model import Sample, make_batch, train


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def case(model: ModelConfig, sample: Sample, genes: int, checkpointing: bool, threads: int) -> tuple[int, float, int]:
    """(measured, estimated activations, gradients) in bytes, in this process."""
    torch.set_num_threads(threads)
    little = ModelConfig(expression=model.expression)  # the code of the libraries is read in before, by a small model
    train(Storm(little, genes), make_batch(replace(sample, side=1), little, genes))
    batch, network = make_batch(sample, model, genes), Storm(model, genes, 0, checkpointing)
    size = flops.sizes(batch, model.registers, padded=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident_bytes("VmRSS")
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 0.0)
        parameter.grad.add_(1)  # pages of zeros are not there before they are written
    train(network, batch)
    gradients = sum(p.numel() * p.element_size() for p in network.parameters())
    kept = flops.activation_bytes(model, size, False, checkpointing) + flops.working_bytes(model, size, False)
    return resident_bytes("VmHWM") - before, kept, gradients


def case_apart(
    model: ModelConfig, sample: Sample, genes: int, checkpointing: bool, threads: int
) -> tuple[int, float, int]:
    """`case` in a process of its own: one that has freed memory would take it again, and seem to need none."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(case, (model, sample, genes, checkpointing, threads))


def memory_table(model: ModelConfig, sample: Sample, genes: int, threads: int) -> str:
    """Measured and estimated GB, of bag and tokens, with and without activation checkpointing."""
    rows = []
    for expression in EXPRESSIONS:
        for checkpointing in (False, True):
            chosen = replace(model, expression=expression)
            found, kept, gradients = case_apart(chosen, sample, genes, checkpointing, threads)
            rows.append([expression, "yes" if checkpointing else "no", f"{found / 1e9:.2f}",
                         f"{(kept + gradients) / 1e9:.2f}", f"{kept / 1e9:.2f}", f"{gradients / 1e9:.2f}",
                         f"{found / (kept + gradients):.2f}"])  # fmt: skip
    columns = ["expression", "checkpointing", "measured GB", "estimated GB", "activations, work", "gradients", "ratio"]
    tiles = sample.regions * sample.side**2
    return f"{tiles} tiles, {sample.regions * sample.profiles} profiles, fp32, torch {torch.__version__}\n\n" + table(
        columns, rows
    )
