"""Figures of the corpus report: a slide's picture, its profiles over it, histograms.

In: a slide store. Out: a JPEG of the slide, a transparent PNG of its profiles coloured by depth, and counts in bins
that are the same for every slide, as inline SVG.
"""

import base64
import io
import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from storm import schema
from storm.store import SlideStore

_MAX_POINTS = 20_000
_SIDES = (560, 440, 340, 260, 200, 150)  # px of a picture's longer side; the largest that fits its share of the report
_ROW_SIDE = 72  # px of the picture in the table
_COLOURS = 15
_OUTSIDE = 0.001  # share of all values that an axis may leave to its last bin, on either side
_EMPTY = (244, 244, 242)  # behind profiles that have no image


@dataclass(frozen=True)
class Axis:
    """The bins of one figure, the same for every slide."""

    title: str
    low: float
    high: float
    bins: int
    log: bool  # bins are of log10

    def counts(self, values: npt.NDArray) -> npt.NDArray[np.int64]:
        """[bins] how many of the values lie in each; what lies beyond an end is in the last bin there."""
        known = values[np.isfinite(values)].astype(np.float64)
        if self.log:
            known = np.log10(np.maximum(known, 10.0**self.low))
        place = np.floor((known - self.low) / (self.high - self.low) * self.bins).astype(np.int64)
        return np.bincount(place.clip(0, self.bins - 1), minlength=self.bins)

    def label(self, edge: int) -> str:
        """The value at a bin's edge, for people."""
        value = self.low + (self.high - self.low) * edge / self.bins
        if self.log:
            value = 10**value
            return f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.0f}"
        return f"{value:.2g}"


AXES = {
    "depth": Axis("counts per profile", 0, 6, 48, True),
    "genes": Axis("genes per profile", 0, 4.5, 36, True),
    "control": Axis("control share", 0, 0.2, 40, False),
    "tissue": Axis("tissue per tile", 0, 1, 20, False),
    "sharpness": Axis("sharpness per tile", 0, 4.5, 36, True),
}


def histograms(store: SlideStore, quality: dict[str, npt.NDArray]) -> dict[str, npt.NDArray[np.int64]]:
    """AXES' figures of one slide; only those that it has."""
    found = {}
    if len(quality["depth"]):
        depth, control = quality["depth"], quality["control"]
        found = {"depth": AXES["depth"].counts(depth), "genes": AXES["genes"].counts(quality["genes"])}
        if control.any():
            found["control"] = AXES["control"].counts(control / np.maximum(1, control + depth))
    if len(store):
        column = {name: store.tile_quality[:, i] for i, name in enumerate(schema.TILE_QUALITY)}
        found |= {name: AXES[name].counts(column[name]) for name in ("tissue", "sharpness")}
    return found


def span(counts: list[npt.NDArray[np.int64]]) -> tuple[int, int]:
    """(first, last + 1) bin between which nearly all values of some histograms lie; never fewer than four bins."""
    running = np.cumsum(np.sum(counts, axis=0))
    first, last = np.searchsorted(running, [_OUTSIDE * running[-1], (1 - _OUTSIDE) * running[-1]], side="right")
    last = min(int(last) + 1, len(running))
    return max(0, min(int(first), last - 4)), max(last, 4)


def svg(name: str, counts: npt.NDArray[np.int64], shown: tuple[int, int], width: int = 160) -> str:
    """A histogram of the bins `shown`, which all slides have in common, with its median; the rest is in their ends."""
    axis, (first, last) = AXES[name], shown
    height, base = 60, 46
    part = counts[first:last].copy()
    part[0] += counts[:first].sum()
    part[-1] += counts[last:].sum()
    step, top = width / (last - first), max(1, int(part.max()))
    bars = "".join(
        f"M{i * step:.1f} {base}v-{max(1.0, (base - 4) * n / top):.1f}h{step - 0.6:.1f}V{base}z"
        for i, n in enumerate(part.tolist())
        if n
    )
    middle = int(np.searchsorted(np.cumsum(part), part.sum() / 2)) + 0.5
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{axis.title}, {counts.sum()} values">'
        f'<path class="bar" d="{bars}"/><path class="axis" d="M0 {base}.5h{width}"/>'
        f'<path class="median" d="M{middle * step:.1f} 2V{base}"/>'
        f'<text x="0" y="{height - 2}">{axis.label(first)}</text>'
        f'<text x="{width}" y="{height - 2}" text-anchor="end">{axis.label(last)}</text></svg>'
    )


