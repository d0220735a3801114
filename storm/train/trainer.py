"""The loop: take the micro-batches of a step, weigh their losses against all ranks' counts, move, log, checkpoint.

In: a RunConfig. Out: the run folder,

    config.yaml deepspeed.json    as resolved
    log.jsonl tensorboard/        one record per logged step
    checkpoints/step_0000020/     see storm.checkpoints
    FINISHED                      json, written last

Losses are sums divided by counts of the whole global batch, so neither ranks nor micro-batches change them.
"""

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storm import checkpoints, files, losses
from storm.config import RunConfig, dump
from storm.data.batch import BatchSpec
from storm.data.stream import Batch, GroupStream, batches
from storm.losses import TERMS
from storm.model.storm import Storm
from storm.presets import ModelConfig
from storm.shards import MANIFEST, ShardSet
from storm.train import checkpoint, engine
from storm.train.meter import Meter
from storm.train.metrics import PARTS, RunLog, means, tagged
from storm.train.optim import learning_rate
from storm.train.validate import Validation

FINISHED = "FINISHED"


class RankError(ValueError):
    """A fault that one rank alone has met; the others only wait for it."""


class NotFiniteError(ArithmeticError):
    """A loss or a gradient is NaN or infinite; the optimizer has not moved."""


def pretrain(config: RunConfig, resume: str = "auto", stop_after_step: int | None = None) -> None:
    """Train a run to its end, or to `stop_after_step`, which leaves a checkpoint and does not bend the schedule.

    Args:
        resume: `auto`, `never`, or the path of one of the run's checkpoints.

    Raises:
        ValueError: of config, shards or checkpoint; it names the file, the fact and the cure.
        NotFiniteError: a loss or gradient is not finite.
    """
    if stop_after_step is not None and stop_after_step < 1:
        raise ValueError(f"--stop-after-step {stop_after_step}: no step comes before it; give 1 or more")
    run_dir = Path(config.run_dir)
    if (run_dir / FINISHED).is_file():
        if os.environ.get("RANK", "0") == "0":
            print(f"{run_dir}: the run is finished ({FINISHED}); to train anew choose another run_dir")
        return
    world = engine.connect()
    try:
        trainer = Trainer(config, world)
        trainer.start(resume)
        trainer.train(stop_after_step)
    finally:
        engine.disconnect()


def fit_model(model: ModelConfig, shards: ShardSet) -> ModelConfig:
    """The model's config with the shards' geometry and organs.

    Raises:
        ValueError: the config asks for another geometry than that of the shards.
    """
    manifest = shards.manifest
    found = {"tile_px": manifest["tile_px"], "tile_mpp": manifest["tile_mpp"], "organs": tuple(manifest["organs"])}
    for field in dataclasses.fields(ModelConfig):
        asked = getattr(model, field.name)
        if field.name in found and asked not in (field.default, found[field.name]):
            raise ValueError(
                f"{shards.folder / MANIFEST}: {field.name} is {found[field.name]}, the config asks for {asked}; "
                f"leave model.{field.name} out, or pack again"
            )
    return dataclasses.replace(model, **found)


def reference(shards: ShardSet, split: str, seed: int) -> dict[str, Any]:
    """What inference and the model card need of the data: no slide or donor is named."""
    manifest = shards.manifest
    index = shards.index(split)
    of_slide: dict[str, int] = {}
    for key, profiles in zip(index.keys, index.profiles.tolist(), strict=True):
        slide = key.rpartition("_")[0]
        of_slide[slide] = of_slide.get(slide, 0) + profiles
    counted: dict[str, dict[str, dict[str, int]]] = {"study": {}, "organ": {}, "platform": {}}
    for slide, profiles in sorted(of_slide.items()):
        for what, table in counted.items():
            row = table.setdefault(manifest["slides"][slide][what], {"slides": 0, "profiles": 0})
            row["slides"] += 1
            row["profiles"] += profiles
    return manifest["reference"] | {
        "gene_hash": shards.genes.hash, "split_by": manifest["split_by"], "seed": seed,
        "shards_hash": files.sha256_file(shards.folder / MANIFEST), "spots_side": manifest["prep"]["spots_side"],
        "licenses": {study: manifest["licenses"][study] for study in counted["study"]},
        "studies": counted["study"], "organs": counted["organ"], "platforms": counted["platform"],
    }  # fmt: skip


