"""Tissue as polygons: GeoJSON in level-0 px, as QuPath writes and reads it.

In: a mask over an overview, or a user's file. Out: a FeatureCollection (RFC 7946) of polygons with holes, or the mask
that such a file draws.
"""

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from storm.files import dump_json

Mask = npt.NDArray[np.bool_]
Ring = npt.NDArray[np.float64]  # [V, 2] x, y in level-0 px, its last point not repeated
Polygon = list[Ring]  # the outline, then its holes

_TOLERANCE_PX = 0.5  # of the overview, by which a simplified outline may leave the mask
_FINER = 2
_PROPERTIES = {"objectType": "annotation", "classification": {"name": "Tissue", "color": [150, 60, 170]}}
_MAX_BYTES = 256 << 20  # of a file: more is no outline of tissue
_FRACTION = 4  # bits below one px when drawing
_CURE = "export the annotations from QuPath as GeoJSON"


def from_mask(mask: Mask, px_px0: float, size_px0: tuple[int, int]) -> list[Polygon]:
    """The outlines of a mask's pieces.

    Args:
        mask: over an overview of `px_px0` level-0 px per px.
        size_px0: width and height of the slide; no outline leaves it.
    """
    fine = _without_touching(mask)
    found, tree = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    polygons: dict[int, Polygon] = {}
    for number, contour in enumerate(found):
        ring = (cv2.approxPolyDP(contour, _TOLERANCE_PX * _FINER, True)[:, 0] + 0.5) / _FINER * px_px0
        outline = tree[0][number][3]
        if len(ring) > 2:
            polygons.setdefault(int(number if outline < 0 else outline), []).append(np.clip(ring, 0, size_px0))
    return [polygons[number] for number in sorted(polygons)]


def _without_touching(mask: Mask) -> npt.NDArray[np.uint8]:
    """A mask on px half as wide whose outlines stay two tolerances apart: a ring that touches itself is no polygon."""
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    fine = cv2.resize(opened, None, fx=_FINER, fy=_FINER, interpolation=cv2.INTER_NEAREST)
    while True:  # px that meet at a corner alone are joined
        one, two, three, four = fine[:-1, :-1], fine[:-1, 1:], fine[1:, :-1], fine[1:, 1:]
        corners = (one == four) & (two == three) & (one != two)
        if not corners.any():
            return fine
        for part in (one, two, three, four):
            part[corners] = 1


def _area(ring: Ring) -> float:
    x, y = ring.T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(np.roll(x, -1), y)) / 2


def dump(polygons: list[Polygon]) -> bytes:
    """Polygons as a GeoJSON file: outlines counterclockwise in (x, y), holes clockwise."""
    features = [
        {
            "type": "Feature", "properties": _PROPERTIES,
            "geometry": {"type": "Polygon", "coordinates": [_closed(ring, k > 0) for k, ring in enumerate(polygon)]},
        }
        for polygon in polygons
    ]  # fmt: skip
    return dump_json({"type": "FeatureCollection", "features": features})


def _closed(ring: Ring, hole: bool) -> list[list[float]]:
    turned = np.round(ring if (_area(ring) > 0) != hole else ring[::-1], 1)
    return [*turned.tolist(), turned[0].tolist()]


def to_mask(polygons: list[Polygon], px_px0: float, shape: tuple[int, int]) -> Mask:
    """[H, W] the mask over an overview that the polygons draw."""
    drawn = np.zeros(shape, np.uint8)
    for polygon in polygons:
        # The middle of px 0 is the drawing's 0, and lies half a px from the slide's corner.
        places = [ring / px_px0 - 0.5 for ring in polygon]
        low = np.clip(np.floor(np.min([at.min(axis=0) for at in places], axis=0)) - 1, 0, shape[::-1]).astype(int)
        high = np.clip(np.ceil(np.max([at.max(axis=0) for at in places], axis=0)) + 2, 0, shape[::-1]).astype(int)
        part = drawn[low[1] : high[1], low[0] : high[0]]  # alone: there may be very many small ones
        if part.size:
            own = np.zeros(part.shape, np.uint8)
            rings = [np.rint((at - low) * (1 << _FRACTION)).astype(np.int32) for at in places]
            cv2.fillPoly(own, rings, 1, lineType=cv2.LINE_8, shift=_FRACTION)
            part |= own
    return drawn > 0


