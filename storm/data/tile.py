"""One tile: JPEG bytes in, RGB pixels out, at the size that was promised or not at all. Pixels are passed through."""

import numpy as np
import numpy.typing as npt
import simplejpeg

from storm.schema import Group, TileData

Pixels = npt.NDArray[np.uint8]


def decode_tile(
    tile: TileData, tile_px: int, source: str, least_px: tuple[int, int] = (0, 0), out: Pixels | None = None
) -> Pixels:
    """Pixels uint8 [tile_px, tile_px, 3]; the size in the header is compared before anything is allocated for it.

    Args:
        tile: a JPEG, or pixels of the promised size.
        source: names the tile in errors.
        out: [tile_px, tile_px, 3], contiguous, that the pixels are decoded into.
        least_px: (width, height) that is enough: the tile may come back reduced, by the powers of two of the format.

    Raises:
        ValueError: not a JPEG, or of another size.
    """
    if isinstance(tile, np.ndarray):
        assert tile.shape == (tile_px, tile_px, 3), source
        if out is None:
            return tile
        out[...] = tile
        return out
    try:
        height, width = simplejpeg.decode_jpeg_header(tile)[:2]
        if (height, width) == (tile_px, tile_px):
            pixels: Pixels = simplejpeg.decode_jpeg(
                tile, "RGB", min_width=least_px[0], min_height=least_px[1], min_factor=1, buffer=out
            )
            return pixels
    except ValueError as error:
        raise ValueError(f"{source} is damaged ({error}); build and pack its slide again") from error
    raise ValueError(f"{source} is {width} x {height} px, not {tile_px}; build and pack its slide again")


def decode_tiles(group: Group, tile_px: int) -> Pixels:
    """[t, tile_px, tile_px, 3] a group's tiles in the order of their places. Raises ValueError as `decode_tile`."""
    pixels = np.empty((len(group.tiles), tile_px, tile_px, 3), np.uint8)
    for place, out in zip(sorted(group.tiles), pixels, strict=True):
        decode_tile(group.tiles[place], tile_px, f"slide {group.meta.slide}: tile {place}", out=out)
    return pixels
