"""Cells and bins pooled to footprints of any size, so that size is neither a label of the platform nor a leak of depth.

In: a group of cells or bins. Out: a group of discs or squares of 8-120 um, one shape and one size per region. A pooled
profile holds the sum of the counts of every cell or bin whose centre lies in its footprint; those in none are left out.
Footprints lie on a square lattice whose pitch is at least their size: none overlap, so no molecule is in two.

A pooled profile is a bin, whatever it was made of: the guard between what is hidden and what is shown is that of bins.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storm.schema import DISC, SQUARE, Group, Profiles, spans

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SIZES_UM = (8.0, 120.0)  # but no smaller than half of the cells or bins, which come whole
_PITCH = (1.0, 1.5)  # in sizes


@dataclass(frozen=True)
class Lattice:
    """Where the footprints of each of R regions lie."""

    kind: Ints  # [R] DISC or SQUARE
    size_um: Floats  # [R] diameter or side
    pitch_um: Floats  # [R] at least the size
    centre_um: Floats  # [R, 2] of one of them, in the slide's frame


def pool(group: Group, probability: float, rng: np.random.Generator) -> Group:
    """With `probability` the group pooled, else as it is; spots are never pooled."""
    if group.meta.kind == "spot" or not len(group.profiles) or rng.random() >= probability:
        return group
    return pooled(group, draw_lattice(group, rng))


def draw_lattice(group: Group, rng: np.random.Generator) -> Lattice:
    """Shape, size, pitch and offset for each region; some footprint holds a profile that is drawn, so none is empty."""
    regions = group.meta.regions
    kind = rng.choice([DISC, SQUARE], len(regions))
    size, pitch, centre = np.zeros(len(regions)), np.zeros(len(regions)), np.zeros((len(regions), 2))
    for g, region in enumerate(regions):
        members = np.flatnonzero(group.region == g)
        smallest = np.median(group.profiles.footprint_um[members]) if len(members) else 0.0
        low, high = np.log(np.clip(smallest, *SIZES_UM)), np.log(SIZES_UM[1])
        size[g] = np.exp(rng.uniform(low, high))
        pitch[g] = size[g] * rng.uniform(*_PITCH)
        at, shift = rng.random(), rng.uniform(-0.35, 0.35, 2)  # within a disc: .35 * sqrt(2) < .5
        corner = np.array(region.origin_um)
        held = group.profiles.xy_um[members[int(at * len(members))]] if len(members) else corner
        far = corner + np.array([region.cols, region.rows]) * group.meta.tile_um
        centre[g] = np.clip(held + shift * size[g], corner, far - 1e-3)  # in the region, as every profile is
    return Lattice(kind, size, pitch, centre)


def pooled(group: Group, lattice: Lattice) -> Group:
    """The group with the footprints of a lattice in place of its own: those that hold any, and lie in their region by
    their centre."""
    rows, owner, node, region = _members(group, lattice)
    profiles, count = group.profiles, len(region)
    indptr, entries = spans(profiles.indptr, rows)
    width = int(profiles.gene.max(initial=0)) + 1
    key = np.repeat(owner, np.diff(indptr)) * width + profiles.gene[entries]
    order = np.argsort(key, kind="stable")
    first = np.flatnonzero(np.diff(key[order], prepend=-1))
    summed = np.add.reduceat(profiles.count[entries][order].astype(np.int64), first) if len(first) else first
    row, gene = np.divmod(key[order][first], width)
    made = Profiles(
        [""] * count,
        lattice.centre_um[region] + node * lattice.pitch_um[region, None],
        lattice.size_um[region].astype(np.float32),
        lattice.kind[region].astype(np.uint8),
        np.searchsorted(row, np.arange(count + 1)).astype(np.int64),
        gene.astype(np.int32),
        summed.astype(np.int32),
        # The slide's mean density is that of its cells (or bins) over their own areas. Between cells lie molecules that
        # none of them counts, so a depth over the whole footprint would differ from that mean by how much of the tissue
        # was segmented; over the areas that were counted it does not.
        pooled_um2=np.bincount(owner, profiles.counted_um2[rows], minlength=count).astype(np.float64),
    )
    meta = dataclasses.replace(group.meta, kind="bin")
    return Group(meta, made, region.astype(np.int32), group.tiles)


def _members(group: Group, lattice: Lattice) -> tuple[Ints, Ints, Ints, Ints]:
    """(row of each profile that lies in a footprint [m], its footprint's number [m]; node [n, 2] and region [n])."""
    meta, of, xy = group.meta, group.region.astype(np.int64), group.profiles.xy_um
    size, pitch, centre = lattice.size_um[of], lattice.pitch_um[of, None], lattice.centre_um[of]
    node = np.floor((xy - centre) / pitch + 0.5)
    apart = xy - centre - node * pitch
    square = (apart >= -size[:, None] / 2).all(axis=1) & (apart < size[:, None] / 2).all(axis=1)
    inside = np.where(lattice.kind[of] == SQUARE, square, np.linalg.norm(apart, axis=1) <= size / 2)
    corner = np.array([r.origin_um for r in meta.regions])[of]
    sides = np.array([(r.cols, r.rows) for r in meta.regions])[of] * meta.tile_um
    place = centre + node * pitch - corner
    inside &= (place >= 0).all(axis=1) & (place < sides).all(axis=1)
    rows = np.flatnonzero(inside)
    found, owner = np.unique(
        np.column_stack([of[rows], node[rows].astype(np.int64)]), axis=0, return_inverse=True
    )  # fmt: skip
    return rows, owner.reshape(-1), found[:, 1:], found[:, 0]
