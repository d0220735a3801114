"""Readers of vendor files: axes, joins, layouts, controls, and the traps of real ones."""

import gzip
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep import align, platforms
from data_prep.platforms import Measurement, st, visium
from storm.config import PrepConfig
from storm.schema import DISC
from tests.data_prep.vendors import MPP, SYMBOLS, write_st, write_visium


def dense(found: Measurement) -> np.ndarray:
    """[N, columns] counts."""
    table = np.zeros((len(found.ids), len(found.names)), np.int64)
    table[np.repeat(np.arange(len(found.ids)), np.diff(found.indptr)), found.column] = found.count
    return table


def fit(found: Measurement) -> align.LatticeFit:
    assert found.lattice_um is not None
    assert found.lattice_px0 is not None
    return align.fit_lattice(found.lattice_um, found.lattice_px0)


@pytest.mark.parametrize("header", [True, False])
def test_visium(tmp_path: Path, header: bool) -> None:
    found = visium.read(write_visium(tmp_path, header=header), None)
    assert found.names == list(SYMBOLS)  # the antibody is no gene
    assert found.notes == ["1 features that are no gene expression are left out"]
    assert len(found.ids) == len(set(found.ids)) == 64
    assert visium.read_matrix(tmp_path).types[-1] == "Antibody Capture"
    np.testing.assert_allclose(found.xy_px0[0], [60 / MPP, 80 / MPP])  # x is the column, which comes last
    assert (found.footprint_um == 55).all()
    assert (found.footprint_kind == DISC).all()
    assert fit(found).mpp == pytest.approx(MPP, rel=1e-4)
    assert found.reported_mpp == pytest.approx(MPP)
    with h5py.File(tmp_path / "filtered_feature_bc_matrix.h5") as root:
        assert found.count.sum() < root["matrix/data"][...].sum()


def mex_of(outs: Path, zipped: bool, kind: str = "filtered") -> Path:
    """The same outs folder with the matrix as MEX."""
    found = visium.read_matrix(outs)
    folder = outs / f"{kind}_feature_bc_matrix"
    folder.mkdir()
    rows = np.repeat(np.arange(len(found.barcodes)), np.diff(found.indptr))
    entries = "\n".join(f"{c + 1} {r + 1} {n}" for r, c, n in zip(rows, found.column, found.count, strict=True))
    size = f"{len(found.names)} {len(found.barcodes)} {len(found.count)}"
    texts = {
        "matrix.mtx": f"%%MatrixMarket matrix coordinate integer general\n{size}\n{entries}\n",
        "features.tsv": "\n".join("\t".join(f) for f in zip(found.names, found.symbols, found.types, strict=True)),
        "barcodes.tsv": "\n".join(found.barcodes),
    }
    for name, text in texts.items():
        data = text.encode()
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(data) if zipped else data)
    (outs / "filtered_feature_bc_matrix.h5").unlink()
    return outs


@pytest.mark.parametrize("zipped", [True, False])
def test_visium_mex_equals_h5(tmp_path: Path, zipped: bool) -> None:
    one = visium.read(write_visium(tmp_path / "h5"), None)
    other = visium.read(mex_of(write_visium(tmp_path / "mex"), zipped), None)
    assert (one.ids, one.names) == (other.ids, other.names)
    np.testing.assert_array_equal(dense(one), dense(other))


def test_visium_before_space_ranger_2_and_prefixed_names(tmp_path: Path) -> None:
    outs = write_visium(tmp_path, header=False)
    (outs / "spatial" / "tissue_positions.csv").rename(outs / "spatial" / "tissue_positions_list.csv")
    (outs / "filtered_feature_bc_matrix.h5").rename(outs / "Vis5A_filtered_feature_bc_matrix.h5")
    assert len(visium.read(outs, None).ids) == 64
    shutil.copy(outs / "Vis5A_filtered_feature_bc_matrix.h5", outs / "Vis5B_filtered_feature_bc_matrix.h5")
    with pytest.raises(ValueError, match="holds 2 files"):
        visium.read(outs, None)


