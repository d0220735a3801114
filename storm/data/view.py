"""The random choices of one sample: what is hidden, what is asked, and how the inputs are varied. No tensor yet.

In: a group, the mask config and a generator. Out: the group, perhaps cropped, cut again or pooled, and a `View` of it.
Everything random of a batch lies in these two, and they are a pure function of (seed, epoch, index in the epoch):
neither ranks, workers nor micro-batches change what is drawn.

Whatever a draw reads of the counts, it reads of the visible ones: hidden counts cannot move an input, not even through
the generator.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storm.config import MASK_MODES, MaskConfig
from storm.data.outline import radius_um
from storm.data.pool import pool
from storm.data.recut import crop, recut
from storm.schema import POLYGON, Group, Profiles

IMAGE_ONLY, IN_CONTEXT, GENE_LEVEL, GENE_ONLY = range(len(MASK_MODES))

Mask = npt.NDArray[np.bool_]
Place = tuple[int, int, int]  # region, row, column of a tile

_HIDDEN_PROFILES = (0.3, 0.95)  # share of the profiles hidden in mode in_context
_STPATH = 10.0, 1.0  # the same share with preset stpath: of a beta distribution
_HIDDEN_GENES = (0.15, 0.6)  # share of the genes hidden in the modes gene_level and gene_only
_LEAST_DEPTH, _LEAST_PANEL = 0.02, 0.01  # log-uniform up to 1
_GUARD_UM = 30.0  # transcripts of cells and bins spill over and diffuse this far
_SIZE_JITTER = 0.15  # sd of the log footprint size that is fed
_SCALE_JITTER = 0.05  # of the position code
_OUTLINE_UM = (1.0, 2.0)  # a polygon is eroded or dilated by so much
_REGROUP = 1  # keeps the generator of what is done to a group apart from that of its view


@dataclass(frozen=True)
class View:
    """How one group is shown. N profiles, G genes, Z visible (profile, gene) entries with a count."""

    mode: int  # index in config.MASK_MODES
    visible: Mask  # [N] profiles with visible expression: context
    query: Mask  # [N] profiles that are asked
    visible_genes: Mask | None  # [G] genes shown of the visible profiles; None = all
    hidden_genes: Mask | None  # [G] genes asked of visible profiles; None = none
    entry: npt.NDArray[np.int64]  # [Z] position in the group's CSR
    count: npt.NDArray[np.int64]  # [Z] the count that is shown there, > 0
    hidden_tiles: frozenset[Place] = frozenset()
    flip: bool = False  # mirror x, then
    turns: int = 0  # quarter turns, counter-clockwise
    angle: float = 0.0  # of the position code alone, radians
    scale: float = 1.0
    stain: npt.NDArray[np.float64] | None = None  # [3] factor on the optical density of R, G, B
    size_factor: npt.NDArray[np.float64] | None = None  # [N] on the footprint size that is fed
    grow_um: npt.NDArray[np.float64] | None = None  # [N] on the radii of each polygon; NaN: a disc in its place
    tell_platform: bool = True
    tell_organ: bool = True
    token_seed: int | None = None  # of the draw of the tokens among what is visible; None = no draw


def plain_view(group: Group, use_counts: bool | Mask) -> View:
    """Nothing varied, every tile encoded, every profile asked; the counts of all, of none, or of some [N] visible."""
    shown = np.full(len(group.profiles), use_counts)
    entry = _entries(group.profiles, shown, None)
    count = group.profiles.count[entry].astype(np.int64)
    return View(IMAGE_ONLY, shown, np.ones_like(shown), None, None, entry, count)


def view_rng(seed: int, epoch: int, index: int, *purpose: int) -> np.random.Generator:
    """The generator of the group at `index` of an epoch's order; another one for each purpose."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, index], spawn_key=purpose)))


def draw_sample(group: Group, mask: MaskConfig, key: tuple[int, int, int], panel: Mask) -> tuple[Group, View]:
    """The group of (seed, epoch, index), cropped, cut again and pooled as `mask` has it, and how it is shown.

    Raises:
        ValueError: a tile that is cut again is damaged.
    """
    rng = view_rng(*key, _REGROUP)
    group = pool(recut(crop(group, mask.crop, rng), mask.recut, rng), mask.pool_cells, rng)
    return group, draw_view(group, mask, view_rng(*key), panel)


def draw_view(group: Group, mask: MaskConfig, rng: np.random.Generator, panel: Mask) -> View:
    """Draw how a group is shown in training.

    Args:
        group: the sample.
        mask: shares and strengths.
        rng: of this sample alone (`view_rng`).
        panel: [G] genes that were measured.
    """
    weights = np.array([mask.image_only, mask.in_context, mask.gene_level, mask.gene_only])
    mode = int(rng.choice(len(MASK_MODES), p=weights / weights.sum()))
    visible, query = _split_profiles(group, mode, mask.preset, rng)
    hidden_genes = _subset(panel, rng.uniform(*_HIDDEN_GENES), rng) if mode in (GENE_LEVEL, GENE_ONLY) else None
    visible_genes = panel if hidden_genes is None else panel & ~hidden_genes
    if rng.random() < mask.panel_subsampling:
        visible_genes = _subset(visible_genes, _log_uniform(_LEAST_PANEL, rng), rng)
    hidden_tiles = _hide_tiles(group, mode, mask, rng)
    jitter = mask.position_jitter
    flip, turns = (bool(rng.integers(2)), int(rng.integers(4))) if mask.flips else (False, 0)
    angle, scale = rng.uniform(0, 2 * np.pi), rng.uniform(1 - _SCALE_JITTER, 1 + _SCALE_JITTER)
    stain = np.exp(rng.normal(0, mask.stain_jitter, 3)) if mask.stain_jitter else None
    size = np.exp(rng.normal(0, _SIZE_JITTER, len(visible)))
    tell_platform, tell_organ = rng.random() >= mask.drop_platform, rng.random() >= mask.drop_organ
    outlines = _vary_outlines(group.profiles, mask.polygon_jitter, rng)
    # Last, because the number of values it draws depends on the (visible) counts.
    entry, count = _thin(group.profiles, visible, visible_genes, mask.thinning, rng)
    token_seed = int(rng.integers(1 << 63))
    return View(
        mode, visible, query, visible_genes, hidden_genes, entry, count, hidden_tiles, flip, turns,
        angle if jitter else 0.0, scale if jitter else 1.0, stain, size, outlines, tell_platform, tell_organ,
        token_seed,
    )  # fmt: skip


