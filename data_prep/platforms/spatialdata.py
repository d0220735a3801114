"""SpatialData (zarr) -> a Measurement; needs the extra `spatialdata`.

In: `path.zarr`, with `#table` where it holds several tables and `@system` where its shapes lie in several coordinate
systems: `path.zarr#table@system`. The table annotates one element of shapes, circles or polygons; its images are not
read, the manifest's column image gives the slide. Out: one profile per row of the table, placed by its shape in the
coordinate system: px of the full-resolution image, or with `space_um` a space of its own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data_prep import align
from data_prep.platforms import Measurement, Source, annotated, h5ad, units
from storm.schema import DISC, POLYGON

if TYPE_CHECKING:
    import geopandas as gpd

_ROOT = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata")


@dataclass(frozen=True)
class _Address:
    """What a measurement names."""

    folder: Path
    table: str
    system: str


@dataclass(frozen=True)
class _Shapes:
    """Shapes of N profiles in the coordinate system."""

    xy: npt.NDArray[np.float64]  # [N, 2]
    diameter: npt.NDArray[np.float64] | None  # [N] of circles, units of the system
    indptr: npt.NDArray[np.int64] | None  # [N + 1] of polygons
    vertices: npt.NDArray[np.float64] | None  # [V, 2]
    notes: list[str]


def _entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def _address(measurement: Path) -> _Address:
    """Folder, table and coordinate system; the table may be the only one there is.

    Raises:
        ValueError: no such folder, or the table that is named, or the only one, is not there.
    """
    name, _, rest = measurement.name.partition("#")
    table, _, system = rest.partition("@")
    folder = measurement.with_name(name)
    if not any((folder / file).is_file() for file in _ROOT):
        raise ValueError(f"{folder}: is no zarr folder; give the path of a SpatialData object")
    tables = _entries(folder / "tables") or _entries(folder / "table")
    if not table and len(tables) == 1:
        table = tables[0]
    if table not in tables:
        fact = f"has no table {table!r}" if table else f"holds {len(tables)} tables"
        raise ValueError(f"{folder}: {fact} ({', '.join(tables) or 'none'}); name one: measurement {name}#TABLE")
    return _Address(folder, table, system)


def _table_folder(at: _Address) -> Path:
    return at.folder / ("tables" if (at.folder / "tables").is_dir() else "table") / at.table


def inputs(source: Source) -> list[Path]:
    """All files of the table and of the shapes, and the object's own metadata."""
    at = _address(source.measurement)
    parts = [p for folder in (_table_folder(at), at.folder / "shapes") for p in folder.rglob("*") if p.is_file()]
    return [*(at.folder / name for name in _ROOT if (at.folder / name).is_file()), *sorted(parts)]


def _region(root: Any, at: _Address) -> tuple[str, npt.NDArray]:
    """(the element of shapes that the table annotates, [N] the shape of each row).

    Raises:
        ValueError: it annotates several, none, or labels.
    """
    if "spatialdata_attrs" not in annotated.keys(root, "uns"):
        raise ValueError(f"{at.folder}: the table {at.table} annotates no element; link it to its shapes")
    told = annotated.element(root, "uns/spatialdata_attrs")
    regions = np.atleast_1d(np.asarray(told["region"])).tolist()
    if len(regions) != 1:
        raise ValueError(f"{at.folder}: the table {at.table} annotates {len(regions)} elements ({', '.join(regions)}); "
                         "write one table for each slide")  # fmt: skip
    region = str(regions[0])
    shapes = _entries(at.folder / "shapes")
    if region not in shapes:
        fact = "labels" if region in _entries(at.folder / "labels") else "no shapes"
        cure = f"link it to one of its shapes ({', '.join(shapes)})" if shapes else "make shapes of them (to_polygons)"
        raise ValueError(f"{at.folder}: the table {at.table} annotates {region}, which is {fact}; {cure}")
    instance = annotated.column(root, "obs", str(told["instance_key"]))
    if instance is None:
        raise ValueError(f"{at.folder}: obs of the table {at.table} lacks its instance_key {told['instance_key']}; "
                         "link it to its shapes again")  # fmt: skip
    return region, instance


def _frame(at: _Address, region: str) -> tuple["gpd.GeoDataFrame", align.Matrix]:
    """The shapes and the matrix that takes them into the coordinate system."""
    try:
        import spatialdata
        from spatialdata.transformations import get_transformation
    except ImportError as error:
        raise ValueError(
            f"{at.folder}: SpatialData needs its own library; pip install 'storm-tissue[spatialdata]'"
        ) from error
    annotated.check_codecs(at.folder / "shapes")
    try:
        shapes = spatialdata.read_zarr(at.folder, selection=("shapes",)).shapes[region]
    except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{at.folder}: its shapes are not readable ({error}); write the object again") from error
    systems = get_transformation(shapes, get_all=True)
    system = at.system or (next(iter(systems)) if len(systems) == 1 else "")
    if system not in systems:
        fact = f"are not in {system!r}, but in" if system else f"lie in {len(systems)} coordinate systems:"
        raise ValueError(f"{at.folder}: the shapes {region} {fact} {', '.join(sorted(systems))}; name that of the "
                         f"full-resolution image: measurement {at.folder.name}#{at.table}@SYSTEM")  # fmt: skip
    matrix = systems[system].to_affine_matrix(("x", "y"), ("x", "y"))
    return shapes, np.asarray(matrix, np.float64)


