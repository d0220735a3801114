"""Checkpoints: the folder of storm.checkpoints, written by all ranks, complete or absent; and the way back.

In: the engine, the position, what the run was made of. Out: `checkpoints/step_0000020/`. On resume everything that can
differ is compared first (model, genes, config), then every hash, and only then is the state read.

The state is weights and AdamW's moments as whole named tensors in safetensors, not DeepSpeed's own files. Those are
pickles of flat partitions that another number of ranks or another ZeRO stage cannot read; DeepSpeed's way across (its
universal checkpoint) is a second format, unpickled three more times, and knows no stage 0. Whole tensors go from any
stage and world to any other without a conversion, hold every bit of the state, and can hold no code.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import storm
from storm import checkpoints, files
from storm.config import CheckpointConfig, RunConfig, StopConfig, dump
from storm.data.corpus import Corpus
from storm.data.order import Position
from storm.genes import GeneTable
from storm.presets import ModelConfig
from storm.train import engine
from storm.train.engine import Engine, World

# What may differ between a run and its continuation: it changes neither losses nor weights.
_FREE = {
    "run_dir", "log_every", "data.shards", "data.workers", "data.verify", "data.on_error", "data.skip_most",
    "data.timeout_s", "data.stage_dir", "data.stage_gb", "data.cache_dir", "data.cache_gb", "data.remote_timeout_s",
    "data.remote_retries", "validation.every_steps", "validation.groups",
    *(f"checkpoint.{name}" for name in CheckpointConfig.model_fields),
    *(f"stop.{name}" for name in StopConfig.model_fields),
}  # fmt: skip
_WEIGHTS, _MOMENTS = "model.safetensors", "optimizer_rank{}.safetensors"


@dataclass(frozen=True)
class Contents:
    """What a run is made of, beside its weights and its position."""

    config: str  # the resolved RunConfig as YAML
    model: ModelConfig
    genes: GeneTable
    reference: dict[str, Any]


def _reference(corpus: Corpus, seed: int) -> dict[str, Any]:
    """What inference and the model card need of the data: no slide or donor is named."""
    manifest = corpus.manifest
    counted: dict[str, dict[str, dict[str, int]]] = {"study": {}, "organ": {}, "platform": {}}
    for slide, profiles in corpus.profiles_of_slides().items():
        for what, table in counted.items():
            row = table.setdefault(manifest["slides"][slide][what], {"slides": 0, "profiles": 0})
            row["slides"] += 1
            row["profiles"] += profiles
    return manifest["reference"] | {
        "gene_hash": corpus.genes.hash, "split_by": manifest["split_by"], "seed": seed,
        "shards_hash": corpus.hash, "spots_side": manifest["prep"]["spots_side"],
        "licenses": {study: manifest["licenses"][study] for study in counted["study"]},
        "studies": counted["study"], "organs": counted["organ"], "platforms": counted["platform"],
    }  # fmt: skip


def contents(config: RunConfig, corpus: Corpus) -> Contents:
    """What a run of a fitted config is made of."""
    return Contents(dump(config), config.model, corpus.genes, _reference(corpus, config.seed))


class Schedule:
    """When a run saves: at every so many steps and, where asked, so many minutes after it last saved."""

    def __init__(self, config: CheckpointConfig, world: World) -> None:
        self.config, self.world = config, world
        self.saved()

    def saved(self) -> None:
        """The clock starts anew."""
        self._since = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after `step` steps; rank 0's clock counts for all, so all ranks must ask."""
        if step % self.config.every_steps == 0 or not self.config.every_minutes:
            return step % self.config.every_steps == 0
        late = time.monotonic() - self._since >= 60 * self.config.every_minutes
        return bool(engine.sum_over_ranks(torch.tensor(int(late and not self.world.rank), device=self.world.device)))


def save(
    run_dir: Path, step: int, position: Position, contents: Contents, training: Engine, world: World,
    keep: CheckpointConfig,
) -> Path:  # fmt: skip
    """Write the checkpoint after `step` steps and remove those that `keep` does not name; all ranks must call it."""
    target = run_dir / checkpoints.FOLDER / f"step_{step:07d}"
    if world.rank:
        _save_part(Path(engine.gather("")[0]), training, world)
        engine.barrier()
    else:
        with files.replacing_folder(target) as folder:
            engine.gather(str(folder))
            sums = _save_part(folder, training, world)
            _save_common(folder, step, position, contents, sums, world)
        _retain(run_dir, keep)
        engine.barrier()
    return target