def read(path: Path, size_px0: tuple[int, int]) -> list[Polygon]:
    """The polygons of a user's file; where some are classified as Tissue, these alone.

    Raises:
        ValueError: naming file, fact and cure: no GeoJSON, a shape that is no area, or none that lies on the slide.
    """
    found = [(name, polygon) for geometry, name in _geometries(_load(path), path) for polygon in _areas(geometry, path)]
    named = [polygon for name, polygon in found if name.lower() == "tissue"]
    polygons = named or [polygon for _, polygon in found]
    width, height = size_px0
    if not any((ring.max(0) > 0).all() and (ring.min(0) < (width, height)).all() for ring, *_ in polygons):
        raise ValueError(
            f"{path}: none of its {len(polygons)} polygons lies on the slide ({width} x {height} px); {_CURE}, in px "
            "of the full resolution"
        )
    return polygons


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; correct the manifest")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size >> 20} MiB are too much for outlines of tissue; simplify them")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no GeoJSON ({type(error).__name__}); {_CURE}") from error


def _geometries(found: Any, path: Path) -> list[tuple[dict[str, Any], str]]:
    """(geometry, name of its class) of every feature of a collection, a list of features, a feature or a geometry."""
    if isinstance(found, dict) and found.get("type") == "FeatureCollection":
        found = found.get("features")
    features = found if isinstance(found, list) else [found]
    geometries = []
    for number, feature in enumerate(features, 1):
        geometry = feature.get("geometry", feature) if isinstance(feature, dict) else None
        if not isinstance(geometry, dict):
            raise ValueError(f"{path}: feature {number} has no geometry; {_CURE}")
        properties = feature.get("properties")
        label = properties.get("classification") if isinstance(properties, dict) else None
        name = label.get("name") if isinstance(label, dict) else None
        geometries.append((geometry, name if isinstance(name, str) else ""))
    return geometries


def _areas(geometry: dict[str, Any], path: Path) -> list[Polygon]:
    kind, parts = geometry.get("type"), geometry.get("coordinates")
    if kind not in ("Polygon", "MultiPolygon"):
        raise ValueError(f"{path}: holds a {kind}, which is no area; {_CURE}, closed areas alone")
    polygons = parts if kind == "MultiPolygon" else [parts]
    if not isinstance(polygons, list) or not all(isinstance(rings, list) and rings for rings in polygons):
        raise ValueError(f"{path}: a {kind} has no coordinates; {_CURE}")
    return [[_ring(points, path) for points in rings] for rings in polygons]


def _ring(points: Any, path: Path) -> Ring:
    """A ring of coordinates as an array. Raises ValueError: no numbers, not closed, or without an area."""
    try:
        ring = np.array([(x, y) for x, y, *_ in points], np.float64)
        if not all(isinstance(v, int | float) and math.isfinite(v) for point in points for v in point[:2]):
            raise ValueError("not finite")
    except (TypeError, ValueError, KeyError, OverflowError):
        raise ValueError(f"{path}: a ring is no list of points with finite x and y; {_CURE}") from None
    if len(ring) < 4 or (ring[0] != ring[-1]).any():
        raise ValueError(f"{path}: a ring of {len(ring)} points is not closed (first = last, 4 or more); {_CURE}")
    if np.abs(ring).max() > 1e7 or _area(ring[:-1]) == 0:
        raise ValueError(f"{path}: a ring encloses no area, or lies beyond any slide; {_CURE}")
    return ring[:-1]
