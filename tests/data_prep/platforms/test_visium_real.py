"""Visium: every real outs folder, against pandas, scanpy and anndata; a square grid that only looks like one."""

import json
import shutil
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

from data_prep import align
from data_prep.manifest import ManifestRow
from data_prep.platforms import Measurement, Source, visium
from data_prep.profiles import place
from storm.prep_config import PrepConfig
from tests.data_prep.platforms.helpers import dense, fit, sparse

H5 = "filtered_feature_bc_matrix.h5"


def read(outs: Path) -> Measurement:
    return visium.read(Source("visium", outs))


def row_of(outs: Path, mpp: float | None = None) -> ManifestRow:
    return ManifestRow("s", None, outs, "visium", mpp=mpp)


REAL = [
    ("scmuscle_visium/visium_data/Vis5A_2dpi", 982, 33217, 0.3597),
    ("scanpy_visium/tests/_data/visium_data/1.0.0", 100, 100, 0.7252),
    ("spatialexperiment_2sections/inst/extdata/10xVisium/section1/outs", 22, 50, 0.7251),
    ("spatialexperiment_2sections/inst/extdata/10xVisium/section2/outs", 22, 50, 0.7251),
    ("seurat_visium_hd/tests/testdata/visium", 2695, 100, 0.7248),
]


@pytest.mark.parametrize(("outs", "profiles", "genes", "mpp"), REAL)
def test_real_visium(real_data: Path, outs: str, profiles: int, genes: int, mpp: float) -> None:
    import pandas as pd

    found = read(real_data / outs)
    assert (len(found.ids), len(found.names)) == (profiles, genes)
    assert fit(found).mpp == pytest.approx(mpp, abs=2e-4)
    assert fit(found).residual_px0 < 0.5
    assert found.reported_mpp == pytest.approx(mpp, rel=0.005)
    assert align.lattice_fault(fit(found), "visium", PrepConfig()) is None
    assert "mirrored" not in " ".join(found.notes)
    table = pd.read_csv(next((real_data / outs / "spatial").glob("*positions*")), header=None, index_col=0)
    np.testing.assert_array_equal(found.xy, table.loc[found.ids, [5, 4]])
    assert found.in_tissue is not None
    assert found.in_tissue.tolist() == table.loc[found.ids, 1].tolist()


@pytest.mark.parametrize("outs", [REAL[0][0], REAL[1][0], REAL[4][0]])
def test_real_counts_equal_scanpy(real_data: Path, outs: str) -> None:
    import scanpy

    found = read(real_data / outs)
    other = scanpy.read_10x_h5(next((real_data / outs).glob("*.h5")))
    assert found.ids == list(other.obs_names)
    assert found.names == list(other.var["gene_ids"])
    assert (sparse(found) != other.X).nnz == 0


def test_real_section_whose_positions_lack_a_barcode(real_data: Path) -> None:
    found = read(real_data / "spatialexperiment_2sections/inst/extdata/10xVisium/section2/outs")
    assert found.notes == [
        "1 barcodes without a position are left out", "raw matrix: 27 barcodes that are not in tissue are left out"
    ]  # fmt: skip


def test_a_square_grid_is_no_visium_lattice_and_needs_its_mpp_told(real_data: Path) -> None:
    import pandas as pd

    outs = real_data / "msti_human_outs" / "outs"
    found = read(outs)  # barcodes of 16 bases, without -1
    assert (len(found.ids), len(found.names)) == (2172, 36601)
    assert sum(int(block.count.sum()) for block in found.counts(np.arange(2172))) == 1720934
    table = pd.read_csv(outs / "spatial" / "tissue_positions_list.csv", header=None, index_col=0)
    np.testing.assert_allclose(found.xy, table.loc[found.ids, [5, 4]], rtol=1e-12)
    row = row_of(outs)
    with pytest.raises(ValueError, match=r"two pixel sizes, 73\.2 % apart .*check the spots, or give mpp in the manif"):
        place(row, None, found, PrepConfig())
    told = place(row_of(outs, mpp=0.4), None, found, PrepConfig())
    assert (told.mpp.value, told.mpp.source) == (0.4, "manifest")
    assert "two pixel sizes" in told.facts["notes"][0]  # the fault stays on record


def test_real_dlpfc_through_an_outs_folder(real_data: Path, tmp_path: Path) -> None:
    import anndata
    import pandas as pd

    folder = real_data / "dlpfc_151673" / "10X" / "151673"
    adata = anndata.read_h5ad(real_data / "dlpfc_151673" / "LIBD_subset.h5ad")
    spatial = tmp_path / "spatial"
    spatial.mkdir()
    for name in ("tissue_positions_list.txt", "scalefactors_json.json"):
        shutil.copy(folder / name, spatial)
    with h5py.File(tmp_path / H5, "w") as root:
        group = root.create_group("matrix")
        names = np.array(adata.var_names, "S")
        values = {"barcodes": np.array(adata.obs_names, "S"), "data": adata.X.data, "indices": adata.X.indices,
                  "indptr": adata.X.indptr, "features/id": names, "features/name": names,
                  "features/feature_type": np.full(len(names), b"Gene Expression")}  # fmt: skip
        for name, value in values.items():
            group[name] = value
    found = read(tmp_path)
    np.testing.assert_array_equal(dense(found), adata.X.toarray())
    table = pd.read_csv(folder / "tissue_positions_list.txt", header=None, index_col=0).loc[found.ids]
    np.testing.assert_array_equal(found.xy, table[[5, 4]])
    assert fit(found).mpp == pytest.approx(0.7245, abs=1e-4)
    picture = cv2.imread(str(folder / "tissue_lowres_image.png"))
    assert picture is not None
    scale = json.loads((folder / "scalefactors_json.json").read_text())["tissue_lowres_scalef"]
    at = np.floor(found.xy * scale).astype(int)  # the coordinates lie on the tissue of the vendor's own picture
    assert picture[at[:, 1], at[:, 0]].mean() < 0.85 * picture[:50, :50].mean()