def test_a_matrix_of_cell_ranger_2(tmp_path: Path) -> None:
    outs = write_visium(tmp_path)
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "a") as root:
        root.move("matrix", "GRCh38")
        group = root["GRCh38"]
        group["genes"], group["gene_names"] = group["features/id"][...], group["features/name"][...]
        del group["features"]
    assert visium.read(outs, None).names[:-1] == list(SYMBOLS)


def test_a_raw_matrix_keeps_what_is_in_tissue(tmp_path: Path) -> None:
    outs = mex_of(write_visium(tmp_path), zipped=False, kind="raw")
    path = outs / "spatial" / "tissue_positions.csv"
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace(",1,", ",0,", 1)
    path.write_text("\n".join(lines))
    found = visium.read(outs, None)
    assert len(found.ids) == 63
    assert "raw matrix: 1 barcodes that are not in tissue are left out" in found.notes


@pytest.mark.parametrize("suffix", ["", "-1"])
def test_barcodes_join_with_and_without_their_suffix(tmp_path: Path, suffix: str) -> None:
    found = visium.read(write_visium(tmp_path, suffix=suffix), None)
    assert all(name.endswith("-1") == bool(suffix) for name in found.ids)  # the matrix's own names stay
    assert len(found.ids) == 64


def test_barcodes_that_do_not_join_stop(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"64 of 64 barcodes \(as '.*-2'\) are not in tissue_positions\.csv"):
        visium.read(write_visium(tmp_path, suffix="-2"), None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("spatial/tissue_positions.csv", "A-1,1,0,0,5\n", "row 1 is not barcode, in_tissue"),
        ("spatial/tissue_positions.csv", "A-1,1,0,0,nan,5\n", "row 1 is not .*its place is no number"),
        ("spatial/tissue_positions.csv", "A-1,1,0,0,5,5\nA-1,1,0,0,6,5\n", "row 2 is not .*A-1 comes twice"),
        ("spatial/tissue_positions.csv", "", r"positions\.csv: holds no spot"),
        ("spatial/scalefactors_json.json", "{", "not readable as JSON"),
        ("spatial/scalefactors_json.json", "[1]", r"factors_json\.json: holds no names with numbers"),
        ("spatial/scalefactors_json.json", '{"spot_diameter_fullres": "wide"}', "is no number of pixels"),
        ("filtered_feature_bc_matrix.h5", "no h5", "no readable 10x matrix"),
        ("filtered_feature_bc_matrix.h5", None, "has no matrix"),
        ("spatial/tissue_positions.csv", None, "has no positions"),
    ],
)
def test_damaged_visium_files_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    outs = write_visium(tmp_path)
    (outs / name).unlink()
    if content is not None:
        (outs / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        visium.read(outs, None)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("indices", lambda a: np.where(np.arange(len(a)) == 3, 6, a), "an index lies outside 0 to 5"),
        ("indices", lambda a: a - 1, "an index lies outside 0 to 5"),
        ("indices", lambda a: a[:-1], "indices for .* counts"),
        ("indices", lambda a: a * 1.0, "indices is no list of numbers"),
        ("data", lambda a: a[:-1], "indices for .* counts"),
        ("data", None, "data is no list of numbers"),
        ("indptr", lambda a: a[:-1], "indptr has 64 numbers for 64 barcodes"),
        ("indptr", lambda a: a + 1, "indptr does not rise from 0"),
        ("indptr", lambda a: np.where(np.arange(len(a)) == 5, 10**9, a), "indptr does not rise from 0"),
        ("features/name", lambda a: a[:-1], "6 ids, 5 names and 6 types"),
        ("features", None, "no readable 10x matrix"),
        ("barcodes", None, "barcodes is no list of names"),
    ],
)
def test_an_unsound_h5_matrix_is_named(tmp_path: Path, name: str, change, message: str) -> None:
    outs = write_visium(tmp_path)
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "a") as root:
        before = None if change is None else root["matrix"][name][...]
        del root["matrix"][name]
        if change is None:
            root["matrix"].create_group(name)
        else:
            root["matrix"][name] = change(before)
    with pytest.raises(ValueError, match=rf"filtered_feature_bc_matrix\.h5: .*{message}"):
        visium.read(outs, None)


