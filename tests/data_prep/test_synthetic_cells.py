"""Cells of the synthetic tissue: a real bundle, its truth, the errors of segmentation, and the gate."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy import spatial, stats

from data_prep import build, pack
from data_prep.synthetic import SIZES, Size, write_corpus
from data_prep.synthetic.corpus import manifest_row, sections, write_section
from data_prep.synthetic.descriptors import SHARES, WIDTH, write_descriptors
from data_prep.synthetic.expression import choose_genes, targeted
from data_prep.synthetic.segment import MERGED, SHIFTED, SPILL, areas, segment
from data_prep.synthetic.tissue import LATENTS, grow
from storm import schema
from storm.evaluate.baselines import colour_features
from storm.shards import ShardSet
from storm.store import SlideStore
from tests.conftest import PREP_TINY
from tests.data_prep.gate import Gate, Measured, manifest, read_section

PAIR = SIZES["pair"]
Truth = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_corpus(folder, "pair", seed=0, workers=1)
    return folder


@pytest.fixture(scope="module")
def stores(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "stores"
    words = [str(pair / "manifest.csv"), "--store", str(folder), "--config", str(PREP_TINY), "--workers", "1"]
    assert build.main(words) == 0
    return folder


def truth_of(folder: Path, row: dict[str, str]) -> Truth:
    with np.load(folder / "truth" / f"{row['slide_id']}.npz", allow_pickle=False) as file:
        return dict(file)


def rows_of(folder: Path, platform: str) -> list[dict[str, str]]:
    return [row for row in manifest(folder) if row["platform"] == platform]


def test_each_donor_comes_on_both_platforms_in_one_split() -> None:
    found = sections(SIZES["platforms"])
    donors = {s.donor for s in found}
    assert {s.split for s in found} == {"train", "test"} and 6 <= len(donors) <= 9
    for donor in donors:
        own = [s for s in found if s.donor == donor]
        assert [s.platform for s in own] == ["visium", "xenium"] and len({s.split for s in own}) == 1
        assert own[0].tissue == own[1].tissue == own[0].index


def test_a_bundle_is_built_into_cells_where_the_truth_says(pair: Path, stores: Path) -> None:
    for row in rows_of(pair, "xenium"):
        truth, store = truth_of(pair, row), SlideStore(stores / f"{row['slide_id']}.zarr.zip")
        profiles, genes = store.profiles(), store.genes()
        assert profiles.ids == truth["profile_id"].tolist() and store.info.platform == "xenium"
        assert set(genes.ids) == set(truth["gene_id"].tolist()) and len(genes) == PAIR.probes
        assert (profiles.footprint_kind == schema.POLYGON).all()
        np.testing.assert_allclose(profiles.xy_um, truth["xy_um"], atol=0.05)  # through a turned, shifted alignment
        np.testing.assert_allclose(profiles.area_um2, truth["area_um2"], rtol=0.01)
        moved = np.hypot(*(truth["xy_um"] - truth["true_xy_um"]).T)
        assert np.ptp(moved) < 1e-9 and moved.max() <= 3
        assert np.corrcoef(profiles.depth, truth["depth"])[0, 1] > 0.9


def test_cells_are_packed_into_regions_of_their_panel(stores: Path, tmp_path: Path) -> None:
    """Five tiles a side, the geometry of the large presets: every cell once, no region above the cap."""
    words = ["--store", str(stores), "--out", str(tmp_path / "shards"), "--config", str(PREP_TINY)]
    assert pack.main([*words, "spots_side=6", "max_profiles=300"]) == 0
    packed = ShardSet(tmp_path / "shards")
    index, cells = packed.index("train"), 0
    for i in range(len(index)):
        group = packed.read("train", index, i)
        if group.meta.platform != "xenium":
            continue
        assert packed.panels[group.meta.panel].sum() == PAIR.probes
        assert {(r.rows, r.cols) for r in group.meta.regions} == {(5, 5)}
        assert np.bincount(group.region).max() <= 300
        cells += len(group.profiles)
    assert cells == len(SlideStore(stores / "d00s1_xenium.zarr.zip").profiles())


def test_truth_of_cells_is_what_evaluation_reads(pair: Path) -> None:
    for row in rows_of(pair, "xenium"):
        truth = truth_of(pair, row)
        cells = len(truth["profile_id"])
        assert truth["expected"].shape == (cells, PAIR.probes) and truth["latent"].shape == (cells, len(LATENTS))
        assert {len(truth[k]) for k in ("domain", "xy_um", "depth", "segmentation")} == {cells}
        np.testing.assert_allclose(truth["expected"].sum(1), 1, rtol=1e-5)
        assert sorted(set(truth["gene_class"])) == list("abcde")


def test_counts_of_cells_look_measured(pair: Path) -> None:
    for row in rows_of(pair, "xenium"):
        truth, seen = truth_of(pair, row), read_section(pair, row)
        depth = truth["depth"]
        assert depth.min() >= 20 and depth.max() <= 700 and 60 <= np.median(depth) <= 400
        assert 0.63 <= stats.spearmanr(truth["area_um2"], depth).statistic <= 0.80  # area tells depth, noisily
        assert 0.3 < (seen.lognorm == 0).mean() < 0.95
        assert 40 < np.median(truth["area_um2"]) < 160


def test_platforms_differ_by_gene() -> None:
    panel = choose_genes(2000, 0)
    spread = panel.efficiency.std(1)
    assert (spread[:2] > 0.5).all() and 0.7 < spread[2] < 1.0
    assert abs(np.corrcoef(panel.efficiency[0], panel.efficiency[2])[0, 1]) < 0.1
    probed = targeted(panel, 300, 0)
    assert len(set(probed.tolist())) == 300
    assert [int((panel.kind[probed] == c).sum()) for c in "abcde"] == [60, 60, 60, 45, 75]


def test_two_cuts_share_the_tissue_and_not_the_picture(pair: Path) -> None:
    for donor in ("donor00", "donor01"):
        spots, cells = (row for row in manifest(pair) if row["donor"] == donor)
        one, other = truth_of(pair, spots), truth_of(pair, cells)
        under = spatial.KDTree(other["true_xy_um"]).query_ball_point(one["true_xy_um"], 27.5)
        rows = [i for i, members in enumerate(under) if len(members) > 4]
        assert len(rows) > 5
        niche = LATENTS.index("niche")
        pooled = np.stack([other["latent"][under[i]].mean(0) for i in rows])[:, niche:]
        assert np.corrcoef(pooled.ravel(), one["latent"][rows, niche:].ravel())[0, 1] > 0.95
        red, again = (tifffile.imread(pair / row["image"], key=0).mean((0, 1)) for row in (spots, cells))
        assert np.abs(red - again).max() > 1  # stains of their own


def test_segmentation_errs_as_often_as_told() -> None:
    tissue = grow(np.random.default_rng(0), 1000.0)
    found = segment(np.random.default_rng(1), tissue)
    cells = len(found.xy_um)
    merged = np.diff(found.nuclei.indptr) == 2
    assert (merged == (found.error == MERGED)).all()
    assert 0.02 < merged.mean() < 0.07 and 0.02 < (found.error == SHIFTED).mean() < 0.05
    np.testing.assert_allclose(found.nuclei.sum(1), 1)
    total = found.share.sum(0)  # of each true cell's molecules, how much anybody got
    assert found.share.min() >= 0 and total.max() <= 1 + 1e-9
    own = found.share.multiply(found.nuclei > 0).sum(1)[found.error == 0]
    away = 1 - own
    assert SPILL[0] - 1e-9 <= away[away < 0.21].min() and (away < SPILL[1] + 1e-9).mean() > 0.9
    assert cells < len(tissue.kind)


def test_cells_do_not_overlap_but_for_errors() -> None:
    found = segment(np.random.default_rng(1), grow(np.random.default_rng(0), 500.0))
    good = np.flatnonzero(found.error == 0)
    centre, corner = found.xy_um[good], found.polygon_um[good]
    nearest = spatial.KDTree(centre).query(corner.reshape(-1, 2))[1]
    assert (nearest == np.repeat(np.arange(len(good)), corner.shape[1])).mean() > 0.999
    square = np.array([[[0.0, 0], [2, 0], [2, 3], [0, 3]]])
    assert areas(square).tolist() == [6.0]


def test_a_section_of_cells_written_again_alone_has_the_same_bytes(pair: Path, tmp_path: Path) -> None:
    write_section(tmp_path, PAIR, 0, sections(PAIR)[1])
    again = [p for p in sorted(tmp_path.rglob("*")) if p.is_file()]
    assert len(again) == 2 + 6  # image, truth, bundle
    for path in again:
        assert path.read_bytes() == (pair / path.relative_to(tmp_path)).read_bytes(), path.name


def test_descriptors_explain_the_loadings_as_far_as_told(tmp_path: Path) -> None:
    panel = choose_genes(2000, 3)
    code = panel.loading.T[:, panel.loading.any(1)]
    for path, r2 in zip(write_descriptors(tmp_path, panel, 3), SHARES, strict=True):
        with np.load(path, allow_pickle=False) as file:
            ids, descriptor = file["gene_id"], file["descriptor"]
        assert ids.dtype.kind == "U" and (ids == panel.ids).all()
        assert descriptor.shape == (2000, WIDTH) and descriptor.dtype == np.float32
        explained = np.array([[np.corrcoef(c, d)[0, 1] ** 2 for d in descriptor.T] for c in code.T])
        assert np.diag(explained) == pytest.approx(r2, abs=0.07)
        assert explained[:, code.shape[1] :].max() < 0.02  # padding tells nothing
    first = path.read_bytes()
    assert write_descriptors(tmp_path, panel, 3)[-1].read_bytes() == first


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Measured]:
    """Every fifth cell of three training and two test donors."""
    size = Size(train=3, val=0, test=2, second=0, genes=400, mpp=1.0, visium_um=1100.0, st_um=0.0, probes=200)
    folder = tmp_path_factory.mktemp("cells")
    found = [section for section in sections(size) if section.platform == "xenium"]
    for section in found:
        write_section(folder, size, 0, section)
    return [read_section(folder, manifest_row(section, size.mpp), every=5) for section in found]


def test_gate_of_cells(cells: list[Measured]) -> None:
    gate = Gate(cells)
    oracle = gate.score([np.log1p(1e4 * s.truth["expected"]) for s in gate.test])
    colour = gate.ridge(lambda s: colour_features(s.patches))
    report = {"oracle": oracle, "colour": colour}
    print(*(f"{name:13s} { ({k: round(v, 3) for k, v in part.items()}) }" for name, part in report.items()), sep="\n")
    assert oracle["a"] > 0.4 and all(oracle[c] > 0.15 for c in "bcd"), report
    # colour shows density, density area, and area depth: so a little of class e is seen
    assert abs(oracle["e"]) <= 0.02 and abs(colour["e"]) <= 0.03, report
    assert colour["a"] < 0.9 * oracle["a"] and all(colour[c] < 0.2 * oracle[c] for c in "bcd"), report


def test_cells_differ_inside_the_area_of_a_spot(pair: Path) -> None:
    """What a pooled footprint can be asked for: the truth varies among the cells of one 55 um disc."""
    for row in rows_of(pair, "xenium"):
        truth = truth_of(pair, row)
        log = np.log(truth["expected"])
        hits = spatial.KDTree(truth["xy_um"]).query_ball_point(truth["xy_um"][::20], 27.5)
        for kind in "ab":
            own = log[:, truth["gene_class"] == kind]
            inside = np.mean([own[members].var(0, ddof=1) for members in hits if len(members) >= 3], 0)
            assert 0.05 < (inside / own.var(0)).mean() < 0.8
