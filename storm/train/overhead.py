"""The share of a step that is neither forward, backward nor optimizer: what the run around the model costs.

In: a RunConfig and a number of steps; one rank. Out: seconds per step by part, on the clock and of the processor. The
parts are measured from outside, around the trainer's own calls, over whole steps with their log lines; the first step
and checkpoints are left out.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from storm import losses
from storm.config import RunConfig
from storm.train import engine
from storm.train.metrics import RunLog
from storm.train.trainer import Trainer

INSIDE = ("forward", "backward", "optimizer")
AROUND = ("data", "log")
REST = "rest"  # collectives of counts and sums, moving batches, bookkeeping

Seconds = tuple[float, float]  # on the clock, of this process's processor time


@dataclass
class Clock:
    """Seconds by part of all calls so far; calls that it sees do not nest."""

    spent: dict[str, Seconds] = field(default_factory=lambda: dict.fromkeys((*INSIDE, *AROUND), (0.0, 0.0)))

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Add what every call of `owner.name` takes to a part."""
        honest: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            wall, processor = now()
            try:
                return honest(*args, **kwargs)
            finally:
                after, used = now()
                before = self.spent[part]
                self.spent[part] = (before[0] + after - wall, before[1] + used - processor)

        setattr(owner, name, watched)


def now() -> Seconds:
    """The moment, after all that was given to a device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def measure(config: RunConfig, steps: int) -> dict[str, Seconds]:
    """Seconds per step by part, over `steps` steps after a first one. The run folder is written as in any run."""
    world = engine.connect()
    if world.size > 1:
        raise ValueError(f"the overhead is measured on one rank, this job has {world.size}: start one process")
    honest_terms, honest_write = losses.terms, RunLog.write
    try:
        trainer = Trainer(config, world)
        trainer.start("never")
        return _watched(trainer, steps)
    finally:
        losses.terms, RunLog.write = honest_terms, honest_write  # type: ignore[method-assign]
        engine.disconnect()


def _watched(trainer: Trainer, steps: int) -> dict[str, Seconds]:
    clock = Clock()
    clock.watch(trainer.engine, "forward", "forward")
    clock.watch(losses, "terms", "forward")
    clock.watch(trainer.engine, "backward", "backward")
    clock.watch(trainer.engine, "grad_norm", "optimizer")
    clock.watch(trainer.engine, "step", "optimizer")
    clock.watch(trainer, "take", "data")
    clock.watch(trainer.meter, "read", "log")
    clock.watch(RunLog, "write", "log")
    begun: list[tuple[Seconds, dict[str, Seconds]]] = []
    honest = trainer._train_step

    def step(source: Any) -> dict[str, Any]:
        begun.append((now(), dict(clock.spent)))
        return honest(source)

    trainer._train_step = step  # type: ignore[method-assign]
    trainer.train(stop_after_step=steps + 2)  # from the second step's begin to the last one's are `steps` whole steps
    (first, before), (last, after) = begun[1], begun[-1]
    found = {part: _per_step(before[part], after[part], steps) for part in clock.spent}
    whole = _per_step(first, last, steps)
    rest = tuple(whole[i] - sum(found[part][i] for part in found) for i in range(2))
    return found | {REST: (rest[0], rest[1]), "step": whole}


def _per_step(before: Seconds, after: Seconds, steps: int) -> Seconds:
    return (after[0] - before[0]) / steps, (after[1] - before[1]) / steps


def shares(found: dict[str, Seconds]) -> Seconds:
    """The share of a step around forward, backward and optimizer, on the clock and of processor time."""
    inside = [sum(found[part][i] for part in INSIDE) / found["step"][i] for i in range(2)]
    return 1 - inside[0], 1 - inside[1]


def text(config: RunConfig, found: dict[str, Seconds], steps: int) -> str:
    """The table with its conditions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    data = config.data
    lines = [
        f"{steps} steps of {data.global_batch_size} groups in micro-batches of {data.micro_batch_size}, one rank on "
        f"{device}, {config.engine.precision}, ZeRO {config.engine.zero_stage}, {data.workers} loader processes, "
        f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the end",
        f"{'per step':<12}{'s':>10}{'share':>9}{'processor s':>14}{'share':>9}",
    ]
    whole = found["step"]
    for part, (wall, processor) in found.items():
        lines.append(f"{part:<12}{wall:>10.4f}{wall / whole[0]:>9.2%}{processor:>14.4f}{processor / whole[1]:>9.2%}")
    wall, processor = shares(found)
    return "\n".join([*lines, f"around forward, backward and optimizer: {wall:.2%} of the step on the clock, "
                              f"{processor:.2%} of its processor time"])  # fmt: skip
