"""The synthetic tissue: vendors' layouts, truth, determinism, and the gate that it is neither too easy nor too hard."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest

from data_prep.synthetic import SIZES, write_corpus
from data_prep.synthetic.corpus import COLUMNS, sections, write_section
from data_prep.synthetic.expression import (
    CLASSES,
    MOLECULE_SHARES,
    cell_expression,
    choose_genes,
    expected_composition,
    under_discs,
)
from data_prep.synthetic.render import Stain, render
from data_prep.synthetic.tissue import NICHE_NEUTRAL, grow, niche
from data_prep.synthetic.vendors import ANTIBODIES
from storm import genes
from storm.evaluate.baselines import colour_features
from tests.data_prep.gate import MATRIX, Gate, manifest, read_section, st_counts, surroundings, tenx_counts, texture


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    write_corpus(folder, "quickstart", seed=0, workers=2)
    return folder


def test_manifest_names_existing_files_and_splits_by_donor(synthetic_tiny: Path) -> None:
    rows = manifest(synthetic_tiny)
    assert tuple(rows[0]) == COLUMNS
    assert {r["platform"] for r in rows} == {"visium", "st"}
    for row in rows:
        assert (synthetic_tiny / row["image"]).is_file() and (synthetic_tiny / row["measurement"]).exists()
        assert (row["spots"] != "") == (row["platform"] == "st")


@pytest.mark.parametrize("size", SIZES)
def test_every_donor_lies_in_one_split(size: str) -> None:
    found = sections(SIZES[size])
    assert {s.split for s in found} >= {"train", "test"}
    assert len({(s.donor, s.split) for s in found}) == len({s.donor for s in found}) == SIZES[size].donors
    assert len({s.slide_id for s in found}) == len(found)


def test_benchmark_is_large_enough() -> None:
    found = sections(SIZES["benchmark"])
    assert len({s.donor for s in found}) >= 12 and len({s.donor for s in found if s.split == "test"}) >= 4
    assert len(found) == 2 * SIZES["benchmark"].donors


def test_openslide_sees_a_pyramid_with_mpp(synthetic_tiny: Path) -> None:
    for row in manifest(synthetic_tiny):
        with openslide.OpenSlide(synthetic_tiny / row["image"]) as slide:
            assert slide.properties["openslide.vendor"] == "generic-tiff"
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(float(row["mpp"]))
            assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(float(row["mpp"]))
            assert slide.level_count >= 3 and slide.level_downsamples[1] == pytest.approx(2)


def test_slide_looks_stained(synthetic_tiny: Path) -> None:
    row = manifest(synthetic_tiny)[0]
    with openslide.OpenSlide(synthetic_tiny / row["image"]) as slide:
        rgb = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3].astype(int)
    red, green, blue = rgb.transpose(2, 0, 1)
    white = (rgb.min(2) > 225).mean()
    nuclei = ((red < 140) & (blue > red)).mean()  # purple and dark
    stroma = ((red > 190) & (green < 190) & (red > blue)).mean()  # pink
    assert 0.1 < white < 0.6 and 0.02 < nuclei < 0.25 and 0.15 < stroma < 0.8


def test_visium_positions_give_the_pixel_size_and_join_the_matrix(synthetic_tiny: Path) -> None:
    row = next(r for r in manifest(synthetic_tiny) if r["platform"] == "visium")
    outs, mpp = synthetic_tiny / row["measurement"], float(row["mpp"])
    lines = (outs / "spatial" / "tissue_positions.csv").read_text().splitlines()
    assert lines[0] == "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres"
    table = np.array([line.split(",")[1:] for line in lines[1:]], int)
    lattice = np.column_stack([table[:, 2] * 50.0, table[:, 1] * 50.0 * 3**0.5, np.ones(len(table))])
    fit, residual, *_ = np.linalg.lstsq(lattice, table[:, [4, 3]].astype(float), rcond=None)
    assert 1 / np.sqrt(abs(np.linalg.det(fit[:2]))) == pytest.approx(mpp, rel=2e-3)
    assert np.sqrt(residual / len(table)).max() < 0.6
    barcodes, counts, _ = tenx_counts(outs / MATRIX["visium"])
    inside = {line.split(",")[0] for line in lines[1:] if line.split(",")[1] == "1"}
    assert set(barcodes) == inside and counts.sum(1).min() > 0
    factors = json.loads((outs / "spatial" / "scalefactors_json.json").read_text())
    assert factors["spot_diameter_fullres"] == pytest.approx(65 / mpp)
    with openslide.OpenSlide(synthetic_tiny / row["image"]) as slide:
        hires = cv2.imread(str(outs / "spatial" / "tissue_hires_image.png"))
        assert hires is not None and hires.shape[1] == pytest.approx(
            slide.dimensions[0] * factors["tissue_hires_scalef"], abs=1
        )


def test_visium_matrix_has_known_genes_and_antibodies(synthetic_tiny: Path) -> None:
    row = next(r for r in manifest(synthetic_tiny) if r["platform"] == "visium")
    _, _, group = tenx_counts(synthetic_tiny / row["measurement"] / MATRIX["visium"])
    ids, names, kinds = ([v.decode() for v in group[f"features/{k}"][:]] for k in ("id", "name", "feature_type"))
    assert tuple(ids[-2:]) == ANTIBODIES and set(kinds[-2:]) == {"Antibody Capture"}
    assert set(kinds[:-2]) == {"Gene Expression"} and len(ids) == SIZES["tiny"].genes + 2
    assert [genes.canonical(n, "human") for n in names[:-2]] == ids[:-2]


def test_st_tables_join_and_miss_one_spot(synthetic_tiny: Path) -> None:
    row = next(r for r in manifest(synthetic_tiny) if r["platform"] == "st")
    names, symbols, counts = st_counts(synthetic_tiny / row["measurement"])
    head, *lines = (synthetic_tiny / row["spots"]).read_text().splitlines()
    assert head.split("\t") == ["x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected"]
    table = np.array([line.split("\t") for line in lines], float)
    keys = {f"{x:g}x{y:g}" for x, y in table[:, :2]}
    assert set(names) < keys and len(keys) == len(names) + 1
    assert 0.9 < len(symbols) / SIZES["tiny"].genes < 1 and (counts >= 0).all() and (counts == counts.round()).all()
    fit = np.linalg.lstsq(np.column_stack([table[:, 2:4], np.ones(len(table))]), table[:, 4:6], rcond=None)[0]
    assert 200 / np.sqrt(abs(np.linalg.det(fit[:2]))) == pytest.approx(float(row["mpp"]), rel=1e-3)


def test_truth_is_a_composition_per_profile(synthetic_tiny: Path) -> None:
    for row in manifest(synthetic_tiny):
        truth = np.load(synthetic_tiny / "truth" / f"{row['slide_id']}.npz", allow_pickle=False)
        kinds, numbers = np.unique(truth["gene_class"], return_counts=True)
        assert kinds.tolist() == list("abcde") and numbers.tolist() == [64, 64, 64, 48, 80]
        assert truth["expected"].shape == (len(truth["profile_id"]), SIZES["tiny"].genes)
        np.testing.assert_allclose(truth["expected"].sum(1), 1, rtol=1e-5)
        moved = np.hypot(*(truth["xy_um"] - truth["true_xy_um"]).T)
        assert np.ptp(moved) < 1e-9 and moved.max() <= 15


def test_a_section_written_again_alone_has_the_same_bytes(synthetic_tiny: Path, tmp_path: Path) -> None:
    for section in sections(SIZES["tiny"])[:2]:
        write_section(tmp_path, SIZES["tiny"], 0, section)
    again = [p for p in sorted(tmp_path.rglob("*")) if p.is_file()]
    assert len(again) == 7 + 4  # Visium and ST
    for path in again:
        assert path.read_bytes() == (synthetic_tiny / path.relative_to(tmp_path)).read_bytes(), path.name


def test_unknown_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tiny, quickstart, benchmark"):
        write_corpus(tmp_path, size="huge")


def test_gate_the_tissue_is_a_fair_test(quick: Path) -> None:
    gate = Gate([read_section(quick, row) for row in manifest(quick)])
    oracle = gate.score([np.log1p(1e4 * s.truth["expected"]) for s in gate.test])
    colour = gate.ridge(lambda s: colour_features(s.patches))
    look, around = gate.ridge(texture), gate.ridge(surroundings)
    report = {"oracle": oracle, "colour": colour, "texture": look, "surroundings": around}
    print(*(f"{name:13s} { ({k: round(v, 3) for k, v in part.items()}) }" for name, part in report.items()), sep="\n")
    assert 0.30 <= colour["a-d"] / oracle["a-d"] <= 0.50, report
    assert all(colour[c] < 0.2 * oracle[c] for c in "bcd"), report
    assert abs(colour["e"]) <= 0.02 and abs(oracle["e"]) <= 0.02, report
    assert oracle["a"] > 0.5 and all(oracle[c] > 0.25 for c in "bcd"), report
    assert look["b"] > 0.4 * oracle["b"], report  # arrangement is there to be seen at 1 um/px in one tile
    assert around["c"] > 0.4 * oracle["c"], report  # so is the niche, for who looks 250 um around
    assert abs(look["d"]) < 0.1 * oracle["d"] and abs(around["d"]) < 0.1 * oracle["d"], report  # fields are in no pixel


def test_domains_share_morphology_or_genes(quick: Path) -> None:
    """Domains 1 and 2: same colours, other genes; 0 and 3: the reverse. Compared by standardised mean differences."""
    parts = [read_section(quick, row) for row in manifest(quick) if row["platform"] == "visium"]

    def contrast(values: list[np.ndarray], one: int, two: int) -> np.ndarray:
        out = []
        for section, value in zip(parts, values, strict=True):
            domain, z = section.truth["domain"], (value - value.mean(0)) / value.std(0)
            if (domain == one).any() and (domain == two).any():
                out.append(z[domain == one].mean(0) - z[domain == two].mean(0))
        return np.abs(np.mean(out, 0))

    colours = [colour_features(s.patches) for s in parts]
    fields = [s.truth["latent"][:, -3:-2] for s in parts]
    assert contrast(fields, 1, 2).max() > 3 * contrast(fields, 0, 3).max()
    assert contrast(colours, 0, 3).max() > 2 * contrast(colours, 1, 2).max()


def test_a_vessel_may_cross_the_edge_of_the_image() -> None:
    tissue = grow(np.random.default_rng(0), 300.0)
    vessels = np.array([[5.0, 5.0, 30.0], [298.0, 296.0, 30.0]])
    stain = Stain(1.0, 1.0, 0.0, 243.0, folds=1, blurs=1)
    rgb = render(np.random.default_rng(1), replace(tissue, vessels=vessels), stain, 1.0)
    assert rgb.shape == (300, 300, 3)
    for corner in (rgb[2, 2].astype(int), rgb[297, 297].astype(int)):
        assert corner[0] > corner[1] + 60  # blood


def test_niche_is_neutral_at_its_source_and_on_between_115_and_225_um() -> None:
    away = np.array([0.0, 60.0, 115.0, 170.0, 225.0, 300.0])
    found = niche(np.column_stack([away, 0 * away]), np.array([[0.0, 0.0, 30.0]]))
    np.testing.assert_allclose(found, [NICHE_NEUTRAL, NICHE_NEUTRAL, 1, 1, 1, 0])


def test_a_spot_is_the_sum_of_the_cells_under_it() -> None:
    tissue = grow(np.random.default_rng(0), 400.0)
    centre = tissue.xy_um.mean(0)
    panel = choose_genes(100, 0)
    under = under_discs(tissue, centre[None], 80.0)
    cells = np.flatnonzero(np.hypot(*(tissue.xy_um - centre).T) <= 40.0)
    assert under.indices.tolist() == cells.tolist() and len(cells) > 3
    plain = cell_expression(panel, tissue.latent[cells], np.zeros(100)).sum(0)
    found = expected_composition(panel, tissue, under, np.zeros(100))[0]
    np.testing.assert_allclose(found, plain / plain.sum())
    for kind, share in zip(CLASSES, MOLECULE_SHARES, strict=True):  # nothing leaks through the closure
        assert found[panel.kind == kind].sum() == pytest.approx(share)
