"""Segmented cells of Visium HD: outlines and their numbers, centres, what is left out, and faults."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.manifest import ManifestRow
from data_prep.platforms import Measurement, Source, segmented, visium_hd
from data_prep.profiles import place, polygon_areas
from data_prep.synthetic.visium_hd import Section, write_cells
from storm.prep_config import PrepConfig
from storm.schema import POLYGON
from tests.data_prep.platforms.helpers import dense, fit, truth

MPP = 0.5
CELLS, OUTLINES = "segmented_outputs/filtered_feature_cell_matrix.h5", "segmented_outputs/cell_segmentations.geojson"


def read(folder: Path) -> Measurement:
    return visium_hd.read(Source("visium_hd", folder, unit="cell"))


def test_cells(hd_written: Path) -> None:
    found = read(hd_written)
    assert (found.kind, len(found.ids)) == ("cell", 225)
    assert found.ids[1] == "cellid_000000003-1"  # numbers have gaps: the join is by name
    assert (found.footprint_kind == POLYGON).all()
    np.testing.assert_array_equal(dense(found), truth(hd_written / CELLS))
    features = json.loads((hd_written / OUTLINES).read_text())["features"]
    assert found.polygon_indptr is not None
    assert found.polygon_xy is not None
    for i in (0, 17, 224):
        ring = np.array(features[i]["geometry"]["coordinates"][0])
        own = found.polygon_xy[found.polygon_indptr[i] : found.polygon_indptr[i + 1]]
        np.testing.assert_array_equal(own, ring[:-1])  # the closing vertex is not kept
    areas = polygon_areas(found.polygon_indptr, found.polygon_xy) * MPP**2
    assert np.median(areas) == pytest.approx(3 * 4.0**2, rel=0.1)  # a twelve-gon of radius 4 um
    assert found.lattice_um is not None  # that of the bins beside them
    assert fit(found).mpp == pytest.approx(MPP, rel=1e-9)


def test_cells_in_another_order_than_their_outlines(hd_outs: Path) -> None:
    expected = read(hd_outs)
    content = json.loads((hd_outs / OUTLINES).read_text())
    content["features"].reverse()
    (hd_outs / OUTLINES).write_text(json.dumps(content, indent=2))
    found = read(hd_outs)
    np.testing.assert_array_equal(found.xy, expected.xy)
    np.testing.assert_array_equal(found.polygon_xy, expected.polygon_xy)


@pytest.mark.parametrize("block", [64, 1000, 1 << 20])
def test_outlines_are_read_in_blocks_of_any_size(hd_written: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    expected = segmented.read(hd_written / OUTLINES)
    monkeypatch.setattr(segmented, "_BLOCK", block)
    found = segmented.read(hd_written / OUTLINES)
    np.testing.assert_array_equal(found.xy, expected.xy)
    np.testing.assert_array_equal(found.indptr, expected.indptr)


def test_centres_are_centres_of_mass(hd_written: Path) -> None:
    import shapely

    found = segmented.read(hd_written / OUTLINES)
    polygons = [shapely.Polygon(found.xy[a:b]) for a, b in zip(found.indptr[:-1], found.indptr[1:], strict=True)]
    np.testing.assert_allclose(found.positions.xy, [p.centroid.coords[0] for p in polygons], atol=1e-9)
    flat = np.array([[0.0, 0], [2, 0], [4, 0], [0, 0], [2, 0], [2, 2], [0, 2]])
    centres = segmented.centroids(np.array([0, 3, 7]), flat)
    np.testing.assert_allclose(centres, [[2, 0], [1, 1]])


def test_cells_without_bins_beside_them_take_the_vendors_pixel_size(tmp_path: Path) -> None:
    write_cells(tmp_path, Section(20), 12, 60)
    found = read(tmp_path / "segmented_outputs")
    assert found.lattice_um is None
    placed = place(ManifestRow("s", None, tmp_path, "visium_hd", unit="cell"), None, found, PrepConfig())
    assert (placed.mpp.value, placed.mpp.source) == (0.5, "matrix")
    (tmp_path / "segmented_outputs/spatial/scalefactors_json.json").write_text("{}")
    unknown = read(tmp_path)
    with pytest.raises(ValueError, match=r"the pixel size \(mpp\) is unknown; give um per pixel in the column mpp"):
        place(ManifestRow("s", None, tmp_path, "visium_hd", unit="cell"), None, unknown, PrepConfig())


def test_a_few_cells_without_outline_are_left_out_more_are_refused(hd_outs: Path) -> None:
    whole = dense(read(hd_outs))
    content = json.loads((hd_outs / OUTLINES).read_text())
    (hd_outs / OUTLINES).write_text(json.dumps(content | {"features": content["features"][3:]}))
    found = read(hd_outs)
    assert found.notes[0] == "3 barcodes without an outline are left out"
    np.testing.assert_array_equal(dense(found), whole[3:])
    (hd_outs / OUTLINES).write_text(json.dumps(content | {"features": content["features"][:100]}))
    with pytest.raises(ValueError, match=r"125 of 225 barcodes \(as 'cellid_0.*are not in cell_segmentations\.geojson"):
        read(hd_outs)


def test_the_annotated_outlines_will_do_and_never_come_first(hd_outs: Path) -> None:
    annotated = hd_outs / "segmented_outputs/graphclust_annotated_cell_segmentations.geojson"
    (hd_outs / OUTLINES).rename(annotated)
    assert len(read(hd_outs).ids) == 225
    annotated.rename(annotated.with_name("P1_cell_segmentations.geojson"))
    annotated.write_text("{}")
    assert len(read(hd_outs).ids) == 225


def test_the_largest_part_of_a_cell_is_its_outline(hd_outs: Path) -> None:
    content = json.loads((hd_outs / OUTLINES).read_text())
    geometry = content["features"][5]["geometry"]
    small = [[[0, 0], [1, 0], [1, 1], [0, 0]]]
    geometry.update({"type": "MultiPolygon", "coordinates": [small, geometry["coordinates"], small]})
    expected = read(hd_outs)
    (hd_outs / OUTLINES).write_text(json.dumps(content))
    found = read(hd_outs)
    np.testing.assert_array_equal(found.polygon_xy, expected.polygon_xy)
    assert found.notes == ["1 cells have several parts, of which the largest is their outline"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "it breaks off or is no JSON"),
        (lambda text: "{}", "it holds no features"),
        (lambda text: '{"features": []}', "holds no cell"),
        (lambda text: '{"features": [nonsense', "feature 1: .*it breaks off or is no JSON"),
        (lambda text: text.replace('"cell_id": 3', '"cell_id": 1'), "cell 1 comes twice"),
        (lambda text: text.replace('"cell_id": 3', '"id": 3'), "feature 2: KeyError.*cell_id"),
        (lambda text: text.replace('"Polygon"', '"Point"', 1), "feature 1: KeyError.*Point"),
        (lambda text: text.replace("[[[", "[[[NaN, NaN], [", 1), "feature 1: .*fewer than three places"),
        (lambda text: '{"features": [' + "[" * 5000, "no readable outlines of cells"),
    ],
)
def test_outlines_with_faults(hd_outs: Path, change: Callable[[str], str], message: str) -> None:
    (hd_outs / OUTLINES).write_text(change((hd_outs / OUTLINES).read_text()))
    with pytest.raises(ValueError, match=rf"cell_segmentations\.geojson: .*{message}"):
        read(hd_outs)