def _log_uniform(low: float, rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(np.log(low), 0)))


def _subset(mask: Mask, share: float, rng: np.random.Generator) -> Mask:
    """A random share of the set bits, at least one where there is one."""
    genes = np.flatnonzero(mask)
    chosen = np.zeros_like(mask)
    chosen[rng.permutation(genes)[: max(1, round(share * len(genes)))]] = True
    return chosen


def _split_profiles(group: Group, mode: int, preset: str, rng: np.random.Generator) -> tuple[Mask, Mask]:
    """(visible, query), each [N]. In mode in_context the two are apart, and a guard lies between them for cells."""
    everything = np.ones(len(group.profiles), dtype=bool)
    if mode == IMAGE_ONLY:
        return ~everything, everything
    if mode in (GENE_LEVEL, GENE_ONLY):
        return everything, everything
    dense = group.meta.kind != "spot"
    share, blob = rng.uniform(*_HIDDEN_PROFILES), bool(rng.integers(2)) or dense
    if preset == "stpath":
        share, blob = rng.beta(*_STPATH), dense
    hidden = ~everything
    for region in range(len(group.meta.regions)):
        members = np.flatnonzero(group.region == region)
        hidden[members[_pick(group.profiles.xy_um[members], share, blob, rng)]] = True
    return ~hidden & ~_too_near(group, hidden, _GUARD_UM if dense else 0.0), hidden


def _pick(xy_um: npt.NDArray[np.float64], share: float, blob: bool, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Rows of about `share` of the profiles of a region: those nearest to a random one, or any."""
    total = len(xy_um)
    number = int(share * total + rng.random())  # rounded at random, so that a lone profile is sometimes hidden
    order = rng.permutation(total)
    if blob and total:
        order = np.argsort(((xy_um - xy_um[order[0]]) ** 2).sum(axis=1), kind="stable")
    return order[:number]


def _too_near(group: Group, hidden: Mask, guard_um: float) -> Mask:
    """[N] profiles whose footprint is nearer than `guard_um` to that of a hidden profile of their region."""
    near = np.zeros_like(hidden)
    radius = radius_um(group.profiles)
    for region in range(len(group.meta.regions)):
        asked = np.flatnonzero((group.region == region) & hidden)
        others = np.flatnonzero((group.region == region) & ~hidden)
        apart = np.linalg.norm(group.profiles.xy_um[others, None] - group.profiles.xy_um[None, asked], axis=-1)
        near[others] = (apart < radius[others, None] + radius[None, asked] + guard_um).any(axis=1)
    return near


def _hide_tiles(group: Group, mode: int, mask: MaskConfig, rng: np.random.Generator) -> frozenset[Place]:
    """Tiles that are not encoded: none, all (gene_only, at times in_context), or a block of each region in the other
    modes with genes."""
    if mode == GENE_ONLY or (mode == IN_CONTEXT and mask.hide_all_tiles and rng.random() < mask.hide_all_tiles):
        return frozenset(group.tiles)
    if mode == IMAGE_ONLY or rng.random() >= mask.hide_tiles:
        return frozenset()
    blocks = [(_span(r.rows, rng), _span(r.cols, rng)) for r in group.meta.regions]
    return frozenset(
        (g, row, col) for g, row, col in group.tiles if row in blocks[g][0] and col in blocks[g][1]
    )  # fmt: skip


def _span(side: int, rng: np.random.Generator) -> range:
    """A run of at most half of `side` tiles."""
    length = int(rng.integers(1, (side + 1) // 2 + 1))
    start = int(rng.integers(0, side - length + 1))
    return range(start, start + length)


def _vary_outlines(profiles: Profiles, probability: float, rng: np.random.Generator) -> npt.NDArray[np.float64] | None:
    """[N] um on the radii of each polygon, NaN for a disc in its place; without polygons None, nothing drawn."""
    total = len(profiles)
    if not probability or not (profiles.footprint_kind == POLYGON).any():
        return None
    disc, moved = rng.random((2, total)) < probability
    by_um = rng.uniform(*_OUTLINE_UM, total) * rng.choice([-1.0, 1.0], total)
    return np.where(disc, np.nan, np.where(moved, by_um, 0.0))


def _entries(profiles: Profiles, visible: Mask, visible_genes: Mask | None) -> npt.NDArray[np.int64]:
    """[Z] places in the CSR of the visible counts."""
    shown = np.repeat(visible, np.diff(profiles.indptr))
    if visible_genes is not None:
        shown &= visible_genes[profiles.gene]
    return np.flatnonzero(shown)


def _thin(
    profiles: Profiles, visible: Mask, visible_genes: Mask, probability: float, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(entry, count), each [Z], of what is left visible; with `probability` each molecule is kept at one drawn rate."""
    entry = _entries(profiles, visible, visible_genes)
    count = profiles.count[entry].astype(np.int64)
    if rng.random() < probability:
        count = rng.binomial(count, _log_uniform(_LEAST_DEPTH, rng))
    return entry[count > 0], count[count > 0]
