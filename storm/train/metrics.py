"""The run's log: log.jsonl, one JSON object per logged step, and the same numbers for TensorBoard. Rank 0 writes."""

import json
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from storm import files

LOG, TENSORBOARD = "log.jsonl", "tensorboard"
TOLD_EVERY_S = 15.0  # on the screen


def truncate(path: Path, step: int) -> None:
    """Drop the lines after `step` (and a torn last line), which a resumed run writes again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= step:
            kept.append(line + "\n")
    files.write_bytes(path, "".join(kept).encode())


class RunLog:
    """The open log of a run that continues after `step` steps."""

    def __init__(self, run_dir: Path, step: int) -> None:
        truncate(run_dir / LOG, step)
        self._lines = (run_dir / LOG).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=step + 1)
        self._told = time.monotonic()

    def write(self, record: dict[str, Any]) -> None:
        """Append one step's record (it has the key `step`)."""
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        for name, value in record.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, record["step"])
        if time.monotonic() - self._told >= TOLD_EVERY_S:
            self._told = time.monotonic()
            print(f"step {record['step']}: loss {record['loss']:.4f}, {record['seconds']:.2f} s", flush=True)

    def close(self) -> None:
        """Flush and close both."""
        self._lines.close()
        self._board.close()
