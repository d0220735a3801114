"""Groups made by hand for the tests of the batch: few genes, small tiles, everything drawn from one seed."""

from typing import Any

import numpy as np
import simplejpeg

from storm.data.batch import BatchSpec
from storm.schema import Group, GroupMeta, Profiles, RegionMeta

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
