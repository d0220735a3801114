"""HEST-1k: where places, pixel size and footprints come from, controls, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data_prep.manifest import ManifestRow
from data_prep.one_slide import build_slide
from data_prep.platforms import CONTROL, GENE, Measurement, Source, hest
from data_prep.profiles import place, profiles_of
from storm.prep_config import PrepConfig
from storm.schema import DISC, SQUARE
from storm.store import SlideStore
from tests.data_prep.platforms.helpers import dense
from tests.data_prep.vendors import tissue, write_tiff

GENES = ["TP53", "EGFR", "NegControlProbe_00042", "BLANK_0069", "antisense_PROKR2", "UnassignedCodeword_0001"]
COUNTS = np.random.default_rng(0).poisson(2.0, (30, 6))
MPP = 0.2734  # TENX158: so says the json, the tif says a tenth of it


def write(root: Path, name: str = "TENX158", genes: list[str] = GENES, **told: Any) -> Path:
    """st/<id>.h5ad and metadata/<id>.json as HEST-1k has them; `told` replaces metadata, None removes it."""
    (root / "st").mkdir(parents=True, exist_ok=True)
    (root / "metadata").mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    x, y = rng.uniform(50, 400, (2, 30))
    obs = pd.DataFrame(
        # array_row and array_col are those of no lattice, as after HEST's own filter
        {"in_tissue": 1, "pxl_col_in_fullres": x, "pxl_row_in_fullres": y, "array_row": np.arange(30), "array_col": 0},
        index=[f"{i:03d}x001" for i in range(30)],
    )
    scale = {"ST": {"scalefactors": {"spot_diameter_fullres": 55 / MPP, "tissue_downscaled_fullres_scalef": 0.01}}}
    data = anndata.AnnData(
        sparse.csr_matrix(COUNTS.astype(np.float32)), obs, pd.DataFrame(index=genes),
        obsm={"spatial": np.column_stack([x, y])}, uns={"spatial": scale},
    )  # fmt: skip
    data.write_h5ad(root / "st" / f"{name}.h5ad")
    metadata = {
        "id": name, "species": "Homo sapiens", "st_technology": "Visium", "patient": "patient 1",
        "inter_spot_dist": 100.0, "spot_diameter": 55.0, "pixel_size_um_embedded": 0.02734,
        "pixel_size_um_estimated": MPP, "hest_version_added": "1.0.0",
    } | told  # fmt: skip
    kept = {key: value for key, value in metadata.items() if value is not None}
    (root / "metadata" / f"{name}.json").write_text(json.dumps(kept))
    return root / "st" / f"{name}.h5ad"


def read(path: Path, platform: str = "visium", **told: Any) -> Measurement:
    return hest.read(Source(platform, path, **told))


def test_places_pixel_size_and_counts(tmp_path: Path) -> None:
    path = write(tmp_path)
    found = read(path)
    data = anndata.read_h5ad(path)
    np.testing.assert_array_equal(found.xy[:, 0], data.obs.pxl_col_in_fullres)
    np.testing.assert_array_equal(found.xy[:, 1], data.obs.pxl_row_in_fullres)
    assert found.space_um == MPP
    assert found.lattice_um is None  # array_row and array_col are not believed
    assert found.reported_mpp == pytest.approx(MPP)  # 55 um here, where Space Ranger means 65
    np.testing.assert_array_equal(dense(found), COUNTS)


def test_controls_are_no_genes(tmp_path: Path) -> None:
    path = write(tmp_path, st_technology="Xenium")
    found = read(path, "xenium")
    assert found.column_kind.tolist() == [GENE] * 2 + [CONTROL] * 4
    assert found.notes == ["4 controls are left out"]
    row = ManifestRow("s", None, path, "xenium", format="hest")
    config = PrepConfig()
    _, stream, facts = profiles_of(row, found, place(row, None, found, config), config)
    assert facts["controls"] == 4
    assert stream.table.symbols == ("TP53", "EGFR")
    list(stream.blocks())
    np.testing.assert_array_equal(stream.control, COUNTS[:, 2:].sum(1))


@pytest.mark.parametrize(
    ("technology", "platform", "told", "kind", "shape", "size"),
    [
        ("Visium", "visium", {}, "spot", DISC, 55),
        ("Visium", "visium", {"spot_diameter": None}, "spot", DISC, 55),
        ("Spatial Transcriptomics", "st", {"spot_diameter": 150.0, "inter_spot_dist": 110.0}, "spot", DISC, 150),
        ("Spatial Transcriptomics", "st", {"spot_diameter": float("nan")}, "spot", DISC, 100),
        ("Xenium", "xenium", {}, "bin", SQUARE, 100),
        ("Visium HD", "visium_hd", {"inter_spot_dist": 128.0}, "bin", SQUARE, 128),
    ],
)
def test_footprints(
    tmp_path: Path, technology: str, platform: str, told: dict[str, Any], kind: str, shape: int, size: float
) -> None:
    found = read(write(tmp_path, st_technology=technology, **told), platform)
    assert (found.platform, found.kind) == (platform, kind)
    assert (found.footprint_kind == shape).all()
    assert (found.footprint_um == size).all()


def test_a_pool_of_another_size_is_told_by_unit(tmp_path: Path) -> None:
    found = read(write(tmp_path, st_technology="Xenium"), "xenium", unit="square58um")  # NCBI784
    assert (found.footprint_um == 58).all()


@pytest.mark.parametrize("tag", [0.02734, None])
def test_the_tag_of_the_tif_is_not_believed(tmp_path: Path, tag: float | None) -> None:
    image = write_tiff(tmp_path / "wsis.tif", tissue(480, 480), mpp=tag)
    row = ManifestRow("s", image, write(tmp_path), "visium", format="hest")
    info = SlideStore(build_slide(row, tmp_path / "stores", PrepConfig())).info
    assert (info.mpp, info.mpp_source, info.alignment_source) == (MPP, "matrix", "HEST-1k")
    np.testing.assert_array_equal(info.alignment, np.eye(3))
    ignored = [note for note in info.facts["notes"] if "embedded mpp of 0.02734 is not believable" in note]
    assert len(ignored) == (tag is not None)


def test_a_matrix_of_the_user_comes_first(tmp_path: Path) -> None:
    assert read(write(tmp_path), alignment=tmp_path / "m.csv").matrix is None


def test_inputs_of_a_file_and_of_a_folder(tmp_path: Path) -> None:
    path = write(tmp_path)
    expected = [path, tmp_path / "metadata" / "TENX158.json"]
    assert hest.inputs(Source("visium", path)) == hest.inputs(Source("visium", tmp_path)) == expected
    write(tmp_path, "NCBI784")
    with pytest.raises(ValueError, match=r"holds 2 files st/\*\.h5ad \(st/NCBI784\.h5ad, st/TENX158\.h5ad"):
        hest.inputs(Source("visium", tmp_path))
    with pytest.raises(ValueError, match=r"holds 0 files st/\*\.h5ad; name the one"):
        hest.inputs(Source("visium", tmp_path / "st"))


def test_ensembl_names(tmp_path: Path) -> None:
    ids = ["ENSG00000141510", "ENSG00000146648.5", *GENES[2:]]
    found = read(write(tmp_path, genes=ids))
    assert found.names[:2] == ids[:2]


@pytest.mark.parametrize(
    ("told", "source", "message"),
    [
        ({"pixel_size_um_estimated": None}, {}, r"TENX158\.json: tells no pixel_size_um_estimated.*not to be believed"),
        ({"pixel_size_um_estimated": float("nan")}, {}, "tells no pixel_size_um_estimated"),
        ({"pixel_size_um_estimated": "0.27"}, {}, "tells no pixel_size_um_estimated"),
        ({"st_technology": "Xenium"}, {}, "st_technology is Xenium, the manifest says visium; write platform xenium"),
        ({"st_technology": "Slide-seq"}, {}, "st_technology is Slide-seq.*known are Visium, Visium HD"),
        ({"species": "Mus musculus"}, {"species": "human"}, "species is Mus musculus, the manifest says human"),
        ({"st_technology": "Xenium", "inter_spot_dist": None}, {"platform": "xenium"}, "tells no inter_spot_dist"),
        ({}, {"unit": "cell"}, "HEST-1k holds no cells"),
    ],
)
def test_metadata_with_faults(tmp_path: Path, told: dict[str, Any], source: dict[str, Any], message: str) -> None:
    path = write(tmp_path, **told)
    with pytest.raises(ValueError, match=message):
        read(path, **{"platform": "visium", **source})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("metadata/TENX158.json", Path.unlink, r"TENX158\.json: no such file, so the pixel size is not known"),
        ("metadata/TENX158.json", lambda p: p.write_text("{"), r"TENX158\.json: not readable as JSON"),
        ("metadata/TENX158.json", lambda p: p.write_text("[1]"), r"TENX158\.json: holds no names with values"),
        ("st/TENX158.h5ad", Path.unlink, r"TENX158\.h5ad: no such file"),
        ("st/TENX158.h5ad", cut, r"TENX158\.h5ad: no readable AnnData"),
    ],
)
def test_files_with_faults(tmp_path: Path, name: str, change: Callable[[Path], Any], message: str) -> None:
    path = write(tmp_path)
    change(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read(path)
