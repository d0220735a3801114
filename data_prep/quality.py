"""Quality of tiles and profiles: cheap figures that are stored as flags; nothing is dropped by them.

In: a tile's pixels, or a profile's figures. Out: the columns of schema.TILE_QUALITY and schema.PROFILE_QUALITY.
"""

import cv2
import numpy as np
import numpy.typing as npt

from data_prep.slides import Pixels
from storm import schema
from storm.config import PrepConfig


def sharpness(pixels: Pixels) -> float:
    """Variance of the Laplacian of the grey image; low = out of focus, or empty."""
    return float(cv2.Laplacian(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.CV_32F).var())


def tile_quality(pixels: Pixels, tissue: float, inside: float) -> tuple[float, ...]:
    """The figures of a tile in the order of schema.TILE_QUALITY; `tissue` and `inside` are shares of the tile."""
    return (tissue, inside, 0.0, 0.0, 0.0, 0.0, sharpness(pixels))


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
    flags = sum((flagged[name].astype(np.uint16) << bit for bit, name in enumerate(schema.FLAGS)), np.uint16(0))
    return {
        "depth": depth, "genes": genes, "control": control, "in_tissue": in_tissue, "tissue": tissue, "flags": flags,
    }  # fmt: skip


def summary(quality: npt.NDArray[np.float32]) -> dict[str, float]:
    """Figures of a slide from those of its tiles [T, Q], rounded because they are for reading."""
    if not len(quality):
        return {}
    column = dict(zip(schema.TILE_QUALITY, quality.T, strict=True))
    low, middle = np.percentile(column["sharpness"], [5, 50])
    return {
        "tissue_mean": round(float(column["tissue"].mean()), 4),
        "sharpness_p5": round(float(low), 2),
        "sharpness_median": round(float(middle), 2),
    }
