"""The loop: take the micro-batches of a step, weigh their losses against all ranks' counts, move, log, checkpoint.

In: a RunConfig. Out: the run folder,

    config.yaml deepspeed.json    as resolved
    log.jsonl tensorboard/        one record per logged step
    checkpoints/step_0000020/     see storm.checkpoints
    restarts.json                 how often a machine began it anew without a new checkpoint
    STOP                          to be made by whoever wants the run to save and end
    FINISHED                      json, written last

Losses are sums divided by counts of the whole global batch, so neither ranks nor micro-batches change them.
"""

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storm import checkpoints, descriptors, files, losses
from storm.config import RunConfig
from storm.data.batch import BatchSpec, spec_of
from storm.data.corpus import Corpus, open_corpus
from storm.data.stream import Batch, GroupStream, batches
from storm.genes import GeneTable
from storm.losses import TERMS
from storm.model import encoders
from storm.model.storm import Standard, Storm
from storm.presets import ModelConfig
from storm.shards import MANIFEST, ShardSet
from storm.train import checkpoint, engine, feature_cache, ranks, stop
from storm.train.meter import Meter
from storm.train.metrics import PARTS, RunLog, means, tagged
from storm.train.optim import learning_rate
from storm.train.owner import owned
from storm.train.validate import Validation
from storm.train.watch import Watch

FINISHED = checkpoints.FINISHED


class RankError(ValueError):
    """A fault that one rank alone has met; the others only wait for it."""


class NotFiniteError(ArithmeticError):
    """A loss or a gradient is NaN or infinite; the optimizer has not moved."""

    code = stop.FAULT


def pretrain(
    config: RunConfig, resume: str = "auto", stop_after_step: int | None = None, allow: Collection[str] = ()
) -> stop.Reason:
    """Train a run to its end, or to `stop_after_step`, which leaves a checkpoint and does not bend the schedule.

    Args:
        resume: `auto`, `never`, or the path of one of the run's checkpoints.
        allow: keys of the config that may differ from those of the checkpoint.

    Returns:
        Why it stopped; its `code` is the process's exit code.

    Raises:
        ValueError: of config, shards or checkpoint; it names the file, the fact and the cure.
        NotFiniteError: a loss or gradient is not finite.
        RankLeftError, ToldError: another rank left or failed.
    """
    if stop_after_step is not None and stop_after_step < 1:
        raise ValueError(f"--stop-after-step {stop_after_step}: no step comes before it; give 1 or more")
    run_dir = Path(config.run_dir)
    place = ranks.current()
    if (run_dir / FINISHED).is_file():
        if place.rank == 0:
            _refuse_changed(config, run_dir, allow)
            print(f"{run_dir}: the run is finished ({FINISHED}); to train anew choose another run_dir")
        return stop.FINISHED
    world = engine.connect(place)
    try:
        with Watch(place, world.progress, config.stop.stall_s), owned(run_dir, world):
            engine.refuse_unequal(place, world, config.engine.precision)
            trainer = Trainer(config, world)
            trainer.start(resume, allow)
            reason = trainer.train(stop_after_step)
            trainer.requests.conclude(reason)
            return reason
    finally:
        engine.disconnect()


def _refuse_changed(config: RunConfig, run_dir: Path, allow: Collection[str]) -> None:
    """Raise ValueError where a finished run was of another config or other shards: it is not what is asked for."""
    if found := checkpoints.complete(run_dir):
        shards = open_corpus(config.data)
        checkpoint.compare(found[-1], checkpoint.contents(fitted(config, shards), shards), allow, finished=True)


