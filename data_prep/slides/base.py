"""What every reader of slides gives, and the grid of tiles on a slide.

In: nothing but numbers. Out: the protocol `Slide`, the errors of reading, and `Grid`: tiles as rectangles of level 0.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]


class DecodeError(ValueError):
    """A part of a slide that opens does not decode."""


class Slide(Protocol):
    """An open slide. It may be sent to another process, which opens its own handles."""

    embedded_mpp: float | None  # um per level-0 pixel as the file tells it, not judged here
    facts: dict[str, Any]

    @property
    def width_px0(self) -> int:
        """Width of level 0."""

    @property
    def height_px0(self) -> int:
        """Height of level 0."""

    def read(self, x_px0: int, y_px0: int, w_px0: int, h_px0: int, out_px: int) -> Pixels:
        """Pixels [out_px, out_px, 3] of a rectangle of level 0, which may reach over the border.

        Raises:
            DecodeError: the file is damaged there; other places may still be read.
        """

    def close(self) -> None:
        """Let go of handles, decoded parts and a scratch file; nothing is read afterwards."""


@dataclass(frozen=True)
class Header:
    """What a slide's header tells, without a pixel."""

    width_px0: int
    height_px0: int
    embedded_mpp: float | None


def files_of(path: Path) -> list[Path]:
    """All files of a slide: the file itself and, for MIRAX, the folder beside it."""
    folder = path.with_suffix("")
    beside = sorted(p for p in folder.rglob("*") if p.is_file()) if path.suffix == ".mrxs" and folder.is_dir() else []
    return [path, *beside]


@dataclass(frozen=True)
class Grid:
    """Tiles on a slide: squares of `tile_px0` (not a whole number) from the top-left corner on."""

    tile_px0: float
    rows: int
    cols: int

    @classmethod
    def over(cls, slide: Slide | Header, tile_px0: float) -> "Grid":
        """The grid that covers a slide."""
        return cls(tile_px0, math.ceil(slide.height_px0 / tile_px0), math.ceil(slide.width_px0 / tile_px0))

    def check(self, slide: Slide | Header, path: Path, max_tiles: int, max_px_per_byte: int) -> None:
        """Raises ValueError where a header of a few bytes would keep the machine busy for days."""
        size = f"{path}: its header tells {slide.width_px0} x {slide.height_px0} px"
        if self.rows * self.cols > max_tiles:
            raise ValueError(
                f"{size}, {self.rows * self.cols} tiles (max_tiles {max_tiles}); restore it, or raise that"
            )
        in_file = sum(part.stat().st_size for part in files_of(path))
        if slide.width_px0 * slide.height_px0 > max_px_per_byte * in_file:
            raise ValueError(
                f"{size} in {in_file} bytes (max_px_per_byte {max_px_per_byte}); restore it, or raise that"
            )

    def inside(self, slide: Slide, row: int, col: int) -> float:
        """Share of a tile that lies on the slide."""
        x, y, w, h = self.box(row, col)
        across, down = min(x + w, slide.width_px0) - max(x, 0), min(y + h, slide.height_px0) - max(y, 0)
        return max(0, across) * max(0, down) / (w * h)

    def box(self, row: int, col: int, span: int = 1) -> tuple[int, int, int, int]:
        """(x, y, w, h) in level-0 px of `span` x `span` tiles; rounded so that neighbours abut."""
        x0, y0 = round(col * self.tile_px0), round(row * self.tile_px0)
        x1, y1 = round((col + span) * self.tile_px0), round((row + span) * self.tile_px0)
        return x0, y0, x1 - x0, y1 - y0
