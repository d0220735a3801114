"""A measurement in the slide's own micron frame, its columns as canonical genes.

In: a manifest row, the open slide (or none), what the platform measured. Out: where it lies (mpp, matrix, residual),
its profiles without their counts, and the counts as a stream of blocks over canonical genes.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep import align, slides
from data_prep.manifest import ManifestRow
from data_prep.platforms import GENE, OTHER, Measurement
from storm import genes, schema
from storm.prep_config import PrepConfig

_MAX_OUTSIDE = 0.05  # share of profiles that may lie beside the image before it is called the wrong image
_POLYGONS = 1 << 16  # are turned into um at a time
_MOST = 2**31 - 1  # counts of a gene in a profile
_LARGEST_UM = 500_000.0  # no slide is half a metre wide
_WIDEST_UM = 5_000.0  # no profile covers five mm
_MARGIN_UM = 200.0  # around the profiles of a measurement without an image


@dataclasses.dataclass(frozen=True)
class Placed:
    """A slide's micron frame, and how it was found."""

    mpp: align.Mpp
    matrix: align.Matrix  # measurement's own space -> level-0 px
    matrix_source: str
    residual_px0: float | None
    size_px0: tuple[int, int]  # width, height of level 0; without an image of the frame around the profiles
    facts: dict[str, Any]


def place(
    row: ManifestRow, slide: slides.Slide | slides.Header | None, measured: Measurement | None, config: PrepConfig
) -> Placed:
    """The slide's mpp and the map from the measurement's own space to level 0.

    Raises:
        ValueError: the mpp is unknown, its sources disagree, no file aligns the measurement, or the spots do not lie on
            their lattice.
    """
    try:
        matrix, source = _matrix(row, slide, measured)
        told: dict[str, float | None] = {"manifest": row.mpp, "lattice": None, "matrix": None, "embedded": None}
        told["embedded"] = slide.embedded_mpp if slide else None
        facts: dict[str, Any] = {}
        notes: list[str] = []
        residual = None
        scale = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))  # level-0 px per unit of the own space
        if measured and measured.space_um:
            told["matrix"] = measured.space_um / scale
        if measured and measured.lattice_um is not None and measured.lattice_xy is not None:
            fit = align.fit_lattice(measured.lattice_um, align.apply(matrix, measured.lattice_xy))
            residual = fit.residual_px0
            facts["lattice"] = {"mpp": fit.mpp, "residual_px0": fit.residual_px0, "anisotropy": fit.anisotropy}
            fault = align.lattice_fault(fit, measured.platform, config)
            if fault and row.mpp is None:
                raise ValueError(f"{fault}; check the spots, or give mpp in the manifest")
            notes += [fault] if fault else []
            told["lattice"] = None if fault else fit.mpp
        if measured and measured.reported_mpp:
            told["scalefactors"] = measured.reported_mpp / scale
        mpp = align.choose_mpp(told, config)
    except ValueError as error:
        raise ValueError(f"{row.measurement or row.image}: {error}") from error
    size = (slide.width_px0, slide.height_px0) if slide else (0, 0)
    if measured and not slide:
        matrix, size = _framed(row, measured, mpp.value)
    return Placed(mpp, matrix, source, residual, size, {**facts, "notes": [*notes, *mpp.notes]})


def _matrix(
    row: ManifestRow, slide: slides.Slide | slides.Header | None, measured: Measurement | None
) -> tuple[align.Matrix, str]:
    """The map from the own space to level 0, and who told it."""
    if measured is None or slide is None:
        return np.eye(3), "no image" if slide is None else "no measurement"
    if measured.matrix is not None:
        return measured.matrix, measured.matrix_source
    if row.alignment:
        found = align.read_alignment(row.alignment)
        return found.matrix, found.source
    if measured.space_um is None:
        return np.eye(3), measured.matrix_source
    if row.assume_aligned:
        return np.eye(3), "assumed"
    spots = ", or its spot file with pixel_x, pixel_y in spots" if row.platform == "st" else ""
    raise ValueError(
        f"no file tells where it lies on {row.image}; give its matrix in the column alignment{spots}, leave image "
        "blank for expression alone, or, where its pixels are those of the image, say assume_aligned true"
    )


def _framed(row: ManifestRow, measured: Measurement, mpp: float) -> tuple[align.Matrix, tuple[int, int]]:
    """Without an image: the own space moved so that all profiles lie in a frame with a margin."""
    low, high = measured.xy.min(axis=0), measured.xy.max(axis=0)
    far_um = float((high - low).max()) * mpp
    if not far_um <= _LARGEST_UM:
        raise ValueError(f"{row.measurement}: its profiles lie up to {far_um / 1000:.4g} mm apart, and no slide is so "
                         "large; correct their places, or the size of a pixel")  # fmt: skip
    margin = _MARGIN_UM / mpp
    matrix = np.eye(3)
    matrix[:2, 2] = margin - low
    width, height = np.ceil(high - low + 2 * margin).astype(int).tolist()
    return matrix, (width, height)