@pytest.mark.parametrize("first", [1, 0])
def test_a_barcode_that_comes_twice_is_refused(tmp_path: Path, first: int) -> None:
    outs = write_visium(tmp_path)
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "a") as root:
        barcodes = root["matrix/barcodes"]
        # The second time by its whole name, or by its name without the suffix.
        barcodes[0] = barcodes[1] if first else barcodes[1].replace(b"-1", b"")
    with pytest.raises(ValueError, match=r"bc_matrix\.h5: barcode 'CAAA.*-1' comes twice"):
        visium.read(outs, None)


def test_a_matrix_without_barcodes_or_cut_is_named(tmp_path: Path) -> None:
    outs = mex_of(write_visium(tmp_path / "none"), zipped=False)
    folder = outs / "filtered_feature_bc_matrix"
    (folder / "barcodes.tsv").write_text("")
    (folder / "matrix.mtx").write_text("%%MatrixMarket matrix coordinate integer general\n6 0 0\n")
    with pytest.raises(ValueError, match="holds no barcode"):
        visium.read(outs, None)
    (folder / "matrix.mtx").write_text("%%MatrixMarket matrix coordinate integer general\n6 1 2\n1 1 1\n")
    with pytest.raises(ValueError, match=r"matrix\.mtx: no readable matrix"):
        visium.read(outs, None)


def test_normalised_counts_are_refused(tmp_path: Path) -> None:
    outs = write_visium(tmp_path)
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "a") as root:
        data = root["matrix/data"][...] * 0.5
        del root["matrix/data"]
        root["matrix/data"] = data
    with pytest.raises(ValueError, match="give the raw counts, not normalised"):
        visium.read(outs, None)


def test_st(tmp_path: Path) -> None:
    found = st.read(*write_st(tmp_path))
    assert len(found.ids) == 15
    assert found.notes == ["1 spots with counts are not selected and are left out"]
    np.testing.assert_allclose(found.xy_px0[0], [120 / MPP, 120 / MPP])
    assert (found.footprint_um == 100).all()
    assert fit(found).mpp == pytest.approx(MPP, rel=1e-4)


def test_st_transposed_and_fractional_ids(tmp_path: Path) -> None:
    counts, spots = write_st(tmp_path)
    rows = [line.split("\t") for line in gzip.decompress(counts.read_bytes()).decode().splitlines()]
    turned = "\n".join("\t".join(line) for line in zip(*rows, strict=True)).replace("1x2\t", "1.05x1.9\t")
    (tmp_path / "turned.tsv").write_text(turned)
    np.testing.assert_array_equal(dense(st.read(tmp_path / "turned.tsv", spots)), dense(st.read(counts, spots)))


@pytest.mark.parametrize("corner", ["\t", ""])
def test_st_columns_keep_their_names(tmp_path: Path, corner: str) -> None:
    counts, spots = write_st(tmp_path, genes=("TP53", "EGFR", "TP53", "CD3E", "TP53.1"))
    text = gzip.decompress(counts.read_bytes()).decode()
    counts.write_bytes(gzip.compress((corner + text.removeprefix("\t")).encode()))
    found = st.read(counts, spots)
    assert found.names == found.symbols == ["TP53", "EGFR", "TP53", "CD3E", "TP53.1"]
    assert dense(found).shape == (15, 5)


