"""GeoJSON of tissue: what is written is valid and reads back; a user's file replaces our mask; bad files are named."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from shapely.geometry import Polygon, shape

from data_prep import outlines, tissue
from storm import store
from tests.data_prep.pictures import overview_of, section
from tests.data_prep.vendors import write_manifest

SQUARE = [[100, 100], [500, 100], [500, 400], [100, 400], [100, 100]]
HOLE = [[200, 200], [200, 300], [300, 300], [300, 200], [200, 200]]


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def feature(geometry: Any, name: str | None = None) -> dict[str, Any]:
    properties = {"classification": {"name": name}} if name else {}
    return {"type": "Feature", "properties": properties, "geometry": geometry}


def polygon(*rings: Any) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": list(rings)}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_written_is_valid_and_reads_back(seed: int, tmp_path: Path) -> None:
    seen = overview_of(section(seed)[1], 2.0)
    mask = tissue.tissue_mask(seen.rgb, 7.0)
    mask[100:110, 60:100] = False  # a hole
    mask[70, :] = False  # a gap of one px
    data = outlines.dump(outlines.from_mask(mask, seen.px_px0, seen.size_px0))
    found = json.loads(data)
    areas = [shape(part["geometry"]) for part in found["features"]]
    assert found["type"] == "FeatureCollection"
    assert all(part["properties"]["objectType"] == "annotation" for part in found["features"])
    assert {part["properties"]["classification"]["name"] for part in found["features"]} == {"Tissue"}
    assert all(area.is_valid and area.exterior.is_ccw and not any(h.is_ccw for h in area.interiors) for area in areas)
    assert sum(len(area.interiors) for area in areas) >= 1
    assert sum(area.area for area in areas) == pytest.approx(mask.sum() * seen.px_px0**2, rel=0.02)
    path = tmp_path / "t.geojson"
    path.write_bytes(data)
    again = outlines.to_mask(outlines.read(path, seen.size_px0), seen.px_px0, mask.shape)
    assert (again & mask).sum() / (again | mask).sum() > 0.96


def test_random_masks_give_valid_polygons() -> None:
    for seed in range(20):
        mask = np.random.default_rng(seed).random((40, 50)) < 0.85
        found = [Polygon(rings[0], rings[1:]) for rings in outlines.from_mask(mask, 3.3, (165, 132))]
        assert found
        assert all(area.is_valid for area in found), seed


def test_no_tissue_is_an_empty_collection() -> None:
    assert json.loads(outlines.dump(outlines.from_mask(np.zeros((9, 9), bool), 2.0, (18, 18))))["features"] == []


@pytest.mark.parametrize(
    "content",
    [
        {"type": "FeatureCollection", "features": [feature(polygon(SQUARE, HOLE))]},
        feature(polygon(SQUARE, HOLE)),
        polygon(SQUARE, HOLE),
        [feature({"type": "MultiPolygon", "coordinates": [[SQUARE, HOLE]]})],
        [feature(polygon([[0, 0], [90, 0], [0, 90], [0, 0]]), "Artefact"), feature(polygon(SQUARE, HOLE), "Tissue")],
    ],
)
def test_the_forms_in_which_polygons_come(content: Any, tmp_path: Path) -> None:
    found = outlines.read(write(tmp_path / "a.geojson", content), (1000, 800))
    mask = outlines.to_mask(found, 10.0, (80, 100))
    assert [len(part) for part in found] == [2]
    assert (mask[15, 15], mask[25, 25], mask[50, 50], mask[2, 2]) == (True, False, False, False)
    assert mask.sum() == pytest.approx(40 * 30 - 10 * 10, rel=0.12)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"a\.geojson: is no GeoJSON \(JSONDecodeError\); export the annotations from QuPath"),
        ("[" * 100_000, r"is no GeoJSON \(RecursionError\)"),
        ({"type": "FeatureCollection"}, "feature 1 has no geometry"),
        (feature(None), "feature 1 has no geometry"),
        (feature({"type": "LineString", "coordinates": SQUARE}), "holds a LineString, which is no area"),
        (feature({"type": "Polygon", "coordinates": []}), "a Polygon has no coordinates"),
        (feature({"type": "Polygon"}), "a Polygon has no coordinates"),
        (feature(polygon([[0, 0], [1, 1]])), "a ring of 2 points is not closed"),
        (feature(polygon(SQUARE[:-1])), "a ring of 4 points is not closed"),
        (feature(polygon([["a", 1], [2, 3], [4, 5], ["a", 1]])), "no list of points with finite x and y"),
        (feature(polygon([[float("nan"), 1], [2, 3], [4, 5], [float("nan"), 1]])), "finite x and y"),
        (feature(polygon([[0, 0], [5, 5], [9, 9], [0, 0]])), "encloses no area"),
        (feature(polygon([[0, 0], [1e9, 0], [1e9, 1e9], [0, 0]])), "lies beyond any slide"),
        (feature(polygon([[2000, 0], [3000, 0], [3000, 90], [2000, 0]])), r"none of its 1 polygons .*1000 x 800 px"),
    ],
)
def test_bad_files_are_named_with_a_cure(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        outlines.read(write(tmp_path / "a.geojson", content), (1000, 800))
    assert str(caught.value).startswith(f"{tmp_path / 'a.geojson'}: ")
    assert "export the annotations" in str(caught.value)


def test_a_users_outlines_replace_ours(built, corpus: Path, tmp_path: Path) -> None:
    rows = [
        {"slide_id": name, "image": "images/i.tif", "platform": "image", "tissue": path}
        for name, path in (("own", ""), ("drawn", "drawn.geojson"), ("bad", "bad.geojson"), ("absent", "no.geojson"))
    ]
    write(corpus / "drawn.geojson", feature(polygon([[0, 0], [336, 0], [336, 336], [0, 336], [0, 0]])))
    write(corpus / "bad.geojson", feature({"type": "Point", "coordinates": [1, 2]}))
    code, folder = built(manifest=write_manifest(corpus / "m.csv", rows))
    own, drawn = (store.SlideStore(folder / f"{name}{store.SUFFIX}") for name in ("own", "drawn"))
    reasons = {name: json.loads((folder / f"{name}.record.json").read_text())["reason"] for name in ("bad", "absent")}
    assert code == 1
    assert reasons["bad"].startswith("bad.geojson: holds a Point, which is no area")
    assert reasons["absent"] == "no.geojson: no such file; correct the manifest"
    assert (own.info.facts["tissue_source"], drawn.info.facts["tissue_source"]) == ("own", "manifest")
    # 336 px are 3 tiles; what is drawn takes half a px of the overview more
    assert {tuple(place) for place in drawn.place.tolist()} >= {(r, c) for r in range(3) for c in range(3)}
    assert drawn.info.facts["tissue_mm2"] == pytest.approx(0.336**2, rel=0.06)
    assert json.loads(drawn.overview()[1])["features"][0]["geometry"]["coordinates"][0][0] == [0.0, 0.0]
    assert json.loads(own.overview()[1])["features"]
    before = folder.joinpath("drawn.record.json").read_text()
    write(corpus / "drawn.geojson", feature(polygon([[0, 0], [300, 0], [300, 336], [0, 336], [0, 0]])))
    built(manifest=corpus / "m.csv")
    assert folder.joinpath("drawn.record.json").read_text() != before  # another outline, another store


def test_polygons_are_drawn_as_on_the_whole_overview() -> None:
    rng = np.random.default_rng(0)
    shape, px_px0 = (60, 90), 3.7
    polygons = [[rng.uniform(-60, 360, 2) + rng.uniform(-40, 40, (5, 2)) for _ in range(2)] for _ in range(50)]
    expected = np.zeros(shape, bool)
    for polygon in polygons:
        whole = np.zeros(shape, np.uint8)
        rings = [np.rint((ring / px_px0 - 0.5) * 16).astype(np.int32) for ring in polygon]
        cv2.fillPoly(whole, rings, 1, shift=4)
        expected |= whole > 0
    np.testing.assert_array_equal(outlines.to_mask(polygons, px_px0, shape), expected)
