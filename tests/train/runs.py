"""Small runs for the tests; as a script, one rank of a job that trains one and writes its first gradients.

A run beside it, left by another number of ranks, is continued by the same job.
"""

import functools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from storm import losses
from storm.config import RunConfig, load
from storm.data.batch import spec_of
from storm.data.corpus import open_corpus
from storm.data.stream import GroupStream, batches
from storm.shards import ShardSet
from storm.train import engine
from storm.train.trainer import FINISHED, NotFiniteError, Trainer, fit_model

MEASURED = ("perf/", "mem/")  # tags of these differ from run to run
THRESHOLD = "deepspeed.extra.zero_optimization.stage3_param_persistence_threshold"
BATCH, STEPS, STOP = 4, 20, 10
# Small tensors would stay whole on every rank in ZeRO 3; with this none does.
DIVIDED = f"{THRESHOLD}=0"
# Every other switch of the model, and a first step in which groups come without a tile.
SWITCHED = (
    "model.expression=tokens", "model.position=distance_bias", "mask.gene_only=0.6", "model.expression_genes=40",
    "model.expression_zeros=8", "model.expression_width=32",
)  # fmt: skip
KEEP = ("checkpoint.every_steps=10", "checkpoint.keep_every=10")


def words(shards: Path, run_dir: Path, micro: int = 1, *more: str) -> list[str]:
    """The overrides that make a small run: no preset, no file."""
    return [
        f"run_dir={run_dir}", f"data.shards={shards}", "data.workers=0", f"data.global_batch_size={BATCH}",
        f"data.micro_batch_size={micro}", f"optim.steps={STEPS}", "optim.lr=2e-3", "checkpoint.every_steps=100",
        "mask.loss_genes=200", *more,
    ]  # fmt: skip


def all_terms(shards: Path, run_dir: Path, micro: int) -> list[str]:
    """A run of groups of up to 80 profiles, with every term at work from the first step."""
    more = ["model.align_width=8", "model.likelihood=zinb", "loss.corr_from=0", "loss.align_from=0"]
    shown = ["mask.gene_only=0", "mask.hide_tiles=0.2", "mask.panel_subsampling=0", "mask.thinning=0"]
    same = "data.global_batch_size=8", *more, *shown
    return [*words(shards, run_dir, micro, *same), f"seed={seed_of_all_terms(*words(shards, Path('any'), 8, *same))}"]


@functools.cache
def seed_of_all_terms(*overrides: str) -> int:
    """The first seed whose first global batch holds what every term but anchor is computed of.

    The count of corr asks for 64 wholly hidden profiles in a group, which few views have.
    """
    corpus = open_corpus(load(RunConfig, None, list(overrides)).data)
    for seed in range(200):
        config = load(RunConfig, None, [*overrides, f"seed={seed}"])
        model, share = fit_model(config.model, corpus), corpus.genes.share
        assert share is not None
        spec = spec_of(model, corpus.panels, share)
        batch = GroupStream(corpus, spec, config.mask, config.data, seed)[0]
        counts = losses.counts(batch, losses.absent(model))
        if all(counts[term] > 0 for term in losses.TERMS if term != "anchor"):
            return seed
    raise ValueError(f"{corpus.name}: no seed shows every term; give its groups more profiles")


def kept(shards: Path, run_dir: Path, *more: str) -> RunConfig:
    """A run in micro-batches of one group that keeps its checkpoints of the steps STOP and STEPS."""
    return load(RunConfig, None, words(shards, run_dir, 1, *KEEP, *more))


def descriptors(shards: Path, folder: Path) -> str:
    """The word that gives a run a table of descriptors, which is written; the first gene has no row."""
    ids = ShardSet(shards).genes.ids
    rng = np.random.default_rng(0)
    np.savez(folder / "descriptors.npz", gene_id=np.array(ids[1:]), descriptor=rng.normal(size=(len(ids) - 1, 6)))
    return f"data.descriptors={folder / 'descriptors.npz'}"


def train(
    shards: Path, run_dir: Path, world: engine.World, *more: str, resume: str = "auto", stop: int | None = None
) -> Trainer:
    """A run of three steps, or its continuation."""
    trainer = Trainer(load(RunConfig, None, words(shards, run_dir, 2, "optim.steps=3", *more)), world)
    trainer.start(resume)
    trainer.train(stop)
    return trainer