def palette() -> npt.NDArray[np.uint8]:
    """[15, 3] colours from few counts to many."""
    ramp = np.linspace(0, 255, _COLOURS).astype(np.uint8)
    return np.asarray(cv2.applyColorMap(ramp[:, None], cv2.COLORMAP_VIRIDIS)[:, 0, ::-1])


def levels(depth: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
    """([N] colour of each profile, from 1 on; the depths of the first and of the last colour)."""
    low, high = np.percentile(np.maximum(depth, 1), [2, 98])
    scale = math.log(high / low) if high > low else 1.0
    place = np.log(np.maximum(depth, 1) / low) / scale * _COLOURS
    return place.clip(0, _COLOURS - 1).astype(np.uint8) + 1, (round(low), round(high))


@dataclass(frozen=True)
class Picture:
    """A slide as data URIs; empty text where it has none."""

    width: int
    height: int
    small: str  # for the table
    slide: str
    profiles: str
    depths: tuple[int, int]  # of the first and the last colour
    shown: int  # profiles that are drawn


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _jpeg(pixels: npt.NDArray[np.uint8], side: int) -> bytes:
    """The picture with a longer side of at most `side` px."""
    scale = min(1.0, side / max(pixels.shape[:2]))
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(small), 80, "RGB", "420", fastdct=False))


def _places_png(store: SlideStore, depth: npt.NDArray, size: tuple[int, int]) -> tuple[bytes, tuple[int, int], int]:
    """(transparent PNG of the profiles, depths of the first and the last colour, how many profiles are drawn)."""
    profiles, (width, height) = store.places(), size
    px_per_um = width / (store.info.width_px0 * store.info.mpp)
    colour, depths = levels(depth)
    rows = np.unique(np.linspace(0, len(profiles) - 1, min(len(profiles), _MAX_POINTS)).astype(np.int64))
    xy = np.floor(profiles.xy_um[rows] * px_per_um).astype(np.int64)
    radius = profiles.footprint_um[rows] * px_per_um / 2
    canvas = np.zeros((height, width), np.uint8)
    inside = ((xy >= 0) & (xy < (width, height))).all(axis=1)
    canvas[xy[inside, 1], xy[inside, 0]] = colour[rows][inside]
    for i in np.flatnonzero(radius >= 1):
        cv2.circle(canvas, xy[i].tolist(), round(float(radius[i])), int(colour[rows[i]]), -1)
    image = Image.fromarray(canvas)
    image.putpalette([0, 0, 0, *palette().ravel().tolist()])
    data = io.BytesIO()
    image.save(data, "PNG", transparency=0, optimize=True, bits=4)
    return data.getvalue(), depths, len(rows)


def picture(store: SlideStore, depth: npt.NDArray, budget_bytes: int) -> Picture:
    """The largest picture of a slide, with its profiles, that `budget_bytes` allow.

    Raises:
        ValueError: the stored overview is no JPEG.
    """
    overview, _ = store.overview()
    info = store.info
    if overview:
        pixels = simplejpeg.decode_jpeg(overview)
    else:  # expression alone: the frame that its profiles lie in
        long = max(info.width_px0, info.height_px0, 1)
        shape = [max(1, round(_SIDES[0] * side / long)) for side in (info.height_px0, info.width_px0)]
        pixels = np.full((*shape, 3), _EMPTY, np.uint8)
    slide, points, depths, shown = b"", b"", (0, 0), 0
    for side in _SIDES:
        slide = _jpeg(pixels, side)
        height, width = simplejpeg.decode_jpeg_header(slide)[:2]
        if len(depth):
            points, depths, shown = _places_png(store, depth, (width, height))
        if len(slide) + len(points) <= budget_bytes:
            break
    small = _uri("jpeg", _jpeg(pixels, _ROW_SIDE)) if overview else _uri("png", points) if points else ""
    return Picture(width, height, small, _uri("jpeg", slide), _uri("png", points) if points else "", depths, shown)
