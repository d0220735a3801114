"""CosMx: cells and squares of three vintages against what was written, axes, the size of a pixel, and refusals."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_prep import align
from data_prep.manifest import ManifestRow
from data_prep.one_slide import build_slide
from data_prep.platforms import CONTROL, GENE, Source, cosmx, tabular
from data_prep.profiles import polygon_areas
from data_prep.synthetic.cells import CellSection, draw_cells
from data_prep.synthetic.cosmx import CONTROLS, FOV_PX, ORIGIN_PX, PIXEL_UM, write_cosmx
from storm import genes
from storm.prep_config import PrepConfig
from storm.schema import DISC, POLYGON, SQUARE
from storm.store import SlideStore
from tests.data_prep.platforms.helpers import dense
from tests.data_prep.vendors import tissue, write_tiff

CELLS, GENES = 2116, 30  # 46 x 46 cells 12 um apart: 2 x 2 fields of view
TINY = PrepConfig(tile_px=56, tile_mpp=1.0)


def drawn(vintage: str) -> CellSection:
    known = genes.shipped("human")
    symbols = list(known.symbols[:GENES])
    return draw_cells(CELLS, list(known.ids[:GENES]), symbols, CONTROLS[vintage], 0, genes_per_cell=4, vertices=6)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, CellSection, list[str]]]:
    """Vintage -> folder, section, ids of its cells."""
    made = {}
    for vintage in CONTROLS:
        folder, part = tmp_path_factory.mktemp("cosmx") / "flat", drawn(vintage)
        made[vintage] = folder, part, write_cosmx(folder, part, vintage, ".csv" if vintage == "legacy" else ".csv.gz")
    return made


@pytest.fixture
def flat(written: dict, tmp_path: Path) -> Path:
    """A copy of the newest vintage that a test may change."""
    return shutil.copytree(written["1.3.2"][0], tmp_path / "flat")


def source(folder: Path, **more) -> Source:
    return Source("cosmx", folder, **more)


@pytest.mark.parametrize("vintage", CONTROLS)
def test_cells_of_every_vintage(written: dict, vintage: str) -> None:
    folder, section, ids = written[vintage]
    found = cosmx.read(source(folder, space_um=None if vintage == "1.3.2" else PIXEL_UM))
    assert found.space_um == pytest.approx(PIXEL_UM)
    assert sorted(found.ids) == sorted(ids)
    assert len({name.split("_")[0] for name in found.ids}) == 4  # the same cell_ID in four fields of view
    rows = np.argsort(ids)[np.argsort(np.argsort(found.ids))]
    away = found.xy * PIXEL_UM - section.xy_um[rows]
    np.testing.assert_allclose(away - away[0], 0, atol=1e-3)  # upright: y grows downward as in the section
    np.testing.assert_array_equal(dense(found), section.counts[rows].toarray())
    assert found.column_kind.tolist() == [GENE] * GENES + [CONTROL] * len(section.controls)
    assert found.notes == [
        "4 rows of cell_ID 0, which lie in no cell, are left out",
        "no alignment: y, which points up in CosMx, is turned over",
    ]
    assert (found.footprint_kind == POLYGON).all()
    area = polygon_areas(found.polygon_indptr, found.polygon_xy * PIXEL_UM)  # type: ignore[arg-type,operator]
    np.testing.assert_allclose(area, section.area_um2[rows], rtol=1e-3)
    first = section.polygon_um[section.polygon_indptr[rows[0]]] - section.xy_um[rows[0]]
    np.testing.assert_allclose((found.polygon_xy[0] - found.xy[0]) * PIXEL_UM, first, atol=1e-3)  # type: ignore[index]


def test_without_polygons_cells_are_discs_of_their_area(flat: Path, written: dict) -> None:
    (flat / "S1-polygons.csv.gz").unlink()
    found = cosmx.read(source(flat))
    section, ids = written["1.3.2"][1:]
    assert (found.footprint_kind == DISC).all()
    areas = dict(zip(ids, section.area_um2, strict=True))
    np.testing.assert_allclose(np.pi / 4 * found.footprint_um**2, [areas[name] for name in found.ids], rtol=1e-3)
    assert f"{CELLS} cells have no polygon and are discs of their area" in found.notes


def test_a_polygon_of_two_vertices_is_none(flat: Path) -> None:
    table = pd.read_csv(flat / "S1-polygons.csv.gz")
    chosen = (table["fov"] == 2) & (table["cellID"] == 5)
    drop = chosen & (table.groupby(["fov", "cellID"]).cumcount() > 1)
    table[~drop].to_csv(flat / "S1-polygons.csv.gz", index=False)
    found = cosmx.read(source(flat))
    assert [found.ids[r] for r in np.flatnonzero(found.footprint_kind == DISC)] == ["f2_c5"]
    assert "1 cells have no polygon and are discs of their area" in found.notes


def test_an_alignment_is_applied_to_the_vendors_own_coordinates(written: dict, tmp_path: Path) -> None:
    """Global px, y up -> H&E px, y down: such a matrix mirrors."""
    folder, section, ids = written["1.3.2"]
    scale = PIXEL_UM / 0.5
    top = ORIGIN_PX[1] + 2 * FOV_PX
    matrix = np.array([[scale, 0, 20 - scale * ORIGIN_PX[0]], [0, -scale, 30 + scale * top], [0, 0, 1]])
    np.savetxt(tmp_path / "m.csv", matrix, delimiter=",")
    write_tiff(tmp_path / "he.tif", tissue(1300, 1300), mpp=0.5)
    row = ManifestRow("x", tmp_path / "he.tif", folder, "cosmx", alignment=tmp_path / "m.csv")
    store = SlideStore(build_slide(row, tmp_path, TINY))
    found = store.places()
    rows = np.argsort(ids)[np.argsort(np.argsort(found.ids))]
    np.testing.assert_allclose(found.xy_um, section.xy_um[rows] + [10, 15], atol=1e-2)
    assert store.info.mpp == pytest.approx(0.5)
    assert (store.info.mpp_source, store.info.alignment_source) == ("matrix", "file")
    np.testing.assert_allclose(found.area_um2, section.area_um2[rows], rtol=1e-3)
    first = section.polygon_um[section.polygon_indptr[rows[0]]] - section.xy_um[rows[0]]
    np.testing.assert_allclose(found.polygon_um[0], first, atol=1e-2)
    assert not any("turned over" in note for note in store.info.facts["notes"])


def test_key_points_name_their_sides(written: dict, tmp_path: Path) -> None:
    matrix = np.array([[0.24, 0, -100], [0, -0.24, 9000], [0, 0, 1]])
    fixed = np.random.default_rng(0).uniform(18000, 26000, (8, 2))
    table = np.hstack([fixed, align.apply(matrix, fixed)])
    names = ["fixedX", "fixedY", "alignmentX", "alignmentY"]
    pd.DataFrame(table, columns=names).to_csv(tmp_path / "k.csv", index=False)
    found = cosmx.read(source(written["1.3.2"][0], alignment=tmp_path / "k.csv"))
    np.testing.assert_allclose(found.matrix, matrix, atol=1e-4)  # type: ignore[arg-type]
    assert found.facts["key_points"]["points"] == 8


def test_an_image_without_an_alignment_is_refused(written: dict, tmp_path: Path) -> None:
    write_tiff(tmp_path / "he.tif", tissue(300, 300), mpp=0.5)
    row = ManifestRow("x", tmp_path / "he.tif", written["1.3.2"][0], "cosmx")
    with pytest.raises(ValueError, match=r"no file tells where it lies on .*leave image blank for expression alone"):
        build_slide(row, tmp_path, TINY)


def test_expression_alone(written: dict, tmp_path: Path) -> None:
    folder, section, ids = written["1.3.2"]
    store = SlideStore(build_slide(ManifestRow("x", None, folder, "cosmx"), tmp_path, TINY))
    assert (store.info.image, store.info.mpp_source, len(store)) == (False, "matrix", 0)
    depth = dict(zip(ids, section.totals[0].tolist(), strict=True))
    assert store.quality()["depth"].tolist() == [depth[name] for name in store.places().ids]
    assert store.quality()["control"].sum() == section.totals[1].sum() > 0


def test_places_in_the_fields_of_view_become_global(flat: Path, written: dict) -> None:
    """Metadata without global px, as some exports have it: by the places of the fields of view."""
    whole = cosmx.read(source(flat))
    table = pd.read_csv(flat / "S1_metadata_file.csv.gz")
    table.drop(columns=["CenterX_global_px", "CenterY_global_px"]).to_csv(flat / "S1_metadata_file.csv.gz", index=False)
    np.testing.assert_allclose(cosmx.read(source(flat)).xy, whole.xy, atol=1e-3)


def test_mm_alone_give_the_pixel_where_two_tables_tell_the_places(flat: Path, written: dict) -> None:
    shutil.copy(written["mm"][0] / "S1_fov_positions_file.csv.gz", flat)
    assert cosmx.read(source(flat)).space_um == pytest.approx(PIXEL_UM)


def test_the_manifest_wins_over_the_files_about_the_pixel(flat: Path) -> None:
    found = cosmx.read(source(flat, space_um=0.18))
    assert found.space_um == 0.18
    assert "space_um 0.18 of the manifest, the files tell 0.12028" in found.notes


def test_counts_are_read_in_batches(written: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cosmx.read(source(written["1.3.2"][0]))
    before = dense(found)
    monkeypatch.setattr(tabular, "_CSV_BYTES", 4096)
    rows = np.arange(1, CELLS, 7)
    blocks = list(found.counts(rows))
    assert len(blocks) > 20
    assert max(len(block.indptr) for block in blocks) < 40
    np.testing.assert_array_equal(dense(found, rows), before[rows])


def test_squares_are_those_that_pandas_makes(written: dict) -> None:
    folder = written["1.3.2"][0]
    found = cosmx.read(source(folder, unit="square16um"))
    table = pd.read_csv(folder / "S1_tx_file.csv.gz")
    table = table[~table["target"].isin(CONTROLS["1.3.2"])]
    places = [(table[f"{a}_global_px"] * found.space_um // 16).astype(int) for a in "xy"]
    expected = {
        (int(i), int(j), str(name)): int(n) for (i, j, name), n in table.groupby([*places, "target"]).size().items()
    }
    counts = dense(found)
    counts[:, found.column_kind == CONTROL] = 0
    at = [tuple(int(part) for part in name.split("_")[1:]) for name in found.ids]
    assert {(*at[r], found.names[c]): counts[r, c] for r, c in zip(*np.nonzero(counts), strict=True)} == expected
    assert (found.kind, set(found.footprint_kind)) == ("bin", {SQUARE})
    np.testing.assert_allclose(found.xy[0] * PIXEL_UM, [(at[0][0] + 0.5) * 16, -(at[0][1] + 0.5) * 16])


def on(name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / f"S1{name}.csv.gz"
        change(pd.read_csv(path)).to_csv(path, index=False)

    return edit


def removed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / f"S1{name}.csv.gz").unlink()


def on_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / f"S1{name}.csv.gz"
        path.write_bytes(change(path.read_bytes()))

    return edit


def swapped(table: pd.DataFrame) -> pd.DataFrame:
    names = {"local": "global", "global": "local"}
    return table.rename(columns=lambda n: "_".join(names.get(part, part) for part in n.split("_")))


def counts(value: float) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """One count of a cell, changed."""

    def change(table: pd.DataFrame) -> pd.DataFrame:
        table["Negative1"] = table["Negative1"].astype(float)
        table.loc[7, "Negative1"] = value
        return table

    return change


META, EXPR, FOVS, POLY = "_metadata_file", "_exprMat_file", "_fov_positions_file", "-polygons"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no counts": (removed(EXPR), r"flat: has no counts \(exprMat_file\.csv or exprMat_file\.csv\.gz\); give"),
    "no cells": (removed(META), r"flat: has no cells \(metadata_file\.csv or metadata_file\.csv\.gz\)"),
    "nothing tells the pixel": (removed(FOVS), r"flat: no file tells the size of a pixel .*in the column space_um"),
    "metadata without fov": (on(META, lambda t: t.drop(columns="fov")), r"columns \['fov'\] are missing"),
    "metadata without a number": (on(META, lambda t: t.drop(columns="cell_ID")), r"columns \['cell_ID'\] are missing"),
    "metadata without places": (
        on(META, lambda t: t[["fov", "cell_ID", "Area"]]), r"metadata_file\.csv\.gz: has neither global nor local px",
    ),
    "a cell twice in metadata": (
        on(META, lambda t: t.iloc[[*range(CELLS), 4]]), r"metadata_file\.csv\.gz: cell f1_c5 comes twice",
    ),
    "a cell twice in exprMat": (
        on(EXPR, lambda t: t.iloc[[*range(len(t)), 4]]), r"exprMat_file\.csv\.gz: cell f1_c4 comes twice",
    ),
    "cells of another export": (
        on(META, lambda t: t[t["fov"] != 3]), r"\d+ of 2116 cells \(as f3_c1\) are not in S1_metadata_file\.csv\.gz",
    ),
    "a cell without a place": (
        on(META, lambda t: t.assign(CenterX_global_px=t["CenterX_global_px"].where(t.index != 3))),
        r"metadata_file\.csv\.gz: row 4 has no place",
    ),
    "a cell number with a fraction": (
        on(META, lambda t: t.assign(cell_ID=t["cell_ID"] + 0.5)), r"cell_ID 1\.5 in row 1 is no whole number",
    ),
    "local and global swapped": (
        on(META, swapped), r"local px reach \d+, a field of view has at most 6000; the names of .* are swapped",
    ),
    "negative counts": (on(EXPR, counts(-3)), r"holds -3\.0, which is no count; give the raw counts"),
    "normalised counts": (on(EXPR, counts(0.25)), r"holds 0\.25, which is no count"),
    "a count is missing": (on(EXPR, counts(np.nan)), "holds nan, which is no count"),
    "exprMat without targets": (on(EXPR, lambda t: t[["fov", "cell_ID"]]), "has no column of counts"),
    "a target twice": (
        on_bytes(EXPR, lambda d: gzip.compress(gzip.decompress(d).replace(b'"Negative1"', b'"FalseCode1"', 1))),
        r"columns \['FalseCode1'\] come twice",
    ),
    "exprMat cut off": (on_bytes(EXPR, lambda d: d[:-500]), r"exprMat_file\.csv\.gz: not readable as a table"),
    "plain text named gz": (on_bytes(META, gzip.decompress), r"metadata_file\.csv\.gz: not readable as a table"),
    "an empty file": (on_bytes(META, lambda d: b""), r"metadata_file\.csv\.gz: (not readable|columns)"),
    "no cell but 0": (on(EXPR, lambda t: t[t["cell_ID"] == 0]), r"exprMat_file\.csv\.gz: holds no cell"),
    "fields of view of another kind": (
        on(FOVS, lambda t: t[["FOV"]]), r"fov_positions_file\.csv\.gz: has no fov with x_global_px",
    ),
    "a field of view twice": (
        on(FOVS, lambda t: t.iloc[[0, 1, 2, 3, 0]]), r"a field of view comes twice; give the export of one slide",
    ),
    "mm that are um": (
        on(FOVS, lambda t: t.assign(x_global_mm=t["x_global_mm"] * 1e3, y_global_mm=t["y_global_mm"] * 1e3)),
        r"its places in px and in mm make a pixel 120 um wide, which none is",
    ),
    "polygons of other cells": (
        on(POLY, lambda t: t.assign(cellID=t["cellID"].max() + 1 - t["cellID"])),
        r"-polygons\.csv\.gz: \d+ of \d+ polygons do not lie around their cells",
    ),
    "polygons torn apart": (
        on(POLY, lambda t: t.iloc[[*range(2, len(t)), 0, 1]]), r"the vertices of cell f1_c1 do not follow each other",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(flat: Path, name: str) -> None:
    spoil, message = BAD[name]
    spoil(flat)
    with pytest.raises(ValueError, match=message):
        dense(cosmx.read(source(flat)))


def test_a_matrix_of_mm_is_refused(flat: Path, tmp_path: Path) -> None:
    np.savetxt(tmp_path / "m.csv", np.diag([2000.0, -2000.0, 1]), delimiter=",")
    with pytest.raises(ValueError, match=r"m\.csv: makes a pixel of the slide 6\.01e-05 um wide"):
        cosmx.read(source(flat, alignment=tmp_path / "m.csv"))


def test_fields_of_view_that_are_not_known(flat: Path) -> None:
    on(META, lambda t: t.drop(columns=["CenterX_global_px", "CenterY_global_px"]))(flat)
    on(FOVS, lambda t: t[t["FOV"] != 2])(flat)
    with pytest.raises(ValueError, match="has no global px, and field of view 2 has no place in px; give"):
        cosmx.read(source(flat))


def test_swapped_molecules_and_none(flat: Path) -> None:
    on("_tx_file", swapped)(flat)
    with pytest.raises(ValueError, match=r"tx_file\.csv\.gz: local px reach .* swapped; swap them back"):
        cosmx.read(source(flat, unit="square16um"))
    on("_tx_file", lambda t: swapped(t).assign(target="Negative1"))(flat)
    with pytest.raises(ValueError, match=r"tx_file\.csv\.gz: holds no molecule of a gene"):
        cosmx.read(source(flat, unit="square16um"))
    removed("_tx_file")(flat)
    with pytest.raises(ValueError, match=r"flat: has no molecules \(tx_file\.csv or tx_file\.csv\.gz\)"):
        cosmx.read(source(flat, unit="square16um"))


def test_inputs(flat: Path, tmp_path: Path) -> None:
    names = {path.name for path in cosmx.inputs(source(flat))}
    assert names == {f"S1{part}.csv.gz" for part in (META, EXPR, FOVS, POLY)}
    assert {p.name for p in cosmx.inputs(source(flat, unit="square8um"))} == {f"S1{FOVS}.csv.gz", "S1_tx_file.csv.gz"}
    shutil.copy(flat / "S1-polygons.csv.gz", flat / "S2-polygons.csv.gz")
    with pytest.raises(ValueError, match=r"holds S1-polygons\.csv\.gz, S2-polygons\.csv\.gz; leave one"):
        cosmx.inputs(source(flat))
    with pytest.raises(ValueError, match="none: is no folder; give the folder of the flat files"):
        cosmx.inputs(source(tmp_path / "none"))
