"""Quality of tiles and profiles: cheap figures that are stored as flags; nothing is dropped by them.

In: a tile's pixels, or a profile's figures. Out: the columns of schema.TILE_QUALITY and schema.PROFILE_QUALITY, and a
slide's summary.
"""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from data_prep.slides import Pixels
from storm import schema
from storm.prep_config import PrepConfig

_STEP = 4  # colours are judged on every fourth px of every fourth row
_BLACK, _WHITE = 30, 225  # no channel is lighter, no channel is darker
# Ink. Both dyes of H&E take at least as much green as red, and hematoxylin takes a good part of the blue: on real
# slides blue has under 0.31 of the optical density of red in 1 of 1000 dark px. Red ink is not told from blood.
_GREENER = 30  # green and turquoise: so much more green than red
_BLUE = (256 * ((np.arange(256) + 1) / 256) ** 0.28).astype(np.uint8)  # blue, violet: more blue than this, by red
_BLUE[110:] = 255  # of pale px the ratio is noise
_INK = (12, 60, 20)  # black: the lightest channel from .. to, and the largest difference of two; frames are darker


def planes(rgb: Pixels) -> tuple[Pixels, ...]:
    """(red, green, blue, lightest, darkest) of each px; numpy is slow over an axis of three."""
    red, green, blue = cv2.split(rgb)
    return red, green, blue, cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)


def _ink(parts: tuple[Pixels, ...]) -> npt.NDArray[np.bool_]:
    red, green, blue, high, low = parts
    black = (high >= _INK[0]) & (high < _INK[1]) & (cv2.subtract(high, low) < _INK[2])
    return (cv2.subtract(green, red) > _GREENER) | (blue > cv2.LUT(red, _BLUE)) | black


def pen_mask(rgb: Pixels) -> npt.NDArray[np.bool_]:
    """[H, W] true where a px has the colour of blue, green or black ink."""
    return _ink(planes(rgb))


def sharpness(pixels: Pixels) -> float:
    """Variance of the Laplacian of the green channel; low = out of focus, or empty.

    Green is what both dyes take. Two bands, half of the rows, stand for all: it is the dearest of a tile's figures.
    """
    rows = pixels.shape[0]
    squares = total = count = 0.0
    for eighth in (1, 5):
        band = pixels[eighth * rows // 8 : (eighth + 2) * rows // 8]
        bends = cv2.Laplacian(cv2.extractChannel(band, 1), cv2.CV_16S)
        squares += cv2.norm(bends, cv2.NORM_L2SQR)
        total += cv2.sumElems(bends)[0]
        count += bends.size
    return float(squares / count - (total / count) ** 2)


def tile_quality(pixels: Pixels, tissue: float, inside: float) -> tuple[float, ...]:
    """The figures of a tile in the order of schema.TILE_QUALITY; `tissue` and `inside` are shares of the tile."""
    size = (-(-pixels.shape[1] // _STEP), -(-pixels.shape[0] // _STEP))
    parts = planes(cv2.resize(pixels, size, interpolation=cv2.INTER_NEAREST))
    high, low = parts[3:]
    pen, black, white = (
        np.count_nonzero(which) / high.size for which in (_ink(parts), high < _BLACK, low > _WHITE)
    )  # fmt: skip
    saturation = cv2.mean(cv2.divide(cv2.subtract(high, low), high, scale=255))[0] / 255
    return (tissue, inside, pen, black, white, saturation, sharpness(pixels))


def profile_quality(
    depth: npt.NDArray[np.int64], genes: npt.NDArray[np.int64], control: npt.NDArray[np.int64],
    in_tissue: npt.NDArray[np.int8], tissue: npt.NDArray[np.float32], config: PrepConfig,
) -> dict[str, npt.NDArray]:  # fmt: skip
    """The arrays of schema.PROFILE_QUALITY; `tissue` is NaN where there is no tile."""
    flagged = {
        "low_depth": depth < config.min_depth,
        "few_genes": genes < config.min_genes,
        "many_controls": control > config.max_control_share * np.maximum(1, depth + control),
        "off_tissue": tissue < config.min_tissue,
        "not_in_tissue": in_tissue == 0,
    }
    flags: npt.NDArray[np.uint16] = np.zeros(len(depth), np.uint16)
    for bit, name in enumerate(schema.FLAGS):
        flags |= flagged[name].astype(np.uint16) << bit
    return {
        "depth": depth, "genes": genes, "control": control, "in_tissue": in_tissue, "tissue": tissue, "flags": flags,
    }  # fmt: skip


def profile_summary(figures: dict[str, npt.NDArray]) -> dict[str, Any]:
    """Figures of a slide from those of its profiles: medians, and the share that each flag marks."""
    count = len(figures["depth"])
    if not count:
        return {}
    control, depth = figures["control"].sum(), figures["depth"].sum()
    flagged = {name: (figures["flags"] >> bit & 1).mean() for bit, name in enumerate(schema.FLAGS)}
    return {
        "median_depth": float(np.median(figures["depth"])),
        "median_genes": float(np.median(figures["genes"])),
        "counts": int(figures["genes"].sum()),
        "control_share": round(float(control / max(1, control + depth)), 5),
        "flagged": {name: round(float(share), 4) for name, share in flagged.items()},
        "flagged_any": round(float((figures["flags"] > 0).mean()), 4),
    }


def summary(quality: npt.NDArray[np.float32]) -> dict[str, float]:
    """Figures of a slide from those of its tiles [T, Q], rounded because they are for reading."""
    if not len(quality):
        return {}
    column = dict(zip(schema.TILE_QUALITY, quality.T, strict=True))
    low, middle = np.percentile(column["sharpness"], [5, 50])
    means = {f"{name}_mean": round(float(column[name].mean()), 4) for name in schema.TILE_QUALITY[:-1]}
    return means | {"sharpness_p5": round(float(low), 2), "sharpness_median": round(float(middle), 2)}
