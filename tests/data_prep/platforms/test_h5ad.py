"""AnnData files: every form of the counts, genes, places, footprints, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data_prep import align
from data_prep.manifest import ManifestRow
from data_prep.one_slide import build_slide
from data_prep.platforms import CONTROL, GENE, OTHER, Measurement, Source, annotated, h5ad
from storm.prep_config import PrepConfig
from storm.schema import DISC, SQUARE
from storm.store import SlideStore
from tests.data_prep.platforms.helpers import dense, fit

SYMBOLS = ["TP53", "EGFR", "ERBB2", "MKI67", "CD3E"]
IDS = ["ENSG00000141510", "ENSG00000146648", "ENSG00000141736", "ENSG00000148773", "ENSG00000198851"]
COUNTS = np.random.default_rng(0).poisson(1.0, (40, 5))


def made(x: Any = None, **parts: Any) -> anndata.AnnData:
    """40 profiles of 5 genes on the Visium lattice, 2 px per um, as scanpy would hold them."""
    row, col = np.divmod(np.arange(40), 8)
    obs = pd.DataFrame({"in_tissue": np.arange(40) % 2, "array_row": row, "array_col": 2 * col + row % 2},
                       index=[f"AC{i:02d}-1" for i in range(40)])  # fmt: skip
    places = np.column_stack([100 + obs.array_col * 50, 100 + obs.array_row * 50 * 3**0.5]) * 2.0
    x = sparse.csr_matrix(COUNTS.astype(np.float32)) if x is None else x
    found = anndata.AnnData(x, obs, pd.DataFrame({"gene_ids": IDS}, index=SYMBOLS), obsm={"spatial": places})
    for name, value in parts.items():
        setattr(found, name, value)
    return found


def write(path: Path, data: anndata.AnnData) -> Path:
    data.write_h5ad(path)
    return path


def read(path: Path, platform: str = "visium", **told: Any) -> Measurement:
    return h5ad.read(Source(platform, path, **told))


def test_a_file_of_scanpy(tmp_path: Path) -> None:
    data = made()
    found = read(write(tmp_path / "a.h5ad", data))
    assert (found.platform, found.kind, found.ids) == ("visium", "spot", list(data.obs_names))
    assert (found.names, found.symbols) == (IDS, SYMBOLS)
    np.testing.assert_array_equal(found.xy, data.obsm["spatial"])
    np.testing.assert_array_equal(dense(found), COUNTS)
    assert found.in_tissue is not None
    np.testing.assert_array_equal(found.in_tissue, np.arange(40) % 2)
    assert (found.footprint_um == 55).all()
    assert found.space_um is None
    assert fit(found).mpp == pytest.approx(0.5)


FORMS: dict[str, Callable[[], anndata.AnnData]] = {
    "csr": made,
    "csc": lambda: made(sparse.csc_matrix(COUNTS.astype(np.float64))),
    "dense": lambda: made(COUNTS.astype(np.int16)),
    "layer": lambda: made(COUNTS / 3, layers={"counts": sparse.csr_matrix(COUNTS)}),
    "dense layer": lambda: made(np.log1p(COUNTS), layers={"counts": COUNTS}),
    "int64": lambda: made(sparse.csr_matrix(COUNTS.astype(np.int64))),
    "bool": lambda: made(sparse.csr_matrix(COUNTS > 0)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [np.arange(40), np.array([3, 4, 30]), np.arange(0)], ids=["all", "some", "none"])
@pytest.mark.parametrize("block", [7, 1 << 22], ids=["small blocks", "one block"])
def test_forms_of_the_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, rows: np.ndarray, block: int
) -> None:
    monkeypatch.setattr("data_prep.platforms._BLOCK_ENTRIES", block)
    monkeypatch.setattr(annotated, "_BLOCK_CELLS", block)
    found = read(write(tmp_path / "a.h5ad", FORMS[form]()))
    np.testing.assert_array_equal(dense(found, rows), (COUNTS > 0 if form == "bool" else COUNTS)[rows])
    if block == 7 and len(rows) == 40:
        assert len(list(found.counts(rows))) > 5 or form == "bool"
    assert found.facts["counts from"] == ("layers/counts" if "layer" in form else "X")


def test_a_large_matrix_by_gene_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.h5ad", FORMS["csc"]())
    monkeypatch.setattr(annotated, "MAX_TURNED", 10)
    with pytest.raises(ValueError, match=r"a\.h5ad: X is stored by gene \(CSC\).*more than 10.*write it by profile"):
        read(path)


def test_genes(tmp_path: Path) -> None:
    columns = {
        "feature_name": ["TP53", "EGFR", "BLANK_0001", "CD3-antibody", None],
        "feature_types": ["Gene Expression"] * 3 + ["Antibody Capture", "Blank Codeword"],
    }
    index = ["ENSG00000141510", "ENSG00000146648", "ENSG00000000003", "ENSG00000198851", "b5"]
    data = made(var=pd.DataFrame(columns, index=index))
    found = read(write(tmp_path / "a.h5ad", data))
    assert found.names == list(data.var_names)
    assert found.symbols == ["TP53", "EGFR", "BLANK_0001", "CD3-antibody", "b5"]
    assert found.column_kind.tolist() == [GENE, GENE, CONTROL, OTHER, CONTROL]
    assert found.notes == ["2 controls are left out", "1 features of another kind are left out"]


def test_symbols_stand_in_for_missing_ids(tmp_path: Path) -> None:
    data = made(var=pd.DataFrame({"gene_ids": [*IDS[:4], None]}, index=SYMBOLS))
    assert read(write(tmp_path / "a.h5ad", data)).names == [*IDS[:4], "CD3E"]
    bare = made(var=pd.DataFrame(index=SYMBOLS))
    found = read(write(tmp_path / "b.h5ad", bare))
    assert found.names == found.symbols == SYMBOLS


def test_a_categorical_of_anndata_0_7(tmp_path: Path) -> None:
    """Their columns hold codes and point to their words: read as numbers they would make every gene something else."""
    path = write(tmp_path / "a.h5ad", made())
    with h5py.File(path, "a") as root:
        root["var/__categories/feature_types"] = np.array(["Antibody Capture", "Gene Expression"], "S")
        root["var/feature_types"] = np.array([1, 1, 0, 1, 1], np.int8)
        root["var/feature_types"].attrs["categories"] = root["var/__categories/feature_types"].ref
    assert read(path).column_kind.tolist() == [GENE, GENE, OTHER, GENE, GENE]


@pytest.mark.parametrize(
    ("platform", "told", "kind", "shape", "size"),
    [
        ("visium", {}, "spot", DISC, 55),
        ("st", {}, "spot", DISC, 100),
        ("st", {"unit": "disc150um"}, "spot", DISC, 150),
        ("visium_hd", {"unit": "square8um"}, "bin", SQUARE, 8),
        ("xenium", {"unit": "square100um", "space_um": 1.0}, "bin", SQUARE, 100),
        ("xenium", {"space_um": 1.0}, "cell", DISC, 2 * (75 / np.pi) ** 0.5),
        ("visium_hd", {"unit": "cell"}, "cell", DISC, 2 * (75 / np.pi) ** 0.5),
    ],
)
def test_footprints(tmp_path: Path, platform: str, told: dict[str, Any], kind: str, shape: int, size: float) -> None:
    data = made()
    data.obs["cell_area"] = 75.0
    found = read(write(tmp_path / "a.h5ad", data), platform, **told)
    assert (found.kind, found.space_um) == (kind, told.get("space_um"))
    assert found.footprint_kind.tolist() == [shape] * 40
    np.testing.assert_allclose(found.footprint_um, size, rtol=1e-6)


def test_what_the_scale_factors_say_is_compared(tmp_path: Path) -> None:
    data = made(uns={"spatial": {"lib": {"scalefactors": {"spot_diameter_fullres": 130.0}}}})
    assert read(write(tmp_path / "a.h5ad", data)).reported_mpp == pytest.approx(0.5)  # of Space Ranger: 65 um


def test_a_store_of_it(tmp_path: Path) -> None:
    row = ManifestRow("s", None, write(tmp_path / "a.h5ad", made()), "visium", format="h5ad")
    store = SlideStore(build_slide(row, tmp_path / "stores", PrepConfig()))
    assert store.info.mpp_source == "lattice"
    assert store.info.mpp == pytest.approx(0.5)
    assert sum(int(store.counts(np.array([row])).count.sum()) for row in range(40)) == COUNTS.sum()
    assert sorted(store.genes().ids) == sorted(IDS)


def edited(data: anndata.AnnData, **parts: Any) -> anndata.AnnData:
    for name, value in parts.items():
        setattr(data, name, value)
    return data


def with_count(value: float) -> anndata.AnnData:
    counts = COUNTS.astype(np.float32)
    counts[2, 1] = value
    return made(sparse.csr_matrix(counts))


def with_places(places: Any) -> anndata.AnnData:
    data = made()
    del data.obsm["spatial"]
    if places is not None:
        data.obsm["spatial"] = places
    return data


NAN_PLACE = np.where(np.arange(80).reshape(40, 2) == 7, np.nan, 1.0)


@pytest.mark.parametrize(
    ("data", "told", "message"),
    [
        (lambda: made(np.log1p(COUNTS / COUNTS.sum(1, keepdims=True) * 1e4)), {}, "no count; give the raw counts"),
        (lambda: with_count(1.5), {}, "holds 1.5, which is no count"),
        (lambda: with_count(-1), {}, "holds -1.0, which is no count"),
        (lambda: with_count(np.nan), {}, "holds nan, which is no count"),
        (lambda: with_count(3e9), {}, "which is no count"),
        (lambda: with_places(None), {}, r"has no obsm\['spatial'\]"),
        (lambda: with_places(np.zeros((40, 3))), {}, r"obsm\['spatial'\] is 40 x 3 of float64, not 40 x 2 numbers"),
        (lambda: with_places(NAN_PLACE), {}, "has no place for 1 of 40 profiles"),
        (lambda: edited(made(), obs_names=["a"] * 40), {}, "obs_names hold 'a' twice"),
        (lambda: made(uns={"spatial": {"one": {}, "two": {}}}), {}, r"holds 2 sections \(one, two\)"),
        (made, {"platform": "visium_hd"}, "nothing tells what its visium_hd profiles cover"),
        (made, {"platform": "xenium"}, "xenium does not measure on the H&E"),
        (made, {"platform": "cosmx", "space_um": 1.0}, "nothing tells what its cells cover; add the areas"),
        (lambda: edited(made(), obs=made().obs.assign(cell_area=0.0)), {"unit": "cell"}, "40 of 40 cells have no area"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_files_with_faults(tmp_path: Path, data: Callable, told: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.h5ad", data())
    with pytest.raises(ValueError, match=rf"bad\.h5ad: .*{message}"):
        read(path, **{"platform": "visium", **told})


def drop(name: str) -> Callable[[h5py.File], None]:
    return lambda root: root.__delitem__(name)


def put(name: str, value: Any) -> Callable[[h5py.File], None]:
    def change(root: h5py.File) -> None:
        del root[name]
        root[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("X"), r"no readable AnnData \('it has no X'\)"),
        (drop("var"), "it has no var"),
        (put("X/indptr", np.arange(41)), "X is no sound matrix"),
        (put("X/indptr", np.zeros(3, int)), "X is no sound matrix"),
        (put("X/data", np.array(["a", "b"], "S")), "X/data is no list of numbers"),
        (put("obs", np.zeros(40, [("index", "i4")])), "was written by anndata before 0.7"),
        (put("X", h5py.ExternalLink("other.h5", "/X")), "X is a link"),
        (lambda r: r["X"].attrs.__setitem__("shape", [40, 6]), "X is 40 x 6, but there are 40 obs_names and 5"),
        (lambda r: r["X"].attrs.__setitem__("encoding-type", "coo_matrix"), "X is stored as coo_matrix"),
        (lambda r: r["obsm/spatial"].attrs.__setitem__("encoding-type", "rec"), "stored as rec 0.2.0, which is not"),
        (lambda r: r["obs/_index"].attrs.__delitem__("encoding-version"), "stored as string-array , which is not read"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, change: Callable[[h5py.File], None], message: str) -> None:
    path = write(tmp_path / "bad.h5ad", made())
    with h5py.File(path, "a") as root:
        change(root)
    with pytest.raises(ValueError, match=rf"bad\.h5ad: .*{message}"):
        read(path)


def test_a_gene_that_is_not_there_is_found_when_counts_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.h5ad", made())
    with h5py.File(path, "a") as root:
        root["X/indices"][3] = 5
    with pytest.raises(ValueError, match=r"bad\.h5ad: X has an index outside 0 to 4"):
        list(read(path).counts(np.arange(40)))


def test_files_that_are_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", made())
    (tmp_path / "cut.h5ad").write_bytes(path.read_bytes()[:-900])
    with pytest.raises(ValueError, match=r"cut\.h5ad: no readable AnnData \(.*truncated"):
        read(tmp_path / "cut.h5ad")
    (tmp_path / "text.h5ad").write_text("not this")
    with pytest.raises(ValueError, match=r"text\.h5ad: no readable AnnData"):
        read(tmp_path / "text.h5ad")
    with pytest.raises(ValueError, match=r"none\.h5ad: no such file"):
        read(tmp_path / "none.h5ad")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder: no readable AnnData"):
        read(tmp_path / "folder")
    assert h5ad.inputs(Source("visium", path)) == [path]


def test_real_dlpfc(real_data: Path, tmp_path: Path) -> None:
    """The file lacks its places; with those of the positions file it is read."""
    folder = real_data / "dlpfc_151673"
    with pytest.raises(ValueError, match=r"obsm\['spatial'\] is 3639 x 0 of float64, not 3639 x 2 numbers"):
        read(folder / "LIBD_subset.h5ad")
    data = anndata.read_h5ad(folder / "LIBD_subset.h5ad")
    columns = ["barcode", "in_tissue", "array_row", "array_col", "y", "x"]
    positions = pd.read_csv(folder / "10X" / "151673" / "tissue_positions_list.txt", header=None, names=columns)
    placed = positions.set_index("barcode").loc[data.obs_names]
    assert (placed.array_row == data.obs.array_row).all()
    data.obsm["spatial"] = placed[["x", "y"]].to_numpy()
    found = read(write(tmp_path / "placed.h5ad", data))
    assert (len(found.ids), len(found.names)) == (3639, 500)
    assert found.ids == list(data.obs_names)
    assert found.names == list(data.var_names)
    np.testing.assert_array_equal(found.xy, placed[["x", "y"]].to_numpy())
    np.testing.assert_array_equal(dense(found), data.X.toarray())
    row = positions[positions.array_row == 38].sort_values("array_col")  # neighbours in a row are 100 um apart
    assert fit(found).mpp == pytest.approx(100 / np.hypot(row.x.diff(), row.y.diff()).mean(), rel=5e-3)
    assert align.lattice_fault(fit(found), "visium", PrepConfig()) is None
