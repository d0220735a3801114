"""The golden loss curve: 20 steps of a small run on the tests' own synthetic shards, under version control.

`python -m pytest tests/train/test_golden.py` compares. Who changes the curve on purpose writes it anew, with
`STORM_WRITE_GOLDEN=1` before that command, and says why in CHANGELOG.md beside the name of the curve: a hash of its
numbers, which the first line of the file tells.
"""

from pathlib import Path

from storm import files

PATH = Path(__file__).resolve().parents[1] / "golden" / "loss_tiny_cpu.txt"
TAGS = {
    "loss": "train/loss", **{term: f"train/loss/{term}" for term in ("expr", "depth", "image", "spatial")},
    "grad_norm": "optim/grad_norm",
}  # fmt: skip


def text(records: list[dict]) -> str:
    """The file of a run's log."""
    rows = [
        " ".join([f"{record['step']:2d}", *(f"{record[tag] or 0:.6f}" for tag in TAGS.values())]) for record in records
    ]
    body = "\n".join([f"step {' '.join(TAGS)}", *rows]) + "\n"
    return f"# curve {files.sha256_of(body.encode())[:8]}\n{body}"


def read() -> tuple[str, list[list[float]]]:
    """The name of the curve and its rows.

    Raises:
        ValueError: somebody edited the numbers by hand.
    """
    first, _, body = PATH.read_text().partition("\n")
    name = first.split()[-1]
    if files.sha256_of(body.encode())[:8] != name:
        raise ValueError(f"{PATH}: not as it was written; restore it, or write it with STORM_WRITE_GOLDEN=1")
    return name, [[float(word) for word in line.split()[1:]] for line in body.splitlines()[1:]]
