"""H&E of a latent tissue: hematoxylin and eosin as two density images, then light through them.

In: a `Tissue`, a `Stain` and the pixel size. Out: RGB uint8 [h, w, 3]. Densities add along the light path (Beer and
Lambert); the two dyes' colours are optical densities per channel after Ruifrok and Johnston (2001).
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from data_prep.synthetic import tissue as tissues
from data_prep.synthetic.tissue import Image, Tissue

HEMATOXYLIN = np.array([0.65, 0.70, 0.29])
EOSIN = np.array([0.09, 0.91, 0.30])
BLOOD = np.array([0.00, 0.10, 0.55])  # what hemoglobin takes out beside the eosin
# Per cell type: length and width of the nucleus in um and its hematoxylin; eosin and hematoxylin of its surroundings
NUCLEUS = np.array([[12.0, 3.4, 0.95], [9.6, 7.2, 0.72], [6.4, 6.0, 1.15], [8.2, 6.4, 0.88]])
SURROUNDINGS = np.array([[0.50, 0.02], [0.38, 0.17], [0.27, 0.11], [0.42, 0.08]])
_SHIFT = 4  # sub-pixel bits of the drawing calls


@dataclass(frozen=True)
class Stain:
    """One section's staining, cutting and scanning."""

    hematoxylin: float
    eosin: float
    hue: float  # -1..1: turns both dyes a little towards blue or red
    white: float  # grey level of the empty slide
    folds: int
    blurs: int


