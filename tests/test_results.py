"""AnnData as its users expect it: their object unchanged, plots that run with no further argument, provenance."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from storm import export, results, store
from tests import untrained


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> export.Pretrained:
    folder = tmp_path_factory.mktemp("model")
    return export.load(export.export(untrained.write_checkpoint(folder / "run"), folder / "model"))


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained.write_store(tmp_path_factory.mktemp("store"))


def test_embed_returns_the_measured_counts_and_places(pretrained: export.Pretrained, slide: Path) -> None:
    found = results.embed(pretrained, slide)
    opened = store.SlideStore(slide)
    profiles, genes = opened.profiles(), opened.genes()
    assert list(found.obs_names) == profiles.ids
    assert found.var_names.is_unique and list(found.var["gene_ids"]) == list(genes.ids)
    assert int(found.X.sum()) == int(profiles.count.sum())
    assert found.obsm["X_storm"].shape == (len(profiles), 32)
    np.testing.assert_allclose(found.obsm["spatial_um"], profiles.xy_um)
    np.testing.assert_allclose(found.obsm["spatial"], profiles.xy_um / 0.875)
    assert found.uns["storm"]["input"] == "H&E and counts"
    assert found.uns["storm"]["model_hash"] == pretrained.hash
    assert results.embed(pretrained, slide, use_counts=False).uns["storm"]["input"] == "H&E only"


def test_the_users_own_object_is_unchanged_but_for_what_is_added(pretrained: export.Pretrained, slide: Path) -> None:
    names = ["spot40-1", "spot3-1", "spot7-1"]
    own = anndata.AnnData(
        sparse.csr_matrix(np.arange(12.0).reshape(3, 4)),
        pd.DataFrame({"cluster": ["a", "b", "a"]}, index=names), pd.DataFrame(index=["q", "r", "s", "t"]),
        layers={"raw": np.ones((3, 4))}, uns={"mine": 1}, obsm={"X_pca": np.zeros((3, 2))},
    )  # fmt: skip
    before = own.copy()
    found = results.embed(pretrained, slide, adata=own)
    for obj in (own, found):
        assert list(obj.obs_names) == names and obj.obs.equals(before.obs) and obj.var.equals(before.var)
        assert (obj.X != before.X).nnz == 0 and np.array_equal(obj.layers["raw"], before.layers["raw"])
    assert list(own.obsm) == ["X_pca"] and list(own.uns) == ["mine"]
    whole = results.embed(pretrained, slide)[names].obsm["X_storm"]
    np.testing.assert_allclose(found.obsm["X_storm"], whole, atol=1e-5)
    own.obs_names = ["spot40-1", "spot3-1", "elsewhere-1"]
    with pytest.raises(ValueError, match=r"1 of 3 obs_names \(as 'elsewhere-1'\)"):
        results.embed(pretrained, slide, adata=own)
    own.obs_names = ["spot40-1", "spot3-1", "spot40-1"]
    with pytest.raises(ValueError, match=r"'spot40-1' is there twice; give the object of slide slide1 alone"):
        results.embed(pretrained, slide, adata=own)


def test_the_users_own_places_and_images_stay(pretrained: export.Pretrained, slide: Path) -> None:
    own = anndata.AnnData(np.ones((3, 1), np.float32), pd.DataFrame(index=["spot40-1", "spot3-1", "spot7-1"]))
    px = results.embed(pretrained, slide, adata=own).obsm["spatial"]
    for places, drawn in ((px, True), (px + 0.4, True), (px * 0.875, False), (np.ones((3, 3)), False)):
        own.obsm["spatial"] = places
        found = results.embed(pretrained, slide, adata=own)
        np.testing.assert_array_equal(found.obsm["spatial"], places)
        assert ("spatial" in found.uns) == drawn, "an image lies under its own frame alone"
    del own.obsm["spatial"]
    own.uns["spatial"] = {"mine": {}}
    found = results.embed(pretrained, slide, adata=own)
    assert list(found.uns["spatial"]) == ["mine"]
    np.testing.assert_array_equal(found.obsm["spatial"], px)


def test_predict_is_dense_unique_and_says_its_unit(pretrained: export.Pretrained, slide: Path) -> None:
    found = results.predict(pretrained, slide)
    assert isinstance(found.X, np.ndarray) and found.X.dtype == np.float32 and np.isfinite(found.X).all()
    assert found.shape == (len(store.SlideStore(slide).profiles()), 32)
    assert found.var_names.is_unique and found.var["gene_ids"].iloc[3] == "ENSG00000000003"
    assert found.uns["storm"]["unit"].startswith("lognorm: ")
    assert list(found.uns["storm"]["genes_left_out"]) == ["ENSG99999999999"]
    assert found.uns["storm"]["input"] == "H&E only" and found.uns["storm"]["split_by"] == "donor"
    shares = results.predict(pretrained, slide, unit="composition")
    np.testing.assert_allclose(shares.X.sum(1), 1, atol=1e-5)
    with pytest.warns(UserWarning, match=r"1 of 3 genes are left out \(as 'GENE38'\): a gene outside the reference"):
        some = results.predict(pretrained, slide, ["GENE5", "GENE38", "GENE2"], "composition")
    assert list(some.var_names) == ["GENE5", "GENE2"] and list(some.uns["storm"]["genes_left_out"]) == ["GENE38"]
    np.testing.assert_array_equal(some.X, shares[:, ["GENE5", "GENE2"]].X)
    again = results.predict(pretrained, slide, some.var_names, "composition")  # type: ignore[arg-type]
    np.testing.assert_array_equal(again.X, some.X)
    with pytest.raises(ValueError, match="unit 'tpm' is unknown"):
        results.predict(pretrained, slide, unit="tpm")


def test_squidpy_draws_it_with_no_further_argument(
    pretrained: export.Pretrained, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    matplotlib.use("Agg")
    squidpy = pytest.importorskip("squidpy")
    bare = untrained.write_store(tmp_path / "bare", "bare", measured=False)
    for found in (
        results.predict(pretrained, slide),
        results.embed(pretrained, slide),
        results.embed(pretrained, bare),
    ):
        results.write(found, tmp_path / "found.h5ad")
        read = anndata.read_h5ad(tmp_path / "found.h5ad")
        squidpy.pl.spatial_scatter(read)
        matplotlib.pyplot.savefig(tmp_path / "drawn.png")
        matplotlib.pyplot.close("all")
        assert (tmp_path / "drawn.png").stat().st_size > 10_000


def test_image_and_scale_factors_lie_under_the_spots(pretrained: export.Pretrained, slide: Path) -> None:
    found = results.predict(pretrained, slide, ["GENE1"])
    (entry,) = found.uns["spatial"].values()
    image, factors = entry["images"]["hires"], entry["scalefactors"]
    assert image.dtype == np.uint8 and max(image.shape) <= 2000
    # the one absent tile, (1, 1), is the white hole of the image
    hole = (np.array([1.5, 1.5]) * 112 / 0.875 * factors["tissue_hires_scalef"]).astype(int)
    assert (image[hole[1] - 10 : hole[1] + 10, hole[0] - 10 : hole[0] + 10] == 255).all()
    assert (image == 255).all(2).mean() < 0.02
    assert factors["spot_diameter_fullres"] == pytest.approx(55 / 0.875)


def test_writing_twice_gives_the_same_bytes_and_leaves_no_scraps(
    pretrained: export.Pretrained, slide: Path, tmp_path: Path
) -> None:
    for name in ("a.h5ad", "b.h5ad"):
        results.write(results.embed(pretrained, slide), tmp_path / name)
    assert (tmp_path / "a.h5ad").read_bytes() == (tmp_path / "b.h5ad").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad", "b.h5ad"]