@dataclasses.dataclass
class GeneCounts:
    """The counts of chosen profiles over canonical genes, as a stream."""

    path: Path | None  # of the measurement, for errors
    measured: Measurement
    column: npt.NDArray[np.int64]  # [K] canonical gene of each column, -1 = none
    table: genes.GeneTable
    rows: npt.NDArray[np.int64]  # of the measurement
    control: npt.NDArray[np.int64]  # [rows] counts in control columns; complete once `blocks` is exhausted

    def blocks(self) -> Iterator[schema.CountBlock]:
        """Consecutive blocks; columns of one gene are summed, columns that are no gene are left out.

        Raises:
            ValueError: a sum is no count that a tissue could give.
        """
        from scipy.sparse import csr_matrix

        is_control = (self.column < 0) & (self.measured.column_kind != OTHER)
        done = 0
        for block in self.measured.counts(self.rows):
            n = len(block.indptr) - 1
            profile = np.repeat(np.arange(n), np.diff(block.indptr))
            control = is_control[block.gene]
            self.control[done : done + n] += np.bincount(profile[control], block.count[control], n).astype(np.int64)
            gene = self.column[block.gene]
            kept = (gene >= 0) & (block.count > 0)
            count = block.count[kept].astype(np.int64)  # of which a sum may be more than one entry can hold
            summed = csr_matrix((count, (profile[kept], gene[kept])), shape=(n, max(1, len(self.table))))
            summed.sort_indices()
            if summed.nnz and summed.data.max() > _MOST:
                raise ValueError(f"{self.path}: a profile counts {summed.data.max()} of one gene, which none can; "
                                 "restore the counts")  # fmt: skip
            yield schema.CountBlock(
                summed.indptr.astype(np.int64), summed.indices.astype(np.int32), summed.data.astype(np.int32)
            )
            done += n


def _gene_map(
    row: ManifestRow, measured: Measurement, config: PrepConfig
) -> tuple[npt.NDArray[np.int64], genes.GeneTable, float]:
    """([K] canonical gene of each column, the genes, the share of gene columns that have an Ensembl id)."""
    for names in (measured.ids, measured.names, measured.symbols):
        schema.check_names(names, str(row.measurement))
    is_gene = np.flatnonzero(measured.column_kind == GENE)
    aliases = genes.read_aliases(Path(config.aliases)) if config.aliases else None
    names, symbols = ([texts[c] for c in is_gene] for texts in (measured.names, measured.symbols))
    found = genes.map_columns(names, symbols, row.species, aliases)
    _check_species(row, names, symbols, found)
    if not len(found.table):
        raise ValueError(f"{row.measurement}: all {len(is_gene)} columns are technical controls; give the "
                         "counts of genes")  # fmt: skip
    if found.mapped_share < config.min_mapped:
        raise ValueError(
            f"{row.measurement}: only {100 * found.mapped_share:.1f} % of the columns map to {row.species} genes "
            f"(min_mapped {100 * config.min_mapped:.0f} %); check species, give aliases, or lower min_mapped"
        )
    column = np.full(len(measured.names), -1, np.int64)
    column[is_gene] = found.column
    return column, _shown(found.table, row.species), found.mapped_share


def _check_species(row: ManifestRow, names: list[str], symbols: list[str], found: genes.GeneMap) -> None:
    """Raises ValueError where the genes are those of another species: most symbols of one are names of the other too,
    and an Ensembl id is believed as it is. Mouse genes in capitals still map better to mouse."""
    told = genes.species_of(names) or genes.species_of(symbols)
    if told and told != row.species and genes.map_columns(names, symbols, told).mapped_share >= found.mapped_share:
        raise ValueError(f"{row.measurement}: its genes are named as those of {told}, the manifest says {row.species}; "
                         f"write species {told}")  # fmt: skip


def _shown(table: genes.GeneTable, species: str) -> genes.GeneTable:
    """The table with current symbols where the measurement gave only Ensembl ids."""
    known = genes.shipped(species)
    symbols = [
        known.symbols[known.index[g]] if s.startswith("ENS") and g in known.index else s
        for g, s in zip(table.ids, table.symbols, strict=True)
    ]
    return genes.GeneTable(table.ids, tuple(symbols))