def _noise(rng: np.random.Generator, size_px: int, sigma_px: float) -> Image:
    """Smooth noise [size, size] of sd 1; coarse noise is drawn coarse, which is what makes it cheap."""
    step = max(1, int(sigma_px))
    small = rng.standard_normal((size_px // step + 3,) * 2, dtype=np.float32)
    small = cv2.GaussianBlur(small, (0, 0), max(sigma_px / step, 0.6))
    return cv2.resize(small / small.std(), (size_px, size_px), interpolation=cv2.INTER_LINEAR)


def _fibres(rng: np.random.Generator, fibre: Image, size_px: int, mpp: float) -> Image:
    """Fibrous noise [size, size], drawn out along the local direction: a blend of four oriented blurs."""
    if mpp < 1.0:  # fibres are wider than a pixel: draw them coarse
        coarse = _fibres(rng, fibre, size_px // 2, 2 * mpp)
        return cv2.resize(coarse, (size_px, size_px), interpolation=cv2.INTER_LINEAR)
    base = rng.standard_normal((size_px, size_px), dtype=np.float32)
    reach = max(3, int(9.0 / mpp))
    axis = np.arange(-reach, reach + 1, dtype=np.float32)
    out = np.zeros_like(base)
    for direction in (0.0, 0.25 * math.pi, 0.5 * math.pi, 0.75 * math.pi):  # Python floats: numpy's would make float64
        along = axis * math.cos(direction) + axis[:, None] * math.sin(direction)
        across = axis[:, None] * math.cos(direction) - axis * math.sin(direction)
        kernel = np.exp(-0.5 * ((along * mpp / 6.0) ** 2 + (across * mpp / 0.9) ** 2))
        kernel /= np.sqrt((kernel**2).sum())  # noise of sd 1 stays so
        weight = cv2.resize(np.cos(fibre - direction) ** 4, (size_px, size_px), interpolation=cv2.INTER_LINEAR)
        out += cv2.multiply(weight, cv2.filter2D(base, -1, kernel))
    return out


def _ellipse(canvas: npt.NDArray[np.uint8], xy_px: npt.NDArray, half_px: npt.NDArray, turn: float, value: int) -> None:
    scale = 1 << _SHIFT
    centre = (round(float(xy_px[0] - 0.5) * scale), round(float(xy_px[1] - 0.5) * scale))
    axes = (max(1, round(float(half_px[0]) * scale)), max(1, round(float(half_px[1]) * scale)))
    cv2.ellipse(canvas, centre, axes, np.degrees(turn), 0, 360, value, -1, cv2.LINE_AA, _SHIFT)


def _nuclei(rng: np.random.Generator, tissue: Tissue, size_px: int, mpp: float) -> Image:
    """Hematoxylin of the nuclei: rims, paler inside for the large ones, chromatin grain."""
    canvas = np.zeros((size_px, size_px), np.uint8)
    count = len(tissue.kind)
    half = NUCLEUS[tissue.kind, :2] / 2 * np.exp(rng.normal(0, 0.11, (count, 2))) / mpp
    dark = NUCLEUS[tissue.kind, 2] * np.exp(rng.normal(0, 0.12, count))
    xy = tissue.xy_um / mpp
    rim = 0.9 / mpp
    for i in range(count):
        value = min(255, int(dark[i] * 150))
        _ellipse(canvas, xy[i], half[i], tissue.angle[i], value)
        if tissue.kind[i] in (tissues.EPITHELIUM, tissues.MACROPHAGE):
            _ellipse(canvas, xy[i], half[i] - rim, tissue.angle[i], int(value * 0.72))
    soft = cv2.GaussianBlur(canvas, (0, 0), 0.45 / mpp).astype(np.float32) / 150.0
    return soft * (1.0 + 0.16 * _noise(rng, size_px, 0.9 / mpp))


def _lumens(tissue: Tissue, size_px: int, mpp: float) -> Image:
    canvas = np.zeros((size_px, size_px), np.uint8)
    for x, y, long, short, turn in tissue.lumens:
        _ellipse(canvas, np.array([x, y]) / mpp, np.array([long, short]) / mpp, turn, 255)
    return cv2.GaussianBlur(canvas, (0, 0), 0.7 / mpp).astype(np.float32) / 255.0


def _surroundings(tissue: Tissue) -> tuple[Image, Image]:
    """Eosin and hematoxylin between the nuclei, on the raster: what the cells around lend to a place."""
    eosin, hematoxylin = (tissue.shares @ SURROUNDINGS.astype(np.float32)).transpose(2, 0, 1)
    hyaline = cv2.GaussianBlur((tissue.domain == tissues.HYALINE).astype(np.float32), (0, 0), 4.0)
    return eosin * (1 + 0.35 * hyaline), hematoxylin


def _span(centre: int, reach: int, size: int) -> slice:
    return slice(max(centre - reach, 0), min(centre + reach, size))


def _draw_vessels(rng: np.random.Generator, tissue: Tissue, layers: Image, mpp: float) -> None:
    """Round walls of muscle in concentric coats around packed red cells: what the niche looks for."""
    grain = _noise(rng, 256, 2.2 / mpp)
    for x, y, radius in tissue.vessels:
        reach = min(int((radius + 6) / mpp) + 1, 128)
        col, row = int(x / mpp), int(y / mpp)
        window = (_span(row, reach, layers.shape[1]), _span(col, reach, layers.shape[2]))
        rows, cols = np.ogrid[window]
        dx, dy = (cols + 0.5) * mpp - x, (rows + 0.5) * mpp - y
        turn = np.arctan2(dy, dx)
        distance = np.hypot(dx, dy) * (1 + 0.06 * np.sin(2 * turn + x) + 0.03 * np.sin(5 * turn + y))
        wall = np.clip((radius - distance) / 2.0, 0, 1)
        blood = np.clip((0.62 * radius - distance) / 2.0, 0, 1)
        coats = 0.55 + 0.10 * np.sin(distance * 1.3 + 1.5 * np.sin(3 * turn)) * (1 - blood)
        red = blood * (1 + 0.22 * grain[: blood.shape[0], : blood.shape[1]])
        layer = layers[(slice(None), *window)]
        layer *= 1 - wall
        layer += np.stack([wall * coats * (1 - blood) + 0.75 * red, wall * 0.09 * (1 - blood), red]).astype(np.float32)


def _spoil(rng: np.random.Generator, stain: Stain, layers: Image, mpp: float) -> None:
    """Folds (twice the tissue along a line) and places out of focus, in place."""
    size = layers.shape[1]
    axis = np.arange(size, dtype=np.float32) * mpp
    for _ in range(stain.folds):
        start, turn, width = rng.uniform(0.2, 0.8) * size * mpp, rng.uniform(-0.6, 0.6), rng.uniform(10, 18)
        bend = 25 * np.sin(axis / rng.uniform(120, 260))
        distance = np.abs(axis[None] - (start + turn * (axis - size * mpp / 2) + bend)[:, None])
        layers *= 1 + np.float32(0.8) * np.clip((width - distance) / 4, 0, 1)
    for _ in range(stain.blurs):
        radius = int(rng.uniform(70, 140) / mpp)
        x, y = rng.integers(radius, size - radius, 2)
        rows, cols = np.ogrid[-radius:radius, -radius:radius]
        share = np.clip((radius - np.hypot(rows, cols)) * mpp / 25, 0, 1).astype(np.float32)
        for layer in layers[:, y - radius : y + radius, x - radius : x + radius]:
            layer += share * (cv2.GaussianBlur(layer, (0, 0), 2.0 / mpp) - layer)


def _light(layers: Image, stain: Stain) -> npt.NDArray[np.uint8]:
    """RGB of light through the dyes [eosin, hematoxylin, blood]."""
    eosin = (EOSIN + stain.hue * np.array([-0.02, 0.0, 0.05])) * stain.eosin
    hematoxylin = (HEMATOXYLIN + stain.hue * np.array([-0.05, 0.02, 0.05])) * stain.hematoxylin
    rgb = np.empty((*layers.shape[1:], 3), np.uint8)
    for channel, dyes in enumerate(np.stack([eosin, hematoxylin, BLOOD], 1).astype(np.float32)):
        density = layers[0] * dyes[0] + layers[1] * dyes[1] + layers[2] * dyes[2]
        rgb[..., channel] = np.clip(np.exp(-density) * np.float32(stain.white) + 0.5, 0, 255).astype(np.uint8)
    return rgb


def _dyes(rng: np.random.Generator, tissue: Tissue, size_px: int, mpp: float) -> Image:
    """Densities [3, h, w] of eosin, hematoxylin and blood, without vessels."""

    def enlarge(field: Image) -> Image:
        return cv2.resize(field, (size_px, size_px), interpolation=cv2.INTER_LINEAR)

    eosin, hematoxylin = _surroundings(tissue)
    grain = 0.5 * np.clip(eosin, 0.2, 0.5)  # collagen is fibrous, cytoplasm less so
    layers = np.stack([enlarge(eosin), enlarge(hematoxylin), np.zeros((size_px, size_px), np.float32)])
    texture = enlarge(grain) * _fibres(rng, tissue.fibre, size_px, mpp) + 0.12 * _noise(rng, size_px, 9.0 / mpp)
    layers[0] *= np.clip(1 + texture, 0.2, 2.5)
    nuclei = _nuclei(rng, tissue, size_px, mpp)
    layers[1] += nuclei
    layers[0] *= 1 - 0.5 * np.minimum(nuclei, 1)
    layers *= (1 - _lumens(tissue, size_px, mpp)) * np.clip(enlarge(tissue.inside) * 8 + 0.5, 0, 1)
    return layers


def render(rng: np.random.Generator, tissue: Tissue, stain: Stain, mpp: float) -> npt.NDArray[np.uint8]:
    """The section as RGB uint8 [h, w, 3] at `mpp` um per pixel, h = w = side / mpp."""
    size_px = round(tissue.side_um / mpp)
    layers = _dyes(rng, tissue, size_px, mpp)
    assert layers.dtype == np.float32, layers.dtype
    _draw_vessels(rng, tissue, layers, mpp)
    _spoil(rng, stain, layers, mpp)
    layers[0] += 0.012 + 0.008 * _noise(rng, size_px, 1.0)
    return _light(layers, stain)
