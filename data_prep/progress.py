"""What a command shows while it works: a bar on a terminal, plain lines in a log, a table at its end.

In: how many items there are, and a step for each that is done. Out: text on stdout; the bar goes to stderr, so that
stdout can be kept as it is.
"""

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from tqdm import tqdm

_QUIET_S = 30.0  # a log is told of steps without a text at most so often


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def size(count: float) -> str:
    """Bytes in the decimal unit that leaves one to three digits before the point."""
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.0f} {units[0]}" if count >= 99.5 or units[0] == "B" else f"{count:.1f} {units[0]}"


class Progress:
    """Progress over `total` items; to be used in a `with` statement."""

    def __init__(self, total: int, unit: str = "slide", scaled: bool = False) -> None:
        """`scaled` shows large counts, as of bytes, with k, M and G."""
        self.total, self.done = total, 0
        self._start = self._told = time.monotonic()
        self._bar = tqdm(total=total, unit=unit, unit_scale=scaled, dynamic_ncols=True, disable=not sys.stderr.isatty())
        self._show: Callable[[int], str] = size if scaled else str

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def line(self, text: str) -> None:
        """Print a text, above the bar where there is one."""
        if self._bar.disable:
            print(text, flush=True)
        else:
            tqdm.write(text)

    def step(self, text: str = "", amount: int = 1) -> None:
        """Count `amount` items as done; `text` tells of them, and in a log its first line also how far things are."""
        self.done += amount
        self._bar.update(amount)
        now = time.monotonic()
        if not self._bar.disable:
            if text:
                self.line(text)
            return
        if text or self.done >= self.total or now - self._told >= _QUIET_S:
            self._told = now
            first, _, rest = text.partition("\n")
            where = f"[{self._show(self.done)}/{self._show(self.total)}, {clock(now - self._start)}]"
            self.line(f"{first} {where}".strip() + (f"\n{rest}" if rest else ""))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows as aligned text: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)
