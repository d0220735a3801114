"""The tensors of a micro-batch: groups and their views in, the dict of `schema.BATCH` out. Nothing random happens here.

Every input is made of what the view shows; the hidden counts enter the entries `target_*`, `depth_*` alone.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from storm.data import features, stain, tokens
from storm.data.features import Cached
from storm.data.outline import sample_points
from storm.data.tile import decode_tile
from storm.data.view import Mask, View
from storm.presets import ModelConfig
from storm.schema import APART_UM, FOOTPRINT_SIDE, LOGNORM_SCALE, PLATFORMS, TILE_STATS, Group, RegionMeta

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray]


@dataclass(frozen=True)
class BatchSpec:
    """What `collate` must know beside the groups."""

    tile_px: int
    n_genes: int
    panels: dict[str, Mask]  # panel id -> bool [G]: the genes a measurement could see
    organs: tuple[str, ...]  # names behind organ ids 1, 2, ...
    share: npt.NDArray[np.float64]  # [G] expected share of counts, sums to 1
    target_panel: Mask | None = None  # [G] the set S of Z(h, S); None = each group's own panel
    token_spec: tokens.TokenSpec | None = None  # where the model's expression encoder reads tokens
    descriptors: bool = False  # whether the model has them

    def panel(self, group: Group) -> Mask:
        """[G] genes that the group's measurement could see. Raises ValueError for a panel that is not known."""
        name = group.meta.panel
        if name not in self.panels:
            raise ValueError(f"slide {group.meta.slide}: panel {name!r} is not in the shard manifest; pack again")
        return self.panels[name]

    def target(self, group: Group) -> Mask:
        """[G] the set S that the group's predictions are normalised over."""
        return self.panel(group) if self.target_panel is None else self.target_panel


def spec_of(
    model: ModelConfig, panels: dict[str, Mask], share: npt.NDArray[np.float64], target_panel: Mask | None = None
) -> BatchSpec:
    """What the batches of a model are made with."""
    chosen = tokens.TokenSpec(model.expression_genes, model.expression_zeros)
    return BatchSpec(
        model.tile_px, len(share), panels, model.organs, share, target_panel,
        chosen if model.expression == "tokens" else None, model.descriptor_width > 0,
    )  # fmt: skip


@dataclass
class _Part:
    """A group in the micro-batch: its regions begin at `first`; (region, slot) is each profile's place in [R, N]."""

    group: Group
    view: View
    first: int
    region: Ints  # [n] region of the micro-batch
    slot: Ints  # [n] place among the region's profiles


@dataclass
class _Layout:
    """Where everything goes: the parts, R regions, N profiles per region, C tiles per region, the common grid."""

    parts: list[_Part]
    regions: list[RegionMeta]  # [R] after flips and turns
    n: int
    c: int
    rows: int
    cols: int
    out: Arrays = field(default_factory=dict)

    def zeros(self, name: str, dtype: type, *shape: int) -> npt.NDArray:
        """A new zero array [R, *shape] of the batch."""
        self.out[name] = np.zeros((len(self.regions), *shape), dtype=dtype)
        return self.out[name]


def loss_genes(spec: BatchSpec, number: int, rng: np.random.Generator) -> Ints:
    """[K] the genes of one step's loss: all that any panel holds, or where they are more than `number`, a quarter those
    of the highest expected share and the rest at random (`collate` gives these the weight they stand for).

    The highest share stands in for the highest variance: a shard set knows the one, and for counts the two go together.
    """
    measured = np.flatnonzero(np.any(list(spec.panels.values()), axis=0))
    if len(measured) <= number:
        return measured
    top = top_genes(spec, number)
    rest = np.setdiff1d(measured, top)
    return np.sort(np.concatenate([top, rng.choice(rest, number - len(top), replace=False)]))


