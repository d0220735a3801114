"""HEST-1k: `st/<id>.h5ad` with `metadata/<id>.json` beside it -> a Measurement.

In: the h5ad, or a HEST folder that holds one; its slide is `wsis/<id>.tif`. Out: one profile per row at
obsm['spatial'], the centre (x, y) in full-resolution px; array_row and array_col are wrong in some files and never
read. The pixel size is metadata's pixel_size_um_estimated; what the tif or pixel_size_um_embedded say is not believed.
Visium and ST profiles are spots; Xenium and Visium HD were pooled into squares of inter_spot_dist um, and their
controls are still among the genes.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.platforms import Measurement, Source, annotated, h5ad, units
from storm import files
from storm.schema import SQUARE

SCALEFACTOR_SPOT_UM = 55.0  # here spot_diameter_fullres is the diameter of the real spot, not Space Ranger's 65 um
_PLATFORMS = {"Visium": "visium", "Visium HD": "visium_hd", "Xenium": "xenium", "Spatial Transcriptomics": "st"}
_SPECIES = {"Homo sapiens": "human", "Mus musculus": "mouse"}
_CURE = "restore it from HEST-1k"


def _located(measurement: Path) -> tuple[Path, Path]:
    """The h5ad and its metadata."""
    path = measurement
    if measurement.is_dir():
        found = sorted((measurement / "st").glob("*.h5ad"))
        if len(found) != 1:
            names = ", ".join(f"st/{p.name}" for p in found[:3])
            raise ValueError(
                f"{measurement}: holds {len(found)} files st/*.h5ad{f' ({names}, ...)' if found else ''}; name the one "
                "of this slide as measurement"
            )
        path = found[0]
    return path, path.parent.parent / "metadata" / f"{path.stem}.json"


def inputs(source: Source) -> list[Path]:
    """The h5ad and its metadata."""
    return list(_located(source.measurement))


def _metadata(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file, so the pixel size is not known; keep HEST's folder metadata beside st")
    told = files.read_json(path)
    if not isinstance(told, dict):
        raise ValueError(f"{path}: holds no names with values; {_CURE}")
    return told


def _number(told: dict[str, Any], key: str) -> float | None:
    value = told.get(key)
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    return number if 0 < number < math.inf else None


def _check(told: dict[str, Any], source: Source, path: Path) -> None:
    """Raises ValueError where platform or species are not those of the manifest."""
    technology = str(told.get("st_technology"))
    platform = _PLATFORMS.get(technology)
    if platform != source.platform:
        cure = f"write platform {platform}" if platform else f"known are {', '.join(_PLATFORMS)}"
        raise ValueError(f"{path}: st_technology is {technology}, the manifest says {source.platform}; {cure}")
    species = _SPECIES.get(str(told.get("species")))
    if species and source.species and species != source.species:
        raise ValueError(f"{path}: species is {told['species']}, the manifest says {source.species}; write {species}")


def _footprint(told: dict[str, Any], source: Source, path: Path) -> units.Footprint:
    """By `unit`, else by the metadata: spots as wide as spot_diameter, pooled squares of inter_spot_dist."""
    if source.unit == "cell":
        raise ValueError(f"{path}: HEST-1k holds no cells but spots and pooled squares; leave unit blank")
    usual = units.footprint(source.unit, source.platform)
    if usual:
        told_um = None if source.unit else _number(told, "spot_diameter")
        return units.Footprint(usual.kind, usual.shape, told_um or usual.size_um)
    side = _number(told, "inter_spot_dist")
    if side is None:
        raise ValueError(f"{path}: tells no inter_spot_dist, the side of its pooled squares; give unit square<N>um")
    return units.Footprint("bin", SQUARE, side)


def read(source: Source) -> Measurement:
    """All profiles, in the file's order; counts are read when they are asked for.

    Raises:
        ValueError: a file is missing or damaged, the metadata tell no pixel size, or another platform or species.
    """
    path, metadata = _located(source.measurement)
    told = _metadata(metadata)
    _check(told, source, metadata)
    mpp = _number(told, "pixel_size_um_estimated")
    if mpp is None:
        raise ValueError(f"{metadata}: tells no pixel_size_um_estimated, and what the tif says is not to be believed; "
                         f"{_CURE}")  # fmt: skip
    covered = _footprint(told, source, metadata)
    with annotated.opened(path) as root:
        found = annotated.load(root, path)
        xy = annotated.places(root, path, len(found.ids))
        diameter = h5ad.spot_diameter(root, path)
        in_tissue = annotated.in_tissue(root)
    n = len(found.ids)
    reported = SCALEFACTOR_SPOT_UM / diameter if diameter and source.platform == "visium" else None
    version = str(told.get("hest_version_added", ""))[:32]
    return Measurement(
        source.platform, covered.kind, found.ids, xy, np.full(n, covered.size_um, np.float32),
        np.full(n, covered.shape, np.uint8), found.counts, found.names, found.symbols, found.column_kind,
        space_um=mpp, matrix=None if source.alignment else np.eye(3), matrix_source="HEST-1k", in_tissue=in_tissue,
        reported_mpp=reported, notes=found.notes, facts={**found.facts, "hest_version_added": version},
    )  # fmt: skip
