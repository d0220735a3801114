"""Every ZeRO stage on 1-4 ranks against one plain process: `python -m tests.train.matrix SHARDS OUT.md`, by hand.

In: a shard set. Out: a table of losses after 20 steps, of what each rank holds, measured and by theory, and of what a
checkpoint takes beside DeepSpeed's own; and of runs carried from one number of ranks to another.
"""

import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from storm import checkpoints
from storm.config import RunConfig, load
from storm.data.stream import batches
from storm.train import capacity, engine
from storm.train.engine import Engine
from storm.train.trainer import Trainer
from tests.train import jobs, plain, runs

STAGES, WORLDS, CARRIED = (0, 1, 2, 3), (1, 2, 4), ((2, 1), (1, 2), (2, 4))


def tensors(*values: Any) -> Iterator[Tensor]:
    """All tensors in nested lists and dicts."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors(*value.values())
        elif isinstance(value, list | tuple):
            yield from tensors(*value)


def size(found: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, each piece once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in found)}.values())


def held(training: Engine) -> dict[str, int]:
    """Bytes of parameters (with DeepSpeed's second fp32 copy), gradients and optimizer on this rank."""
    zero = training._engine.optimizer
    names = ("bit16_groups_flat", "single_partition_of_fp32_groups", "fp16_partitioned_groups_flat",
             "fp32_partitioned_groups_flat")  # fmt: skip
    own = list(training.model.parameters())
    flat = [getattr(zero, name, []) for name in names]
    partitions = getattr(zero, "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition", {})
    grads = [[p.grad for p in own if p.grad is not None], getattr(zero, "averaged_gradients", {}), partitions]
    moments = [{k: v for k, v in state.items() if k != "step"} for state in training._optimizer.state.values()]
    return {
        "parameters": size(tensors(own, *flat)), "gradients": size(tensors(grads)), "optimizer": size(tensors(moments)),
    }  # fmt: skip


def theory(parameters: int, stage: int, world: int) -> dict[str, float]:
    """The same by arithmetic; the weights that the optimizer moves count as parameters here, as `held` finds them."""
    found = capacity.state(parameters, stage, world, bf16=False)
    moved = capacity.FP32 * parameters / world if stage else 0
    return {
        "parameters": found.parameters + moved, "gradients": found.gradients, "optimizer": found.optimizer - moved,
    }  # fmt: skip


def measure(config: RunConfig, world: engine.World, folder: Path) -> dict[str, Any]:
    """What the engine of a run holds in its first step, and what DeepSpeed's own checkpoint after it takes."""
    trainer = Trainer(config, world)
    seen: list[dict[str, int]] = []
    honest = trainer.engine.backward

    def backward(loss: Tensor, last: bool) -> None:
        honest(loss, last)
        seen.append(held(trainer.engine))

    trainer.engine.backward = backward  # type: ignore[method-assign]
    trainer.backward(trainer.take(batches(trainer.stream, 0, 1, workers=0)))
    trainer.engine.step(1e-3)
    engine.barrier()
    began = time.perf_counter()
    trainer.engine._engine.save_checkpoint(str(folder / "own"), tag="x", save_latest=False)
    seconds = time.perf_counter() - began
    engine.barrier()
    most = {name: max(other[name] for other in seen) for name in seen[0]}
    return {"held": most, "parameters": sum(t.numel() for t in trainer.engine.weights().values()), "own_s": seconds}


def rank(folder: Path, overrides: list[str]) -> None:
    """One rank of a job: measure, train `run`, continue `other` where there is one."""
    world = engine.connect()
    found = measure(load(RunConfig, None, overrides), world, folder)
    found["held"] = engine.gather(found["held"])
    for name in ("run", "other"):
        if name == "run" or (folder / name).exists():
            trainer = Trainer(load(RunConfig, None, [*overrides, f"run_dir={folder / name}"]), world)
            trainer.start("auto", [runs.THRESHOLD])
            trainer.train()
    if world.rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    engine.barrier()
    engine.disconnect()


def mb(path: Path) -> float:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) / 1e6


def curve(run: Path) -> np.ndarray:
    return np.array([line["train/loss"] for line in runs.log(run)])


def row(stage: int, world: int, folder: Path, twin: plain.Twin) -> str:
    """A line of the table."""
    found = json.loads((folder / "found.json").read_text())
    found["parameters"] = sum(tensor.numel() for tensor in twin.ends.values())
    apart = np.abs(curve(folder / "run") / twin.losses - 1).max()
    ends = load_file(checkpoints.latest(folder / "run") / "model.safetensors")
    gap = plain.apart(ends, twin)
    expected = theory(found["parameters"], stage, world)
    bytes_ = [f"{max(r[name] for r in found['held']) / 1e6:.2f} / {expected[name] / 1e6:.2f}" for name in expected]
    records = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    saved = max(record.get("perf/checkpoint_s", 0.0) for record in records)
    ours = mb(checkpoints.latest(folder / "run"))
    cells = [stage, world, f"{apart:.1e}", f"{gap:.1e}", *bytes_, f"{saved:.2f} s, {ours:.1f} MB",
             f"{found['own_s']:.2f} s, {mb(folder / 'own'):.1f} MB"]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main(shards: Path, out: Path) -> None:
    """Run all of it and write the table."""
    lines = [
        f"{runs.STEPS} steps in fp32 against one plain process (torch's AdamW, no DeepSpeed); {platform.machine()},",
        f"torch {torch.__version__}. Bytes of the largest rank, most after any backward pass, measured / by theory, MB",
        "(ZeRO 1 without accumulation has given its gradients back by then).",
        "",
        "| ZeRO | ranks | loss apart, relative | weights apart, of the way they moved | parameters | gradients "
        "| optimizer | checkpoint | DeepSpeed's own |",
        "|" + "--:|" * 9,
    ]
    twin = plain.train(runs.kept(shards, Path("unused")))
    carried = []
    with tempfile.TemporaryDirectory() as scratch:
        for stage in STAGES:
            words = runs.words(shards, Path(scratch), 1, *runs.KEEP, f"engine.zero_stage={stage}", runs.DIVIDED)
            of = {world: Path(scratch) / f"{stage}-{world}" for world in WORLDS}
            for world in WORLDS:
                of[world].mkdir()
                if world > 1:
                    runs.carry(of[world // 2] / "run", of[world] / "other")
                script = ["-m", "tests.train.matrix", "--rank", str(of[world]), *words]
                jobs.Ranks(script, world, of[world] / "out.txt").wait()
                lines.append(row(stage, world, of[world], twin))
                print(lines[-1], flush=True)
            back = Path(scratch) / f"{stage}-back"
            back.mkdir()
            runs.carry(of[2] / "run", back / "other")
            jobs.Ranks(["-m", "tests.train.matrix", "--rank", str(back), *words], 1, back / "out.txt").wait()
            for (old, new), folder in zip(CARRIED, (back, of[2], of[4]), strict=True):
                gap = np.abs(curve(folder / "other") / twin.losses - 1).max()
                carried.append(f"| {stage} | {old} -> {new} | {gap:.1e} |")
    lines += ["", f"Carried to another number of ranks at step {runs.STOP}, no conversion:", ""]
    lines += ["| ZeRO | ranks | loss apart, relative |", "|" + "--:|" * 3, *carried]
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        rank(Path(sys.argv[2]), sys.argv[3:])
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