def _save_part(folder: Path, training: Engine, world: World) -> dict[str, str]:
    """This rank's share of the state: weights on rank 0, moments and generators on all. Hashes of all ranks' files."""
    written = [folder / _MOMENTS.format(world.rank), folder / f"rng_rank{world.rank}.json"]
    weights = training.weights()
    if world.rank == 0:
        _write(weights, folder / _WEIGHTS)
        (folder / _WEIGHTS).chmod(0o644)  # safetensors makes it private; others export from it
        written.append(folder / _WEIGHTS)
    _write(training.moments(), written[0])
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
    values = {name: bytes(state.tolist()).hex() for name, state in states.items()}
    written[1].write_bytes(files.dump_json(values))
    sums: dict[str, str] = {}
    for own in engine.gather({path.name: _seal(path) for path in written}):
        sums |= own
    return sums


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors to a file. Raises OSError, for which the library has an error of its own, where the disk fails."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise


def _seal(path: Path) -> str:
    """The hash of a file that is on the disk now; on a network file system only its writer can say so."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    return files.sha256_file(path)


def _save_common(
    folder: Path, step: int, position: Position, contents: Contents, sums: dict[str, str], world: World
) -> None:
    model = {"model": asdict(contents.model), "n_genes": len(contents.genes)}
    common = {
        "model.json": files.dump_json(model), "genes.tsv": contents.genes.to_tsv(),
        "reference.json": files.dump_json(contents.reference), "config.yaml": contents.config.encode(),
        "position.json": files.dump_json({**asdict(position), "step": step}),
    }  # fmt: skip
    for name, data in common.items():
        (folder / name).write_bytes(data)
    marker = {
        "step": step, "ranks": world.size, "code_version": checkpoints.code_version(),
        "storm_version": storm.__version__, "torch_version": torch.__version__,
        "files": sums | {name: files.sha256_of(data) for name, data in common.items()},
    }  # fmt: skip
    (folder / checkpoints.MARKER).write_bytes(files.dump_json(marker))


def _retain(run_dir: Path, keep: CheckpointConfig) -> None:
    """Remove the complete checkpoints but the last ones and those at multiples of `keep_every`."""
    for old in checkpoints.complete(run_dir)[: -keep.keep_last]:
        if not keep.keep_every or checkpoints.step_of(old) % keep.keep_every:
            _remove(old)


def _remove(path: Path) -> None:
    """Remove a checkpoint, marker first: what a kill leaves of it does not count, and `sweep` takes it away. Of one
    that was moved elsewhere and linked, the link alone."""
    if path.is_symlink():
        path.unlink()
        return
    (path / checkpoints.MARKER).unlink(missing_ok=True)
    shutil.rmtree(path)


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
            f"{resume}: lies outside {run_dir / checkpoints.FOLDER}; a run goes on from its own checkpoints"
        )
    return path


def check(path: Path, contents: Contents, world: World, allow: Collection[str] = ()) -> None:
    """Compare a checkpoint with the run that wants to continue from it, then verify all of its files; all ranks must
    call it.

    Args:
        allow: keys of the config that may have changed.

    Raises:
        ValueError: another model, other genes, another config, or a damaged file.
    """
    _verify_together(path, ["model.json", "genes.tsv", "config.yaml", "position.json"], world)
    compare(path, contents, allow)
    _verify_together(path, sorted(checkpoints.verify(path, [])["files"]), world)


def compare(path: Path, contents: Contents, allow: Collection[str] = (), finished: bool = False) -> None:
    """Compare what a checkpoint was made of with a run.

    Args:
        allow: keys of the config that may have changed.
        finished: the run will not go on; then its shards are compared too, which no stream does any more.

    Raises:
        ValueError: another model, other genes, another config or, where finished, other shards.
    """
    told = "the run is finished, and " if finished else ""
    own = json.loads(json.dumps(asdict(contents.model)))  # tuples become lists, as in the file
    changes = _changes({"model": files.read_json(path / "model.json")["model"]}, {"model": own})
    _refuse(path / "model.json", f"{told}the checkpoint is of another model", changes, "set these back")
    if GeneTable.read(path / "genes.tsv").hash != contents.genes.hash:
        raise ValueError(f"{path / 'genes.tsv'}: {told}not the genes of the shards; resume with the shards of the run")
    before, now = yaml.safe_load((path / "config.yaml").read_text()), yaml.safe_load(contents.config)
    if unknown := sorted(set(allow) - (_flat(before).keys() | _flat(now).keys())):
        raise ValueError(f"--allow-change {unknown[0]}: is no key of the config; keys are written as in data.workers")
    changes = [change for change in _changes(before, now) if change.partition(":")[0] not in allow]
    cure = "set these back" if finished else "set these back, or name each with --allow-change"
    _refuse(path / "config.yaml", f"{told or 'the run '}was started with other values", changes, cure)
    if finished and files.read_json(path / "reference.json")["shards_hash"] != contents.reference["shards_hash"]:
        raise ValueError(
            f"{path / 'reference.json'}: {told}was trained on other shards than {now['data']['shards']} (data.shards); "
            "set it back, or choose another run_dir"
        )


def _verify_together(path: Path, names: list[str], world: World) -> None:
    """Verify the files of a checkpoint, each on one rank; what one finds is raised on all."""
    fault = ""
    try:
        checkpoints.verify(path, names[world.rank :: world.size])
    except ValueError as error:
        fault = str(error)
    faults = [text for text in engine.gather(fault) if text]
    if faults:
        older = [other for other in checkpoints.complete(path.parent.parent) if other < path]
        cure = f" (--resume {older[-1]})" if older else ""
        raise ValueError(faults[0] + cure)


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


def _refuse(path: Path, fact: str, changes: list[str], cure: str) -> None:
    if changes:
        raise ValueError(f"{path}: {fact} ({'; '.join(changes)}); {cure}, or choose another run_dir")


def load(path: Path, training: Engine, world: World) -> Position:
    """Bring engine and generators to a checkpoint that passed `check`, written by any number of ranks in any ZeRO
    stage; all ranks must call it.

    Returns:
        The position of the stream.
    """
    values = files.read_json(path / "position.json")
    step = values.pop("step")  # for the optimizer and for readers; the position implies it
    position = Position(**values)
    training.load(step, _reader(path))
    kept = path / f"rng_rank{world.rank}.json"
    if kept.is_file():
        states = files.read_json(kept)
        torch.set_rng_state(_state(states["cpu"]))
        if world.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(_state(states["cuda"]), world.device)
    else:  # a rank that the run did not have
        torch.manual_seed(int(np.random.SeedSequence([position.seed, world.rank, step]).generate_state(1)[0]))
    return position


def _reader(path: Path) -> Callable[[str], Tensor]:
    """A function from the name of a tensor to the tensor, in whichever file of a checkpoint it lies; of those that the
    marker names, for only they were verified."""
    names = sorted(name for name in checkpoints.verify(path, [])["files"] if name.endswith(".safetensors"))
    opened = {name: safe_open(path / name, "pt") for name in names}
    held = {name: file for file, content in opened.items() for name in content.keys()}  # noqa: SIM118 (no mapping)

    def read(name: str) -> Tensor:
        if name not in held:
            raise ValueError(f"{path}: holds no tensor {name}; another version of storm wrote it, resume with that one")
        tensor: Tensor = opened[held[name]].get_tensor(name)
        return tensor

    return read


def sweep(run_dir: Path) -> None:
    """Remove what a killed run was writing or removing: temporary folders of checkpoints, and those without a marker.
    One rank calls it, before any saves."""
    whole = checkpoints.complete(run_dir)
    for path in (run_dir / checkpoints.FOLDER).glob(".step_*"):
        _remove(path)
    for path in checkpoints.named(run_dir):
        if path not in whole:
            _remove(path)


def discard_after(run_dir: Path, step: int) -> list[str]:
    """Remove the checkpoints newer than the step a run continues from, and name them: they are of another history, from
    which `auto` would go on, and for which retention would drop the new ones. One rank calls it, when all have loaded.
    """
    newer = [path for path in checkpoints.complete(run_dir) if checkpoints.step_of(path) > step]
    for other in reversed(newer):  # newest first: what a kill leaves is still a history
        _remove(other)
    return [other.name for other in newer]


def _state(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
