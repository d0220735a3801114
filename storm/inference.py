"""A slide store and an exported model -> embeddings and predicted expression, as arrays.

In: `Pretrained`, `SlideStore`. Out: embeddings [N, D], or a `Prediction` [N, K]. The slide is covered with overlapping
regions of the size used in training; each footprint is taken from the region in which it is most central. Queries do
not see each other, so which footprints are asked, and in how many chunks, changes no answer.

Which counts the model sees is the caller's: none, all, or those of some profiles, which are then context wherever a
region holds them (imputation). The pixels can be withheld too (expression only).

Without counts the footprints are those of a lattice over the tissue. Pixels are all that is read of such a slide.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from storm import regions, schema
from storm.data.batch import collate, spec_of
from storm.data.view import plain_view
from storm.descriptors import Descriptors
from storm.export import Pretrained
from storm.genes import GeneTable, canonical, species_of
from storm.model.storm import Storm
from storm.prediction import Prediction
from storm.regions import Region
from storm.store import SlideStore
from storm.tile_maps import TileMaps

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

LATTICE_PITCH_UM = 100.0
_CHUNK = 256  # profiles asked of a region at a time
_CONTEXT = 1024  # profiles of a region that are context beside those asked: as many as a model is made for
_REGIONS = 4  # per forward
SYMMETRIES = [(flip, turns) for flip in (False, True) for turns in range(4)]  # the slide as it is comes first
_PANEL, _NO_GENES = "slide", np.zeros(0, np.int64)


@dataclass(frozen=True)
class Slide:
    """A slide store made ready for a model: `profiles.gene` indexes the model's vocabulary."""

    store: SlideStore
    profiles: schema.Profiles
    panel: npt.NDArray[np.bool_]  # [G] the genes that were measured
    measured: bool  # False: the footprints are a lattice and have no counts
    unknown: tuple[str, ...]  # measured genes that the model cannot know
    read: Rows  # [M, 2] (row, col) of the tiles that the footprints read
    kind: str = ""  # of the profiles; '' = as the store has it


def prepare(pretrained: Pretrained, store: SlideStore) -> Slide:
    """A slide for a model: its measured profiles, or a lattice over its tissue where it has none.

    Raises:
        ValueError: tiles of another geometry than the model's, or no gene in common with it.
    """
    info, config = store.info, pretrained.config
    if (info.tile_px, info.tile_mpp) != (config.tile_px, config.tile_mpp):
        raise ValueError(
            f"{store.path}: tiles of {info.tile_px} px at {info.tile_mpp:g} um/px, the model reads {config.tile_px} px "
            f"at {config.tile_mpp:g}; build the store with tile_px={config.tile_px} tile_mpp={config.tile_mpp:g}"
        )
    profiles = store.profiles()
    measured = len(profiles) > 0
    if measured:
        profiles, panel, unknown = _to_vocabulary(profiles, store.genes(), pretrained.genes, store)
    else:
        profiles, panel, unknown = _lattice(pretrained, store), pretrained.panel, ()
    read = regions.tiles_read(profiles.xy_um, profiles.footprint_um, info.tile_um)
    return Slide(store, profiles, panel, measured, unknown, read)


def _to_vocabulary(
    profiles: schema.Profiles, genes: GeneTable, vocabulary: GeneTable, store: SlideStore
) -> tuple[schema.Profiles, npt.NDArray[np.bool_], tuple[str, ...]]:
    """(profiles over the vocabulary, measured [G], genes that are not in it)."""
    column = np.array([vocabulary.index.get(gene_id, -1) for gene_id in genes.ids], dtype=np.int64)
    known = column >= 0
    if not known.any():
        raise ValueError(
            f"{store.path}: none of its {len(genes)} genes is in the model's vocabulary; is it of another species?"
        )
    panel = np.zeros(len(vocabulary), dtype=bool)
    panel[column[known]] = True
    kept = known[profiles.gene]
    owner = np.repeat(np.arange(len(profiles)), np.diff(profiles.indptr))[kept]
    gene = column[profiles.gene[kept]]
    order = np.lexsort((gene, owner))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(profiles)))]).astype(np.int64)
    mapped = schema.Profiles(
        profiles.ids, profiles.xy_um, profiles.footprint_um, profiles.footprint_kind,
        indptr, gene[order].astype(np.int32), profiles.count[kept][order],
        profiles.polygon_indptr, profiles.polygon_um,
    )  # fmt: skip
    return mapped, panel, tuple(g for g, k in zip(genes.ids, known, strict=True) if not k)


