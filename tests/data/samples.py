"""Groups made by hand for the tests of the batch: few genes, small tiles, everything drawn from one seed."""

import dataclasses
from typing import Any

import numpy as np
import simplejpeg

from storm.data.batch import BatchSpec
from storm.schema import POLYGON, Group, GroupMeta, Profiles, RegionMeta

TILE_PX, TILE_UM, GENES = 32, 64.0, 40
PANEL = np.arange(GENES) % 5 != 4  # 32 of 40 genes
SHARE = np.linspace(1, 5, GENES) / np.linspace(1, 5, GENES).sum()


def spec(**changes: Any) -> BatchSpec:
    """Two panels over 40 genes."""
    panels = {"p": PANEL, "all": np.ones(GENES, dtype=bool)}
    return BatchSpec(**{"tile_px": TILE_PX, "n_genes": GENES, "panels": panels, "organs": ("breast",), "share": SHARE}
                     | changes)  # fmt: skip


def profiles(xy_um: np.ndarray, counts: np.ndarray, diameter_um: float = 40.0) -> Profiles:
    """Discs at `xy_um` with the dense `counts` [N, G]."""
    row, gene = np.nonzero(counts)
    n = len(xy_um)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=n))]).astype(np.int64)
    return Profiles(
        [f"s{i}" for i in range(n)], xy_um.astype(np.float64), np.full(n, diameter_um, np.float32),
        np.zeros(n, np.uint8), indptr, gene.astype(np.int32), counts[row, gene].astype(np.int32),
    )  # fmt: skip


def group(seed: int = 0, regions: int = 2, side: int = 3, per_region: int = 12, panel: str = "p", **meta: Any) -> Group:
    """`regions` squares of `side` tiles, one tile absent, profiles anywhere in them."""
    rng = np.random.default_rng(seed)
    metas = tuple(RegionMeta((1000.0 * g, 500.0), side, side) for g in range(regions))
    region = np.repeat(np.arange(regions), per_region).astype(np.int32)
    xy = rng.uniform(0, side * TILE_UM, (len(region), 2)) + np.array([m.origin_um for m in metas])[region]
    rate = SHARE * rng.lognormal(5, 0.7, (len(region), 1)) * (PANEL if panel == "p" else 1)
    tiles = {
        (g, r, c): _jpeg(rng)
        for g in range(regions)
        for r in range(side)
        for c in range(side)
        if (g, r, c) != (0, 0, 1)
    }
    values: dict[str, Any] = {
        "slide": "s1", "section": "s1", "donor": "d", "study": "t", "organ": "breast", "species": "human",
        "platform": "visium", "kind": "spot", "panel": panel, "slide_log_density": -1.5, "mpp": 0.5,
        "tile_px": TILE_PX, "tile_mpp": TILE_UM / TILE_PX, "regions": metas,
    } | meta  # fmt: skip
    return Group(GroupMeta(**values), profiles(xy, rng.poisson(rate)), region, tiles)


def _jpeg(rng: np.random.Generator) -> bytes:
    noise = rng.integers(60, 250, (TILE_PX // 8, TILE_PX // 8, 3), dtype=np.uint8)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(noise.repeat(8, 0).repeat(8, 1)), quality=95)


def outlined(profiles: Profiles, rng: np.random.Generator, edges: int = 9) -> Profiles:
    """The profiles with star-shaped polygons of `edges` vertices, about as large as their discs."""
    n = len(profiles)
    angle = np.sort(rng.uniform(0, 2 * np.pi, (n, edges)), axis=1)
    radius = profiles.footprint_um[:, None] / 2 * rng.uniform(0.7, 1.4, (n, edges))
    ring = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    after = np.roll(ring, -1, axis=1)
    area = np.abs((ring[..., 0] * after[..., 1] - ring[..., 1] * after[..., 0]).sum(1)) / 2
    return dataclasses.replace(
        profiles, footprint_um=np.sqrt(4 / np.pi * area).astype(np.float32),
        footprint_kind=np.full(n, POLYGON, np.uint8),
        polygon_indptr=np.arange(n + 1) * edges, polygon_um=ring.reshape(-1, 2).astype(np.float32),
    )  # fmt: skip


def cells(seed: int = 0, regions: int = 2, side: int = 3, per_region: int = 200, **meta: Any) -> Group:
    """A group of cells of 8-16 um with outlines."""
    made = group(seed, regions, side, per_region, **{"platform": "xenium", "kind": "cell"} | meta)
    rng = np.random.default_rng(seed)
    made.profiles.footprint_um = rng.uniform(8, 16, len(made.profiles)).astype(np.float32)
    return dataclasses.replace(made, profiles=outlined(made.profiles, rng))