def _footprints(
    measured: Measurement, rows: npt.NDArray[np.int64], placed: Placed
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """(size [N] um, polygon_indptr [N + 1], vertices [V, 2] in um from the centre) of the chosen profiles."""
    size = measured.footprint_um[rows].astype(np.float32)
    if measured.polygon_indptr is None or measured.polygon_xy is None:
        return size, np.zeros(len(rows) + 1, np.int64), np.zeros((0, 2), np.float32)
    length = np.diff(measured.polygon_indptr)[rows]
    indptr = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    around = np.empty((indptr[-1], 2), np.float32)
    for start in range(0, len(rows), _POLYGONS):
        part = slice(start, start + _POLYGONS)
        own, entries = schema.spans(measured.polygon_indptr, rows[part])
        owner = np.repeat(np.arange(len(own) - 1), np.diff(own))
        centre = align.apply(placed.matrix, measured.xy[rows[part]])
        xy = (align.apply(placed.matrix, measured.polygon_xy[entries]) - centre[owner]) * placed.mpp.value
        around[indptr[start] : indptr[start] + len(xy)] = xy
        drawn = measured.footprint_kind[rows[part]] == schema.POLYGON
        size[part] = np.where(drawn, np.sqrt(4 / np.pi * polygon_areas(own, xy)), size[part])
    return size, indptr, around


def _check_footprints(
    row: ManifestRow, measured: Measurement, rows: npt.NDArray[np.int64], size_um: npt.NDArray[np.float32]
) -> None:
    wrong = np.flatnonzero(~((size_um >= 0) & (size_um <= _WIDEST_UM)))
    if wrong.size:
        first = int(wrong[0])
        raise ValueError(
            f"{row.measurement}: {len(wrong)} profiles (as {measured.ids[int(rows[first])]!r}) cover more than "
            f"{_WIDEST_UM / 1000:.0f} mm, which none does; correct their areas or outlines"
        )


def polygon_areas(indptr: npt.NDArray[np.int64], xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[N] areas of polygons by the shoelace formula; a polygon that crosses itself counts as the formula has it."""
    if not len(xy):
        return np.zeros(len(indptr) - 1)
    following = np.arange(1, len(xy) + 1)
    filled = np.diff(indptr) > 0
    following[indptr[1:][filled] - 1] = indptr[:-1][filled]
    cross = xy[:, 0] * xy[following, 1] - xy[following, 0] * xy[:, 1]
    running = np.concatenate([[0.0], np.cumsum(cross)])
    return np.abs(np.diff(running[indptr])) / 2


def profiles_of(
    row: ManifestRow, measured: Measurement, placed: Placed, config: PrepConfig
) -> tuple[schema.Profiles, GeneCounts, dict[str, Any]]:
    """Profiles in the slide's micron frame without their counts, the stream of these, and facts.

    Raises:
        ValueError: too few columns are genes, or too many profiles lie beside the image.
    """
    column, table, mapped_share = _gene_map(row, measured, config)
    xy_px0 = align.apply(placed.matrix, measured.xy)
    inside = np.all((xy_px0 >= 0) & (xy_px0 < placed.size_px0), axis=1)
    rows = np.flatnonzero(inside)
    outside = len(inside) - len(rows)
    if not len(inside) or outside > _MAX_OUTSIDE * len(inside):
        raise ValueError(
            f"{row.image}: {outside} of {len(inside)} profiles lie beside the image ({placed.size_px0[0]} x "
            f"{placed.size_px0[1]} px); give the full-resolution image that was measured, or its alignment matrix"
        )
    size_um, polygon_indptr, polygon_um = _footprints(measured, rows, placed)
    _check_footprints(row, measured, rows, size_um)
    none = np.zeros(0, np.int32)
    found = schema.Profiles(
        [measured.ids[r] for r in rows], xy_px0[rows] * placed.mpp.value, size_um, measured.footprint_kind[rows],
        np.zeros(len(rows) + 1, np.int64), none, none, polygon_indptr, polygon_um,
    )  # fmt: skip
    notes = [*measured.notes, *([f"{outside} profiles lie beside the image and are left out"] if outside else [])]
    facts = {
        "profiles": len(found), "genes": len(table), "mapped_share": round(mapped_share, 4),
        "controls": int(((column < 0) & (measured.column_kind != OTHER)).sum()), "notes": notes, **measured.facts,
    }  # fmt: skip
    return found, GeneCounts(row.measurement, measured, column, table, rows, np.zeros(len(rows), np.int64)), facts


def no_profiles() -> schema.Profiles:
    """What an image without a measurement has."""
    empty = np.zeros(0)
    return schema.Profiles(
        [], np.zeros((0, 2)), empty.astype(np.float32), empty.astype(np.uint8), np.zeros(1, np.int64),
        empty.astype(np.int32), empty.astype(np.int32),
    )  # fmt: skip
