"""The latent tissue: what is there before anybody stains or sequences it.

In: a generator and the side of the section. Out: `Tissue`: cells with type, place and latents, lumens, vessels and
smooth maps on a coarse raster, all in um with the origin at the image's top left corner.

The tissue is built from units of 72 um. A unit holds some cells, drawn from the proportions of its domain, and some
lumen. In a *gland* unit the epithelial cells stand in a ring around one lumen; in a *scattered* unit the same cells
and the same area of lumen lie anywhere. So arrangement shows in the texture, and neither in colour nor in density.
Vessels are the sources of the niche: they change expression 100-250 um away, where the own pixels do not show them.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Image = npt.NDArray[np.float32]

RASTER_UM = 4.0  # of the smooth maps
UNIT_UM = 72.0
SLOTS = 6  # a unit has SLOTS x SLOTS places for scattered cells
FIBROBLAST, EPITHELIUM, LYMPHOCYTE, MACROPHAGE = range(4)
# Proportions of the four types per domain. Domains 1 and 2 look alike and differ in genes, 0 and 3 the reverse.
DOMAINS = np.array(
    [
        [0.60, 0.20, 0.12, 0.08],  # stroma
        [0.08, 0.76, 0.08, 0.08],  # epithelium
        [0.08, 0.76, 0.08, 0.08],  # epithelium with another programme
        [0.60, 0.20, 0.12, 0.08],  # stroma, hyalinised
        [0.10, 0.18, 0.64, 0.08],  # inflamed
    ]
)
HYALINE = 3
LATENTS = (
    "fibroblast", "epithelium", "lymphocyte", "macrophage", "density", "gland", "niche", "field0", "field1", "field2",
)  # fmt: skip
OWN_TYPE = 0.2  # of a cell's programme follows its own type, the rest the types within some 50 um
NICHE_NEUTRAL = 0.35  # at the source itself: the section's mean, so that seeing a vessel tells nothing about its spot


@dataclass(frozen=True)
class Tissue:
    """One section: C cells, V vessels, U lumens; maps are [h, w] at RASTER_UM."""

    side_um: float
    xy_um: Floats  # [C, 2]
    kind: npt.NDArray[np.int64]  # [C] cell type
    angle: Floats  # [C] direction of the long axis, radians
    latent: Floats  # [C, len(LATENTS)]
    lumens: Floats  # [U, 5] x, y, half axes, angle
    vessels: Floats  # [V, 3] x, y, radius
    domain: npt.NDArray[np.int64]  # map
    inside: Image  # map: > 0 within the tissue, about 1 per 60 um of distance from its edge
    fibre: Image  # map: direction of the fibres, radians
    shares: Image  # map [h, w, 4]: cell types around a place, which colour it


def smooth_field(rng: np.random.Generator, side_um: float, length_um: float) -> Image:
    """Gaussian noise [h, w] on the raster with correlation length `length_um`, of mean 0 and sd 1 in this section."""
    cells = int(np.ceil(side_um / length_um)) + 3
    size = int(np.ceil(side_um / RASTER_UM))
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    scale = int(np.ceil(size * cells / (cells - 3)))
    fine = cv2.GaussianBlur(
        cv2.resize(coarse, (scale, scale), interpolation=cv2.INTER_CUBIC), (0, 0), 0.25 * length_um / RASTER_UM
    )
    x0, y0 = rng.integers(0, scale - size + 1, 2)
    fine = fine[y0 : y0 + size, x0 : x0 + size]
    return ((fine - fine.mean()) / fine.std()).astype(np.float32)


def at(field: npt.NDArray, xy_um: Floats) -> npt.NDArray:
    """Values [N] of a map at places [N, 2]; outside the raster the nearest one."""
    index = np.clip((xy_um / RASTER_UM).astype(np.int64), 0, np.array([field.shape[1], field.shape[0]]) - 1)
    return field[index[:, 1], index[:, 0]]


def _outline(rng: np.random.Generator, side_um: float) -> Image:
    """Signed distance-like map of a rounded piece of tissue that leaves a white margin."""
    size = int(np.ceil(side_um / RASTER_UM))
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    radius = (np.abs(axis[None]) ** 3 + np.abs(axis[:, None]) ** 3) ** (1 / 3)
    bumps = smooth_field(rng, side_um, 200.0) * 45.0 + smooth_field(rng, side_um, 40.0) * 6.0
    margin = (1 - np.maximum(np.abs(axis[None]), np.abs(axis[:, None]))) * side_um / 2 - 15.0
    return np.minimum((0.9 - radius) * side_um / 2 + bumps, margin) / 60.0


def _vessels(rng: np.random.Generator, inside: Image, side_um: float) -> Floats:
    """Vessels [V, 3] in the tissue, at least 300 um apart, about 2.2 per mm2."""
    area_mm2 = float((inside > 0).sum()) * (RASTER_UM / 1000) ** 2
    wanted = max(1, round(2.2 * area_mm2))
    found: list[Floats] = []
    for xy in rng.uniform(0, side_um, (400, 2)):
        far = all(np.hypot(*(xy - other[:2])) > 300.0 for other in found)
        if far and at(inside, xy[None])[0] > 0.8:
            found.append(np.array([*xy, rng.uniform(24.0, 31.0)]))
        if len(found) == wanted:
            break
    return np.array(found).reshape(-1, 3)


def niche(xy_um: Floats, vessels: Floats) -> Floats:
    """Strength [N] of the niche: neutral under 90 um from a vessel, 1 from 115 to 225 um, 0 beyond 260 um."""
    if not len(vessels):
        return np.zeros(len(xy_um))
    distance = np.hypot(*(xy_um[:, None] - vessels[None, :, :2]).transpose(2, 0, 1)).min(1)
    return np.interp(distance, [90.0, 115.0, 225.0, 260.0], [NICHE_NEUTRAL, 1.0, 1.0, 0.0])


@dataclass(frozen=True)
class _Units:
    """Units [n]: centre, whether gland, cells [n, k] by type (-1: no cell)."""

    xy_um: Floats
    gland: npt.NDArray[np.bool_]
    kind: npt.NDArray[np.int64]


def _units(rng: np.random.Generator, side_um: float, gland: Image, density: Image, domain: npt.NDArray) -> _Units:
    count = int(side_um / UNIT_UM) + 2
    row, col = np.divmod(np.arange(count * count), count)
    xy = np.stack([col + 0.5 * (row % 2) - 0.5, row - 0.25], 1) * UNIT_UM + rng.uniform(-4, 4, (len(row), 2))
    cells = np.clip(np.rint(20 * np.exp(0.4 * at(density, xy)) + rng.normal(0, 1, len(xy))), 9, 32)
    share = np.cumsum(DOMAINS[at(domain, xy)], 1)
    kind = (rng.random((len(xy), 32, 1)) > share[:, None, :-1]).sum(2)
    kind[np.arange(32)[None] >= cells[:, None]] = -1
    return _Units(xy, at(gland, xy) > 0, kind)


def _slots(rng: np.random.Generator, units: int, outer: bool) -> Floats:
    """Places [units, slots, 2] relative to the unit's centre, jittered, in random order; `outer`: the rim alone."""
    axis = (np.arange(SLOTS) - (SLOTS - 1) / 2) * UNIT_UM / SLOTS
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    if outer:
        grid = grid[np.abs(grid).max(1) > axis[-1] - 1]
    order = np.argsort(rng.random((units, len(grid))), 1)
    return grid[order] + rng.uniform(-3.0, 3.0, (units, len(grid), 2))


