"""The outlines of Space Ranger's cells: a GeoJSON file of polygons in px of the full-resolution image.

In: `cell_segmentations.geojson`, a FeatureCollection whose features tell a whole number `cell_id` and a Polygon of
(x, y). Out: name, centre and vertices of each cell. The file is read feature by feature: parsed as a whole, one of
300,000 cells would fill gigabytes.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.platforms.spaceranger import Positions
from storm.schema import spans

_BLOCK, _MAX_FEATURE = 1 << 20, 1 << 24  # characters
_FEATURES = re.compile(r'"features"\s*:\s*\[')
_BETWEEN = re.compile(r"[\s,]*")
_CURE = "restore it from Space Ranger's outs"


@dataclass(frozen=True)
class Outlines:
    """M cells: their centres as positions, and their vertices."""

    positions: Positions
    indptr: npt.NDArray[np.int64]  # [M + 1]
    xy: npt.NDArray[np.float64]  # [V, 2] px; the first vertex is not repeated at the end
    notes: list[str]

    def take(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """(indptr, vertices) of some cells."""
        indptr, entries = spans(self.indptr, rows)
        return indptr, self.xy[entries]


def _features(path: Path) -> Iterator[dict[str, Any]]:
    """The features of a collection, one after the other. Raises ValueError where the text breaks off or is none."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8") as handle:
        text, at = "", 0
        while (start := _FEATURES.search(text)) is None:
            more = handle.read(_BLOCK)
            if not more:
                raise ValueError("it holds no features")
            text += more
        at = start.end()
        while True:
            at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
            if text[at : at + 1] == "]":
                return
            try:
                feature, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                more = handle.read(_BLOCK)  # a feature that breaks off goes on in the next block
                if not more or len(text) - at > _MAX_FEATURE:
                    raise ValueError("it breaks off or is no JSON") from error
                text, at = text[at:] + more, 0
                continue
            yield feature


def _ring(feature: dict[str, Any]) -> tuple[int, npt.NDArray[np.float64], bool]:
    """(cell_id, vertices of its outline, whether it has several parts: then the largest)."""
    geometry = feature["geometry"]
    parts = {"Polygon": lambda c: [c], "MultiPolygon": lambda c: c}[geometry["type"]](geometry["coordinates"])
    rings = [np.asarray(part[0], np.float64)[:, :2] for part in parts]
    ring = rings[0] if len(rings) == 1 else max(rings, key=_area)
    if ring[0, 0] == ring[-1, 0] and ring[0, 1] == ring[-1, 1]:
        ring = ring[:-1]
    if len(ring) < 3 or not np.isfinite(ring).all():
        raise ValueError("fewer than three places")
    return int(feature["properties"]["cell_id"]), ring, len(parts) > 1


def _area(ring: npt.NDArray[np.float64]) -> float:
    x, y = ring.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


def read(path: Path) -> Outlines:
    """All cells of a file.

    Raises:
        ValueError: it is damaged, a feature is no cell with an outline, or a cell comes twice.
    """
    ids: list[int] = []
    rings: list[npt.NDArray[np.float64]] = []
    parted = 0
    try:
        for feature in _features(path):
            cell, ring, several = _ring(feature)
            ids.append(cell)
            rings.append(ring)
            parted += several
    except (KeyError, TypeError, IndexError, ValueError, RecursionError) as error:
        place = f"feature {len(ids) + 1}: {error!r}" if not isinstance(error, UnicodeDecodeError) else "not UTF-8"
        raise ValueError(f"{path}: no readable outlines of cells ({place}); {_CURE}") from error
    if not ids:
        raise ValueError(f"{path}: holds no cell; {_CURE}")
    if len(set(ids)) < len(ids):
        twice = next(i for k, i in enumerate(ids) if i in set(ids[:k]))
        raise ValueError(f"{path}: cell {twice} comes twice; {_CURE}")
    indptr = np.concatenate([[0], np.cumsum([len(ring) for ring in rings])]).astype(np.int64)
    xy = np.concatenate(rings)
    names = pa.array([f"cellid_{cell:09d}-1" for cell in ids], pa.string())
    none = np.zeros((len(ids), 2))
    notes = [f"{parted} cells have several parts, of which the largest is their outline"] if parted else []
    return Outlines(Positions(names, np.ones(len(ids), np.int8), none, centroids(indptr, xy)), indptr, xy, notes)


def centroids(indptr: npt.NDArray[np.int64], xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[M, 2] centres of mass of polygons of three vertices or more; of one without area, the mean of its vertices."""
    start, length = indptr[:-1], np.diff(indptr)
    mean = np.add.reduceat(xy, start) / length[:, None]
    around = xy - np.repeat(mean, length, axis=0)  # near zero, so that nothing cancels
    following = np.arange(1, len(xy) + 1)
    following[indptr[1:] - 1] = start
    cross = around[:, 0] * around[following, 1] - around[following, 0] * around[:, 1]
    area = np.add.reduceat(cross, start)
    moment = np.add.reduceat((around + around[following]) * cross[:, None], start)
    flat = np.abs(area) < 1e-9
    return mean + np.where(flat[:, None], 0, moment / (3 * np.where(flat, 1, area))[:, None])
