"""Sections as the protocols see them: counts of common genes, depth, place, and the colour of a patch per profile.

In: slide stores. Out: `Section`s over one list of genes. A patch is a square of 112 um about a profile's centre, cut
from the stored tiles whatever their geometry.
"""

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse, spatial

from storm.data.tile import decode_tile
from storm.evaluate.baselines import colour_features
from storm.store import SlideStore

Floats = npt.NDArray[np.float64]

PATCH_UM = 112.0
_CACHED_TILES = 256
_AT_ONCE = 64  # patches
_PER_PROFILE = ("rows", "xy_um", "counts", "depth", "colour", "around")


@dataclass(frozen=True)
class Section:
    """One measured slide; N profiles with counts, K genes that all sections share."""

    slide_id: str
    donor: tuple[str, str]  # (study, its name there): two studies may use one name
    rows: npt.NDArray[np.int64]  # [N] row numbers of the profiles in the store
    ids: list[str]  # [N]
    xy_um: Floats  # [N, 2]
    counts: sparse.csr_array  # [N, K]
    depth: npt.NDArray[np.int64]  # [N] counts of all measured genes
    colour: Floats  # [N, 15]
    around: Floats  # [N, 30] colour, and its mean over the profile and its neighbours

    @property
    def log_depth(self) -> Floats:
        """[N] natural log of the depth."""
        return np.log(self.depth.astype(np.float64))


def take(section: Section, keep: npt.NDArray) -> Section:
    """The profiles of a section at `keep` (rows or a mask); their colours stay as they were read."""
    rows = np.arange(len(section.rows))[keep]
    parts = {name: getattr(section, name)[rows] for name in _PER_PROFILE}
    return dataclasses.replace(section, ids=[section.ids[i] for i in rows], **parts)


def patches(store: SlideStore, xy_um: Floats, side_um: float = PATCH_UM) -> npt.NDArray[np.uint8]:
    """RGB [N, px, px, 3] squares of `side_um` about centres, stitched from tiles; white where no tile is stored."""
    info = store.info
    px = round(side_um / info.tile_mpp)
    found = np.full((len(xy_um), px, px, 3), 255, np.uint8)
    corner = np.round(xy_um / info.tile_mpp - px / 2).astype(np.int64)
    tile = functools.lru_cache(_CACHED_TILES)(functools.partial(_tile, store))
    for patch, (x, y) in zip(found, corner, strict=True):
        for row in range(y // info.tile_px, (y + px - 1) // info.tile_px + 1):
            for col in range(x // info.tile_px, (x + px - 1) // info.tile_px + 1):
                if (row, col) in store.tile_index:
                    _paste(patch, tile(row, col), col * info.tile_px - x, row * info.tile_px - y)
    return found


def _tile(store: SlideStore, row: int, col: int) -> npt.NDArray[np.uint8]:
    jpeg = store.jpeg(store.tile_index[row, col])
    return decode_tile(jpeg, store.info.tile_px, f"{store.path}: tile ({row}, {col})")


def _paste(patch: npt.NDArray[np.uint8], tile: npt.NDArray[np.uint8], x: int, y: int) -> None:
    """Copy the part of `tile` that lies in `patch` when its corner is put at (x, y)."""
    height, width = patch.shape[:2]
    left, top = max(0, x), max(0, y)
    right, bottom = min(width, x + tile.shape[1]), min(height, y + tile.shape[0])
    patch[top:bottom, left:right] = tile[top - y : bottom - y, left - x : right - x]


def with_neighbours(features: Floats, xy_um: Floats) -> Floats:
    """[N, 2 F]: features, and their mean over the profiles within 1.5 times the usual distance to the nearest one."""
    if len(xy_um) < 2:
        return np.concatenate([features, features], axis=1)
    tree = spatial.KDTree(xy_um)
    pitch_um = float(np.median(tree.query(xy_um, k=2)[0][:, 1]))
    near = tree.query_ball_point(xy_um, 1.5 * pitch_um)
    return np.concatenate([features, np.stack([features[members].mean(0) for members in near])], axis=1)


def open_section(store: SlideStore, gene_ids: list[str]) -> Section:
    """A store's profiles with counts, over `gene_ids`, all of which it measures.

    Raises:
        ValueError: no profile has counts, or a tile is damaged.
    """
    profiles, table = store.profiles(), store.genes()
    column = np.full(len(table), -1, dtype=np.int64)
    column[[table.index[gene_id] for gene_id in gene_ids]] = np.arange(len(gene_ids))
    owner = np.repeat(np.arange(len(profiles)), np.diff(profiles.indptr))
    wanted = column[profiles.gene] >= 0
    counts = sparse.csr_array(
        (profiles.count[wanted].astype(np.float64), (owner[wanted], column[profiles.gene[wanted]])),
        shape=(len(profiles), len(gene_ids)),
    )
    rows = np.flatnonzero(profiles.depth > 0)
    if not len(rows):
        raise ValueError(f"{store.path}: none of its profiles has a count; leave the slide out of the manifest")
    xy_um = profiles.xy_um[rows]
    colour = np.concatenate(
        [colour_features(patches(store, xy_um[i : i + _AT_ONCE])) for i in range(0, len(rows), _AT_ONCE)]
    )
    return Section(
        store.info.slide_id, (store.info.study, store.info.donor), rows, [profiles.ids[i] for i in rows], xy_um,
        counts[rows], profiles.depth[rows], colour, with_neighbours(colour, xy_um),
    )  # fmt: skip
