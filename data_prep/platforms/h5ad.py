"""Any AnnData file (h5ad) -> a Measurement.

In: an h5ad with raw counts in X or layers['counts'], the centres of the profiles in obsm['spatial'], and, where there
are, obs in_tissue, cell_area (um2), array_row and array_col (Visium), var gene_ids and feature_types. Places are px of
the full-resolution image; with `space_um` they lie in a space of their own, which the column `alignment` maps to the
image. Out: one profile per row. What a profile covers is told by `unit`, or is the usual spot of Visium and ST.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.platforms import Measurement, Source, annotated, units, visium
from storm.schema import DISC

_AREAS = ("cell_area", "area_um2", "Area.um2")  # um2


def inputs(source: Source) -> list[Path]:
    """The file."""
    return [source.measurement]


def check_space(source: Source) -> None:
    """Raises ValueError where places of a platform that has its own space would be taken for px of the H&E."""
    if (
        source.platform in ("xenium", "cosmx")
        and not source.assume_aligned
        and source.space_um is None
        and source.alignment is None
    ):
        raise ValueError(
            f"{source.measurement}: no file tells in which space its places lie: {source.platform} does not measure "
            "on the H&E; give um per unit in space_um (and the matrix to the image in alignment), or say "
            "assume_aligned true"
        )


def footprints(root: Any, source: Source, count: int) -> tuple[str, npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """(kind, size [N] um, shape [N]) as `unit` tells them; cells are discs of their area.

    Raises:
        ValueError: neither `unit` nor the file tells what a profile covers.
    """
    path = source.measurement
    told = units.footprint(source.unit, source.platform)
    if told:
        return told.kind, np.full(count, told.size_um, np.float32), np.full(count, told.shape, np.uint8)
    if source.unit != "cell" and source.platform not in ("xenium", "cosmx"):
        raise ValueError(f"{path}: nothing tells what its {source.platform} profiles cover; give unit square<N>um "
                         "(bins), disc<N>um or cell")  # fmt: skip
    area = next((a for a in (annotated.column(root, "obs", name) for name in _AREAS) if a is not None), None)
    if area is None or area.dtype.kind not in "iuf":
        raise ValueError(f"{path}: has no numbers in obs {' or '.join(_AREAS)}, so nothing tells what its cells cover; "
                         "add the areas in um2, or give unit square<N>um or disc<N>um")  # fmt: skip
    area = area.astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(area) & (area > 0)))
    if bad.size:
        raise ValueError(f"{path}: {bad.size} of {count} cells have no area (as {area[bad[0]]}); remove these, or give "
                         "unit disc<N>um")  # fmt: skip
    return "cell", np.sqrt(4 / np.pi * area).astype(np.float32), np.full(count, DISC, np.uint8)


def section(root: Any, path: Path) -> str | None:
    """The only section that uns['spatial'] names, None where it names none.

    Raises:
        ValueError: it names several, whose places would lie upon each other.
    """
    names = annotated.keys(root, "uns/spatial")
    if len(names) > 1:
        raise ValueError(f"{path}: holds {len(names)} sections ({', '.join(names[:5])}) by uns['spatial']; write one "
                         "file for each")  # fmt: skip
    return names[0] if names else None


def spot_diameter(root: Any, path: Path) -> float | None:
    """spot_diameter_fullres in px of the only section; who wrote it decides which um it means."""
    name = section(root, path)
    where = f"uns/spatial/{name}/scalefactors"
    if name is None or "spot_diameter_fullres" not in annotated.keys(root, where):
        return None
    value = float(np.asarray(annotated.element(root, f"{where}/spot_diameter_fullres"), np.float64).reshape(-1)[0])
    return value if 0 < value < np.inf else None


def _lattice(root: Any, source: Source) -> npt.NDArray[np.float64] | None:
    """[N, 2] the printed places of Visium spots, where the file tells them."""
    if source.platform != "visium" or source.unit:
        return None
    found = [annotated.column(root, "obs", name) for name in ("array_col", "array_row")]
    if any(numbers is None or numbers.dtype.kind not in "iuf" for numbers in found):
        return None
    printed = np.column_stack(found).astype(np.float64)  # type: ignore[arg-type]
    return printed * (visium.COL_UM, visium.ROW_UM) if np.isfinite(printed).all() else None


def read(source: Source) -> Measurement:
    """All profiles, in the file's order; counts are read when they are asked for.

    Raises:
        ValueError: the file is damaged or lacks a part, holds no raw counts, or nothing tells what a profile covers.
    """
    check_space(source)
    path = source.measurement
    with annotated.opened(path) as root:
        found = annotated.load(root, path)
        xy = annotated.places(root, path, len(found.ids))
        kind, size, shape = footprints(root, source, len(found.ids))
        diameter = spot_diameter(root, path)
        lattice = None if source.space_um else _lattice(root, source)
        in_tissue = annotated.in_tissue(root)
    mpp = visium.SCALEFACTOR_SPOT_UM / diameter if diameter and source.platform == "visium" else None
    return Measurement(
        source.platform, kind, found.ids, xy, size, shape, found.counts, found.names, found.symbols, found.column_kind,
        space_um=source.space_um, in_tissue=in_tissue, lattice_um=lattice, lattice_xy=None if lattice is None else xy,
        reported_mpp=None if source.space_um else mpp, notes=found.notes, facts=found.facts,
    )  # fmt: skip
