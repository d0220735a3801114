"""Legacy ST: forms of its files, lattices, what is left out and what is refused, and all real sections."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep import align
from data_prep.manifest import ManifestRow
from data_prep.one_slide import build_slide
from data_prep.platforms import Measurement, Source, st
from data_prep.profiles import place, profiles_of
from storm.prep_config import PrepConfig
from storm.schema import DISC
from storm.store import SlideStore
from tests.data_prep.platforms.helpers import dense, fit
from tests.data_prep.vendors import MPP, tissue, write_st, write_tiff

HER2ST = {"A1": 346, "A3": 359, "C1": 176, "C2": 187, "C3": 180, "C4": 184, "E1": 587, "G2": 467}


def read(counts: Path, spots: Path | None = None, **told) -> Measurement:
    return st.read(Source("st", counts, spots, **told))


def written(counts: Path) -> list[list[str]]:
    """The cells of a gzipped table of counts."""
    return [line.split("\t") for line in gzip.decompress(counts.read_bytes()).decode().splitlines()]


def table_of(path: Path, rows: list[list[str]], separator: str = "\t") -> Path:
    data = "\n".join(separator.join(row) for row in rows).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def test_selected_spots_with_counts(tmp_path: Path) -> None:
    counts, spots = write_st(tmp_path)
    found = read(counts, spots)
    assert len(found.ids) == 15
    assert found.notes == ["1 spots with counts are not selected and are left out"]
    np.testing.assert_allclose(found.xy[0], [120 / MPP, 120 / MPP])
    assert (found.footprint_um == 100).all()
    assert (found.footprint_kind == DISC).all()
    assert found.in_tissue is not None
    assert found.in_tissue.tolist() == [1] * 15
    assert fit(found).mpp == pytest.approx(MPP, rel=1e-4)
    np.testing.assert_array_equal(dense(found), np.array([row[1:] for row in written(counts)[1:-1]], dtype=int))


def test_chosen_rows_of_the_counts(tmp_path: Path) -> None:
    counts, spots = write_st(tmp_path)
    rows = spots.read_text().splitlines()
    spots.write_text("\n".join([rows[0], rows[1][:-1] + "0", *rows[2:]]))  # the first spot is not selected
    found = read(counts, spots)
    np.testing.assert_array_equal(dense(found, np.array([0, 3])), dense(found)[[0, 3]])
    np.testing.assert_array_equal(dense(found)[0], np.array(written(counts)[2][1:], dtype=int))


@pytest.mark.parametrize("name", ["turned.tsv", "turned.csv", "turned.csv.gz"])
def test_transposed_and_fractional_ids(tmp_path: Path, name: str) -> None:
    counts, spots = write_st(tmp_path)
    rows = [list(row) for row in zip(*written(counts), strict=True)]
    rows[0][2] = "1.05x1.9"
    turned = table_of(tmp_path / name, rows, "," if "csv" in name else "\t")
    found = read(turned, spots)
    assert found.ids[1] == "1x2"
    np.testing.assert_array_equal(dense(found), dense(read(counts, spots)))


@pytest.mark.parametrize("corner", ["\t", ""])
def test_columns_keep_their_names(tmp_path: Path, corner: str) -> None:
    genes = ("TP53", "EGFR", "TP53", "NA", "TP53.1")
    counts, spots = write_st(tmp_path, genes=genes)
    text = gzip.decompress(counts.read_bytes()).decode()
    counts.write_bytes(gzip.compress((corner + text.removeprefix("\t")).encode()))
    found = read(counts, spots)
    assert found.names == found.symbols == list(genes)
    assert dense(found).shape == (15, 5)


def test_genes_of_every_form(tmp_path: Path) -> None:
    genes = ("ENSG00000141510.17", "EGFR", "MKI67_ENSG00000148773", "ENSG00000146648", "BLANK_1")
    counts, spots = write_st(tmp_path, genes=genes)
    row = ManifestRow("s", None, counts, "st", spots=spots)
    found = read(counts, spots)
    config = PrepConfig()
    profiles, stream, facts = profiles_of(row, found, place(row, None, found, config), config)
    assert stream.table.ids == ("ENSG00000141510", "ENSG00000146648", "ENSG00000148773")
    assert (len(profiles), facts["mapped_share"], facts["controls"]) == (15, 1.0, 1)
    summed = np.zeros((15, 3), int)
    for block in stream.blocks():
        summed[np.repeat(np.arange(15), np.diff(block.indptr)), block.gene] = block.count
    by_column = dense(found)
    np.testing.assert_array_equal(summed, np.stack([by_column[:, 0], by_column[:, [1, 3]].sum(1), by_column[:, 2]], 1))
    np.testing.assert_array_equal(stream.control, by_column[:, 4])


def form(spots: Path, out: Path, header: str, line: Callable[[dict[str, str]], str]) -> Path:
    """The spot file rewritten with another header and other lines."""
    rows = [row.split("\t") for row in spots.read_text().splitlines()]
    cells = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    out.write_text("\n".join([header, *(line(c) for c in cells)]) + "\n")
    return out


SPOT_FILES = {
    "named, X, Y": ("spots.csv", ",X,Y", lambda c: f"{c['x']}x{c['y']},{c['pixel_x']},{c['pixel_y']}"),
    "row names of R": ("r.tsv", "X\tY", lambda c: f"{c['x']}x{c['y']}\t{c['pixel_x']}\t{c['pixel_y']}"),
    "HE_X, HE_Y": ("he.tsv", "x\ty\tHE_X\tHE_Y", lambda c: f"{c['x']}\t{c['y']}\t{c['pixel_x']}\t{c['pixel_y']}"),
    "labels": (
        "l.tsv", "Row.names\tx\ty\tpixel_x\tpixel_y\tlabel",
        lambda c: f"{c['pixel_x']}x7\t{c['x']}.008\t{c['y']}.012\t{c['pixel_x']}\t{c['pixel_y']}\ttumour",
    ),
    "quoted": (
        "q.csv", '"x","y","pixel_x","pixel_y"', lambda c: f"{c['x']},{c['y']},{c['pixel_x']},{c['pixel_y']}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOT_FILES)
def test_forms_of_the_spot_file(tmp_path: Path, name: str) -> None:
    counts, spots = write_st(tmp_path)
    file, header, line = SPOT_FILES[name]
    found = read(counts, form(spots, tmp_path / file, header, line))
    assert len(found.ids) == 16  # none of these forms tells which are selected
    assert found.in_tissue is not None
    assert found.in_tissue.tolist() == [-1] * 16
    np.testing.assert_allclose(found.xy[:15], read(counts, spots).xy)


LATTICE_FILES = {
    "Coords": ("c.tsv", "\txcoord\tycoord\tlab\ttumor", lambda c: f"k\t{c['x']}\t{c['y']}\ttumor\t1"),
    "X, Y": ("c.csv", "X,Y", lambda c: f"{c['x']},{c['y']}"),
    "headless": ("h.csv", "1.02e+00,1.01", lambda c: f"{c['x']}.02,{c['y']}.01"),
    "new_x, new_y": ("n.tsv", "x\ty\tnew_x\tnew_y", lambda c: f"{c['x']}\t{c['y']}\t{c['new_x']}\t{c['new_y']}"),
}


@pytest.mark.parametrize("name", LATTICE_FILES)
def test_without_pixels_the_space_is_the_lattice(tmp_path: Path, name: str) -> None:
    counts, spots = write_st(tmp_path)
    file, header, line = LATTICE_FILES[name]
    path = form(spots, tmp_path / file, header, line)
    if name == "headless":
        path.write_text("\n".join(path.read_text().splitlines()[1:]))
    found = read(counts, path)
    assert (found.space_um, found.lattice_um, found.matrix) == (200.0, None, None)
    exact = [1.02, 1.01] if name in ("headless", "new_x, new_y") else [1, 1]
    np.testing.assert_allclose(found.xy[0], exact)


def test_expression_alone(tmp_path: Path) -> None:
    counts, _ = write_st(tmp_path)
    row = ManifestRow("s", None, counts, "st", donor="d", study="t", organ="skin")
    store = SlideStore(build_slide(row, tmp_path / "stores", PrepConfig()))
    assert (store.info.mpp, store.info.mpp_source) == (200.0, "matrix")
    np.testing.assert_allclose(np.diff(store.places().xy_um[:4], axis=0), [[0, 200]] * 3)


def test_an_image_needs_a_spot_file_or_a_matrix(tmp_path: Path) -> None:
    counts, _ = write_st(tmp_path)
    row = ManifestRow("s", write_tiff(tmp_path / "s.tif", tissue(900, 900)), counts, "st")
    with pytest.raises(ValueError, match=r"no file tells where it lies on .*s\.tif; .* or its spot file with pixel_x"):
        build_slide(row, tmp_path / "stores", PrepConfig())


def test_the_transform_of_the_pipeline(tmp_path: Path) -> None:
    counts, _ = write_st(tmp_path)
    (tmp_path / "transform.txt").write_text("288.5 1.5 0 -1.5 289.5 0 -250.0 -240.0 1\n")
    found = read(counts, alignment=tmp_path / "transform.txt")
    assert found.matrix is not None
    np.testing.assert_allclose(align.apply(found.matrix, np.array([[2.0, 3.0]])), [[322.5, 631.5]])
    assert found.matrix_source == "ST pipeline"
    (tmp_path / "turned.txt").write_text("288.5 -1.5 -250.0\n1.5 289.5 -240.0\n0 0 1\n")
    turned = read(counts, alignment=tmp_path / "turned.txt").matrix
    assert turned is not None
    np.testing.assert_allclose(turned, found.matrix)
    (tmp_path / "matrix.csv").write_text("288.5,-1.5,-250\n1.5,289.5,-240\n0,0,1\n")
    assert read(counts, alignment=tmp_path / "matrix.csv").matrix is None  # place reads it, as for every platform
    (tmp_path / "transform.txt").write_text("1 2 3 4 5 6 7 8 9")
    with pytest.raises(ValueError, match=r"transform\.txt: its nine numbers are no invertible affine matrix"):
        read(counts, alignment=tmp_path / "transform.txt")


def test_other_arrays(tmp_path: Path) -> None:
    counts, spots = write_st(tmp_path)
    found = read(counts, spots, unit="disc150um", space_um=110.0)
    assert (found.footprint_um == 150).all()
    assert found.space_um is None  # the file tells pixels; 110 um is the pitch
    assert fit(found).mpp == pytest.approx(MPP * 110 / 200, rel=1e-4)
    assert read(counts, space_um=110.0).space_um == 110.0
    for unit in ("cell", "square100um"):
        with pytest.raises(ValueError, match=f"unit '{unit}' is no spot of ST"):
            read(counts, spots, unit=unit)


def test_an_array_of_2000_spots_is_told_from_its_places(tmp_path: Path) -> None:
    counts, _ = write_st(tmp_path, side=6)
    rows = written(counts)
    even = [row for row in rows[1:] if sum(map(int, row[0].split("x"))) % 2 == 0]
    table = table_of(tmp_path / "even.tsv", [rows[0], *even])
    with pytest.raises(ValueError, match=r"x \+ y is even for each of its 18 spots.*give the um between place 1 and 2"):
        read(table)
    assert read(table, space_um=100.0).space_um == 100.0


def test_what_the_spot_file_lacks_is_left_out_where_it_is_little(tmp_path: Path) -> None:
    counts, spots = write_st(tmp_path, side=8)
    lines = spots.read_text().splitlines()
    spots.write_text("\n".join([lines[0], *lines[2:], "9\t9\t9\t9\t3440\t3440\t1"]) + "\n")
    found = read(counts, spots)
    assert found.ids[0] == "1x2"
    assert found.notes == [
        "1 spots with counts are not in the spot file and are left out",
        "1 selected spots have no counts and are left out",
        "1 spots with counts are not selected and are left out",
    ]
    assert len(found.ids) == 62
    spots.write_text("\n".join([lines[0], *lines[3:]]) + "\n")
    with pytest.raises(ValueError, match=r"2 of 64 spots \(as 1x1\) are not in spots\.tsv \(limit 2 %\)"):
        read(counts, spots)


def test_lines_without_coordinates(tmp_path: Path) -> None:
    counts, spots = write_st(tmp_path, side=8)
    blank = "\t".join([""] * 6 + ["0"])
    spots.write_text(spots.read_text() + blank + "\n")
    assert read(counts, spots).notes[0] == "1 lines of the spot file have no coordinates and are left out"
    spots.write_text(spots.read_text() + blank + "\n")
    with pytest.raises(ValueError, match=r"2 of 66 lines \(as line 66\) have no coordinates; complete or remove them"):
        read(counts, spots)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.replace("4\t4\t", "9\t9\t"), r"1 of 16 spots \(as 4x4\) are not in spots\.tsv"),
        (lambda t: t.replace("pixel_x", "px"), r"columns \['pixel_x'\] are missing"),
        (lambda t: t.replace("x\ty\t", "a\tb\t"), r"columns \['x', 'y'\] are missing"),
        (lambda t: t.replace("1\t2\t", "1\t1\t", 1), "spot 1x1 comes twice"),
        (lambda t: t.replace("\t1\n", "\t0\n"), "selects none of the 16 spots"),
        (lambda t: t.replace("120.00", "", 1), r"1 of 16 lines \(as line 2\) have no coordinates"),
        (lambda t: t.replace("120.00", "inf", 1), r"\(as line 2\) have no coordinates"),
        (lambda t: t.replace("1\t2\t", "one\t2\t", 1), r"\(as line 3\) have no coordinates"),
        (lambda t: t.replace("new_x", "pixel_x"), r"columns \['pixel_x'\] come twice"),
        (lambda _: "", r"spots\.tsv: not readable as a table"),
    ],
)
def test_spot_files_with_faults(tmp_path: Path, edit, message: str) -> None:
    counts, spots = write_st(tmp_path)
    spots.write_text(edit(spots.read_text()))
    with pytest.raises(ValueError, match=message):
        read(counts, spots)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("1.5", "holds 1.5, which is no count; give the raw counts"),
        ("-2", "holds -2, which is no count"),
        ("", "holds cells that are no numbers"),
        ("many", "holds cells that are no numbers"),
    ],
)
def test_cells_that_are_no_counts(tmp_path: Path, cell: str, message: str) -> None:
    counts, spots = write_st(tmp_path)
    rows = written(counts)
    rows[3][2] = cell
    with pytest.raises(ValueError, match=rf"counts\.tsv\.gz: {message}"):
        read(table_of(counts, rows), spots)


def test_tables_with_faults(tmp_path: Path) -> None:
    counts, spots = write_st(tmp_path)
    (tmp_path / "cut.tsv.gz").write_bytes(counts.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut\.tsv\.gz: not readable as a table"):
        read(tmp_path / "cut.tsv.gz", spots)
    (tmp_path / "plain.tsv.gz").write_bytes(gzip.decompress(counts.read_bytes()))
    with pytest.raises(ValueError, match=r"plain\.tsv\.gz: not readable as a table \(Not a gzipped file"):
        read(tmp_path / "plain.tsv.gz", spots)
    (tmp_path / "other.tsv").write_text("\ta\tb\nrow1\t1\t2\n")
    with pytest.raises(ValueError, match=r"neither its rows nor its columns are all named XxY.*this is no ST table"):
        read(tmp_path / "other.tsv", spots)
    rows = written(counts)
    rows[2][0] = "1.2x0.9"
    with pytest.raises(ValueError, match=r"spots \['1x1'\] come twice after rounding"):
        read(table_of(tmp_path / "twice.tsv", rows), spots)
    with pytest.raises(ValueError, match=r"absent\.tsv: no such file"):
        read(tmp_path / "absent.tsv", spots)


def test_a_table_of_counts_that_was_cut_short_is_a_warning(tmp_path: Path) -> None:
    counts, spots = write_st(tmp_path, side=8)
    rows = written(counts)
    cut = table_of(tmp_path / "cut.tsv", rows[:31])  # a header and 30 of the 64 places
    found = read(cut, spots)
    selected = sum(line.split("\t")[-1] == "1" for line in spots.read_text().splitlines()[1:])
    lost = selected - len(found.ids)
    assert lost > 30
    (warning,) = [note for note in found.notes if note.startswith("WARNING")]
    assert f"{lost} of {selected} selected spots have no counts; is the table" in warning
    assert not any(note.startswith("WARNING") for note in read(counts, spots).notes)


def test_inputs(tmp_path: Path) -> None:
    counts, spots = write_st(tmp_path)
    assert st.inputs(Source("st", counts, spots)) == [counts, spots]
    assert st.inputs(Source("st", counts)) == [counts]


@pytest.mark.parametrize("name", HER2ST)
def test_real_her2st(real_data: Path, name: str) -> None:
    import pandas as pd

    folder = real_data / "her2st" / "data"
    paths = (folder / "ST-cnts" / f"{name}.tsv.gz", folder / "ST-spotfiles" / f"{name}_selection.tsv")
    found = read(*paths)
    table = pd.read_csv(paths[0], sep="\t", index_col=0)
    spots = pd.read_csv(paths[1], sep="\t")
    spots.index = pd.Index([f"{x}x{y}" for x, y in zip(spots.x, spots.y, strict=True)])
    assert len(found.ids) == HER2ST[name]
    assert found.ids == list(table.index)
    assert found.names == list(table.columns)
    np.testing.assert_array_equal(dense(found), table.to_numpy())
    np.testing.assert_allclose(found.xy, spots.loc[found.ids, ["pixel_x", "pixel_y"]].to_numpy())
    lost = len(spots) - len(table)
    assert found.notes == ([f"{lost} selected spots have no counts and are left out"] if lost else [])
    assert align.lattice_fault(fit(found), "st", PrepConfig()) is None
    if name[0] in "AC":
        assert fit(found).mpp == pytest.approx(0.917 if name[0] == "A" else 0.688, rel=0.005)


@pytest.mark.parametrize(("name", "labelled", "blank"), [("C1", 176, 0), ("G2", 467, 8)])
def test_real_labels_serve_as_spot_file(real_data: Path, name: str, labelled: int, blank: int) -> None:
    import pandas as pd

    folder = real_data / "her2st" / "data"
    path = folder / "ST-pat" / "lbl" / f"{name}_labeled_coordinates.tsv"
    found = read(folder / "ST-cnts" / f"{name}.tsv.gz", path)
    left_out = f"{blank} lines of the spot file have no coordinates" if blank else "1 spots have no counts"
    assert found.notes == [f"{left_out} and are left out"]
    table = pd.read_csv(path, sep="\t").dropna()
    table.index = pd.Index([f"{round(x)}x{round(y)}" for x, y in zip(table.x, table.y, strict=True)])
    assert len(found.ids) == labelled
    np.testing.assert_allclose(found.xy, table.loc[found.ids, ["pixel_x", "pixel_y"]].to_numpy())


@pytest.mark.parametrize(("name", "selected", "strangers"), [("MOB1", 379, 11), ("MOB2", 407, 8)])
def test_real_stutility(real_data: Path, name: str, selected: int, strangers: int) -> None:
    import pandas as pd

    folder = real_data / "stutility_mob" / "inst" / "extdata" / "counts"
    paths = (folder / f"{name}.tsv.gz", folder / f"alignment_table_{name}.tsv")
    with pytest.raises(ValueError, match=r"x \+ y is even for each"):  # an array of 2,000 spots
        read(*paths)
    found = read(*paths, space_um=100.0)
    table = pd.read_csv(paths[0], sep="\t", index_col=0)
    spots = pd.read_csv(paths[1], sep="\t")
    spots.index = pd.Index([f"{x}x{y}" for x, y in zip(spots.x, spots.y, strict=True)])
    chosen = spots[spots.selected == 1]
    assert (len(found.ids), len(found.names)) == (selected, 1000)
    assert found.ids == [i for i in table.index if i in chosen.index]
    np.testing.assert_array_equal(dense(found), table.loc[found.ids].to_numpy())
    np.testing.assert_allclose(found.xy, chosen.loc[found.ids, ["pixel_x", "pixel_y"]].to_numpy())
    assert f"{strangers} spots with counts are not in the spot file and are left out" in found.notes
    assert fit(found).mpp == pytest.approx(4.39, abs=0.01)
    assert "two pixel sizes, 11" in (align.lattice_fault(fit(found), "st", PrepConfig()) or "")


@pytest.mark.parametrize(("name", "spots", "genes"), [("slice1", 254, 7998), ("slice2", 251, 7713)])
def test_real_paste(real_data: Path, name: str, spots: int, genes: int) -> None:
    import pandas as pd

    folder = real_data / "paste_bc" / "sample_data"
    table = pd.read_csv(folder / f"{name}.csv.gz", index_col=0)
    places = np.loadtxt(folder / f"{name}_coor.csv", delimiter=",")
    for given in (folder / f"{name}_coor.csv", None):
        found = read(folder / f"{name}.csv.gz", given)
        assert (len(found.ids), len(found.names), found.space_um, found.notes) == (spots, genes, 200.0, [])
        assert found.names == list(table.columns)
        np.testing.assert_array_equal(dense(found), table.to_numpy())
        np.testing.assert_allclose(found.xy, places, atol=5e-4)
        assert found.ids[0] == f"{places[0, 0]:.0f}x{places[0, 1]:.0f}"