def fit_model(model: ModelConfig, shards: Corpus | ShardSet, weights: str = "") -> ModelConfig:
    """The model's config with the shards' geometry and organs, and what its encoder gives.

    Raises:
        ValueError: the config asks for another geometry than that of the shards, or its encoder is not to be had.
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
    return encoders.fit(dataclasses.replace(model, **found), weights)


def build(config: RunConfig, shards: Corpus) -> tuple[Storm, BatchSpec]:
    """The model that a run begins with, its config fitted to the shards, and what its batches are made with.

    Raises:
        ValueError: the encoder's weights do not fit, or the gene table has no shares.
    """
    share, model = shards.genes.share, config.model
    if share is None:
        raise ValueError(f"{shards.name}: the gene table has no column `share`; pack again")
    checkpointing, anchored = config.engine.activation_checkpointing, model.is_anchored
    network = Storm(model, len(shards.genes), config.seed, checkpointing, anchored)
    network.set_gene_bias(torch.from_numpy(np.log(share)).float())
    if isinstance(network.morphology, encoders.TimmEncoder) and config.encoder.weights:
        network.morphology.load(Path(config.encoder.weights))
    return network, spec_of(model, shards.panels, share)


def fitted(config: RunConfig, shards: Corpus) -> RunConfig:
    """The config with its model fitted to the shards; with cached features without what these cannot follow."""
    model, _ = descriptors.fit(fit_model(config.model, shards, config.encoder.weights), config.data.descriptors)
    mask = feature_cache.without_pixels(config.mask)[0] if config.data.features else config.mask
    return config.model_copy(update={"model": model, "mask": mask})


def cache_features(config: RunConfig, variants: int, splits: Sequence[str]) -> list[Path]:
    """Write the features of a run's frozen encoder beside its shards; see storm.train.feature_cache."""
    shards = open_corpus(config.data)
    config = fitted(config, shards)
    return feature_cache.make(config, *build(config, shards), variants, splits)


def describe(network: Storm, table: descriptors.Descriptors, genes: GeneTable, world: engine.World) -> None:
    """Give the model the descriptors of its genes, and say how many have none."""
    found = descriptors.rows_of(table, genes)
    network.set_descriptors(*(torch.from_numpy(array) for array in found[:3]))
    if found.missing and world.rank == 0:
        print(f"{table.source}: lacks {len(found.missing)} of {len(genes)} genes (as {found.missing[0]}); they are "
              "described by the mean", flush=True)  # fmt: skip