def top_genes(spec: BatchSpec, number: int) -> Ints:
    """[number // 4] the genes that are in every step's loss."""
    measured = np.flatnonzero(np.any(list(spec.panels.values()), axis=0))
    return measured[np.argsort(-spec.share[measured], kind="stable")[: number // 4]]


def collate(
    groups: list[Group], views: list[View], spec: BatchSpec, genes: Ints | None = None, kept: Mask | None = None,
    cached: list[Cached] | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The batch of some groups as `schema.BATCH` says.

    Args:
        groups: of any slides.
        views: one per group, from `draw_view` or `plain_view`.
        spec: panels, organs, shares.
        genes: [K] what `loss_genes` drew; None = the whole vocabulary.
        kept: [G] the genes whose own embedding takes part, of a model with descriptors; None = all.
        cached: features of each group, in place of its tiles, as its view shows them.

    Raises:
        ValueError: a tile of another size, or a panel that the spec does not know; the slide is named.
    """
    genes = np.arange(spec.n_genes) if genes is None else np.asarray(genes, dtype=np.int64)
    layout = _lay_out(groups, views)
    _regions(layout, spec)
    _tiles(layout, spec, decode=cached is None)
    _profiles(layout)
    if cached is not None:
        features.entries(groups, views, cached, layout.out, [(part.region, part.slot) for part in layout.parts])
    _inputs(layout, spec)
    _contrast(layout)
    _targets(layout, spec, genes)
    _context(layout)
    if spec.token_spec:
        _tokens(layout, spec, spec.token_spec)
    if spec.descriptors:
        layout.out["gene_kept"] = np.ones(spec.n_genes, bool) if kept is None else kept
    return {name: torch.from_numpy(array) for name, array in layout.out.items()}


def _lay_out(groups: list[Group], views: list[View]) -> _Layout:
    parts: list[_Part] = []
    regions: list[RegionMeta] = []
    for group, view in zip(groups, views, strict=True):
        order = np.argsort(group.region, kind="stable")
        ranks = np.arange(len(order)) - np.searchsorted(group.region[order], group.region[order])
        slot = np.empty(len(order), dtype=np.int64)
        slot[order] = ranks
        parts.append(_Part(group, view, len(regions), len(regions) + group.region.astype(np.int64), slot))
        regions += [_turned(r, view) for r in group.meta.regions]
    tiles = np.bincount([p.first + g for p in parts for g, _, _ in p.group.tiles], minlength=len(regions))
    n = max((int(p.slot.max()) + 1 for p in parts if len(p.slot)), default=1)
    rows, cols = max(r.rows for r in regions), max(r.cols for r in regions)
    return _Layout(parts, regions, n, max(1, int(tiles.max(initial=0))), rows, cols)


def _turned(region: RegionMeta, view: View) -> RegionMeta:
    rows, cols = (region.cols, region.rows) if view.turns % 2 else (region.rows, region.cols)
    return RegionMeta(region.origin_um, rows, cols)


def _turn(xy: npt.NDArray[np.float64], width: npt.ArrayLike, height: npt.ArrayLike, view: View) -> npt.NDArray:
    """Points (x right, y down) in rectangles of that size, mirrored and turned as the pixels are."""
    x, y = xy[..., 0], xy[..., 1]
    width, height = np.asarray(width), np.asarray(height)
    if view.flip:
        x = width - x
    for _ in range(view.turns):
        x, y = y, width - x
        width, height = height, width
    return np.stack([x, y], axis=-1)


def _turn_pixels(pixels: npt.NDArray, view: View) -> npt.NDArray:
    """A picture [rows, cols, ...] mirrored and turned."""
    return np.rot90(pixels[:, ::-1] if view.flip else pixels, view.turns)


def _code(xy_um: npt.NDArray[np.float64], centre_um: npt.NDArray[np.float64], view: View) -> npt.NDArray[np.float64]:
    """Positions for the position code: centred, and rotated and scaled as the view says."""
    cos, sin = view.scale * np.cos(view.angle), view.scale * np.sin(view.angle)
    return (xy_um - centre_um) @ np.array([[cos, sin], [-sin, cos]])


def _regions(layout: _Layout, spec: BatchSpec) -> None:
    names = ("region_group", "platform", "organ", "mode")
    group, platform, organ, mode = (layout.zeros(name, np.int64) for name in names)
    organs = {name: i for i, name in enumerate(spec.organs, 1)}
    for i, part in enumerate(layout.parts):
        meta, view = part.group.meta, part.view
        own = slice(part.first, part.first + len(meta.regions))
        group[own], mode[own] = i, view.mode
        known = meta.platform in PLATFORMS and view.tell_platform
        platform[own] = PLATFORMS.index(meta.platform) if known else 0
        organ[own] = organs.get(meta.organ, 0) if view.tell_organ else 0


def _tiles(layout: _Layout, spec: BatchSpec, decode: bool) -> None:
    """The image entries; pixels are jittered and turned, the targets of hidden tiles are of the tile as it is. Without
    `decode` neither: cached features take their place."""
    present, hidden = (layout.zeros(name, bool, layout.c) for name in ("tile_present", "tile_hidden"))
    target = layout.zeros("tile_target", np.float32, layout.c, len(TILE_STATS))
    position = layout.zeros("tile_pos_um", np.float32, layout.c, 2)
    at = layout.zeros("tile_at", np.int64, layout.rows, layout.cols)
    at[...] = -1
    encoded = sum(len(part.group.tiles.keys() - part.view.hidden_tiles) for part in layout.parts)
    packed = max(1, encoded)  # a dummy where there is none
    pixels = np.zeros((packed if decode else 0, spec.tile_px, spec.tile_px, 3), np.uint8)
    slots: list[int] = []
    for part in layout.parts:
        table = None if part.view.stain is None else stain.jitter_table(part.view.stain)
        used = np.zeros(len(part.group.meta.regions), dtype=np.int64)
        for place in sorted(part.group.tiles):
            region, c = part.first + place[0], int(used[place[0]])
            used[place[0]] += 1
            row, col = _tile_place(part, place, position[region, c])
            present[region, c] = True
            source = f"slide {part.group.meta.slide}: tile {place}"
            if place in part.view.hidden_tiles:
                hidden[region, c] = True
                if decode:
                    jpeg = part.group.tiles[place]
                    target[region, c] = stain.tile_statistics(decode_tile(jpeg, spec.tile_px, source))
                continue
            at[region, row, col] = len(slots)
            slots.append(region * layout.c + c)
            if not decode:
                continue
            tile = decode_tile(part.group.tiles[place], spec.tile_px, source, out=pixels[len(slots) - 1])
            if table is not None or part.view.flip or part.view.turns:
                turned = _turn_pixels(tile if table is None else stain.restain(tile, table), part.view)
                pixels[len(slots) - 1] = turned
    if decode:
        layout.out["tiles"] = pixels
    layout.out["tile_weight"] = np.full(packed, float(encoded > 0), np.float32)
    layout.out["tile_slot"] = np.array(slots or [-1], np.int64)


def _tile_place(part: _Part, place: tuple[int, int, int], position: Floats) -> tuple[int, int]:
    """(row, col) of a tile after flips and turns; its position code is written into `position`."""
    meta = part.group.meta
    region = meta.regions[place[0]]
    centre = np.array([place[2] + 0.5, place[1] + 0.5])  # (x, y) in tiles
    turned = _turn(centre, region.cols, region.rows, part.view)
    side = _turned(region, part.view)
    position[:] = _code(turned * meta.tile_um, np.array([side.cols, side.rows]) * meta.tile_um / 2, part.view)
    return int(turned[1]), int(turned[0])


def _profiles(layout: _Layout) -> None:
    """Who is where, how large, and what is known of it."""
    n = layout.n
    flags = {name: layout.zeros(name, bool, n) for name in ("profile", "visible", "query", "wholly_hidden")}
    xy, pos = (layout.zeros(name, np.float32, n, 2) for name in ("xy_um", "pos_um"))
    side, area, fed = (layout.zeros(name, np.float32, n) for name in ("footprint_um", "log_area", "footprint_input"))
    points = layout.zeros("footprint_points", bool, n, FOOTPRINT_SIDE, FOOTPRINT_SIDE)
    for part in layout.parts:
        profiles, view, meta = part.group.profiles, part.view, part.group.meta
        at = part.region, part.slot
        flags["profile"][at] = True
        flags["visible"][at], flags["query"][at] = view.visible, view.query
        flags["wholly_hidden"][at] = ~view.visible
        sides = np.array([(r.cols, r.rows) for r in meta.regions]) * meta.tile_um
        origins = np.array([r.origin_um for r in meta.regions])
        local = profiles.xy_um - origins[part.group.region]
        width, height = sides[part.group.region].T
        turned = _turn(local, width, height, view)
        centre = np.stack([height, width] if view.turns % 2 else [width, height], axis=-1) / 2
        xy[at], pos[at] = turned, _code(turned, centre, view)
        inside, side[at] = sample_points(profiles, view.grow_um)
        points[at] = _turn_pixels(inside.transpose(1, 2, 0), view).transpose(2, 0, 1)
        area[at] = np.log(profiles.area_um2)
        factor = 1.0 if view.size_factor is None else view.size_factor
        log_size = np.log(profiles.footprint_um * factor)
        # A cell's area predicts its counts: its size is fed to the next power of two um.
        fed[at] = np.log(2) * np.round(log_size / np.log(2)) if meta.kind == "cell" else log_size


def _inputs(layout: _Layout, spec: BatchSpec) -> None:
    """The visible expression: values, depth and number of genes, all of visible genes alone."""
    total = len(layout.regions) * layout.n
    row, gene, count = [], [], []
    scale, shown = np.zeros(total), []
    for part in layout.parts:
        profiles, view = part.group.profiles, part.view
        places = part.region * layout.n + part.slot
        owner = np.repeat(places, np.diff(profiles.indptr))
        row.append(owner[view.entry])
        gene.append(profiles.gene[view.entry].astype(np.int64))
        count.append(view.count)
        panel = spec.panel(part.group)
        measured = panel if view.visible_genes is None else panel & view.visible_genes
        scale[places] = LOGNORM_SCALE * spec.share[measured].sum()
        shown.append(np.flatnonzero(measured & view.visible.any()))
    rows, genes, counts = np.concatenate(row), np.concatenate(gene), np.concatenate(count)
    order = np.argsort(rows, kind="stable")
    rows, genes, counts = rows[order], genes[order], counts[order]
    depth = np.bincount(rows, counts, minlength=total)
    number = np.bincount(rows, minlength=total)
    shape = len(layout.regions), layout.n
    layout.out["input_gene"] = genes
    layout.out["input_value"] = np.log1p(counts * scale[rows] / depth[rows]).astype(np.float32)
    layout.out["input_offsets"] = np.cumsum(number) - number
    layout.out["shown_gene"] = np.concatenate(shown)
    layout.out["shown_value"] = np.log1p(LOGNORM_SCALE * spec.share[layout.out["shown_gene"]]).astype(np.float32)
    layout.out["shown_offsets"] = np.cumsum([0, *map(len, shown)])
    layout.out["input_log_depth"] = np.log1p(depth).astype(np.float32).reshape(shape)
    layout.out["input_log_genes"] = np.log1p(number).astype(np.float32).reshape(shape)


def _contrast(layout: _Layout) -> None:
    """Who has a part in the contrast of image and expression: profiles that show some gene, in a tile that is encoded.

    How many of them are far enough to be told apart is counted here, so that nobody has to look for pairs in a step.
    """
    out, place = layout.out, layout.zeros("place_um", np.float32, layout.n, 2)
    negatives = layout.zeros("negatives", np.int64, layout.n)
    negatives[...] = -1
    for part in layout.parts:
        at, meta = (part.region, part.slot), part.group.meta
        place[at] = part.group.profiles.xy_um - np.array(meta.regions[0].origin_um)
        col, row = (out["xy_um"][at] // meta.tile_um).astype(np.int64).clip(0, [layout.cols - 1, layout.rows - 1]).T
        seen = (out["tile_at"][part.region, row, col] >= 0) & (out["input_log_genes"][at] > 0)
        region, slot = part.region[seen], part.slot[seen]
        xy = place[region, slot]
        square = sum((xy[:, None, axis] - xy[None, :, axis]) ** 2 for axis in range(2))
        negatives[region, slot] = (square >= APART_UM**2).sum(axis=1)


def _context(layout: _Layout) -> None:
    encoded = layout.out["tile_present"] & ~layout.out["tile_hidden"]
    layout.out["context_slots"] = np.arange((encoded.sum(1) + layout.out["visible"].sum(1)).max())


def _tokens(layout: _Layout, spec: BatchSpec, size: tokens.TokenSpec) -> None:
    """The visible expression once more, as tokens."""
    found = []
    for part in layout.parts:
        profiles, view = part.group.profiles, part.view
        row = np.repeat(np.arange(len(profiles)), np.diff(profiles.indptr))[view.entry]
        panel = spec.panel(part.group)
        measured = panel if view.visible_genes is None else panel & view.visible_genes
        gene, sum_to = profiles.gene[view.entry].astype(np.int64), LOGNORM_SCALE * spec.share[measured].sum()
        chosen = tokens.choose(
            row, gene, view.count, view.visible, measured, spec.share, sum_to, size, view.token_seed
        )  # fmt: skip
        found.append(chosen._replace(row=(part.region * layout.n + part.slot)[chosen.row]))
    layout.out |= tokens.pack(found)


def _targets(layout: _Layout, spec: BatchSpec, genes: Ints) -> None:
    """What the losses compare with: full counts of the loss genes, full depth over the target panel."""
    k, n = len(genes), layout.n
    layout.out["genes"] = genes
    weight = layout.zeros("gene_weight", np.float32, k)
    target, asked = layout.zeros("target_count", np.float32, n, k), layout.zeros("target_mask", bool, n, k)
    log_depth, density = (layout.zeros(name, np.float32, n) for name in ("target_log_depth", "depth_target"))
    some = layout.zeros("depth_mask", bool, n)
    column = np.full(spec.n_genes, -1)
    column[genes] = np.arange(k)
    always = np.isin(genes, top_genes(spec, k))
    for part in layout.parts:
        profiles, view, meta = part.group.profiles, part.view, part.group.meta
        at = part.region, part.slot
        panel = spec.target(part.group)
        weight[part.first : part.first + len(meta.regions)] = _weights(panel, genes, always)
        inside = panel[profiles.gene]
        owner = np.repeat(np.arange(len(profiles)), np.diff(profiles.indptr))
        depth = np.bincount(owner[inside], profiles.count[inside], minlength=len(profiles))
        kept = inside & (column[profiles.gene] >= 0)
        target[part.region[owner[kept]], part.slot[owner[kept]], column[profiles.gene[kept]]] = profiles.count[kept]
        measured = (spec.panel(part.group) & panel)[genes]
        hidden = np.zeros(k, dtype=bool) if view.hidden_genes is None else view.hidden_genes[genes]
        ask = (view.query & (depth > 0))[:, None] & (~view.visible[:, None] | hidden[None])
        asked[at] = ask & measured[None]
        log_depth[at] = np.log(np.maximum(depth, 1))
        density[at] = np.log(np.maximum(depth, 1) / profiles.counted_um2) - meta.slide_log_density
        some[at] = view.query & ~view.visible & (depth > 0)


def _weights(panel: Mask, genes: Ints, always: Mask) -> Floats:
    """[K] how many genes of the panel each loss gene stands for: they sum to the panel's size. 0 outside the panel."""
    inside = panel[genes]
    missing = int(panel.sum()) - int(inside.sum())
    weight = inside.astype(np.float32)
    if missing:
        sampled = inside & ~always
        if sampled.any():
            weight[sampled] += missing / sampled.sum()
    return weight