def _lattice(pretrained: Pretrained, store: SlideStore) -> schema.Profiles:
    """Footprints of the reference size every 100 um wherever a tile of tissue exists; ids lattice_<row>_<column>."""
    info, reference = store.info, pretrained.reference
    width, height = info.width_px0 * info.mpp, info.height_px0 * info.mpp
    points = regions.lattice_points(width, height, LATTICE_PITCH_UM)
    tiles = np.floor(points / info.tile_um).astype(np.int64)
    points = points[[(int(row), int(col)) in store.tile_index for col, row in tiles]]
    if not len(points):
        raise ValueError(f"{store.path}: holds no tile of tissue, so nothing can be asked of it; check image and mpp")
    places = np.floor(points / LATTICE_PITCH_UM).astype(np.int64)
    n = len(points)
    return schema.Profiles(
        [f"lattice_{row}_{col}" for col, row in places], points,
        np.full(n, reference["footprint_um"], np.float32), np.full(n, reference["footprint_kind"], np.uint8),
        np.zeros(n + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32),
    )  # fmt: skip


def with_squares(slide: Slide, xy_um: npt.NDArray[np.float64], side_um: npt.NDArray[np.float32]) -> Slide:
    """The slide with squares [N] in place of its own footprints: bins of its platform, in which nothing is counted.

    The tiles that its own footprints read stay context. A bin's size is told to the model as it is, that of a cell to
    the next power of two um.
    """
    n = len(xy_um)
    squares = schema.Profiles(
        [f"square_{i}" for i in range(n)], xy_um, side_um.astype(np.float32), np.full(n, schema.SQUARE, np.uint8),
        np.zeros(n + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32),
    )  # fmt: skip
    read = regions.tiles_read(xy_um, squares.footprint_um, slide.store.info.tile_um)
    return replace(slide, profiles=squares, read=np.unique(np.concatenate([slide.read, read]), axis=0), kind="bin")


def platform_told(pretrained: Pretrained, slide: Slide) -> str:
    """A measured slide's own platform where the model was trained on it, else the reference platform."""
    own = slide.store.info.platform
    trained = pretrained.data["platforms"]
    return own if slide.measured and own in trained else str(pretrained.reference["platform"])


@dataclass(frozen=True)
class _Ask:
    """One region to be encoded: `rows` are the footprints it holds, `wanted` [len(rows)] those to be answered here."""

    region: Region
    rows: Rows
    wanted: npt.NDArray[np.bool_]


def _asks(pretrained: Pretrained, slide: Slide, rows: Rows, visible: Mask) -> Iterator[_Ask]:
    """The regions that cover `rows`; each holds all its visible footprints, because they are its context."""
    tile_um, xy_um = slide.store.info.tile_um, slide.profiles.xy_um
    extent = regions.extent_for(platform_told(pretrained, slide), pretrained.data["spots_side"], tile_um)
    shown, asked = np.flatnonzero(visible), np.isin(np.arange(len(xy_um)), rows)
    for region in regions.cover(xy_um, tile_um, extent):
        place = xy_um[shown] - np.array(region.origin_um(tile_um))
        inside = shown[((place >= 0) & (place < extent * tile_um)).all(1)]
        context, own = _spread(inside), asked[region.profiles]
        # Beside a bounded context those of a chunk see each other: chunks are then the slide's, whoever is asked.
        members = region.profiles if len(context) < len(inside) else region.profiles[own]
        for start in range(0, len(members) if own.any() else 0, _CHUNK):
            part = members[start : start + _CHUNK]
            if asked[part].any():
                held = np.union1d(context, part)
                yield _Ask(region, held, np.isin(held, part) & asked[held])


