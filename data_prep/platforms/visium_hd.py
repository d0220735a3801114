"""Visium HD (Space Ranger 3 and 4): an `outs` folder -> a Measurement of bins or of segmented cells.

In: the outs folder, its `binned_outputs` or `segmented_outputs`, or a folder that holds `square_008um` and the like;
names may carry an `<id>_` prefix. The unit is square2um, square8um (the default), square16um, or cell. Out: a square as
wide as the bin for each bin of the filtered matrix, or the outline of each cell.

    square_008um/filtered_feature_bc_matrix.h5, spatial/tissue_positions.parquet, spatial/scalefactors_json.json
    segmented_outputs/filtered_feature_cell_matrix.h5, cell_segmentations.geojson, spatial/scalefactors_json.json
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.platforms import Measurement, Source, segmented, spaceranger, tenx, visium
from data_prep.platforms.found import OUTS, maybe, one
from storm.schema import POLYGON, SQUARE

DEFAULT_UNIT = "square8um"
CELL = "cell"
_LATTICE_POINTS = 200_000  # enough for a fit; a grid of 2 um has eleven million
_IDENTITY = 1e-3  # how far bin_size_um / spot_diameter_fullres may lie from microns_per_pixel
_ANNOTATED = "graphclust_annotated_cell_segmentations.geojson"


@dataclass(frozen=True)
class _Files:
    """What is read for one unit."""

    matrix: Path
    scale: Path
    positions: Path | None  # of the bins; for cells those of bins beside them, for their lattice alone
    outlines: Path | None  # of the cells
    probes: Path | None
    bin_um: float  # of the positions


def _unpacked(folder: Path) -> Path:
    """The folder itself. Raises ValueError where it is an archive, or holds nothing but archives."""
    packed = [folder] if folder.is_file() else sorted(folder.glob("*_outputs.tar.gz")) if folder.is_dir() else []
    if folder.is_file() or (packed and not _bins(folder) and not _segmented(folder)):
        name = packed[0].name
        fact = "is an archive" if folder.is_file() else f"holds {name} still packed"
        raise ValueError(f"{folder}: {fact}; unpack it (tar -xzf {name}) and give the folder")
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no folder; {OUTS}")
    return folder


def _bins(folder: Path) -> dict[int, Path]:
    """Bin size in um -> folder of the bins, of an outs folder, its binned_outputs, or one size alone."""
    for place in (folder, maybe(folder, ("binned_outputs",))):
        inside = [place, *sorted(place.iterdir())] if place and place.is_dir() else []
        found = {
            int(m[1]): p for p in inside if p.is_dir() and (m := re.fullmatch(r"(?:.*_)?square_(\d{3})um", p.name))
        }
        if found:
            return found
    return {}


def _segmented(folder: Path) -> Path | None:
    """The folder of the segmented cells."""
    bare = folder.name.endswith("segmented_outputs")
    return folder if bare else maybe(folder, ("segmented_outputs",))


def _outs(folder: Path) -> Path:
    """The outs folder that a part of it lies in."""
    folder = folder.absolute()
    while re.search(r"(^|_)(square_\d{3}um|binned_outputs|segmented_outputs)$", folder.name):
        folder = folder.parent
    return folder


def _locate(source: Source) -> _Files:
    """The files of the asked unit. Raises ValueError where they are not there, naming the units that are."""
    unit, folder = source.unit or DEFAULT_UNIT, _unpacked(source.measurement)
    bins, cells = _bins(folder), _segmented(folder)
    probes = spaceranger.probe_set(_outs(folder))
    size = int(unit.removeprefix("square").removesuffix("um")) if unit != CELL else 0
    if (unit == CELL and not cells) or (unit != CELL and size not in bins):
        there = [f"square{n}um" for n in sorted(bins)] + [CELL] * bool(cells)
        raise ValueError(
            f"{folder}: has no {unit} (has: {', '.join(there) or 'neither square_008um and the like nor '}"
            f"{'' if there else 'segmented_outputs'}); write one of them in the column unit, or {OUTS}"
        )
    if unit != CELL:
        found = bins[size]
        names = tuple(f"{kind}_feature_bc_matrix{end}" for kind in ("filtered", "raw") for end in (".h5", ""))
        matrix, spatial = one(found, names, "matrix"), maybe(found, ("spatial",)) or found
        positions = source.spots or one(spatial, ("tissue_positions.parquet", "tissue_positions.csv"), "positions")
        return _Files(matrix, _scale_path(spatial), positions, None, probes, float(size))
    assert cells is not None
    beside = bins or _bins(cells.absolute().parent)
    coarse = max(beside, default=0)  # the fewest points
    positions_ = maybe(beside[coarse] / "spatial", ("tissue_positions.parquet",)) if coarse else None
    drawn = maybe(cells, ("cell_segmentations.geojson",), but=(_ANNOTATED,)) or one(cells, (_ANNOTATED,), "outlines")
    matrices = tuple(f"{kind}_feature_cell_matrix{end}" for kind in ("filtered", "raw") for end in (".h5", ""))
    scale = _scale_path(maybe(cells, ("spatial",)) or cells)
    return _Files(one(cells, matrices, "matrix"), scale, positions_, drawn, probes, float(coarse))


def _scale_path(spatial: Path) -> Path:
    return one(spatial, ("scalefactors_json.json",), "scale factors")


def inputs(source: Source) -> list[Path]:
    """The matrix, the scale factors, positions or outlines and, where there is one, the probe set."""
    found = _locate(source)
    others = (found.scale, found.positions, found.outlines, found.probes)
    return [*tenx.files_of(found.matrix), *(path for path in others if path)]


def _reported_mpp(scale: dict[str, Any], path: Path, bin_um: float | None) -> float | None:
    """um per px by the scale factors.

    Raises:
        ValueError: they contradict each other, or are of bins of another size.
    """
    told, size, width = (scale.get(name) for name in ("microns_per_pixel", "bin_size_um", "spot_diameter_fullres"))
    if bin_um is None:
        return told
    if size is not None and size != bin_um:
        raise ValueError(f"{path}: is of bins of {size} um, not {bin_um:.0f} um; restore it from Space Ranger's outs")
    by_width = bin_um / width if width else None
    if told and by_width and abs(by_width / told - 1) > _IDENTITY:
        raise ValueError(
            f"{path}: {bin_um:.0f} um / spot_diameter_fullres is {by_width:.5g}, microns_per_pixel {told:.5g}: they "
            "should be one length; restore it from Space Ranger's outs"
        )
    return told or by_width


def _lattice(positions: spaceranger.Positions, bin_um: float) -> dict[str, Any]:
    """Measurement's lattice_um and lattice_xy: of a large grid every k-th place."""
    every = slice(None, None, -(-len(positions.xy) // _LATTICE_POINTS))
    return {"lattice_um": positions.array[every] * bin_um, "lattice_xy": positions.xy[every].copy()}


def read(source: Source) -> Measurement:
    """One profile for each bin or cell of the filtered matrix, in the matrix's order.

    Raises:
        ValueError: files are missing, unreadable, packed, or do not fit each other.
    """
    found = _locate(source)
    return _read_cells(source, found) if found.outlines else _read_bins(found)


def _read_bins(found: _Files) -> Measurement:
    assert found.positions is not None
    matrix, positions = tenx.open_matrix(found.matrix), spaceranger.read_positions(found.positions)
    scale = spaceranger.scale_factors(found.scale)
    place = spaceranger.join(matrix, positions, found.positions)
    rows, notes = visium.chosen(matrix, place, positions)
    kinds, told = spaceranger.measured_kinds(matrix, found.probes)
    at = place[rows]
    return Measurement(
        "visium_hd", "bin", matrix.barcodes.take(rows).to_pylist(), positions.xy[at],
        np.full(len(rows), found.bin_um, np.float32), np.full(len(rows), SQUARE, np.uint8),
        lambda wanted: matrix.counts(rows[wanted]), matrix.names, matrix.symbols, kinds,
        in_tissue=positions.in_tissue[at], **_lattice(positions, found.bin_um),
        reported_mpp=_reported_mpp(scale, found.scale, found.bin_um), notes=[*notes, *told],
        facts={"measured": matrix.facts},
    )  # fmt: skip


def _read_cells(source: Source, found: _Files) -> Measurement:
    assert found.outlines is not None
    matrix, cells = tenx.open_matrix(found.matrix), segmented.read(found.outlines)
    place = spaceranger.join(matrix, cells.positions, found.outlines)
    rows = np.flatnonzero(place >= 0)
    kinds, notes = spaceranger.measured_kinds(matrix, found.probes)
    indptr, xy = cells.take(place[rows])
    reported = _reported_mpp(spaceranger.scale_factors(found.scale), found.scale, None)
    lattice: dict[str, Any] = {}
    if found.positions:
        lattice = _lattice(spaceranger.read_positions(found.positions), found.bin_um)
    elif reported:
        # Without bins beside them only the vendor's word tells the pixel's size: it then stands in the fit's place.
        matrix_ = None if source.alignment else np.eye(3)
        lattice = {"space_um": reported, "matrix": matrix_}
    return Measurement(
        "visium_hd", CELL, matrix.barcodes.take(rows).to_pylist(), cells.positions.xy[place[rows]],
        np.zeros(len(rows), np.float32), np.full(len(rows), POLYGON, np.uint8),
        lambda wanted: matrix.counts(rows[wanted]), matrix.names, matrix.symbols, kinds,
        polygon_indptr=indptr, polygon_xy=xy, **lattice, reported_mpp=reported,
        notes=[*spaceranger.stranger_note(place, "an outline"), *notes, *cells.notes],
        facts={"measured": matrix.facts},
    )  # fmt: skip
