"""Visium: axes, layouts, the join of barcodes, panels, controls, and the traps of real outs folders."""

import gzip
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep import platforms
from data_prep.manifest import ManifestRow
from data_prep.one_slide import build_slide
from data_prep.platforms import GENE, OTHER, Measurement, Source, visium
from data_prep.profiles import place, profiles_of
from storm.prep_config import PrepConfig
from storm.schema import DISC
from storm.store import SlideStore
from tests.data_prep.platforms.helpers import dense, edit, fit, mex_of
from tests.data_prep.vendors import MPP, SYMBOLS, tissue, write_tiff, write_visium

H5, CSV, JSON = "filtered_feature_bc_matrix.h5", "spatial/tissue_positions.csv", "spatial/scalefactors_json.json"


def read(outs: Path, **told) -> Measurement:
    return visium.read(Source("visium", outs, **told))


def row_of(outs: Path, image: Path | None = None, **told) -> ManifestRow:
    return ManifestRow("s", image, outs, "visium", **told)


@pytest.mark.parametrize("header", [True, False])
def test_visium(tmp_path: Path, header: bool) -> None:
    found = read(write_visium(tmp_path, header=header))
    assert found.names == [*SYMBOLS, "CD3-antibody"]
    assert found.column_kind.tolist() == [GENE] * 5 + [OTHER]
    assert found.notes == ["1 features that are no gene expression are left out (1 Antibody Capture)"]
    assert len(found.ids) == len(set(found.ids)) == 64
    np.testing.assert_allclose(found.xy[0], [60 / MPP, 80 / MPP])  # x is the column, which comes last
    assert (found.footprint_um == 55).all()
    assert (found.footprint_kind == DISC).all()
    assert found.in_tissue is not None
    assert (found.in_tissue == 1).all()
    assert fit(found).mpp == pytest.approx(MPP, rel=1e-4)
    assert found.reported_mpp == pytest.approx(MPP)  # 65 um, not 55, over spot_diameter_fullres
    with h5py.File(tmp_path / H5) as root:
        assert dense(found).sum() == root["matrix/data"][...].sum()


