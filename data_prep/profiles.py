"""A measurement in the slide's own micron frame, its columns as canonical genes.

In: a manifest row, the open slide, what the platform measured. Out: where it lies (mpp, matrix, residual), its
profiles, their gene table, and facts for the store.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import align, slides
from data_prep.manifest import ManifestRow
from data_prep.platforms import Measurement
from storm import genes, schema
from storm.config import PrepConfig

_MAX_OUTSIDE = 0.05  # share of profiles that may lie beside the image before it is called the wrong image


@dataclasses.dataclass(frozen=True)
class Placed:
    """A slide's micron frame, and how it was found."""

    mpp: align.Mpp
    matrix: align.Matrix
    matrix_source: str
    residual_px0: float | None
    facts: dict[str, Any]


def place(row: ManifestRow, slide: slides.Slide, measured: Measurement | None, config: PrepConfig) -> Placed:
    """The slide's mpp and the map from the measurement's pixels to level 0.

    Raises:
        ValueError: the mpp is unknown, its sources disagree, or the spots do not lie on their lattice.
    """
    matrix = align.read_matrix(row.alignment) if row.alignment else np.eye(3)
    source = "file" if row.alignment else "measured on this image"
    told: dict[str, float | None] = {"manifest": row.mpp, "lattice": None, "embedded": slide.embedded_mpp}
    facts: dict[str, Any] = {}
    notes: list[str] = []
    residual = None
    try:
        if measured and measured.lattice_um is not None and measured.lattice_px0 is not None:
            fit = align.fit_lattice(measured.lattice_um, align.apply(matrix, measured.lattice_px0))
            residual = fit.residual_px0
            facts["lattice"] = {"mpp": fit.mpp, "residual_px0": fit.residual_px0, "anisotropy": fit.anisotropy}
            fault = align.lattice_fault(fit, row.platform, config)
            if fault and row.mpp is None:
                raise ValueError(f"{fault}; check the spots, or give mpp in the manifest")
            notes += [fault] if fault else []
            told["lattice"] = None if fault else fit.mpp
        if measured and measured.reported_mpp:
            told["scalefactors"] = measured.reported_mpp / float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
        mpp = align.choose_mpp(told, config)
    except ValueError as error:
        raise ValueError(f"{row.measurement or row.image}: {error}") from error
    return Placed(mpp, matrix, source, residual, {**facts, "notes": [*notes, *mpp.notes]})


def _merged(measured: Measurement, gene_map: genes.GeneMap, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """indptr, gene, count of the given profiles over canonical genes; columns of one gene are summed."""
    from scipy.sparse import coo_matrix

    profile = np.repeat(np.arange(len(measured.ids)), np.diff(measured.indptr))
    gene = gene_map.column[measured.column]
    kept = (gene >= 0) & (measured.count > 0)
    shape = (len(measured.ids), max(1, len(gene_map.table)))
    summed = coo_matrix((measured.count[kept], (profile[kept], gene[kept])), shape=shape).tocsr()[rows]
    summed.sort_indices()
    return summed.indptr.astype(np.int64), summed.indices.astype(np.int32), summed.data.astype(np.int32)


def _shown(table: genes.GeneTable, species: str) -> genes.GeneTable:
    """The table with current symbols where the measurement gave only Ensembl ids."""
    known = genes.shipped(species)
    symbols = [
        known.symbols[known.index[g]] if s.startswith("ENS") and g in known.index else s
        for g, s in zip(table.ids, table.symbols, strict=True)
    ]
    return genes.GeneTable(table.ids, tuple(symbols))


def profiles_of(
    row: ManifestRow, slide: slides.Slide, measured: Measurement, placed: Placed, config: PrepConfig
) -> tuple[schema.Profiles, genes.GeneTable, dict[str, Any]]:
    """Profiles in the slide's micron frame, their genes, and facts."""
    for names in (measured.ids, measured.names, measured.symbols):
        schema.check_names(names, str(row.measurement))
    aliases = genes.read_aliases(Path(config.aliases)) if config.aliases else None
    gene_map = genes.map_columns(measured.names, measured.symbols, row.species, aliases)
    if not len(gene_map.table):
        raise ValueError(f"{row.measurement}: all {len(measured.names)} columns are technical controls; give the "
                         "counts of genes")  # fmt: skip
    if gene_map.mapped_share < config.min_mapped:
        raise ValueError(
            f"{row.measurement}: only {100 * gene_map.mapped_share:.1f} % of the columns map to {row.species} genes "
            f"(min_mapped {100 * config.min_mapped:.0f} %); check species, give aliases, or lower min_mapped"
        )
    xy_px0 = align.apply(placed.matrix, measured.xy_px0)
    inside = np.all((xy_px0 >= 0) & (xy_px0 < (slide.width_px0, slide.height_px0)), axis=1)
    rows = np.flatnonzero(inside)
    outside = len(inside) - len(rows)
    if not len(inside) or outside > _MAX_OUTSIDE * len(inside):
        raise ValueError(
            f"{row.image}: {outside} of {len(inside)} profiles lie beside the image ({slide.width_px0} x "
            f"{slide.height_px0} px); give the full-resolution image that was measured, or its alignment matrix"
        )
    indptr, gene, count = _merged(measured, gene_map, rows)
    found = schema.Profiles(
        [measured.ids[r] for r in rows], xy_px0[rows] * placed.mpp.value, measured.footprint_um[rows],
        measured.footprint_kind[rows], indptr, gene, count,
    )  # fmt: skip
    notes = [*measured.notes, *([f"{outside} profiles lie beside the image and are left out"] if outside else [])]
    facts = {
        "profiles": len(found), "genes": len(gene_map.table), "mapped_share": round(gene_map.mapped_share, 4),
        "controls": int((gene_map.column < 0).sum()), "median_depth": float(np.median(found.depth)), "notes": notes,
    }  # fmt: skip
    return found, _shown(gene_map.table, row.species), facts


def no_profiles() -> schema.Profiles:
    empty = np.zeros(0)
    return schema.Profiles(
        [], np.zeros((0, 2)), empty.astype(np.float32), empty.astype(np.uint8), np.zeros(1, np.int64),
        empty.astype(np.int32), empty.astype(np.int32),
    )  # fmt: skip