def _arrange(rng: np.random.Generator, units: _Units) -> tuple[Floats, Floats, Floats]:
    """Places [n, k, 2] and directions [n, k] of the cells, and lumens [U, 5]."""
    n, k = units.kind.shape
    rank = np.cumsum(units.kind == EPITHELIUM, 1) - 1
    ringed = (units.kind == EPITHELIUM) & (rank < 16)
    ring = np.clip(ringed.sum(1), 4, 16)
    radius = np.maximum(ring * 8.5 / (2 * np.pi), 11.0)
    turn = rng.uniform(0, 2 * np.pi, (n, 1)) + rank * 2 * np.pi / ring[:, None] + rng.normal(0, 0.06, (n, k))
    around = np.stack([np.cos(turn), np.sin(turn)], 2) * (radius[:, None] + rng.normal(0, 0.8, (n, k)))[..., None]
    rim = _slots(rng, n, outer=True)
    others = np.cumsum((units.kind >= 0) & ~ringed, 1) % rim.shape[1]
    placed = np.where(ringed[..., None], around, np.take_along_axis(rim, others[..., None], 1))
    free = _slots(rng, n, outer=False)
    place = np.where(units.gland[:, None, None], placed, free[:, 4 : 4 + k])
    angle = np.where(units.gland[:, None] & ringed, turn, rng.uniform(0, np.pi, (n, k)))
    lumen_um = np.clip(radius - 6.0, 5.0, 9.0)
    return units.xy_um[:, None] + place, angle, _lumens(rng, units, free[:, :4], lumen_um)