def carry(run: Path, to: Path) -> Path:
    """A copy of a run as it stood at step STOP."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns(FINISHED, f"step_{STEPS:07d}"))
    return to


def log(run_dir: Path) -> list[dict]:
    """The records of log.jsonl, without what is measured and without the marks of a resumed run."""
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [
        {tag: value for tag, value in line.items() if not tag.startswith(MEASURED)}
        for line in lines
        if "event" not in line
    ]


def first_step(config: RunConfig, world: engine.World) -> dict[str, np.ndarray]:
    """Loss and gradients of the first global batch, with weights moved off the zeros that heads start from."""
    trainer = Trainer(config, world)
    generator = torch.Generator().manual_seed(0)
    weights = engine.gather(trainer.engine.weights())[0]
    noise = {name: 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
    trainer.engine.set_weights(lambda name: weights[name] + noise[name])
    loss, parts = trainer.backward(trainer.take(batches(trainer.stream, 0, 1, workers=0)))
    found = {name: gradient.numpy() for name, gradient in trainer.engine.gradients().items()}
    norm = trainer.engine.grad_norm()
    values = {name: np.array(np.nan if value is None else value) for name, value in parts.items()}
    return found | values | {"loss": np.array(loss), "norm": np.array(norm)}


def agree(one: dict[str, np.ndarray], other: dict[str, np.ndarray], relative: float = 1e-5) -> None:
    """Losses and every gradient within `relative`, by the norm of the difference."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (np.isnan(value) == np.isnan(other[name])).all(), name
        difference = np.linalg.norm(np.nan_to_num(value - other[name]))
        assert difference <= relative * np.linalg.norm(np.nan_to_num(value)), name
    gradients = [value for value in one.values() if value.ndim]
    assert sum(bool(value.any()) for value in gradients) > 0.9 * len(gradients) > 20


def steep(found: dict[str, losses.Term]) -> dict[str, losses.Term]:
    """Losses of which depth has the same value and an infinite gradient."""
    total, count = found["depth"]
    return found | {"depth": (total + (total - total.detach()).sqrt(), count)}


def broken(config: RunConfig, world: engine.World, groups: Path) -> str:
    """What a run says whose rank 1 alone has a gradient that is not finite; its groups are written to a file."""
    trainer, honest = Trainer(config, world), losses.terms
    trainer.start("never")
    before = trainer.engine.weights()
    if world.rank == 1:

        def steeper(outputs: losses.Batch, batch: losses.Batch, align_over: str = "group") -> dict[str, losses.Term]:
            return steep(honest(outputs, batch, align_over))

        losses.terms = steeper
        asked = [i for i in range(trainer.stream.accumulation) if trainer.stream[i]["depth_mask"].any()]
        groups.write_text("\n".join(", ".join(trainer.stream.keys(i)) for i in asked))
    try:
        trainer.train()
    except NotFiniteError as error:
        after = trainer.engine.weights()
        assert all(torch.equal(before[name], after[name]) for name in before)
        return str(error)
    finally:
        losses.terms = honest
    raise AssertionError("it trained on")


def main(overrides: list[str], folder: Path) -> None:
    """Write the first gradients, also with every switch and with all terms; train `run` from its start to its end,
    continue `other`, and break one."""
    world = engine.connect()
    table = f"data.descriptors={folder / 'descriptors.npz'}"
    stage = [word for word in overrides if word.startswith(("engine.", "deepspeed."))]
    first = {
        "first": [*overrides, f"run_dir={folder / 'first'}"],
        "switched": [*overrides, *SWITCHED, table, f"run_dir={folder / 'switched'}"],
        "all_terms": [*all_terms(folder / "wide", folder / "everything", 1), *stage],
    }
    for name, words in first.items():
        found = first_step(load(RunConfig, None, words), world)
        if world.rank == 0:
            np.savez(folder / f"{name}.npz", **found)  # type: ignore[arg-type]
    for name, resume in (("run", "never"), ("other", "auto")):
        trainer = Trainer(load(RunConfig, None, [*overrides, f"run_dir={folder / name}"]), world)
        trainer.start(resume, ["engine.zero_stage", THRESHOLD])
        trainer.train()
    said = broken(load(RunConfig, None, [*overrides, f"run_dir={folder / 'broken'}"]), world, folder / "groups.txt")
    (folder / f"said{world.rank}.txt").write_text(said)
    engine.barrier()
    engine.disconnect()


if __name__ == "__main__":
    main(sys.argv[2:], Path(sys.argv[1]))