def _chosen(shapes: "gpd.GeoDataFrame", instance: npt.NDArray, at: _Address, region: str) -> "gpd.GeoDataFrame":
    """The shape of each row of the table."""
    if not shapes.index.is_unique:
        raise ValueError(f"{at.folder}: shapes of {region} share a name; write the object again")
    rows = shapes.index.get_indexer(instance)
    lost = np.flatnonzero(rows < 0)
    if lost.size:
        raise ValueError(f"{at.folder}: {lost.size} of {len(rows)} rows of the table {at.table} (as "
                         f"{instance[lost[0]]}) have no shape in {region}; link the table to its shapes")  # fmt: skip
    return shapes.iloc[rows]


def _drawn(shapes: "gpd.GeoDataFrame", matrix: align.Matrix, at: _Address, region: str) -> _Shapes:
    """Circles or polygons in the coordinate system; of a cell in several parts the largest counts."""
    import shapely

    geometry = np.asarray(shapes.geometry)
    empty = shapely.is_missing(geometry) | shapely.is_empty(geometry)
    if empty.any():
        raise ValueError(f"{at.folder}: {int(empty.sum())} shapes of {region} are empty; remove them and their rows")
    if (shapely.get_type_id(geometry) == shapely.GeometryType.POINT).all():
        if "radius" not in shapes or not (shapes["radius"].to_numpy() > 0).all():
            raise ValueError(f"{at.folder}: shapes of {region} are points without a radius; write circles or polygons")
        scale = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
        return _Shapes(_finite(align.apply(matrix, shapely.get_coordinates(geometry)), at, region),
                       2 * scale * shapes["radius"].to_numpy(np.float64), None, None, [])  # fmt: skip
    parts, owner = shapely.get_parts(geometry, return_index=True)
    if not (shapely.get_type_id(parts) == shapely.GeometryType.POLYGON).all():
        raise ValueError(f"{at.folder}: shapes of {region} are neither circles nor polygons; write them as polygons")
    largest = np.lexsort((-shapely.area(parts), owner))[np.searchsorted(owner, np.arange(len(geometry)))]
    several = int((np.bincount(owner) > 1).sum())
    rings, of = shapely.get_coordinates(shapely.get_exterior_ring(parts[largest]), return_index=True)
    closing = np.append(np.diff(of) > 0, True)  # the last vertex repeats the first
    indptr = np.searchsorted(of[~closing], np.arange(len(geometry) + 1)).astype(np.int64)
    centres = shapely.get_coordinates(shapely.centroid(parts[largest]))
    notes = [f"{several} cells are in several parts: the largest is kept"] if several else []
    return _Shapes(_finite(align.apply(matrix, centres), at, region), None, indptr,
                   _finite(align.apply(matrix, rings[~closing]), at, region), notes)  # fmt: skip


def _finite(xy: npt.NDArray[np.float64], at: _Address, region: str) -> npt.NDArray[np.float64]:
    if not np.isfinite(xy).all():
        raise ValueError(f"{at.folder}: shapes of {region} have places that are no numbers; write the object again")
    return xy


def _footprint(source: Source, drawn: _Shapes) -> tuple[str, npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """(kind, size [N] um, shape [N]): as `unit` or platform tell, else the shapes themselves."""
    n = len(drawn.xy)
    told = units.footprint(source.unit, source.platform)
    if told:
        return told.kind, np.full(n, told.size_um, np.float32), np.full(n, told.shape, np.uint8)
    if source.unit != "cell" and source.platform not in ("xenium", "cosmx"):
        raise ValueError(f"{source.measurement}: nothing tells what its {source.platform} profiles cover; give unit "
                         "square<N>um (bins), disc<N>um or cell")  # fmt: skip
    if drawn.diameter is None:
        return "cell", np.zeros(n, np.float32), np.full(n, POLYGON, np.uint8)
    if source.space_um is None:
        raise ValueError(f"{source.measurement}: its cells are circles of unknown size in um; give um per unit of the "
                         "coordinate system in space_um, or unit disc<N>um")  # fmt: skip
    return "cell", (drawn.diameter * source.space_um).astype(np.float32), np.full(n, DISC, np.uint8)


def read(source: Source) -> Measurement:
    """One profile per row of the table; counts are read when they are asked for.

    Raises:
        ValueError: the library or a part of the object is missing, several elements could be meant, the table
            annotates no shapes, or nothing tells what a profile covers.
    """
    h5ad.check_space(source)
    at = _address(source.measurement)
    path = _table_folder(at)
    with annotated.opened(path) as root:
        found = annotated.load(root, path)
        region, instance = _region(root, at)
        in_tissue = annotated.in_tissue(root)
    shapes, matrix = _frame(at, region)
    drawn = _drawn(_chosen(shapes, instance, at, region), matrix, at, region)
    kind, size, shape = _footprint(source, drawn)
    polygons = shape.size > 0 and shape[0] == POLYGON
    return Measurement(
        source.platform, kind, found.ids, drawn.xy, size, shape, found.counts, found.names, found.symbols,
        found.column_kind, space_um=source.space_um, polygon_indptr=drawn.indptr if polygons else None,
        polygon_xy=drawn.vertices if polygons else None, in_tissue=in_tissue, notes=[*found.notes, *drawn.notes],
        facts=found.facts,
    )  # fmt: skip
