"""The groups of one slide: planned without pixels and counts, and read.

In: an open store. Out: per group its regions, the rows of its profiles and the tiles they read; then the group itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storm import regions, schema, store
from storm.prep_config import PrepConfig

_BYTES_PER_COUNT = 8  # gene and count, int32 each
_BYTES_PER_PROFILE = 48  # place, footprint, pointers, region, and a barcode
_BYTES_PER_MEMBER = 768  # header and padding of a file in a tar
_BATCH = 8_000_000  # counts that are read together; a group holds at most about 500,000

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Planned:
    """A group before it is read: its regions, each with the (row, col) of the tiles that its profiles read."""

    number: int
    regions: tuple[tuple[regions.Region, list[tuple[int, int]]], ...]
    bytes: int  # as estimated

    @property
    def rows(self) -> Rows:
        """Row numbers of its profiles, region by region."""
        return np.concatenate([region.profiles for region, _ in self.regions])


def _cap(indptr: Rows, config: PrepConfig) -> int:
    """Profiles per region and sample: `max_profiles`, or fewer where counts alone would pass `max_group_mb`."""
    each = _BYTES_PER_COUNT * max(1.0, indptr[-1] / max(1, len(indptr) - 1))
    return max(1, min(config.max_profiles, int(config.max_group_mb * 1e6 / each)))


def plan(opened: store.SlideStore, places: schema.Profiles, config: PrepConfig) -> list[Planned]:
    """The groups of a slide, each profile in exactly one.

    Args:
        places: `opened.places()`, which may be bare.
    """
    info, indptr = opened.info, opened.indptr
    extent = regions.extent_for(info.platform, config.spots_side, info.tile_um)
    found = regions.cut(places.xy_um, info.tile_um, extent, _cap(indptr, config))
    owner = np.zeros(len(places), np.int64)
    for i, region in enumerate(found):
        owner[region.profiles] = i
    of, tile, at = _tiles(opened, found, regions.tiles_by(owner, places.xy_um, places.footprint_um, info.tile_um))
    own = _BYTES_PER_COUNT * (np.diff(indptr) + np.diff(places.polygon_indptr)) + _BYTES_PER_PROFILE
    bytes_each = (
        (np.bincount(of, opened.tile_bytes[tile] + _BYTES_PER_MEMBER, len(found)) + np.bincount(owner, own, len(found)))
        .astype(int)
        .tolist()
    )
    tiles = [list(map(tuple, part.tolist())) for part in np.split(at, np.searchsorted(of, np.arange(1, len(found))))]
    rng = np.random.default_rng([config.seed, regions.slide_key(info.slide_id)])
    sizes = [len(region.profiles) for region in found]
    numbers = regions.group(sizes, bytes_each, rng, config.min_profiles, int(config.max_group_mb * 1e6))
    numbers.sort(key=min)  # regions are in the order of their places: groups with near numbers are near each other
    return [
        Planned(n, tuple((found[i], tiles[i]) for i in members), sum(bytes_each[i] for i in members))
        for n, members in enumerate(numbers)
    ]


def _tiles(opened: store.SlideStore, found: list[regions.Region], read: Rows) -> tuple[Rows, Rows, Rows]:
    """(region, number of the tile, [M, 2] its row and col) of what each region's profiles read, in it and present."""
    corner = np.array([(region.row, region.col) for region in found], np.int64)
    extent = np.array([region.extent for region in found])
    inside = read[:, 1:] - corner[read[:, 0]]
    read = read[((inside >= 0) & (inside < extent[read[:, 0], None])).all(axis=1)]
    grid = np.full(opened.place.max(axis=0, initial=0) + 1, -1, np.int64)
    grid[tuple(opened.place.T)] = np.arange(len(opened))
    on_it = ((read[:, 1:] >= 0) & (read[:, 1:] < grid.shape)).all(axis=1)
    read = read[on_it]
    tile = grid[read[:, 1], read[:, 2]]
    return read[tile >= 0, 0], tile[tile >= 0], read[tile >= 0, 1:]


@dataclass(frozen=True)
class SlideReader:
    """One slide's store, with what its groups are written with."""

    opened: store.SlideStore
    places: schema.Profiles
    planned: list[Planned]
    column: npt.NDArray[np.int32]  # [genes of the store] index in the vocabulary, -1 = not in it
    panel: str
    log_density: float

    def group(self, number: int) -> schema.Group:
        """A group, its counts read for it alone."""
        planned = self.planned[number]
        return self._group(planned, self.opened.counts(planned.rows))

    def groups(self, numbers: Sequence[int]) -> Iterator[schema.Group]:
        """Groups in the order of `numbers`, for a slide whose counts memory does not hold.

        Where the rows of a group are scattered through the store, those of many groups are read together.
        """
        batch, held = list[Planned](), 0
        for planned in (self.planned[n] for n in numbers):
            if not self.opened.scattered(planned.rows):
                yield from self._together(batch)
                batch, held = [], 0
                yield self._group(planned, self.opened.counts(planned.rows))
                continue
            size = int((self.opened.indptr[planned.rows + 1] - self.opened.indptr[planned.rows]).sum())
            if held + size > _BATCH:
                yield from self._together(batch)
                batch, held = [], 0
            batch.append(planned)
            held += size
        yield from self._together(batch)

    def _together(self, batch: list[Planned]) -> Iterator[schema.Group]:
        if not batch:
            return
        rows = np.unique(np.concatenate([planned.rows for planned in batch]))
        counts = self.opened.counts(rows)
        for planned in batch:
            indptr, entries = schema.spans(counts.indptr, np.searchsorted(rows, planned.rows))
            yield self._group(planned, schema.CountBlock(indptr, counts.gene[entries], counts.count[entries]))

    def _group(self, planned: Planned, counts: schema.CountBlock) -> schema.Group:
        opened, info = self.opened, self.opened.info
        members = [region for region, _ in planned.regions]
        meta = schema.GroupMeta(
            slide=info.slide_id, section=info.section, donor=info.donor, study=info.study, organ=info.organ,
            species=info.species, platform=info.platform, kind=info.kind, panel=self.panel,
            slide_log_density=self.log_density, mpp=info.mpp, tile_px=info.tile_px, tile_mpp=info.tile_mpp,
            regions=tuple(schema.RegionMeta(r.origin_um(info.tile_um), r.extent, r.extent) for r in members),
        )  # fmt: skip
        number = np.repeat(np.arange(len(members), dtype=np.int32), [len(r.profiles) for r in members])
        tiles = {
            (g, row - region.row, col - region.col): opened.jpeg(opened.tile_index[row, col])
            for g, (region, places) in enumerate(planned.regions)
            for row, col in places
        }
        return schema.Group(meta, self.places.places(planned.rows, self._mapped(counts)), number, tiles)

    def _mapped(self, counts: schema.CountBlock) -> schema.CountBlock:
        """Counts with genes as indices of the vocabulary; what it does not hold is left out.

        Both gene lists are sorted by id, so the order within a profile is kept.
        """
        gene = self.column[counts.gene]
        if not gene.size or gene.min() >= 0:
            return counts._replace(gene=gene)
        known = gene >= 0
        indptr = np.concatenate([[0], np.cumsum(known)])[counts.indptr]
        return schema.CountBlock(indptr, gene[known], counts.count[known])