class Trainer:
    """One run on one rank."""

    def __init__(self, config: RunConfig, world: engine.World) -> None:
        shards = ShardSet(Path(config.data.shards))
        share = shards.genes.share
        if share is None:
            raise ValueError(f"{shards.folder}: the gene table has no column `share`; pack again")
        self.config = config.model_copy(update={"model": fit_model(config.model, shards)})
        self.world, self.run_dir, self.step = world, Path(config.run_dir), 0
        data, model = self.config.data, self.config.model
        spec = BatchSpec(model.tile_px, len(shards.genes), shards.panels, model.organs, share)
        self.stream = GroupStream(
            shards, data.split, spec, config.mask, config.mask.loss_genes, config.seed,
            data.global_batch_size, data.micro_batch_size, world.rank, world.size,
        )  # fmt: skip
        torch.manual_seed(config.seed * 1_000_003 + world.rank)
        network = Storm(model, len(shards.genes), config.seed, config.engine.activation_checkpointing)
        network.set_gene_bias(torch.from_numpy(np.log(share)).float())
        self.engine = engine.Engine(network, self.config, self.stream.accumulation, world)
        platforms = {slide: str(entry["platform"]) for slide, entry in shards.manifest["slides"].items()}
        self.meter = Meter(model, platforms, world)
        self.checkpoint_s = 0.0  # spent on saving since the last record of the log
        self.validation = Validation(shards, spec, self.config, world) if self.config.validation.every_steps else None
        self.contents = checkpoint.Contents(
            dump(self.config), model, shards.genes, reference(shards, data.split, config.seed)
        )

    def start(self, resume: str) -> None:
        """Continue from a checkpoint, or begin, and write the resolved configs."""
        found = checkpoint.find(self.run_dir, resume)
        if found:
            checkpoint.check(found, self.contents, self.world)
            self.step = self.stream.step_at(checkpoint.load(found, self.engine, self.world))
            engine.barrier()  # nothing is removed before every rank has loaded
        if self.world.rank == 0:
            print(f"{self.run_dir}: {f'continues from {found.name}' if found else 'begins'}", flush=True)
            checkpoint.sweep(self.run_dir)
            if found and (gone := checkpoint.discard_after(self.run_dir, self.step)):
                print(f"{self.run_dir}: removed the later checkpoints {', '.join(gone)}", flush=True)
            files.write_bytes(self.run_dir / "config.yaml", self.contents.config.encode())
            files.write_json(self.run_dir / "deepspeed.json", engine.settings(self.config, self.stream.accumulation))
        engine.barrier()

    def train(self, stop_after_step: int | None = None) -> None:
        """The steps up to the end of the schedule, or to `stop_after_step`."""
        steps, every = self.config.optim.steps, self.config.checkpoint.every_steps
        last = steps if stop_after_step is None else min(steps, stop_after_step)
        log = RunLog(self.run_dir, self.step) if self.world.rank == 0 else None
        pin = self.world.device.type == "cuda"
        source = batches(self.stream, self.step, last, self.config.data.workers, pin)
        while self.step < last:
            record = self._train_step(source)
            watched = self._validates()
            if watched:
                record |= watched.run(self.engine)
            if watched or self.step % self.config.log_every == 0 or self.step == last:
                record |= self.meter.read() | {"perf/checkpoint_s": self.checkpoint_s}
                self.checkpoint_s = 0.0
                if log:
                    log.write(record)
            if self.step % every == 0 or self.step == last:
                self._save()
        if log:
            log.close()
        if self.world.rank == 0 and self.step == steps:
            files.write_json(self.run_dir / FINISHED, {"step": self.step, "code_version": checkpoints.code_version()})
        if self.world.rank == 0:
            print(f"{self.run_dir}: step {self.step} of {steps}", flush=True)

    def _validates(self) -> Validation | None:
        """The validation, where the step that is over calls for one."""
        due = self.validation and self.step % self.config.validation.every_steps == 0
        return self.validation if due or self.step == self.config.optim.steps else None

    def _train_step(self, source: Iterator[Batch]) -> dict[str, Any]:
        """One optimizer step; the record for the log."""
        self.meter.begin()
        micro = self.take(source)
        self.meter.loaded()
        loss, parts = self.backward(micro)
        norm = self.engine.grad_norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NotFiniteError(self._explain(norm))
        rate = learning_rate(self.step, self.config.optim)
        self.engine.step(rate)
        self._count(micro)
        self.step += 1
        self.meter.end()
        return {
            "step": self.step, **tagged("train/loss", loss, parts), "optim/lr": rate, "optim/grad_norm": norm,
            "progress/samples": self.step * self.config.data.global_batch_size,
            "progress/epoch": self.stream.position(self.step).epoch,
        }  # fmt: skip

    def _count(self, micro: list[Batch]) -> None:
        """Tell the meter what the step held; here, where a device is still busy with it."""
        first = self.step * self.stream.accumulation
        for i, batch in enumerate(micro):
            self.meter.count(batch, self.stream.keys(first + i))

    def take(self, source: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of this rank's next step."""
        try:
            return list(itertools.islice(source, self.stream.accumulation))
        except ValueError as error:
            # A loader process hands its error over as a traceback in text; the last line is the error itself.
            fact = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
            raise RankError(f"rank {self.world.rank}, step {self.step + 1}: {fact}") from error

    def backward(self, micro: list[Batch]) -> tuple[float, dict[str, float | None]]:
        """Forward and backward of a step's micro-batches; the global loss and its parts, in the log's names.

        The counts come first and from the batches alone, so each micro-batch knows its share of the mean.
        """
        counts = self._counts(micro)
        self.meter.start()
        sums: dict[str, Tensor] = {}
        self.partial: list[dict[str, Tensor]] = []  # each micro-batch's sums, to name a fault
        for i, batch in enumerate(micro):
            batch = {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in batch.items()}
            outputs = self.engine.forward(batch)
            found = {name: total for name, (total, _) in losses.terms(outputs, batch).items()}
            share = [self._weight(name) * found[name] / counts[name].clamp_min(1) for name in TERMS]
            if last := i + 1 == len(micro):
                self.meter.arrive()
            self.engine.backward(torch.stack(share).sum(), last)
            self.partial.append({name: total.detach() for name, total in found.items()})
            modes = losses.expr_by_mode(outputs, batch)
            for mode, (total, count) in modes.items():
                found |= {f"expr_{mode}": total, f"count_expr_{mode}": count}
            for name, total in found.items():
                sums[name] = sums.get(name, 0) + total.detach().double()
        return self._means(sums, counts)

    def _weight(self, term: str) -> float:
        return float(getattr(self.config.loss, term))

    def _counts(self, micro: list[Batch]) -> dict[str, Tensor]:
        """Each term's count over all micro-batches and ranks; left on the device, so that nothing waits for it."""
        own = [torch.stack(list(losses.counts(batch).values())) for batch in micro]
        total = engine.sum_over_ranks(torch.stack(own).sum(0).to(self.world.device))
        return dict(zip(TERMS, total, strict=True))

    def _means(self, sums: dict[str, Tensor], counts: dict[str, Tensor]) -> tuple[float, dict[str, float | None]]:
        """Loss over all ranks, from this rank's sums, and its parts; None where nothing was asked."""
        summed = engine.sum_over_ranks(torch.stack(list(sums.values())))
        values = torch.cat([summed, torch.stack([counts[name] for name in TERMS])]).tolist()
        names = [*sums, *(f"count_{name}" for name in TERMS)]
        found = dict(zip(names, values, strict=True))
        return means(found, {part: found[f"count_{part}"] for part in PARTS}, self.config.loss)

    def _explain(self, norm: float) -> str:
        """Which ranks, terms and groups are not finite; the same text on every rank."""
        first = self.step * self.stream.accumulation
        own = [
            f"rank {self.world.rank}: {name} of groups {', '.join(self.stream.keys(first + i))}"
            for i, found in enumerate(self.partial)
            for name, total in found.items()
            if not math.isfinite(float(total))
        ]
        faults = [fault for faults in engine.gather(own) for fault in faults]
        if not faults:
            wrong = [name for name, grad in self.engine.gradients().items() if not bool(grad.isfinite().all())]
            keys = engine.gather([self.stream.keys(first + i) for i in range(self.stream.accumulation)])
            faults = [f"gradient norm {norm}, in {', '.join(wrong[:8])}; groups {keys}"]
        return (
            f"{self.run_dir}: step {self.step + 1} is not finite ({'; '.join(faults)}); the weights have not moved: "
            "look at these groups, or start again with a lower optim.lr in another run_dir"
        )

    def _save(self) -> None:
        began = time.perf_counter()
        position = self.stream.position(self.step)
        keep = self.config.checkpoint.keep_last
        checkpoint.save(self.run_dir, self.step, position, self.contents, self.engine, self.world, keep)
        self.checkpoint_s += time.perf_counter() - began
