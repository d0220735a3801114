"""Stains of a tile: the fixed statistics that the image loss regresses, and the jitter of training.

In: RGB pixels (uint8). Out: `schema.TILE_STATS`, standardised by constants, so that they mean the same in every run and
cannot collapse; or the same tile in a slightly different stain. Colour deconvolution with the fixed vectors of Ruifrok
& Johnston, Anal Quant Cytol Histol 23:291 (2001).
"""

import numpy as np
import numpy.typing as npt

from storm.schema import TILE_STATS

_HEMATOXYLIN, _EOSIN = (0.650, 0.704, 0.286), (0.072, 0.990, 0.105)  # optical density of pure stain in R, G, B
_NUCLEAR = 0.45  # hematoxylin above this (optical density) counts as nucleus
_TISSUE = 0.15  # mean optical density of R, G, B above this counts as tissue
_STRIDE = 2  # every second pixel: a nucleus is ten pixels wide, and this is four times as fast
# Mean and sd of each statistic over the tissue tiles of two public breast sections and one Aperio slide, rounded;
# fixed, whatever the training data is.
_MEAN = np.array([0.45, 0.37, 0.06, 0.12, 0.35, 0.70], np.float32)
_SD = np.array([0.13, 0.09, 0.08, 0.05, 0.15, 0.15], np.float32)

_DENSITY = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)


def _unmixing() -> npt.NDArray[np.float32]:
    """[3, 2] from optical density (R, G, B) to the amounts of hematoxylin and eosin."""
    stains = np.array([_HEMATOXYLIN, _EOSIN])
    rest = np.cross(*stains)
    basis = np.stack([*stains, rest / np.linalg.norm(rest)])
    return np.linalg.inv(basis / np.linalg.norm(basis, axis=1, keepdims=True))[:, :2].astype(np.float32)


_UNMIXING = _unmixing()


def tile_statistics(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """[S] standardised statistics of a tile [px, px, 3], in the order of `schema.TILE_STATS`."""
    density = _DENSITY[pixels[::_STRIDE, ::_STRIDE].reshape(-1, 3)]
    amount = density @ _UNMIXING
    mean, sd = amount.mean(axis=0), amount.std(axis=0)
    nuclear = float((amount[:, 0] > _NUCLEAR).mean())
    tissue = float((density.mean(axis=1) > _TISSUE).mean())
    values = np.array([mean[0], sd[0], mean[1], sd[1], nuclear, tissue], np.float32)
    assert values.shape == (len(TILE_STATS),)
    return (values - _MEAN) / _SD


def jitter_table(gain: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """[256, 3] new value of each pixel value where the optical density of R, G, B is multiplied by `gain` [3]."""
    shade = np.arange(256)[:, None] / 255
    return np.round(255 * shade ** gain[None, :]).astype(np.uint8)


def restain(pixels: npt.NDArray[np.uint8], table: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pixels [..., 3] looked up in a `jitter_table`."""
    result = np.empty_like(pixels)
    for c in range(3):
        result[..., c] = table[:, c].take(pixels[..., c], mode="clip")  # a byte is never out of range: no check
    return result
