"""SpatialData objects as the library itself writes them: shapes, coordinate systems, names, and what is refused."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale

from data_prep import align
from data_prep.manifest import ManifestRow
from data_prep.one_slide import build_slide
from data_prep.platforms import Measurement, Source
from data_prep.platforms import spatialdata as reader
from storm.prep_config import PrepConfig
from storm.schema import DISC, POLYGON, SQUARE
from storm.store import SlideStore
from tests.data_prep.platforms.helpers import dense

pytestmark = pytest.mark.filterwarnings("ignore:zarr v3 autosharding", "ignore::FutureWarning")

N = 12
XY = np.random.default_rng(0).uniform(50, 400, (N, 2))
NAMES = [f"cell{i:02d}" for i in range(N)]
ORDER = np.random.default_rng(1).permutation(N)  # the table's rows are not in the order of the shapes
COUNTS = np.random.default_rng(2).poisson(2.0, (N, 3))
TURN = np.array([[0.0, -2.0, 900.0], [2.0, 0.0, 30.0], [0.0, 0.0, 1.0]])


def affine(matrix: np.ndarray) -> Affine:
    return Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))


def circles(**systems: Any) -> Any:
    return ShapesModel.parse(XY, geometry=0, radius=np.full(N, 3.0), index=pd.Index(NAMES),
                             transformations=systems or {"global": Identity()})  # fmt: skip


def polygons(parts: int = 1, **systems: Any) -> Any:
    """L-shaped cells; the first in `parts` parts."""

    def cell(x: float, y: float) -> shapely.Polygon:
        return shapely.Polygon([(x, y), (x + 8, y), (x + 8, y + 2), (x + 2, y + 2), (x + 2, y + 6), (x, y + 6)])

    cells: list[Any] = [cell(x, y) for x, y in XY]
    if parts > 1:
        cells[0] = shapely.MultiPolygon([shapely.box(0, 0, 1, 1), cells[0]])
    frame = gpd.GeoDataFrame({"geometry": cells}, index=pd.Index(NAMES))
    return ShapesModel.parse(frame, transformations=systems or {"global": Identity()})


def table(region: Any = "cells", counts: Any = COUNTS, rows: np.ndarray = ORDER) -> anndata.AnnData:
    first = region if isinstance(region, str) else region[0]
    obs = pd.DataFrame({"region": pd.Categorical([first] * len(rows)), "instance": [NAMES[i] for i in rows]},
                       index=[f"id{i:02d}" for i in rows])  # fmt: skip
    if not isinstance(region, str):
        obs["region"] = pd.Categorical([region[i % len(region)] for i in range(len(rows))])
    data = anndata.AnnData(sparse.csr_matrix(counts[rows].astype(np.float32)), obs,
                           pd.DataFrame(index=["TP53", "EGFR", "BLANK_1"]))  # fmt: skip
    return TableModel.parse(data, region=region, region_key="region", instance_key="instance")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Circles in one coordinate system and their table."""
    return write(tmp_path_factory.mktemp("plain"))


def write(folder: Path, **parts: Any) -> Path:
    elements = {"shapes": {"cells": circles()}, "tables": {"table": table()}} | parts
    SpatialData(**elements).write(folder / "a.zarr")
    return folder / "a.zarr"


def read(path: Path | str, platform: str = "visium", **told: Any) -> Measurement:
    return reader.read(Source(platform, Path(path), **told))


def test_circles(plain: Path) -> None:
    found = read(plain)
    assert found.ids == [f"id{i:02d}" for i in ORDER]
    np.testing.assert_allclose(found.xy, XY[ORDER])
    assert (found.kind, found.space_um, found.matrix) == ("spot", None, None)
    assert (found.footprint_um == 55).all()  # a Visium spot, whatever radius was written
    np.testing.assert_array_equal(dense(found), COUNTS[ORDER])
    assert found.notes == ["1 controls are left out"]