def _lumens(rng: np.random.Generator, units: _Units, slots: Floats, radius_um: Floats) -> Floats:
    """One round lumen per gland unit, or four small clefts of the same area in all."""
    n = len(radius_um)
    long = rng.uniform(1.0, 1.25, n)
    one = np.column_stack([units.xy_um, radius_um * long, radius_um / long, rng.uniform(0, np.pi, n)])
    stretch = rng.uniform(1.2, 1.6, (n, 4))
    half = radius_um[:, None] / 2
    small = np.stack([half * stretch, half / stretch, rng.uniform(0, np.pi, (n, 4))], 2)
    four = np.concatenate([units.xy_um[:, None] + slots, small], 2)
    return np.concatenate([one[units.gland], four[~units.gland].reshape(-1, 5)])


def _clear(xy_um: Floats, inside: Image, vessels: Floats, margin_um: float) -> npt.NDArray[np.bool_]:
    """Whether places [N, 2] lie in the tissue and outside every vessel."""
    keep = (at(inside, xy_um) > 0.04) & (xy_um > 0).all(1)
    for x, y, radius in vessels:
        keep &= np.hypot(xy_um[:, 0] - x, xy_um[:, 1] - y) > radius + margin_um
    return keep


def _warp(rng: np.random.Generator, side_um: float, *places: Floats) -> list[Floats]:
    """Places [..., 2 and more] moved by one smooth displacement: it bends the lattice of units, nothing else."""
    shift = np.stack([smooth_field(rng, side_um, 120.0) for _ in range(2)], -1) * 13.0
    moved = [np.array(xy, copy=True) for xy in places]
    for xy in moved:
        xy[:, :2] += at(shift, xy[:, :2])
    return moved


def _local_shares(xy_um: Floats, kind: npt.NDArray[np.int64], size: int, reach_um: float) -> Image:
    """Shares [size, size, 4] of the types within `reach_um` (sd) of each place; fibroblasts where there is no cell."""
    index = np.clip((xy_um / RASTER_UM).astype(np.int64), 0, size - 1)
    weight = np.zeros((size, size, 4), np.float32)
    np.add.at(weight, (index[:, 1], index[:, 0], kind), 1.0)
    weight = cv2.GaussianBlur(weight, (0, 0), reach_um / RASTER_UM) + np.array([2e-3, 0, 0, 0], np.float32)
    return weight / weight.sum(2, keepdims=True)


def grow(rng: np.random.Generator, side_um: float) -> Tissue:
    """A section of `side_um`; each field is drawn anew, so that no place or colour of one foretells another."""
    inside = _outline(rng, side_um)
    vessels = _vessels(rng, inside, side_um)
    domain = np.stack([smooth_field(rng, side_um, 330.0) for _ in DOMAINS]).argmax(0)
    density = np.clip(smooth_field(rng, side_um, 260.0), -2, 2)
    gland = smooth_field(rng, side_um, 190.0)
    fields = [smooth_field(rng, side_um, 240.0) for _ in range(3)]
    fibre = np.pi * smooth_field(rng, side_um, 180.0) * 0.5
    units = _units(rng, side_um, gland, density, domain)
    place, angle, lumens = _arrange(rng, units)
    real = units.kind >= 0
    kind, angle = units.kind[real], angle[real]
    xy, lumens = _warp(rng, side_um, place[real], lumens)
    is_gland = np.repeat(units.gland, real.sum(1))
    stromal = kind == FIBROBLAST  # fibroblasts follow the fibres
    angle = np.where(stromal, at(fibre, xy) + rng.normal(0, 0.25, len(xy)), angle)
    contrast = np.array([0.0, 1.0, -1.0, 0.0, 0.0])[at(domain, xy)]
    shares = _local_shares(xy, kind, len(inside), 14.0)
    around = at(_local_shares(xy, kind, len(inside), 28.0), xy)
    types = OWN_TYPE * (kind[:, None] == np.arange(4)) + (1 - OWN_TYPE) * around
    latent = np.column_stack(
        [types, at(density, xy), np.where(is_gland, 1.0, -1.0), niche(xy, vessels)]
        + [at(f, xy) + (contrast if i == 0 else 0.0) for i, f in enumerate(fields)]
    )
    keep = _clear(xy, inside, vessels, 3.0)
    lumens = lumens[_clear(lumens[:, :2], inside, vessels, 12.0)]
    cells = (xy[keep], kind[keep], angle[keep], latent[keep])
    return Tissue(side_um, *cells, lumens, vessels, domain, inside, fibre, shares)