def test_st_spots_without_counts_are_reported(tmp_path: Path) -> None:
    counts, spots = write_st(tmp_path)
    with spots.open("a") as handle:
        handle.write("9\t9\t9\t9\t3440\t3440\t1\n")
    assert "1 selected spots have no counts and are left out" in st.read(counts, spots).notes


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.replace("4\t4\t", "9\t9\t"), r"1 of 16 spots \(as 4x4\) are not in spots\.tsv"),
        (lambda t: t.replace("pixel_x", "px"), r"columns \['pixel_x'\] are missing"),
        (lambda t: t.replace("1\t2\t", "1\t1\t", 1), "spot 1x1 comes twice"),
        (lambda t: t.replace("120.00", "", 1), "has no coordinates"),
        (lambda t: t.replace("\t1\n", "\t0\n"), "selects none of the 16 spots"),
        (lambda t: t.replace("120.00", "inf", 1), "line 2 has no coordinates"),
        (lambda t: t.replace("1\t2\t", "one\t2\t", 1), "line 3 has no coordinates"),
        (lambda t: t.replace("new_x", "pixel_x"), r"columns \['pixel_x'\] come twice"),
    ],
)
def test_st_spot_files_with_faults(tmp_path: Path, edit, message: str) -> None:
    counts, spots = write_st(tmp_path)
    spots.write_text(edit(spots.read_text()))
    with pytest.raises(ValueError, match=message):
        st.read(counts, spots)


def test_st_tables_with_faults(tmp_path: Path) -> None:
    counts, spots = write_st(tmp_path)
    with pytest.raises(ValueError, match="needs the spot file"):
        st.read(counts, None)
    (tmp_path / "cut.tsv.gz").write_bytes(counts.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut\.tsv\.gz: not readable as a table"):
        st.read(tmp_path / "cut.tsv.gz", spots)
    (tmp_path / "other.tsv").write_text("\ta\tb\nrow1\t1\t2\n")
    with pytest.raises(ValueError, match="this is no ST table"):
        st.read(tmp_path / "other.tsv", spots)


def test_inputs_are_the_files_that_are_read(tmp_path: Path) -> None:
    assert [p.name for p in visium.inputs(write_visium(tmp_path / "v"), None)] == [
        "filtered_feature_bc_matrix.h5", "tissue_positions.csv", "scalefactors_json.json",
    ]  # fmt: skip
    assert len(visium.inputs(mex_of(write_visium(tmp_path / "m"), True), None)) == 5
    assert platforms.reader("st").inputs(Path("a"), Path("b")) == [Path("a"), Path("b")]


def test_real_her2st(real_data: Path) -> None:
    folder = real_data / "her2st" / "data"
    for name, expected in {"A1": 346, "C2": 187, "C3": 180}.items():
        found = st.read(folder / "ST-cnts" / f"{name}.tsv.gz", folder / "ST-spotfiles" / f"{name}_selection.tsv")
        assert len(found.ids) == expected
        assert align.lattice_fault(fit(found), "st", PrepConfig()) is None
        assert fit(found).mpp == pytest.approx(0.917 if name[0] == "A" else 0.688, rel=0.005)


@pytest.mark.parametrize(
    ("outs", "profiles", "genes", "mpp"),
    [
        ("scmuscle_visium/visium_data/Vis5A_2dpi", 982, 33217, 0.3597),
        ("scanpy_visium/tests/_data/visium_data/1.0.0", 100, 100, 0.7252),
        ("spatialexperiment_2sections/inst/extdata/10xVisium/section1/outs", 22, 50, 0.7251),
    ],
)
def test_real_visium(real_data: Path, outs: str, profiles: int, genes: int, mpp: float) -> None:
    found = visium.read(real_data / outs, None)
    assert (len(found.ids), len(found.names)) == (profiles, genes)
    assert fit(found).mpp == pytest.approx(mpp, abs=2e-4)
    assert fit(found).residual_px0 < 0.5
    assert found.reported_mpp == pytest.approx(mpp, rel=0.005)
    assert align.lattice_fault(fit(found), "visium", PrepConfig()) is None


def test_a_square_grid_is_no_visium_lattice(real_data: Path) -> None:
    found = visium.read(real_data / "msti_human_outs" / "outs", None)  # barcodes of 16 bases, without -1
    assert (len(found.ids), len(found.names)) == (2172, 36601)
    assert "two pixel sizes, 73.2 % apart" in (align.lattice_fault(fit(found), "visium", PrepConfig()) or "")