def test_circles_of_cells(tmp_path: Path) -> None:
    path = write(tmp_path, shapes={"cells": circles(**{"global": affine(TURN)})})
    found = read(path, "xenium", space_um=0.2125)
    np.testing.assert_allclose(found.xy, align.apply(TURN, XY[ORDER]))
    assert (found.kind, found.space_um) == ("cell", 0.2125)
    assert (found.footprint_kind == DISC).all()
    np.testing.assert_allclose(found.footprint_um, 2 * 3.0 * 2.0 * 0.2125, rtol=1e-6)
    with pytest.raises(ValueError, match=r"circles of unknown size in um; give um per unit.*or unit disc<N>um"):
        read(path, "xenium", assume_aligned=True)


@pytest.mark.parametrize("parts", [1, 2])
def test_polygons_turned(tmp_path: Path, parts: int) -> None:
    path = write(tmp_path, shapes={"cells": polygons(parts, **{"global": affine(TURN)})})
    found = read(path, "xenium", space_um=0.2125)
    assert (found.footprint_kind == POLYGON).all()
    assert found.polygon_indptr is not None
    assert found.polygon_xy is not None
    assert np.diff(found.polygon_indptr).tolist() == [6] * N  # the closing vertex is dropped
    corner = np.array([[0, 0], [8, 0], [8, 2], [2, 2], [2, 6], [0, 6]])
    for row, shape in enumerate(ORDER):
        drawn = found.polygon_xy[found.polygon_indptr[row] : found.polygon_indptr[row + 1]]
        expected = align.apply(TURN, XY[shape] + corner)
        assert {tuple(v) for v in drawn.round(6)} == {tuple(v) for v in expected.round(6)}
        np.testing.assert_allclose(found.xy[row], shapely.Polygon(expected).centroid.coords[0])
    assert ("1 cells are in several parts: the largest is kept" in found.notes) == (parts > 1)


def test_a_store_of_polygons(tmp_path: Path) -> None:
    path = write(tmp_path, shapes={"cells": polygons()})
    row = ManifestRow("s", None, path, "xenium", format="spatialdata", space_um=0.5)
    store = SlideStore(build_slide(row, tmp_path / "stores", PrepConfig(min_mapped=0.5)))
    area = (8 * 2 + 2 * 4) * 0.5**2
    np.testing.assert_allclose(store.places().footprint_um, 2 * (area / np.pi) ** 0.5, rtol=1e-5)
    assert sum(int(store.counts(np.array([i])).count.sum()) for i in range(N)) == COUNTS[:, :2].sum()


def test_bins_are_told_by_unit(tmp_path: Path) -> None:
    path = write(tmp_path, shapes={"cells": polygons()})
    with pytest.raises(ValueError, match="nothing tells what its visium_hd profiles cover; give unit square<N>um"):
        read(path, "visium_hd")
    found = read(path, "visium_hd", unit="square8um")
    assert (found.kind, found.polygon_indptr) == ("bin", None)
    assert (found.footprint_kind == SQUARE).all()
    assert (found.footprint_um == 8).all()


def test_names_are_asked_for_where_several_could_be_meant(tmp_path: Path) -> None:
    systems = {"slide": Scale([2.0, 2.0], axes=("x", "y")), "lowres": Scale([0.1, 0.1], axes=("x", "y"))}
    counts = COUNTS[:, ::-1]
    tables = {"raw": table(), "other": table(counts=counts)}
    path = write(tmp_path, shapes={"cells": circles(**systems)}, tables=tables)
    with pytest.raises(ValueError, match=r"holds 2 tables \(other, raw\); name one: measurement a\.zarr#TABLE"):
        read(path)
    with pytest.raises(ValueError, match=r"lie in 2 coordinate systems: lowres, slide; .*measurement a\.zarr#raw@SYS"):
        read(f"{path}#raw")
    with pytest.raises(ValueError, match=r"has no table 'row' \(other, raw\)"):
        read(f"{path}#row")
    with pytest.raises(ValueError, match="are not in 'global', but in lowres, slide"):
        read(f"{path}#raw@global")
    found = read(f"{path}#other@slide")
    np.testing.assert_allclose(found.xy, 2 * XY[ORDER])
    np.testing.assert_array_equal(dense(found), counts[ORDER])


