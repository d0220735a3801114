"""The run's log: every metric has one tag, in TensorBoard and in log.jsonl alike. Rank 0 writes.

In: records {"step": s, tag: value}. Out: `log.jsonl`, one JSON object per logged step, and the same values as scalars
of TensorBoard over the step. Where a run continues, what lies after its checkpoint is taken back first: lines are cut,
and TensorBoard purges. A line with the key `event` in place of metrics says so.

The name of a TensorBoard file holds the host's name: it stays in the run folder, which nobody exports.
"""

import json
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from storm import files
from storm.config import MASK_MODES
from storm.losses import TERMS
from storm.schema import PLATFORMS

LOG, TENSORBOARD = "log.jsonl", "tensorboard"
TOLD_EVERY_S = 15.0  # on the screen

PARTS = (*TERMS, *(f"expr_{mode}" for mode in MASK_MODES))  # of a loss

# Tag -> what it is. Dashboards and readers build on these names: a new one may come, none changes its meaning. Values
# of perf, mem and data are of the steps since the last record, over all ranks.
TAGS = {
    "train/loss": "sum of the terms with the weights of the step, over the global batch",
    **{f"train/loss/{part}": f"mean of {part} over the global batch; null where none was asked" for part in PARTS},
    "val/loss": "sum of the terms with the weights of the last step, on held-out donors",
    **{f"val/{part}": f"as train/loss/{part}, on held-out donors" for part in PARTS},
    "val/pearson": "H&E alone: Pearson within a section, mean over genes of high expression and over sections",
    "perf/profiles_per_s": "profiles per second",
    "perf/tiles_per_s": "encoded tiles per second",
    "perf/mfu": "FLOPs of the model (padding and recomputation left out) / peak of all devices",
    "perf/step_s": "seconds per step",
    "perf/checkpoint_s": "seconds spent on saving, which are no part of perf/step_s",
    "perf/data_wait": "share of the step that a rank waits for data: mean of ranks",
    "perf/data_wait_worst": "the same of the rank that waits longest",
    "perf/rank_skew": "share of the step by which the slowest rank comes later to its last backward than the mean rank",
    "mem/device_peak_bytes": "most bytes allocated on a device by torch, of the fullest rank; null on a CPU",
    "mem/host_resident_bytes": "resident bytes of the largest rank, its loader processes apart",
    "optim/lr": "learning rate of the step",
    "optim/grad_norm": "norm of the global gradient before clipping",
    **{f"data/{platform}": f"share of the profiles that are of {platform}" for platform in PLATFORMS},
    "progress/samples": "groups taken since the run began",
    "progress/epoch": "epoch of the stream after the step",
}


def means(
    total: dict[str, float], count: dict[str, float], weight: dict[str, float]
) -> tuple[float, dict[str, float | None]]:
    """The loss and its PARTS from sums and counts over the whole batch; None where nothing was asked."""
    parts = {part: total[part] / count[part] if count[part] else None for part in PARTS}
    return sum(weight[term] * (parts[term] or 0.0) for term in TERMS), parts


def tagged(prefix: str, loss: float, parts: dict[str, float | None]) -> dict[str, float | None]:
    """A loss and its parts under the tags of `train/loss` or `val`."""
    whole = "val/loss" if prefix == "val" else prefix
    return {whole: loss, **{f"{prefix}/{name}": value for name, value in parts.items()}}


def cut_back(path: Path, step: int) -> int:
    """Drop the lines after `step`, which a resumed run writes again, and what is no record, as a torn last line; the
    number of them."""
    if not path.is_file():
        return 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = []
    for line in lines:
        try:
            late = json.loads(line)["step"] > step
        except (json.JSONDecodeError, TypeError, KeyError):
            continue
        if not late:
            kept.append(line + "\n")
    files.write_bytes(path, "".join(kept).encode())
    return len(lines) - len(kept)


def wait_for_next_second(folder: Path) -> None:
    """Wait until a new file of TensorBoard there is named after those that are, at most a second.

    It reads them by name, which begins with the second of their making and goes on with numbers that do not sort: 10
    stands before 9, and a purge before what it takes back.
    """
    last_s = max((int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")), default=0)
    time.sleep(min(max(last_s + 1 - time.time(), 0.0), 1.0))


class RunLog:
    """The open log of a run that continues after `step` steps."""

    def __init__(self, run_dir: Path, step: int) -> None:
        dropped = cut_back(run_dir / LOG, step)
        self._path = str(run_dir / LOG)
        self._lines = (run_dir / LOG).open("a", encoding="utf-8")
        wait_for_next_second(run_dir / TENSORBOARD)
        self._board = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=step + 1)
        self._told = time.monotonic()
        if step:
            self._append({"step": step, "event": "resumed", "lines_dropped": dropped})

    def write(self, record: dict[str, Any], last: bool = False) -> None:
        """Append one step's record: the key `step`, and tags. The screen shows one now and then, and the last.

        Raises:
            KeyError: a name that is none of TAGS.
        """
        if unknown := record.keys() - TAGS.keys() - {"step"}:
            raise KeyError(f"metrics without a line in TAGS: {sorted(unknown)}")
        self._append(record)
        for tag, value in record.items():
            if tag != "step" and value is not None:
                self._board.add_scalar(tag, value, record["step"])
        if last or time.monotonic() - self._told >= TOLD_EVERY_S:
            self._told = time.monotonic()
            self._tell(record)

    def _append(self, record: dict[str, Any]) -> None:
        try:
            self._lines.write(json.dumps(record) + "\n")
            self._lines.flush()
        except OSError as error:  # of a full disk; it tells no file
            error.filename = self._path
            raise

    def _tell(self, record: dict[str, Any]) -> None:
        told = {"loss": ("train/loss", ".4f"), "val loss": ("val/loss", ".4f"), "s": ("perf/step_s", ".2f"),
                "profiles/s": ("perf/profiles_per_s", ".0f"), "mfu": ("perf/mfu", ".1%"),
                "data wait": ("perf/data_wait", ".1%")}  # fmt: skip
        parts = [f"{name} {record[tag]:{form}}" for name, (tag, form) in told.items() if record.get(tag) is not None]
        print(f"step {record['step']}: {', '.join(parts)}", flush=True)

    def close(self) -> None:
        """Flush and close both."""
        self._lines.close()
        self._board.close()
