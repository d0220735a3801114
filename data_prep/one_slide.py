"""One row of the manifest -> one slide store.

In: a row, the config. Out: the store, with tiles, profiles, counts and all that was found on the way. Pixels and counts
are streamed: memory does not grow with the slide.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from data_prep import fingerprints, outlines, platforms, quality, registration, slides, tissue
from data_prep.manifest import IMAGE_ONLY, ManifestRow
from data_prep.platforms import Measurement
from data_prep.profiles import Placed, no_profiles, place, profiles_of
from storm import genes, regions, schema, store
from storm.prep_config import PrepConfig

_MOST_OFF_TISSUE = 0.5  # share of profiles
_BLOCK = 8  # tiles are read in blocks of 8 x 8, row of blocks by row of blocks, so that no part is decoded twice


def _kept_places(
    shares: np.ndarray, profiles: schema.Profiles, tile_um: float, config: PrepConfig
) -> list[tuple[int, int]]:
    """(row, col), neighbours near each other, of the tiles that a profile reads or that hold tissue."""
    rows, cols = shares.shape
    read = regions.tiles_read(profiles.xy_um, profiles.footprint_um, tile_um)
    wanted = {(int(r), int(c)) for r, c in read if 0 <= r < rows and 0 <= c < cols}
    # A tile that did not decode in the overview is asked for once more, so that its loss is counted.
    wanted |= {(int(r), int(c)) for r, c in np.argwhere(~(shares < config.min_tissue))}
    return sorted(wanted, key=_block_order)


def _block_order(place: tuple[int, int]) -> tuple[int, int, int]:
    (block_row, row), (block_col, col) = (divmod(at, _BLOCK) for at in place)
    return block_row, block_col, store.morton(row, col)


def _tiles(
    slide: slides.Slide, grid: slides.Grid, places: list[tuple[int, int]], shares: np.ndarray, config: PrepConfig,
    facts: dict[str, Any],
) -> Iterator[store.Tile]:  # fmt: skip
    """The encoded tiles; `facts` is completed at the end.

    Raises:
        ValueError: more than `max_failed_tiles` do not decode.
    """
    figures: list[tuple[float, ...]] = []
    failed: dict[tuple[int, int], str] = {}
    for row, col in places:
        try:
            pixels = slide.read(*grid.box(row, col), config.tile_px)
        except slides.DecodeError as error:
            failed[row, col] = str(error)
            continue
        share = float(shares[row, col])
        if np.isnan(share):  # the overview did not decode here, the tile itself does
            share = tissue.tile_share(pixels)
        figures.append(quality.tile_quality(pixels, share, grid.inside(slide, row, col)))
        # Chroma at half resolution, as slide scanners store it themselves.
        jpeg = simplejpeg.encode_jpeg(pixels, config.jpeg_quality, "RGB", "420", fastdct=False)
        yield store.Tile(row, col, jpeg, figures[-1])
    if len(failed) > config.max_failed_tiles * len(places):
        raise ValueError(
            f"{len(failed)} of {len(places)} tiles do not decode (max_failed_tiles {config.max_failed_tiles}): "
            f"{next(iter(failed.values()))}; restore the slide"
        )
    facts.update(quality.summary(np.array(figures, np.float32).reshape(-1, len(schema.TILE_QUALITY))))
    facts.update({"tiles": len(figures), "failed_tiles": [list(p) for p in failed]})
    if failed:
        facts["notes"].append(f"{len(failed)} tiles do not decode and are left out")
    if not figures:
        facts["notes"].append("no tile holds tissue or is read by a profile")


def _opened(row: ManifestRow, config: PrepConfig, scratch: Path | None) -> slides.Slide | None:
    return slides.open_slide(row.image, config.max_image_mpx, scratch) if row.image else None


def _measured(row: ManifestRow) -> Measurement | None:
    """Raises ValueError: there is nothing to read."""
    if row.platform == IMAGE_ONLY:
        return None
    if row.source is None:
        raise ValueError(f"slide {row.slide_id}: platform {row.platform} needs a measurement; give its path")
    return platforms.reader(row.reader).read(row.source)


def _info(row: ManifestRow, placed: Placed, measured: Measurement | None, config: PrepConfig) -> store.SlideInfo:
    width, height = placed.size_px0
    return store.SlideInfo(
        slide_id=row.slide_id, section=row.section or row.slide_id, donor=row.donor, study=row.study, organ=row.organ,
        species=row.species, platform=measured.platform if measured else "unknown",
        kind=measured.kind if measured else "spot", split=row.split, mpp=placed.mpp.value, mpp_source=placed.mpp.source,
        width_px0=width, height_px0=height, tile_px=config.tile_px, tile_mpp=config.tile_mpp,
        alignment=placed.matrix.tolist(), alignment_source=placed.matrix_source, residual_px0=placed.residual_px0,
        image=row.image is not None, license=row.license, use_terms=row.use_terms,
    )  # fmt: skip


def check_resolution(row: ManifestRow, mpp: float, measured: Measurement | None, config: PrepConfig) -> None:
    if row.image and mpp > 1.01 * config.tile_mpp * config.max_upsampling:  # 1.0004 um/px is 1 um/px
        told = measured.reported_mpp if measured else None
        why = ""
        if told and told > 1:
            why = f" (Space Ranger was given {told:.2f} um per px, as CytAssist has: run it with the full image)"
        raise ValueError(
            f"{row.image}: {mpp:.2f} um per pixel is too coarse for tiles of {config.tile_mpp} um per px{why}; "
            "give the full-resolution image, or raise max_upsampling"
        )


def build_slide(row: ManifestRow, folder: Path, config: PrepConfig, scratch: Path | None = None) -> Path:
    """Build one slide's store in `folder` and return its path.

    Args:
        scratch: folder for a tiled copy of an image that cannot be read in parts.

    Raises:
        ValueError (or another of build.INPUT_ERRORS): naming file, fact and cure; nothing is left behind.
    """
    slide, measured = _opened(row, config, scratch), _measured(row)
    placed = place(row, slide, measured, config)
    check_resolution(row, placed.mpp.value, measured, config)
    info = _info(row, placed, measured, config)
    info.facts.update({"slide": slide.facts if slide else {}, **placed.facts})
    profiles, counts = no_profiles(), None
    if measured:
        profiles, counts, facts = profiles_of(row, measured, placed, config)
        info.facts.update(facts | {"notes": [*info.facts["notes"], *facts["notes"]]})
    target = store.store_path(folder, row.slide_id)
    with store.writing(folder, row.slide_id) as writer:
        picture = _put_image(writer, row, slide, info, profiles, config)
        table = counts.table if counts else _NO_GENES
        sketch = fingerprints.ProfileSketch(table)
        depth, found = writer.put_counts(sketch.watch(counts.blocks()) if counts else [], table)
        n = len(profiles)
        if measured and not depth.any():
            raise ValueError(f"{row.measurement}: none of its {n} profiles has a count of a gene; restore the counts")
        in_tissue = np.full(n, -1, np.int8)
        if measured and counts and measured.in_tissue is not None:
            in_tissue = measured.in_tissue[counts.rows]
        control = counts.control if counts else np.zeros(n, np.int64)
        shares = _share_at(picture.shares, profiles, info)
        figures = quality.profile_quality(depth, found, control, in_tissue, shares, config)
        writer.put_profiles(profiles, figures)
        info.facts.update(quality.profile_summary(figures))
        info.facts["notes"] += _off_tissue(figures, config)
        info.facts["fingerprints"] = fingerprints.of_slide(picture.overview, picture.mask, sketch)
        if measured and picture.overview:
            _check_alignment(picture.overview, profiles, depth, info)
        writer.close(info, target)
    return target


_NO_GENES = genes.GeneTable((), ())


def _off_tissue(figures: dict[str, np.ndarray], config: PrepConfig) -> list[str]:
    """A warning where most profiles, without those that the vendor itself saw beside the tissue, lie on bare glass."""
    tissue_share = figures["tissue"][figures["in_tissue"] != 0]
    off = float((tissue_share < config.min_tissue).mean()) if len(tissue_share) else 0.0
    if off <= _MOST_OFF_TISSUE:
        return []
    return [f"WARNING: {off:.0%} of the profiles lie where the image shows no tissue; is it the image that was "
            "measured, and are they aligned?"]  # fmt: skip


def _check_alignment(
    overview: tissue.Overview, profiles: schema.Profiles, depth: np.ndarray, info: store.SlideInfo
) -> None:
    found = registration.check(overview, info.mpp, profiles.xy_um, profiles.footprint_um, depth, profiles.area_um2)
    info.facts["alignment_check"] = found
    if found["note"]:
        info.facts["notes"].append(found["note"])


class _Picture(NamedTuple):
    """What is seen of a whole slide."""

    shares: np.ndarray  # [rows, cols] of tissue per tile of the grid; [0, 0] without an image
    overview: tissue.Overview | None
    mask: tissue.Mask | None  # of tissue, over the overview


def _put_image(
    writer: store.Writer, row: ManifestRow, slide: slides.Slide | None, info: store.SlideInfo,
    profiles: schema.Profiles, config: PrepConfig,
) -> _Picture:  # fmt: skip
    """Write tiles, overview and the outlines of the tissue."""
    if slide is None or row.image is None:
        writer.put_tiles([])
        writer.put_overview(b"", b"")
        return _Picture(np.zeros((0, 0), np.float32), None, None)
    grid = slides.Grid.over(slide, info.tile_um / info.mpp)
    grid.check(slide, row.image, config.max_tiles, config.max_px_per_byte)
    overview = tissue.read_overview(slide, grid)
    mask, drawn = _tissue(row, overview, info)
    shares = overview.shares(mask)
    places = _kept_places(shares, profiles, info.tile_um, config)
    writer.put_tiles(_tiles(slide, grid, places, shares, config, info.facts))
    writer.put_overview(overview.jpeg(), outlines.dump(drawn))
    return _Picture(shares, overview, mask)


def _tissue(
    row: ManifestRow, overview: tissue.Overview, info: store.SlideInfo
) -> tuple[tissue.Mask, list[outlines.Polygon]]:
    """The tissue as a mask over the overview and as outlines: the user's own, else ours."""
    if row.tissue:
        drawn = outlines.read(row.tissue, overview.size_px0)
        mask = outlines.to_mask(drawn, overview.px_px0, overview.rgb.shape[:2])
    else:
        mask = tissue.tissue_mask(overview.rgb, overview.px_px0 * info.mpp, overview.glass)
        drawn = outlines.from_mask(mask, overview.px_px0, overview.size_px0)
    info.facts["tissue_source"] = "manifest" if row.tissue else "own"
    info.facts["tissue_mm2"] = round(float(mask.sum()) * (overview.px_px0 * info.mpp / 1000) ** 2, 3)
    return mask, drawn


def _share_at(shares: np.ndarray, profiles: schema.Profiles, info: store.SlideInfo) -> np.ndarray:
    """[N] share of tissue of the tile that holds each profile's centre; NaN without an image."""
    if not shares.size:
        return np.full(len(profiles), np.nan, np.float32)
    col, row = np.floor(profiles.xy_um / info.tile_um).astype(np.int64).T
    return shares[row.clip(0, shares.shape[0] - 1), col.clip(0, shares.shape[1] - 1)]