def test_inputs_are_the_table_the_shapes_and_the_metadata(tmp_path: Path) -> None:
    path = write(tmp_path, tables={"table": table(), "other": table()})
    found = [str(p.relative_to(path)) for p in reader.inputs(Source("visium", Path(f"{path}#table")))]
    assert found[0] == "zarr.json"
    assert "tables/table/X/data/c/0" in found
    assert "shapes/cells/shapes.parquet" in found
    assert not [name for name in found if name.startswith("tables/other")]


def broken(path: Path) -> None:
    (path / "shapes" / "cells" / "shapes.parquet").write_bytes(b"PAR1")


def pickled(path: Path) -> None:
    target = path / "tables" / "table" / "X" / "data" / "zarr.json"
    told = json.loads(target.read_text())
    told["codecs"] = [{"name": "numcodecs.pickle", "configuration": {}}]
    target.write_text(json.dumps(told).replace("pickle", "\\u0070ickle"))


def labelled(region: str) -> dict[str, Any]:
    return {
        "labels": {region: Labels2DModel.parse(np.zeros((8, 8), np.int16), dims=("y", "x"))},
        "tables": {"table": table(region)},
    }


BARE = anndata.AnnData(sparse.csr_matrix(COUNTS.astype(np.float32)))


@pytest.mark.parametrize(
    ("parts", "change", "message"),
    [
        ({}, shutil.rmtree, r"a\.zarr: is no zarr folder"),
        ({"tables": {}}, None, r"a\.zarr: holds 0 tables \(none\)"),
        ({"tables": {"table": TableModel.parse(BARE)}}, None, "the table table annotates no element"),
        ({"tables": {"table": table(["cells", "more"])}, "shapes": {"cells": circles(), "more": circles()}}, None,
         r"annotates 2 elements \(cells, more\); write one table for each slide"),
        (labelled("masks"), None, r"annotates masks, which is labels; link it to one of its shapes \(cells\)"),
        ({**labelled("masks"), "shapes": {}}, None, r"which is labels; make shapes of them \(to_polygons\)"),
        ({"tables": {"table": table("gone")}}, None, "annotates gone, which is no shapes"),
        ({"shapes": {"cells": circles()[3:]}}, None, r"3 of 12 rows of the table table \(as cell0\d\) have no shape"),
        ({"tables": {"table": table(counts=COUNTS / 3)}}, None, "which is no count; give the raw counts"),
        ({}, broken, "its shapes are not readable"),
        ({}, pickled, r"zarr\.json: is stored as pickles, which are never read"),
        ({}, lambda p: (p / "tables/table/obs/zarr.json").write_text("{"), r"zarr\.json: is no JSON"),
        ({}, lambda p: shutil.rmtree(p / "tables/table/X"), "it has no X"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_objects_with_faults(
    tmp_path: Path, plain: Path, parts: dict[str, Any], change: Callable | None, message: str
) -> None:
    path = write(tmp_path, **parts) if parts else shutil.copytree(plain, tmp_path / "a.zarr")
    if change:
        change(path)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_platform_with_a_space_of_its_own_must_tell_it(plain: Path) -> None:
    with pytest.raises(ValueError, match="no file tells in which space its places lie: xenium does not measure on"):
        read(plain, "xenium")


def test_without_the_library(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any) -> Any:
        if name.split(".")[0] == "spatialdata":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"needs its own library; pip install 'storm-tissue\[spatialdata\]'"):
        read(plain)
