"""Writers of slides in many codings, for the tests of the readers."""

from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import numpy.typing as npt
import pyvips
import tifffile

from data_prep.slides import Pixels

APERIO = "Aperio Image Library v11\r\n|AppMag = 20|MPP = 0.5"
# compression and options of tifffile
CODINGS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "jpeg 4:2:0": ("jpeg", {"subsampling": (2, 2), "compressionargs": {"level": 85}}),
    "jpeg 4:2:2": ("jpeg", {"subsampling": (2, 1), "compressionargs": {"level": 85}}),
    "jpeg 4:4:4": ("jpeg", {"subsampling": (1, 1), "compressionargs": {"level": 85}}),
    "jpeg rgb": ("jpeg", {"compressionargs": {"level": 85, "outcolorspace": "rgb"}}),
    "lzw": ("lzw", {"predictor": True}),
    "deflate": ("zlib", {}),
    "none": (None, {}),
}


def picture(height: int, width: int, seed: int = 0) -> Pixels:
    """Blurred noise of strong colours: neighbouring pixels differ, JPEG holds them well."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.random((height, width, 3), dtype=np.float32), (0, 0), 3)
    return ((noise - 0.5) * 1200 + 128).clip(0, 255).astype(np.uint8)


def write_tiles(path: Path, levels: list[Pixels], coding: str, tile: int = 64, **options: Any) -> Path:
    """A tiled TIFF of given levels, as OpenSlide's generic TIFF."""
    compression, extra = CODINGS[coding]
    with tifffile.TiffWriter(path) as writer:
        for i, pixels in enumerate(levels):
            writer.write(
                pixels, tile=(tile, tile), photometric="rgb", compression=compression, metadata=None,
                subfiletype=int(i > 0), **extra, **options,
            )  # fmt: skip
    return path


def write_ome(path: Path, pixels: npt.NDArray, axes: str, levels: int = 3, mpp: float = 0.5, **options: Any) -> Path:
    """An OME-TIFF whose coarser levels are SubIFDs, each every second pixel of the one above."""
    metadata = {"axes": axes, "PhysicalSizeX": mpp, "PhysicalSizeXUnit": "\u00b5m", "PhysicalSizeY": mpp,
                "PhysicalSizeYUnit": "\u00b5m"}  # fmt: skip
    options = {"tile": (64, 64), "photometric": "rgb"} | options
    every = tuple(slice(None, None, 2) if axis in "YX" else slice(None) for axis in axes)
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(pixels, subifds=levels - 1, metadata=metadata, **options)
        for _ in range(levels - 1):
            pixels = np.ascontiguousarray(pixels[every])
            writer.write(pixels, subfiletype=1, **options)
    return path


def write_with_tables(path: Path, pixels: Pixels, quality: int = 80) -> Path:
    """JPEG tiles whose tables stand once in the page, as libtiff writes them; a halved level below."""
    image = pyvips.Image.new_from_array(pixels)
    image.tiffsave(str(path), tile=True, tile_width=128, tile_height=128, compression="jpeg", Q=quality, pyramid=True)
    return path


def write_jpeg2000(path: Path, pixels: Pixels, codec: int, tile: int = 64) -> Path:
    """An Aperio slide of JPEG 2000 tiles; those of 33003 are taken for YCbCr."""

    def tiles() -> Any:
        for y in range(0, pixels.shape[0], tile):
            for x in range(0, pixels.shape[1], tile):
                whole = np.full((tile, tile, 3), 255, np.uint8)
                part = pixels[y : y + tile, x : x + tile]
                whole[: part.shape[0], : part.shape[1]] = part
                yield imagecodecs.jpeg2k_encode(whole, level=40, codecformat="j2k", mct=False)

    tifffile.imwrite(
        path, tiles(), shape=pixels.shape, dtype=np.uint8, tile=(tile, tile), photometric="rgb", compression=codec,
        metadata=None, description=APERIO,
    )  # fmt: skip
    return path


def damage(path: Path, index: int, page: int = 0) -> None:
    """Overwrite the second half of a segment."""
    with tifffile.TiffFile(path) as file:
        found = file.pages[page]
        offset, count = found.dataoffsets[index], found.databytecounts[index]
    data = bytearray(path.read_bytes())
    data[offset + count // 2 : offset + count] = bytes(count - count // 2)
    path.write_bytes(data)
