"""Real files of Xenium and CosMx, and a bundle of ours, against what other libraries read from them."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy
import shapely
import zarr
from scipy import sparse
from zarr.storage import ZipStore

from data_prep.manifest import ManifestRow
from data_prep.one_slide import build_slide
from data_prep.platforms import CONTROL, GENE, Source, cosmx, xenium
from data_prep.profiles import polygon_areas
from data_prep.synthetic.cells import CellSection
from storm.prep_config import PrepConfig
from storm.schema import DISC, POLYGON
from storm.store import SlideStore
from tests.data_prep.platforms.helpers import dense
from tests.data_prep.platforms.xenium_files import pooled, source, squares_of

MULTIQC = "multiqc_xenium/data/modules/xenium"
MOLECULES = "moleculeexperiment_xenium/inst/extdata"
SEGGER = "segger_xenium/tests/data/10x_preview_non-diseased_human_lung_10k_transcripts"
DBKERO = "cosmx_dbkero/inst/extdata/CosMx_DBKero_Tiny"


@pytest.mark.filterwarnings("ignore")  # of libraries that other people keep
def test_spatialdata_io_reads_the_same_cells_from_our_bundle(bundle: Path, section: CellSection) -> None:
    import spatialdata_io

    with ZipStore(bundle / "cells.zarr.zip", mode="w") as store:  # it wants the masks, of which it then reads nothing
        zarr.create_group(store, zarr_format=2)
    told = json.loads((bundle / "experiment.xenium").read_text()) | {"analysis_sw_version": "xenium-1.2.0.0"}
    (bundle / "experiment.xenium").write_text(json.dumps(told))
    off = dict.fromkeys(("nucleus_boundaries", "cells_labels", "nucleus_labels", "morphology_mip", "morphology_focus",
                         "aligned_images", "cells_as_circles", "transcripts"), False)  # fmt: skip
    theirs = spatialdata_io.xenium(bundle, cells_boundaries=True, **off)
    ours, table = xenium.read(source(bundle)), theirs.tables["table"]
    assert ours.ids == table.obs["cell_id"].tolist()
    np.testing.assert_allclose(ours.xy * 0.2125, table.obsm["spatial"])
    of_genes = ours.column_kind == GENE
    np.testing.assert_array_equal(dense(ours)[:, of_genes], table.X.toarray())
    assert [s for s, k in zip(ours.symbols, of_genes, strict=True) if k] == [
        name.split("-")[0] if name.split("-")[-1].isdigit() and name not in ours.symbols else name
        for name in table.var_names
    ]
    areas = theirs.shapes["cell_boundaries"].geometry.area.to_numpy()
    np.testing.assert_allclose(polygon_areas(ours.polygon_indptr, ours.polygon_xy * 0.2125), areas, rtol=1e-4)  # type: ignore[arg-type,operator]


@pytest.mark.parametrize(("sample", "made_up"), [("sample1", 30), ("sample2", 25)])
def test_multiqc_a_matrix_of_other_cells_is_refused(real_data: Path, sample: str, made_up: int) -> None:
    folder = real_data / MULTIQC / sample
    assert len(scanpy.read_10x_h5(folder / "cell_feature_matrix.h5")) == made_up
    message = rf"cell_feature_matrix\.h5: {made_up} of {made_up} cells \(as 'CELL_000-1'\) are not in cells\.parquet"
    with pytest.raises(ValueError, match=message):
        xenium.read(source(folder))
    with pytest.raises(ValueError, match=r"cell_feature_matrix\.h5: lacks \d+ of the \d+ genes of transcripts"):
        xenium.read(source(folder, unit="square16um"))


@pytest.mark.parametrize("sample", ["sample1", "sample2"])
def test_multiqc_cells_and_squares(real_data: Path, tmp_path: Path, sample: str) -> None:
    """The 10,000 real cells under a matrix that knows them, and the squares of the real transcripts."""
    folder = shutil.copytree(real_data / MULTIQC / sample, tmp_path / "b", copy_function=shutil.copyfile)
    cells = pd.read_parquet(folder / "cells.parquet")
    (folder / "cell_feature_matrix.h5").unlink()
    assert squares_of(folder, 16) == pooled(folder, 16)
    with h5py.File(folder / "cell_feature_matrix.h5", "w") as root:
        order = np.random.default_rng(0).permutation(len(cells))
        group = root.create_group("matrix")
        group["barcodes"] = cells["cell_id"].to_numpy()[order].astype("S")
        group["data"] = cells["transcript_counts"].to_numpy()[order]
        group["indices"], group["indptr"] = np.zeros(len(cells), int), np.arange(len(cells) + 1)
        group["shape"] = [1, len(cells)]
        for name, value in (("id", "ENSG00000141510"), ("name", "TP53"), ("feature_type", "Gene Expression")):
            group[f"features/{name}"] = [value.encode()]
    found = xenium.read(source(folder))
    assert len(found.ids) == 10_000
    np.testing.assert_allclose(found.xy * 0.2125, cells[["x_centroid", "y_centroid"]].to_numpy()[order])
    np.testing.assert_array_equal(dense(found)[:, 0], cells["transcript_counts"].to_numpy()[order])
    assert (found.footprint_kind == DISC).all()
    np.testing.assert_allclose(np.pi / 4 * found.footprint_um**2, cells["cell_area"].to_numpy()[order], rtol=1e-5)
    assert found.facts["analysis_sw_version"] == "xenium-3.0.0.15"
    assert set(found.facts) == {"analysis_sw_version", "panel_name"}


@pytest.mark.parametrize(("sample", "low"), [("sample1", 185), ("sample2", None)])
def test_mouse_brain_squares(real_data: Path, sample: str, low: int | None) -> None:
    folder = real_data / MOLECULES / "xenium_V1_FF_Mouse_Brain" / sample
    with pytest.raises(ValueError, match=r"has no table of cells .*or pool transcripts with unit square<N>um"):
        xenium.read(source(folder))
    assert squares_of(folder, 8) == pooled(folder, 8)
    assert sum(pooled(folder, 8).values()) > 500
    found = xenium.read(source(folder, unit="square8um"))
    assert found.facts == {"analysis_sw_version": "xenium-1.0.2", "panel_name": "Xenium Mouse Brain GEX"}
    if low:
        assert found.notes[0] == f"{low} of 962 transcripts have a qv under 20 and are left out"


def test_mouse_brain_cells_with_their_polygons(real_data: Path, tmp_path: Path) -> None:
    """Real boundaries and transcripts of version 1; cells and matrix, which the sample lacks, made from them."""
    folder = shutil.copytree(
        real_data / MOLECULES / "xenium_V1_FF_Mouse_Brain" / "sample1", tmp_path / "b", copy_function=shutil.copyfile
    )
    rings = pd.read_csv(folder / "cell_boundaries.csv").groupby("cell_id")[["vertex_x", "vertex_y"]]
    shapes = {int(k): shapely.Polygon(v.to_numpy()) for k, v in rings}  # type: ignore[call-overload]
    rows = [(k, p.centroid.x, p.centroid.y, p.area) for k, p in shapes.items()]
    cells = pd.DataFrame(rows, columns=["cell_id", "x_centroid", "y_centroid", "cell_area"])
    cells.to_csv(folder / "cells.csv.gz", index=False)
    table = pd.read_csv(folder / "transcripts.csv")
    table = table[(table["qv"] >= 20) & table["cell_id"].isin(list(shapes))]
    counts = pd.crosstab(table["cell_id"], table["feature_name"]).reindex(sorted(shapes), fill_value=0)
    matrix = sparse.csr_matrix(counts.to_numpy())
    with h5py.File(folder / "cell_feature_matrix.h5", "w") as root:
        group = root.create_group("matrix")
        group["barcodes"] = [str(k).encode() for k in counts.index]
        group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr
        group["features/id"] = group["features/name"] = counts.columns.to_numpy().astype("S")
        group["features/feature_type"] = [b"Gene Expression"] * counts.shape[1]
    found = xenium.read(source(folder))
    assert found.ids == [str(k) for k in counts.index]
    np.testing.assert_array_equal(dense(found), counts.to_numpy())
    assert (found.footprint_kind == POLYGON).all()
    areas = polygon_areas(found.polygon_indptr, found.polygon_xy * 0.2125)  # type: ignore[arg-type,operator]
    np.testing.assert_allclose(areas, [shapes[k].area for k in counts.index], rtol=1e-4)
    np.testing.assert_allclose(found.xy * 0.2125, [shapes[k].centroid.coords[0] for k in counts.index])


def test_human_lung_squares_need_the_pixel_size(real_data: Path) -> None:
    with pytest.raises(ValueError, match=r"has no experiment\.xenium; restore it, or give um .* column space_um"):
        xenium.read(source(real_data / SEGGER, unit="square16um"))
    with pytest.raises(ValueError, match="has no table of cells"):
        xenium.read(source(real_data / SEGGER))
    assert squares_of(real_data / SEGGER, 16, space_um=0.2125) == pooled(real_data / SEGGER, 16)
    found = xenium.read(source(real_data / SEGGER, unit="square16um", space_um=0.2125))
    assert "1383 of 10000 transcripts have a qv under 20 and are left out" in found.notes
    assert int((found.column_kind == CONTROL).sum()) == 22


def test_lung9_molecules_of_the_prototype(real_data: Path) -> None:
    folder = real_data / MOLECULES / "nanostring_Lung9_Rep1" / "sample_2"
    with pytest.raises(ValueError, match=r"has no counts \(exprMat_file\.csv .*or pool its molecules with unit square"):
        cosmx.read(Source("cosmx", folder, space_um=0.18))
    with pytest.raises(ValueError, match="no file tells the size of a pixel"):
        cosmx.read(Source("cosmx", folder, unit="square8um"))
    found = cosmx.read(Source("cosmx", folder, unit="square8um", space_um=0.18))
    table = pd.read_csv(folder / "tx_file.csv")
    assert dense(found).sum() == len(table) == 7155
    real = table[~table["target"].str.startswith("NegPrb")]
    assert int((found.column_kind == GENE).sum()) == real["target"].nunique() == 926
    col, row = ((real[f"{axis}_global_px"] * 0.18 // 8).astype(int) for axis in "xy")
    places = set(zip(col, row, strict=True))
    assert {tuple(int(p) for p in name.split("_")[1:]) for name in found.ids} == places
    egfr = dense(found)[:, found.names.index("EGFR")].sum()
    assert egfr == (table["target"] == "EGFR").sum()


def test_dbkero_cells(real_data: Path) -> None:
    folder = real_data / DBKERO
    with pytest.raises(ValueError, match=r"no file tells the size of a pixel .*0\.12028 on commercial instruments"):
        cosmx.read(Source("cosmx", folder))
    found = cosmx.read(Source("cosmx", folder, space_um=0.12028))
    counts = pd.read_csv(folder / "DBKero_exprMat_file.csv")
    counts = counts[counts["cell_ID"] > 0]
    cells = pd.read_csv(folder / "DBKero_metadata_file.csv").set_index("cell_ID").loc[counts["cell_ID"]]
    assert (len(found.ids), len(found.names)) == (905, 1010)
    assert found.ids == [f"f16_c{k}" for k in counts["cell_ID"]]
    labels = set(pd.read_csv(folder / "labels_tiny.tsv", sep="\t")["cell_id"])
    assert (len(labels), labels - set(found.ids)) == (904, set())  # one cell has no label
    assert found.names == list(counts.columns[2:])
    np.testing.assert_array_equal(dense(found), counts.iloc[:, 2:].to_numpy())
    controls = [n for n, k in zip(found.names, found.column_kind.tolist(), strict=True) if k == CONTROL]
    assert controls == [f"NegPrb{k:02d}" for k in range(1, 11)]
    np.testing.assert_allclose(found.xy, cells[["CenterX_global_px", "CenterY_global_px"]].to_numpy() * [1, -1])
    assert (found.footprint_kind == POLYGON).all()
    rings = pd.read_csv(folder / "DBKero-polygons.csv").groupby("cellID")[["x_global_px", "y_global_px"]]
    areas = pd.Series({k: shapely.Polygon(v.to_numpy()).area for k, v in rings}).loc[counts["cell_ID"]].to_numpy()
    np.testing.assert_allclose(polygon_areas(found.polygon_indptr, found.polygon_xy), areas, rtol=1e-4)  # type: ignore[arg-type]
    assert np.median(areas / cells["Area"]) == pytest.approx(1, abs=0.05)  # what the vendor calls area is that in px


def test_dbkero_becomes_a_store(real_data: Path, tmp_path: Path) -> None:
    row = ManifestRow("d", None, real_data / DBKERO, "cosmx", space_um=0.12028)
    store = SlideStore(build_slide(row, tmp_path, PrepConfig()))
    counts = pd.read_csv(real_data / DBKERO / "DBKero_exprMat_file.csv").iloc[1:]
    depth = counts.drop(columns=["fov", "cell_ID"]).filter(regex="^(?!NegPrb)").sum(axis=1)
    np.testing.assert_array_equal(store.quality()["depth"], depth)
    assert store.quality()["control"].sum() == counts.filter(regex="^NegPrb").to_numpy().sum()
    assert (store.info.kind, store.info.platform, store.info.mpp) == ("cell", "cosmx", 0.12028)
    assert store.info.facts["mapped_share"] > 0.95
