"""Checkpoints: the folder of storm.checkpoints, written by all ranks, complete or absent; and the way back.

In: the engine, the position, what the run was made of. Out: `checkpoints/step_0000020/`. On resume everything that can
differ is compared first (model, genes, config, ranks), then every hash, and only then are DeepSpeed's pickles read.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

import storm
from storm import checkpoints, files
from storm.data.order import Position
from storm.genes import GeneTable
from storm.presets import ModelConfig
from storm.train import engine
from storm.train.engine import Engine, World

# What may differ between a run and its continuation: it changes neither losses nor weights.
_FREE = {
    "run_dir", "log_every", "data.shards", "data.workers", "data.verify", "data.on_error", "data.skip_most",
    "data.timeout_s", "data.stage_dir", "data.stage_gb", "data.cache_dir", "data.cache_gb", "data.remote_timeout_s",
    "data.remote_retries", "checkpoint.every_steps", "checkpoint.keep_last",
}  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """What a run is made of, beside its weights and its position."""

    config: str  # the resolved RunConfig as YAML
    model: ModelConfig
    genes: GeneTable
    reference: dict[str, Any]


def save(
    run_dir: Path, step: int, position: Position, contents: Contents, training: Engine, world: World, keep: int
) -> Path:
    """Write the checkpoint after `step` steps and remove the oldest beyond `keep`; all ranks must call it."""
    target = run_dir / checkpoints.FOLDER / f"step_{step:07d}"
    if world.rank:
        _save_part(Path(engine.gather("")[0]), training, world)
        engine.barrier()
    else:
        with files.replacing_folder(target) as folder:
            engine.gather(str(folder))
            _save_part(folder, training, world)
            _save_common(folder, step, position, contents, training, world)
        for old in checkpoints.complete(run_dir)[:-keep]:
            shutil.rmtree(old)
        engine.barrier()
    return target


def _save_part(folder: Path, training: Engine, world: World) -> None:
    """This rank's share of the engine's state, and its generators."""
    training.save(folder / "deepspeed")
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
    values = {name: bytes(state.tolist()).hex() for name, state in states.items()}
    (folder / f"rng_rank{world.rank}.json").write_bytes(files.dump_json(values))
    engine.barrier()


def _save_common(
    folder: Path, step: int, position: Position, contents: Contents, training: Engine, world: World
) -> None:
    save_file(training.weights(), folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private; others export from it
    model = {"model": asdict(contents.model), "n_genes": len(contents.genes)}
    (folder / "model.json").write_bytes(files.dump_json(model))
    (folder / "genes.tsv").write_bytes(contents.genes.to_tsv())
    (folder / "reference.json").write_bytes(files.dump_json(contents.reference))
    (folder / "config.yaml").write_text(contents.config, encoding="utf-8")
    (folder / "position.json").write_bytes(files.dump_json({**asdict(position), "step": step}))
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    marker = {
        "step": step, "ranks": world.size, "code_version": checkpoints.code_version(),
        "storm_version": storm.__version__, "torch_version": torch.__version__,
        "files": {path.relative_to(folder).as_posix(): files.sha256_file(path) for path in written},
    }  # fmt: skip
    (folder / checkpoints.MARKER).write_bytes(files.dump_json(marker))


def find(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to continue from: `auto` the newest complete one, `never` none, else the one at that path.

    Raises:
        ValueError: `never` in a folder that holds a run, or a path outside the run's own checkpoints.
    """
    found = checkpoints.complete(run_dir)
    if resume == "auto":
        return found[-1] if found else None
    if resume == "never":
        if found:
            raise ValueError(f"{run_dir}: holds a run up to {found[-1].name}; use --resume auto, or another run_dir")
        return None
    path = Path(resume).resolve()
    if path.parent != (run_dir / checkpoints.FOLDER).resolve():
        raise ValueError(
            f"{resume}: lies outside {run_dir / checkpoints.FOLDER}; a checkpoint holds pickles, so a run reads its "
            "own only (others use exports)"
        )
    return path


def check(path: Path, contents: Contents, world: World) -> None:
    """Compare a checkpoint with the run that wants to continue from it, then verify all of its files.

    Raises:
        ValueError: another model, other genes, another config, another number of ranks, or a damaged file.
    """
    marker = checkpoints.verify(path, ["model.json", "genes.tsv", "config.yaml", "position.json"])
    own = json.loads(json.dumps(asdict(contents.model)))  # tuples become lists, as in the file
    changes = _changes({"model": files.read_json(path / "model.json")["model"]}, {"model": own})
    _refuse(path / "model.json", "the checkpoint is of another model", changes)
    if GeneTable.read(path / "genes.tsv").hash != contents.genes.hash:
        raise ValueError(f"{path / 'genes.tsv'}: not the genes of the shards; resume with the shards of the run")
    changes = _changes(yaml.safe_load((path / "config.yaml").read_text()), yaml.safe_load(contents.config))
    _refuse(path / "config.yaml", "the run was started with other values", changes)
    if marker["ranks"] != world.size:
        raise ValueError(f"{path}: written by {marker['ranks']} ranks, this job has {world.size}; start as many")
    checkpoints.verify(path, sorted(marker["files"]))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """'key: old -> new' of every key that differs and may not."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted((before.keys() | after.keys()) - _FREE)
        if before.get(key) != after.get(key)
    ]


def _refuse(path: Path, fact: str, changes: list[str]) -> None:
    if changes:
        raise ValueError(f"{path}: {fact} ({'; '.join(changes)}); set these back, or choose another run_dir")


def load(path: Path, training: Engine, world: World) -> Position:
    """Bring engine and generators back to a checkpoint that passed `check`; all ranks must call it.

    Returns:
        The position of the stream.
    """
    training.load(path / "deepspeed")
    states = files.read_json(path / f"rng_rank{world.rank}.json")
    torch.set_rng_state(_state(states["cpu"]))
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(_state(states["cuda"]), world.device)
    position = files.read_json(path / "position.json")
    del position["step"]  # implied by the position; there for readers
    return Position(**position)


def sweep(run_dir: Path) -> None:
    """Remove what a killed run was writing: temporary folders of checkpoints. One rank calls it, before any saves."""
    for suffix in ("tmp", "old"):
        for path in (run_dir / checkpoints.FOLDER).glob(f".step_*.{suffix}"):
            shutil.rmtree(path)


def discard_after(run_dir: Path, step: int) -> list[str]:
    """Remove the checkpoints newer than the step a run continues from, and name them: they are of another history, from
    which `auto` would go on, and for which retention would drop the new ones. One rank calls it, when all have loaded.
    """
    newer = [path for path in checkpoints.complete(run_dir) if int(path.name.rpartition("_")[2]) > step]
    for other in reversed(newer):  # newest first and marker first: what a kill leaves is still a history
        (other / checkpoints.MARKER).unlink()
        shutil.rmtree(other)
    return [other.name for other in newer]


def _state(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