def _spread(rows: Rows) -> Rows:
    """At most _CONTEXT of some rows, evenly along their order."""
    return rows if len(rows) <= _CONTEXT else rows[np.arange(_CONTEXT) * len(rows) // _CONTEXT]


def _group(pretrained: Pretrained, slide: Slide, ask: _Ask, use_image: bool) -> schema.Group:
    """The region as a group of its own, with its tiles as they lie in the store, or without any."""
    info, region = slide.store.info, ask.region
    present = set(slide.store.tile_index)
    tiles = {
        (0, row - region.row, col - region.col): slide.store.jpeg(slide.store.tile_index[row, col])
        for row, col in (regions.region_tiles(region, slide.read, present) if use_image else ())
    }
    platform = platform_told(pretrained, slide)
    meta = schema.GroupMeta(
        info.slide_id, info.section, info.donor, info.study, info.organ, info.species, platform,
        slide.kind or info.kind, _PANEL, float(pretrained.reference["slide_log_density"]), info.mpp,
        info.tile_px, info.tile_mpp,
        (schema.RegionMeta(region.origin_um(info.tile_um), region.extent, region.extent),),
    )  # fmt: skip
    return schema.Group(meta, slide.profiles.take(ask.rows), np.zeros(len(ask.rows), np.int32), tiles)


@dataclass(frozen=True)
class _Shown:
    """What the model sees of a slide: the counts of the `visible` profiles [N], and the pixels or not."""

    visible: Mask
    image: bool


def _shown(slide: Slide, use_counts: bool | Mask, use_image: bool) -> _Shown:
    visible = np.broadcast_to(np.asarray(use_counts, dtype=bool), len(slide.profiles))
    if visible.any() and not slide.measured:
        raise ValueError(f"{slide.store.path}: has no counts; embed it from H&E alone")
    if not use_image and not visible.any():
        raise ValueError(f"{slide.store.path}: neither pixels nor counts are shown; show one of them")
    return _Shown(visible, use_image)


def _mean(name: str, values: list[torch.Tensor]) -> torch.Tensor:
    """Of an output over several symmetries; that of shares is one of shares, so that they still sum to 1."""
    if len(values) == 1:
        return values[0]
    stacked = torch.stack(values).float()
    if name == "log_composition":
        return stacked.logsumexp(0) - math.log(len(values))
    mean = stacked.mean(0)
    return torch.nn.functional.normalize(mean, dim=-1) if name.startswith("align_") else mean


def _outputs(model: Storm, batch: dict[str, torch.Tensor], unseen: Floats | None) -> dict[str, torch.Tensor]:
    """The model's outputs, unseen genes after the others, and as `feature` [R, N, 2, D] what its image encoder alone
    gave of each profile."""
    read: list[torch.Tensor] = []
    hook = model.footprint.register_forward_hook(lambda module, inputs, output: read.append(output[0]))
    try:
        outputs = model(batch) | {"feature": read[0]}
    finally:
        hook.remove()
    if unseen is not None:
        more = model.unseen(outputs["embedding"], batch, torch.from_numpy(unseen).to(outputs["embedding"].device))
        outputs |= {name: torch.cat([outputs[name], values], dim=-1) for name, values in more.items()}
    return outputs


def _forward(
    pretrained: Pretrained, slide: Slide, rows: Rows, shown: _Shown, genes: Rows, names: tuple[str, ...],
    device: torch.device, unseen: Floats | None = None,
) -> Iterator[tuple[Rows, dict[str, torch.Tensor]]]:  # fmt: skip
    """(rows answered [n], the named outputs of the model for them [n, ...], those that it has) of one forward after
    another; unseen genes come after the others."""
    spec = spec_of(pretrained.config, {_PANEL: slide.panel}, np.asarray(pretrained.genes.share), pretrained.panel)
    model = pretrained.model.to(device)
    maps = TileMaps(model, device)
    asks = list(_asks(pretrained, slide, rows, shown.visible))
    for start in range(0, len(asks), _REGIONS):
        some = asks[start : start + _REGIONS]
        groups = [_group(pretrained, slide, ask, shown.image) for ask in some]
        views = [plain_view(group, shown.visible[ask.rows]) for group, ask in zip(groups, some, strict=True)]
        found = []
        for flip, turns in SYMMETRIES[: pretrained.symmetries]:
            batch = collate(groups, [replace(view, flip=flip, turns=turns) for view in views], spec, genes)
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                found.append(_outputs(model, maps(batch), unseen))
        outputs = {name: _mean(name, [outputs[name] for outputs in found]) for name in names if name in found[0]}
        for i, ask in enumerate(some):
            at = torch.from_numpy(np.flatnonzero(ask.wanted)).to(device)
            yield ask.rows[ask.wanted], {name: values[i, at].float().cpu() for name, values in outputs.items()}


def _device(device: str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def vectors(
    pretrained: Pretrained, slide: Slide, names: tuple[str, ...], use_counts: bool | Mask = False,
    use_image: bool = True, rows: Rows | None = None, device: str | None = None,
) -> dict[str, Floats]:  # fmt: skip
    """Some of the model's outputs per footprint, [N, ...], of one pass: of all footprints, or of those at `rows`.

    Args:
        names: embedding; feature [N, 2, D], what the image encoder alone gave under the footprint and over the window;
            align_image and align_expression of a model that has them.
        use_counts: whose counts are shown: nobody's, everybody's, or those of a mask [all footprints].
        use_image: show the pixels.

    Raises:
        ValueError: counts are to be shown, but the slide has none; or nothing is to be shown.
    """
    shown = _shown(slide, use_counts, use_image)
    rows = np.arange(len(slide.profiles)) if rows is None else rows
    place = {int(row): i for i, row in enumerate(rows)}
    found: dict[str, Floats] = {}
    for done, outputs in _forward(pretrained, slide, rows, shown, _NO_GENES, names, _device(device)):
        at = [place[int(row)] for row in done]
        for name, values in outputs.items():
            found.setdefault(name, np.zeros((len(rows), *values.shape[1:]), np.float32))[at] = values.numpy()
    return found if len(rows) else {name: np.zeros((0, 0), np.float32) for name in names}


def embed(
    pretrained: Pretrained, slide: Slide, use_counts: bool | Mask, rows: Rows | None = None, device: str | None = None
) -> Floats:
    """Embeddings [N, D] of all footprints, or of those at `rows`, from H&E and the counts that are shown.

    Raises:
        ValueError: as `vectors`.
    """
    return vectors(pretrained, slide, ("embedding",), use_counts, rows=rows, device=device)["embedding"]


def gene_indices(
    pretrained: Pretrained, genes: Sequence[str] | None, table: Descriptors | None = None
) -> tuple[Rows, list[str]]:
    """([K] vocabulary indices of Ensembl ids or symbols, those that are not there); None = the reference panel.

    Raises:
        ValueError: no gene is named, or neither the reference panel nor the table, where one is given, holds any.
    """
    known = np.flatnonzero(pretrained.panel)
    if genes is None:
        return known, []
    if isinstance(genes, str) or not len(genes):  # by length: an index has no truth value
        fact = f"genes={genes!r} is one word" if len(genes) else "the list of genes is empty"
        raise ValueError(f"{fact}; give a list, or none for the whole reference panel")
    by_name: dict[str, int] = {}
    for i in known:
        by_name.setdefault(pretrained.genes.symbols[i], int(i))
    by_name |= {pretrained.genes.ids[i]: int(i) for i in known}
    found = list(dict.fromkeys(by_name[gene] for gene in genes if gene in by_name))
    absent = [gene for gene in genes if gene not in by_name]
    if not found and not (table and unseen_rows(pretrained, table, absent)[0]):
        raise ValueError(
            f"none of the {len(genes)} genes (as {genes[0]!r}) is in the model's reference panel; the "
            f"export's genes.tsv lists what it knows; {refusal(pretrained)}"
        )
    return np.array(found, dtype=np.int64), absent


def refusal(pretrained: Pretrained) -> str:
    """Why a gene outside the reference panel is not predicted, and what would let it be."""
    gene = "a gene outside the reference panel"
    if pretrained.config.descriptor_width:
        return f"{gene} needs a row in a table of descriptors of the kind the model was trained with"
    return f"{gene} cannot be known: the model was trained without descriptors of genes"


def unseen_rows(pretrained: Pretrained, table: Descriptors, genes: list[str]) -> tuple[dict[str, str], Floats]:
    """(gene -> Ensembl id, of U genes, descriptors [U, C]) of those ids or symbols that the table has.

    Raises:
        ValueError: the model has no descriptors, or others.
    """
    columns = pretrained.config.descriptor_width
    if table.columns != columns:
        raise ValueError(
            f"{table.source}: has {table.columns} columns, the model was trained "
            f"{f'with descriptors of {columns}; give the table of its training' if columns else 'without descriptors'}"
        )
    species, row = species_of(pretrained.genes.ids) or "human", {name: i for i, name in enumerate(table.ids)}
    ids = {gene: gene if gene in row else canonical(gene, species) for gene in genes}
    found = {gene: gene_id for gene, gene_id in ids.items() if gene_id in row}
    return found, table.values[[row[gene_id] for gene_id in found.values()]]


def predict(
    pretrained: Pretrained, slide: Slide, genes: Rows | None = None, rows: Rows | None = None,
    use_counts: bool | Mask = False, device: str | None = None, unseen: Floats | None = None, use_image: bool = True,
) -> Prediction:  # fmt: skip
    """Expected expression of all footprints, or of those at `rows`.

    Args:
        genes: [K] vocabulary indices to return; None = the reference panel. The composition is over the whole reference
            panel whatever is returned.
        use_counts: whose counts are shown, as `vectors` has it. A footprint that is asked and shown is a
            reconstruction, no prediction.
        unseen: [U, C] descriptors of genes outside the vocabulary (`unseen_rows`), returned after the others. Their
            mean level is that of the known genes: the contrasts between footprints are predicted.
        use_image: show the pixels.
    """
    shown = _shown(slide, use_counts, use_image)
    panel = np.flatnonzero(pretrained.panel)
    genes = panel if genes is None else genes
    more = np.arange(0 if unseen is None else len(unseen))
    columns = torch.from_numpy(np.concatenate([np.searchsorted(panel, genes), len(panel) + more]))
    genes = np.concatenate([genes, len(pretrained.genes) + more])
    rows = np.arange(len(slide.profiles)) if rows is None else rows
    place = {int(row): i for i, row in enumerate(rows)}
    composition = np.zeros((len(rows), len(genes)), np.float32)
    dispersion = np.full_like(composition, np.nan if pretrained.config.likelihood == "lognorm" else np.inf)
    zeros = np.zeros(len(genes), np.float32)
    contrast, log_var = (np.zeros(len(rows), np.float32) for _ in range(2))
    names = ("log_composition", "log_dispersion", "zero_logit", "depth_mean", "depth_log_var")
    for done, outputs in _forward(pretrained, slide, rows, shown, panel, names, _device(device), unseen):
        at = [place[int(row)] for row in done]
        composition[at] = outputs["log_composition"][:, columns].exp().numpy()
        if "log_dispersion" in outputs:
            dispersion[at] = outputs["log_dispersion"][:, columns].exp().numpy()
        if "zero_logit" in outputs:  # of the gene alone
            known = outputs["zero_logit"][0].sigmoid().numpy()
            zeros = np.concatenate([known, np.zeros(len(more), np.float32)])[columns.numpy()]  # an unseen gene has none
        contrast[at], log_var[at] = outputs["depth_mean"].numpy(), outputs["depth_log_var"].numpy()
    area = slide.profiles.area_um2[rows].astype(np.float32)
    log_depth = float(pretrained.reference["slide_log_density"]) + np.log(area) + contrast
    return Prediction(genes, composition, log_depth.astype(np.float32), log_var, dispersion, zeros)
