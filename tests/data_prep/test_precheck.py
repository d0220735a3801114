"""precheck: what the build would refuse without a pixel is found before it, also of exports too large to be read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from data_prep import plan, precheck
from data_prep.manifest import ManifestRow
from data_prep.synthetic.cells import CellSection, draw_cells
from data_prep.synthetic.cosmx import CONTROLS, write_cosmx
from data_prep.synthetic.xenium import write_alignment, write_xenium
from storm import genes
from storm.prep_config import PrepConfig
from tests.data_prep.platforms.xenium_files import drawn_section
from tests.data_prep.vendors import tissue, write_tiff, write_visium

CONFIG = PrepConfig(tile_px=56, tile_mpp=1.0)


def cosmx_section(vintage: str) -> CellSection:
    known = genes.shipped("human")
    ids, symbols = list(known.ids[:20]), list(known.symbols[:20])
    return draw_cells(400, ids, symbols, CONTROLS[vintage], 0, genes_per_cell=4, vertices=6)


def faults(row: ManifestRow, tmp_path: Path) -> list[str]:
    return plan.check(row, tmp_path / "stores", CONFIG).faults


@pytest.fixture(params=[precheck.SMALL_BYTES, 0], ids=["small", "large"])
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(precheck, "SMALL_BYTES", request.param)
    return int(request.param)


def test_a_xenium_bundle_without_alignment(tmp_path: Path, limit: int) -> None:
    write_xenium(tmp_path / "x", drawn_section(), transcripts=False)
    image = write_tiff(tmp_path / "he.tif", tissue(400, 400), mpp=0.5)
    (fault,) = faults(ManifestRow("x", image, tmp_path / "x", "xenium"), tmp_path)
    assert "no file tells where it lies on" in fault and "column alignment" in fault
    assert faults(ManifestRow("x", None, tmp_path / "x", "xenium"), tmp_path) == []
    write_alignment(tmp_path / "x" / "he_imagealignment.csv", np.diag([0.5 / 0.2125, 0.5 / 0.2125, 1]))
    assert faults(ManifestRow("x", image, tmp_path / "x", "xenium"), tmp_path) == []
    (tmp_path / "x" / "experiment.xenium").unlink()
    (fault,) = faults(ManifestRow("x", image, tmp_path / "x", "xenium"), tmp_path)
    assert "has no experiment.xenium" in fault and "column space_um" in fault


def test_a_cosmx_export_that_tells_no_pixel(tmp_path: Path, limit: int) -> None:
    folder = tmp_path / "c"
    write_cosmx(folder, cosmx_section("legacy"), "legacy", ".csv")
    (table,) = folder.glob("*fov_positions*")
    lines = [line.split(",") for line in table.read_text().splitlines()]
    kept = [k for k, name in enumerate(lines[0]) if "mm" not in name]
    table.write_text("".join(",".join(line[k] for k in kept) + "\n" for line in lines))
    image = write_tiff(tmp_path / "he.tif", tissue(400, 400), mpp=0.5)
    (fault,) = faults(ManifestRow("c", None, folder, "cosmx"), tmp_path)
    assert "no file tells the size of a pixel" in fault and "column space_um" in fault
    (fault,) = faults(ManifestRow("c", image, folder, "cosmx", space_um=0.18), tmp_path)
    assert "no file tells where it lies on" in fault
    assert faults(ManifestRow("c", None, folder, "cosmx", space_um=0.18), tmp_path) == []


def test_an_h5ad_without_mpp_or_with_a_space_of_its_own(tmp_path: Path, limit: int, write_h5ad: Callable) -> None:
    path = write_h5ad(tmp_path / "a.h5ad")
    bare = write_tiff(tmp_path / "bare.tif", tissue(400, 400), mpp=None)
    told: dict[str, Any] = {"platform": "visium", "format": "h5ad", "unit": "disc55um"}
    (fault,) = faults(ManifestRow("a", bare, path, **told), tmp_path)
    assert "the pixel size (mpp) is unknown" in fault
    assert faults(ManifestRow("a", bare, path, mpp=0.5, **told), tmp_path) == []
    (fault,) = faults(ManifestRow("a", bare, path, mpp=0.5, space_um=0.25, **told), tmp_path)
    assert "no file tells where it lies on" in fault


@pytest.fixture
def write_h5ad() -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        import anndata

        rng = np.random.default_rng(0)
        known = genes.shipped("human")
        data = anndata.AnnData(rng.poisson(2.0, (30, 12)).astype(np.float32))
        data.obs_names, data.var_names = [f"s{i}" for i in range(30)], list(known.ids[:12])
        data.obsm["spatial"] = rng.uniform(20, 380, (30, 2))
        data.write_h5ad(path)
        return path

    return write


def test_counts_of_another_image_and_a_file_that_is_strange(tmp_path: Path) -> None:
    outs = write_visium(tmp_path / "v" / "outs")
    image = write_tiff(tmp_path / "small.tif", tissue(200, 200))
    (fault,) = faults(ManifestRow("v", image, outs, "visium"), tmp_path)
    assert "of 64 profiles lie beside the image (200 x 200 px)" in fault
    write_visium(tmp_path / "odd" / "outs", genes=["AAA1X", "BBB2X", "CCC3X", "TP53", "EGFR"])
    wide = write_tiff(tmp_path / "wide.tif", tissue(950, 1000))
    (fault,) = faults(ManifestRow("v", wide, tmp_path / "odd" / "outs", "visium"), tmp_path)
    assert "only 40.0 % of the columns map to human genes" in fault
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "a") as root:
        del root["matrix/features"]
    assert len(faults(ManifestRow("v", image, outs, "visium"), tmp_path)) == 1


def test_outlines_that_are_none_are_found_before_the_build(tmp_path: Path) -> None:
    image = write_tiff(tmp_path / "he.tif", tissue(400, 400), mpp=0.5)
    row = ManifestRow("x", image, tissue=image)
    assert faults(row, tmp_path) == [
        f"{image}: is no GeoJSON (UnicodeDecodeError); export the annotations from QuPath as GeoJSON"
    ]