class Trainer:
    """One run on one rank."""

    def __init__(self, config: RunConfig, world: engine.World) -> None:
        shards = open_corpus(config.data)
        self.config = fitted(config, shards)
        self.world, self.run_dir, self.step = world, Path(config.run_dir), 0
        self.requests = stop.Requests(self.run_dir, world.rank, config.stop)
        data, model = self.config.data, self.config.model
        torch.manual_seed(config.seed * 1_000_003 + world.rank)
        network, spec = build(self.config, shards)
        if data.descriptors:
            describe(network, descriptors.read(Path(data.descriptors)), shards.genes, world)
        # Before DeepSpeed has divided the weights: the hash is of whole ones.
        encoder = encoders.fingerprint(network.morphology, model) if data.features else ""
        features = feature_cache.find(shards, config, encoder) if data.features else None
        if features and isinstance(network.standard, Standard):
            network.standard.mean, network.standard.sd = torch.from_numpy(features.sets[0].statistics).clone()
        self.stream = GroupStream(shards, spec, self.config.mask, data, config.seed, world.rank, world.size, features)
        if features and world.rank == 0:
            off = ", ".join(feature_cache.without_pixels(config.mask)[1]) or "none was on"
            print(f"{self.run_dir}: {features.recipe.variants} cached variants of each group in place of tiles; off is "
                  f"what needs pixels ({off})", flush=True)  # fmt: skip
        self.engine = engine.Engine(network, self.config, self.stream.accumulation, world)
        platforms = {slide: str(entry["platform"]) for slide, entry in shards.manifest["slides"].items()}
        self.meter = Meter(model, platforms, world)
        watch = self.config.validation.every_steps > 0
        self.validation = Validation(shards, spec, self.config, world, encoder) if watch else None
        self.schedule = checkpoint.Schedule(config.checkpoint, world)
        self.checkpoint_s = 0.0  # spent on saving since the last record of the log
        self.contents = checkpoint.contents(self.config, shards)

    def start(self, resume: str, allow: Collection[str] = ()) -> None:
        """Continue from a checkpoint, or begin, and write the resolved configs."""
        found = engine.gather(checkpoint.find(self.run_dir, resume))[0]  # ranks of other nodes may see an older folder
        if found:
            checkpoint.check(found, self.contents, self.world, allow)
            self.step = self.stream.step_at(checkpoint.load(found, self.engine, self.world))
            engine.barrier()  # nothing is removed before every rank has loaded
        if len(set(engine.gather(self.stream.order_hash))) > 1:
            raise ValueError(f"{self.config.data.shards}: the nodes see it on different file systems, and would take "
                             "its groups in different orders; set data.window_shards=0 or 32")  # fmt: skip
        if self.world.rank == 0:
            print(f"{self.run_dir}: {f'continues from {found.name}' if found else 'begins'}", flush=True)
            checkpoint.sweep(self.run_dir)
            if found and (gone := checkpoint.discard_after(self.run_dir, self.step)):
                print(f"{self.run_dir}: removed the later checkpoints {', '.join(gone)}", flush=True)
            stop.count_restart(self.run_dir, self.step, self.config.stop.max_restarts, os.environ)
            files.write_bytes(self.run_dir / "config.yaml", self.contents.config.encode())
            files.write_json(self.run_dir / "deepspeed.json", engine.settings(self.config, self.stream.accumulation))
        engine.barrier()

    def train(self, stop_after_step: int | None = None) -> stop.Reason:
        """The steps up to the end of the schedule, to `stop_after_step`, or to a request; the reason of the end."""
        steps = self.config.optim.steps
        last = steps if stop_after_step is None else min(steps, stop_after_step)
        log = RunLog(self.run_dir, self.step) if self.world.rank == 0 else None
        pin = self.world.device.type == "cuda"
        with stop.deferred():
            source = batches(self.stream, self.step, last, self.config.data.workers, pin)
        while self.step < last and not self.requests.agreed:
            record = self._train_step(source)
            ends = self.step == last or self.requests.agreed is not None
            watched = self._validates()
            if watched:
                with self.world.progress.waiting("validation"):
                    record |= watched.run(self.engine)
            if watched or self.step % self.config.log_every == 0 or ends:
                record |= self.meter.read() | {"perf/checkpoint_s": self.checkpoint_s}
                self.checkpoint_s = 0.0
                if log:
                    log.write(record, ends)
            if ends or self.schedule.due(self.step):
                self._save()
        if log:
            log.close()
        reason = stop.FINISHED if self.step == steps else self.requests.agreed or stop.AFTER_STEP
        if self.world.rank == 0 and self.step == steps:
            files.write_json(self.run_dir / FINISHED, {"step": self.step, "code_version": checkpoints.code_version()})
        if self.world.rank == 0:
            why = f", stopped by {reason.name}; it is saved, the same command goes on"
            told = why if reason is self.requests.agreed else ""
            print(f"{self.run_dir}: step {self.step} of {steps}{told}", flush=True)
        return reason

    def _validates(self) -> Validation | None:
        """The validation, where the step that is over calls for one; never in the time that is left before an end."""
        if self.requests.agreed:
            return None
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
            raise NotFiniteError(self._explain(norm, micro))
        rate = learning_rate(self.step, self.config.optim)
        self.engine.step(rate)
        self._count(micro)
        self.step += 1
        self.world.progress.step, self.world.progress.waits_for = self.step, "its own step"
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
            with self.world.progress.waiting("its loader"):
                return list(itertools.islice(source, self.stream.accumulation))
        except ValueError as error:
            raise RankError(f"rank {self.world.rank}, step {self.step + 1}: {error}") from error

    def backward(self, micro: list[Batch]) -> tuple[float, dict[str, float | None]]:
        """Forward and backward of a step's micro-batches; the global loss and its parts, in the log's names.

        The counts come first and from the batches alone, so each micro-batch knows its share of the mean.
        """
        counts, weight, negatives = self._counts(micro), self.weights(), self.config.loss.align_over
        self.meter.start()
        sums: dict[str, Tensor] = {}
        self.partial: list[dict[str, Tensor]] = []  # each micro-batch's sums, to name a fault
        for i, batch in enumerate(micro):
            batch = {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in batch.items()}
            outputs = self.engine.forward(batch)
            found = {name: total for name, (total, _) in losses.terms(outputs, batch, negatives).items()}
            share = [weight[name] * found[name] / counts[name].clamp_min(1) for name in TERMS]
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

    def weights(self) -> dict[str, float]:
        """The weight of each term in the step that comes."""
        return losses.weights(self.config.loss, self.step, self.config.optim.steps)

    def _counts(self, micro: list[Batch]) -> dict[str, Tensor]:
        """Each term's count over all micro-batches and ranks; left on the device, so that nothing waits for it.

        What asks the ranks to stop goes into the same sum, and is read with the losses: it costs no other wait.
        """
        lacks, negatives = losses.absent(self.config.model), self.config.loss.align_over
        own = torch.stack([torch.stack(list(losses.counts(b, lacks, negatives).values())) for b in micro]).sum(0)
        votes = torch.tensor(self.requests.votes(), dtype=own.dtype)
        with self.world.progress.waiting("the other ranks"):
            total = engine.sum_over_ranks(torch.cat([own, votes]).to(self.world.device))
        self._votes = total[len(TERMS) :]
        return dict(zip(TERMS, total, strict=False))

    def _means(self, sums: dict[str, Tensor], counts: dict[str, Tensor]) -> tuple[float, dict[str, float | None]]:
        """Loss over all ranks, from this rank's sums, and its parts; None where nothing was asked."""
        with self.world.progress.waiting("the other ranks"):
            summed = engine.sum_over_ranks(torch.stack(list(sums.values())))
            read = torch.cat([summed, torch.stack([counts[name] for name in TERMS]), self._votes]).tolist()
        values, votes = read[: -len(self._votes)], read[-len(self._votes) :]
        self.requests.decide(votes)
        names = [*sums, *(f"count_{name}" for name in TERMS)]
        found = dict(zip(names, values, strict=True))
        return means(found, {part: found[f"count_{part}"] for part in PARTS}, self.weights())

    def _explain(self, norm: float, micro: list[Batch]) -> str:
        """Which ranks, terms and groups are not finite; the same text on every rank."""
        faults = self._named(self.partial)
        if not faults:
            wrong = [name for name, grad in self.engine.gradients().items() if not bool(grad.isfinite().all())]
            probed = self._named([self._probe(batch) for batch in micro])
            faults = [f"gradient norm {norm}, in {', '.join(wrong[:8])}", *probed]
        return (
            f"{self.run_dir}: step {self.step + 1} is not finite ({'; '.join(faults)}); the weights have not moved: "
            "look at these groups, or start again with a lower optim.lr in another run_dir"
        )

    def _named(self, values: list[dict[str, Tensor]]) -> list[str]:
        """'rank: term of groups' of what is not finite among each micro-batch's values by term, of all ranks."""
        first = self.step * self.stream.accumulation
        own = [
            f"rank {self.world.rank}: {name} of groups {', '.join(self.stream.keys(first + i))}"
            for i, found in enumerate(values)
            for name, value in found.items()
            if not math.isfinite(float(value))
        ]
        return [fault for faults in engine.gather(own) for fault in faults]

    def _probe(self, batch: Batch) -> dict[str, Tensor]:
        """The norm of each term's own gradient for one micro-batch of this rank, computed again; all must call it."""
        batch = {name: tensor.to(self.world.device) for name, tensor in batch.items()}
        found = {}
        for term in [term for term in TERMS if term not in losses.absent(self.config.model)]:

            def total(outputs: dict[str, Tensor], term: str = term) -> Tensor:
                return losses.terms(outputs, batch, self.config.loss.align_over)[term][0]

            found[f"gradient of {term}"] = self.engine.own_norm(batch, total)
        return found

    def _save(self) -> None:
        began = time.perf_counter()
        position, keep = self.stream.position(self.step), self.config.checkpoint
        with self.world.progress.waiting("a checkpoint"):
            checkpoint.save(self.run_dir, self.step, position, self.contents, self.engine, self.world, keep)
        self.schedule.saved()
        self.checkpoint_s += time.perf_counter() - began
