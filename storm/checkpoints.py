"""Where a run keeps its checkpoints, and how a complete one is told from a torn one; no torch, no deepspeed.

In: a run folder. Out: its complete checkpoints, verified against their markers.

    <run_dir>/checkpoints/step_0001000/
        model.safetensors     consolidated fp32 weights
        optimizer_rank<r>.safetensors   AdamW's moments of the parameters that rank r wrote, whole and in fp32
        model.json            {"model": ModelConfig, "n_genes": G}
        genes.tsv             the vocabulary with its shares
        reference.json        what inference needs of the shard manifest, and the counts of the training data
        config.yaml           the resolved RunConfig
        position.json         where the stream stands
        rng_rank<r>.json      generators
        COMPLETE              json, written last: step, versions, {"files": {relative name: sha256}}
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from storm import __version__, files

FOLDER, MARKER = "checkpoints", "COMPLETE"
FINISHED = "FINISHED"  # beside the checkpoints, once the schedule is done
_NAME = re.compile(r"step_(\d+)")


def complete(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest step first; folders without a marker do not count."""
    return [path for path in named(run_dir) if (path / MARKER).is_file()]


def named(run_dir: Path) -> list[Path]:
    """What has the name of a checkpoint, complete or not, oldest step first; anything else beside it is the user's."""
    found = [
        (int(match[1]), path) for path in (run_dir / FOLDER).glob("step_*") if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """The number of steps that led to a checkpoint, by its name."""
    return int(checkpoint.name.rpartition("_")[2])


def latest(run_dir: Path) -> Path:
    """The newest complete checkpoint. Raises ValueError where the run has none."""
    found = complete(run_dir)
    if not found:
        raise ValueError(f"{run_dir}: holds no complete checkpoint ({FOLDER}/step_*/{MARKER}); train it further")
    return found[-1]


def verify(checkpoint: Path, names: list[str]) -> dict[str, Any]:
    """The marker of a checkpoint whose files `names` are those that were written.

    Raises:
        ValueError: no marker, or a file that is missing or changed (it is named).
    """
    path = checkpoint / MARKER
    if not path.is_file():
        raise ValueError(f"{checkpoint}: is no complete checkpoint ({MARKER} is absent); use an older one")
    marker: dict[str, Any] = files.read_json(path)
    if not isinstance(marker, dict) or not isinstance(marker.get("files"), dict):
        raise ValueError(f"{path}: names no files; the checkpoint is damaged, use an older one")
    for name in names:
        file = files.inside(checkpoint, name)
        if not file.is_file():
            raise ValueError(f"{file}: is missing; the checkpoint is damaged, use an older one")
        if files.sha256_file(file) != marker["files"].get(name):
            raise ValueError(f"{file}: its sha256 is not that of {MARKER}; the checkpoint is damaged, use an older one")
    return marker


def code_version() -> str:
    """Version, and the first digits of a sha256 over the package's sources: two equal ones ran the same code."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"