@pytest.mark.parametrize("zipped", [True, False])
def test_mex_equals_h5(tmp_path: Path, zipped: bool) -> None:
    one = read(write_visium(tmp_path / "h5"))
    mex_of(write_visium(tmp_path / "mex") / H5, zipped)
    other = read(tmp_path / "mex")
    assert (one.ids, one.names, one.notes) == (other.ids, other.names, other.notes)
    np.testing.assert_array_equal(dense(one), dense(other))


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("name", ["tissue_positions.csv", "tissue_positions_list.csv", "tissue_positions_list.csv.gz"])
def test_a_header_is_told_by_content_not_by_name(tmp_path: Path, name: str, header: bool) -> None:
    outs = write_visium(tmp_path, header=header)
    data = (outs / CSV).read_bytes()
    (outs / CSV).unlink()
    (outs / "spatial" / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    np.testing.assert_allclose(read(outs).xy[0], [60 / MPP, 80 / MPP])


@pytest.mark.parametrize("header", [True, False])
def test_a_spreadsheets_mark_before_the_first_line_is_no_part_of_it(tmp_path: Path, header: bool) -> None:
    outs = write_visium(tmp_path, header=header)
    expected = read(outs)
    (outs / CSV).write_bytes(b"\xef\xbb\xbf" + (outs / CSV).read_bytes().replace(b"\n", b"\r\n"))
    found = read(outs)
    assert (found.ids, found.notes) == (expected.ids, expected.notes)
    np.testing.assert_array_equal(found.xy, expected.xy)


def test_a_header_names_its_columns(tmp_path: Path) -> None:
    outs = write_visium(tmp_path)
    expected = read(outs).xy
    rows = [line.split(",") for line in (outs / CSV).read_text().splitlines()]
    turned = [[row[i] for i in (0, 1, 5, 4, 3, 2)] for row in rows]
    (outs / CSV).write_text("\n".join(",".join(row) for row in turned))
    np.testing.assert_array_equal(read(outs).xy, expected)


def test_prefixed_names_all_in_one_folder(tmp_path: Path) -> None:
    outs = write_visium(tmp_path)
    for name in (H5, CSV, JSON):
        (outs / name).rename(outs / f"GSM1_A1_{Path(name).name}")
    (outs / "spatial").rmdir()
    assert len(read(outs).ids) == 64
    shutil.copy(outs / f"GSM1_A1_{H5}", outs / f"GSM2_B1_{H5}")
    with pytest.raises(
        ValueError, match=r"holds 2 files \*_filtered_feature_bc_matrix\.h5; leave one, of this section"
    ):
        read(outs)


def test_a_raw_matrix_keeps_what_is_in_tissue(tmp_path: Path) -> None:
    outs = write_visium(tmp_path)
    whole = dense(read(outs))
    mex_of(outs / H5, folder=outs / "raw_feature_bc_matrix")
    lines = (outs / CSV).read_text().splitlines()
    lines[4] = lines[4].replace(",1,", ",0,", 1)
    (outs / CSV).write_text("\n".join(lines))
    found = read(outs)
    assert "raw matrix: 1 barcodes that are not in tissue are left out" in found.notes
    np.testing.assert_array_equal(dense(found), np.delete(whole, 3, axis=0))
    np.testing.assert_array_equal(dense(found, np.array([2, 3, 62])), whole[[2, 4, 63]])


def test_a_filtered_barcode_outside_the_tissue_keeps_the_vendors_word(tmp_path: Path) -> None:
    outs = write_visium(tmp_path)
    (outs / CSV).write_text((outs / CSV).read_text().replace(",1,", ",0,", 1))
    found = read(outs)
    assert found.in_tissue is not None
    assert found.in_tissue.tolist() == [0] + [1] * 63


def renamed(outs: Path, change) -> Path:
    """The matrix's barcodes changed."""
    edit(outs / H5, "barcodes", lambda a: np.array([change(i, name.decode()).encode() for i, name in enumerate(a)]))
    return outs


@pytest.mark.parametrize(
    "change",
    [
        lambda i, name: name,
        lambda i, name: name.removesuffix("-1"),
        lambda i, name: f"A1_{name}",
        lambda i, name: f"TCGA-A1_{name}",
        lambda i, name: f"{name}_A1",
        lambda i, name: f"A1#{name.removesuffix('-1')}",
    ],
)
@pytest.mark.parametrize("bare", [True, False])
def test_barcodes_join_with_and_without_suffix_and_sample(tmp_path: Path, change, bare: bool) -> None:
    expected = read(write_visium(tmp_path / "plain")).xy
    outs = renamed(write_visium(tmp_path / "outs"), change)
    if bare:
        (outs / CSV).write_text((outs / CSV).read_text().replace("-1,", ","))
    found = read(outs)
    assert found.ids[3] == change(3, "CGAAAAAAAAAAAAAA-1".replace("CG", "TA"))  # the matrix's own names stay
    np.testing.assert_array_equal(found.xy, expected)


def test_barcodes_of_another_section_are_refused(tmp_path: Path) -> None:
    outs = write_visium(tmp_path, suffix="-2")  # as spaceranger aggr writes the second section
    with pytest.raises(
        ValueError, match=r"64 of 64 barcodes \(as '.*-2'\) are not in tissue_positions\.csv \(as '.*-1"
    ):
        read(outs)
    renamed(outs, lambda i, name: f"s{i % 2}_{name.replace('-2', '-1')}")
    with pytest.raises(
        ValueError, match=r"its barcodes are of 2 samples \(s0_\*, s1_\*\); give the files of one section"
    ):
        read(outs)


def test_a_few_strangers_are_left_out_and_told_more_are_refused(tmp_path: Path) -> None:
    outs = write_visium(tmp_path)
    whole = dense(read(outs))
    lines = (outs / CSV).read_text().splitlines()
    (outs / CSV).write_text("\n".join([*lines[:5], *lines[8:]]))
    found = read(outs)
    assert found.notes[0] == "3 barcodes without a position are left out"
    np.testing.assert_array_equal(dense(found), np.delete(whole, [4, 5, 6], axis=0))
    (outs / CSV).write_text("\n".join([*lines[:5], *lines[9:]]))
    with pytest.raises(ValueError, match=r"4 of 64 barcodes \(as 'AC.*give the positions of the same section"):
        read(outs)


@pytest.mark.parametrize("first", [1, 0])
def test_a_barcode_that_comes_twice_is_refused(tmp_path: Path, first: int) -> None:
    # The second time by its whole name, or by its name without the suffix.
    twice = "CAAAAAAAAAAAAAAA-1" if first else "CAAAAAAAAAAAAAAA"
    outs = renamed(write_visium(tmp_path), lambda i, name: twice if i == 0 else name)
    with pytest.raises(ValueError, match=r"bc_matrix\.h5: barcode 'CAAA.*-1' comes twice"):
        read(outs)


def test_genes_beyond_the_probe_set_are_not_measured(tmp_path: Path) -> None:
    outs = write_visium(tmp_path)
    lines = ["#panel_name=Visium Human", "#panel_type=predesigned", "gene_id,probe_seq,probe_id,included,region"]
    lines += [f"{g},ACGT,{g}|1,{'FALSE' if g == 'EGFR' else 'TRUE'},spliced" for g in SYMBOLS if g != "TP53"]
    (outs / "probe_set.csv").write_text("\n".join([*lines, "EGFR,ACGT,EGFR|2,FALSE,spliced"]))
    found = read(outs)
    assert found.column_kind.tolist() == [OTHER, OTHER, GENE, GENE, GENE, OTHER]
    assert "2 genes that the probe set does not reach are not measured" in found.notes
    assert outs / "probe_set.csv" in visium.inputs(Source("visium", outs))
    row = row_of(outs)
    _, counts, facts = profiles_of(row, found, place(row, None, found, PrepConfig()), PrepConfig())
    assert facts["genes"] == len(counts.table) == 3
    (outs / "probe_set.csv").write_text("gene_id,included\nOTHER1,TRUE\n")
    with pytest.raises(ValueError, match=r"probe_set\.csv: reaches no gene of filtered_.*; give the files of one run"):
        read(outs)
    (outs / "probe_set.csv").write_text("gene,included\n")
    with pytest.raises(ValueError, match=r"probe_set\.csv: has no column gene_id"):
        read(outs)


def test_duplicate_genes_are_summed_and_antibodies_dropped_on_the_way_to_the_store(tmp_path: Path) -> None:
    outs = write_visium(tmp_path / "outs")
    edit(outs / H5, "features/id", lambda a: np.array([b"TP53", b"EGFR", b"TP53", b"MKI67", b"CD3E", b"x"]))
    edit(outs / H5, "features/name", lambda a: np.array([b"TP53", b"EGFR", b"TP53", b"MKI67", b"CD3E", b"x"]))
    whole = dense(read(outs))
    made = SlideStore(build_slide(row_of(outs), tmp_path / "stores", PrepConfig()))
    assert len(made.genes()) == 4
    symbols = list(made.genes().symbols)
    assert made.gene_totals()[symbols.index("TP53")] == whole[:, [0, 2]].sum()
    assert made.quality()["depth"].tolist() == whole[:, :5].sum(1).tolist()
    assert made.quality()["in_tissue"].tolist() == [1] * 64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (CSV, "A-1,1,0,0,5\n", "row 1 is not barcode, in_tissue"),
        (CSV, "A-1,1,0,0,nan,5\n", "row 1 is not .*its place is no number"),
        (CSV, "A-1,1,0,x,7,5\n", "row 1 is not barcode, in_tissue"),
        (CSV, "A-1,1,0,0,5,5\nA-1,1,0,0,6,5\n", "row 2 is not .*A-1 comes twice"),
        (
            CSV,
            "barcode,in_tissue,array_row,array_col,x,y\nA-1,1,0,0,5,5\n",
            r"columns \['pxl_row_in_fullres', 'pxl_col",
        ),
        (CSV, "", r"positions\.csv: holds no spot"),
        (CSV, "\udcff\udcfe", r"positions\.csv: not readable as text"),
        (JSON, "{", "not readable as JSON"),
        (JSON, "[" * 100_000, "not readable as JSON"),
        (JSON, "[1]", r"factors_json\.json: holds no names with numbers"),
        (JSON, '{"spot_diameter_fullres": "wide"}', "spot_diameter_fullres is no positive number"),
        (JSON, '{"spot_diameter_fullres": -3}', "spot_diameter_fullres is no positive number"),
        (JSON, '{"spot_diameter_fullres": NaN}', "spot_diameter_fullres is no positive number"),
        (JSON, '{"spot_diameter_fullres": 1%s}' % ("0" * 400), "spot_diameter_fullres is no positive number"),
        (H5, "no h5", "no readable 10x matrix"),
        (H5, None, "has no matrix"),
        (CSV, None, "has no positions"),
        (JSON, None, "has no scale factors"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    outs = write_visium(tmp_path)
    (outs / name).unlink()
    if content is not None:
        (outs / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read(outs)


def test_what_is_no_outs_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder; give the outs folder"):
        read(tmp_path / "nowhere")
    outs = write_visium(tmp_path / "outs")
    with pytest.raises(ValueError, match="Visium has spots, no square8um; leave the column unit blank"):
        read(outs, unit="square8um")
    (outs / "binned_outputs").mkdir()
    with pytest.raises(ValueError, match="holds bins of Visium HD; write visium_hd in the column platform"):
        read(outs)


def test_a_matrix_without_barcodes_is_named(tmp_path: Path) -> None:
    outs = write_visium(tmp_path)
    folder = mex_of(outs / H5, zipped=False)
    (folder / "barcodes.tsv").write_text("")
    (folder / "matrix.mtx").write_text("%%MatrixMarket matrix coordinate integer general\n6 0 0\n")
    with pytest.raises(ValueError, match="holds no barcode"):
        read(outs)


def test_scale_factors_without_keys_only_leave_the_comparison_out(tmp_path: Path) -> None:
    outs = write_visium(tmp_path)
    (outs / JSON).write_text("{}")
    found = read(outs)
    assert found.reported_mpp is None
    row = row_of(outs)
    assert place(row, None, found, PrepConfig()).mpp.source == "lattice"


def exchanged(outs: Path) -> Path:
    """The two last columns of the positions exchanged: the classic fault of other tools."""
    rows = [line.split(",") for line in (outs / CSV).read_text().splitlines()[1:]]
    (outs / CSV).write_text("\n".join(",".join([*row[:4], row[5], row[4]]) for row in rows))
    return outs


def test_exchanged_axes_fit_the_lattice_and_are_told_by_its_turn(tmp_path: Path) -> None:
    outs = exchanged(write_visium(tmp_path))
    found = read(outs)
    assert fit(found).residual_px0 < 0.01  # the fit alone cannot tell
    assert "WARNING: the lattice lies mirrored on the image; unless the image is (as with CytAssist)" in found.notes[-1]
    (outs / "spatial" / "cytassist_image.tiff").write_bytes(b"")
    assert "mirrored" not in " ".join(read(outs).notes)


def test_exchanged_axes_put_spots_off_an_image_that_is_no_square(tmp_path: Path) -> None:
    image = write_tiff(tmp_path / "wide.tif", tissue(900, 1400))
    outs = write_visium(tmp_path / "outs", side=9)
    rows = [line.split(",") for line in (outs / CSV).read_text().splitlines()]
    wide = [",".join([*row[:5], str(float(row[5]) + 400)]) for row in rows[1:]]
    (outs / CSV).write_text("\n".join(wide))
    config = PrepConfig(tile_px=112, tile_mpp=1.0)
    assert build_slide(row_of(outs, image), tmp_path / "stores", config).is_file()
    exchanged(outs)
    with pytest.raises(ValueError, match="profiles lie beside the image"):
        build_slide(row_of(outs, image), tmp_path / "stores", config)


def test_the_cytassist_image_is_told_as_the_cause_of_coarse_pixels(tmp_path: Path) -> None:
    image = write_tiff(tmp_path / "cytassist_image.tif", tissue(400, 400), mpp=4.6)
    outs = write_visium(tmp_path / "outs", mpp=4.6)
    with pytest.raises(ValueError, match=r"4\.60 um per pixel is too coarse .*was given 4\.60 um per px, as CytAss"):
        build_slide(row_of(outs, image), tmp_path / "stores", PrepConfig())
    assert build_slide(row_of(outs), tmp_path / "stores", PrepConfig()).is_file()  # expression alone


def test_inputs_are_the_files_that_are_read(tmp_path: Path) -> None:
    outs = write_visium(tmp_path)
    source = Source("visium", outs)
    assert [p.name for p in visium.inputs(source)] == [Path(name).name for name in (H5, CSV, JSON)]
    mex_of(outs / H5)
    assert len(platforms.reader("visium").inputs(source)) == 5
