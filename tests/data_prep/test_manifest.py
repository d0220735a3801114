"""The manifest: every fault named with file, line, column and cure, all at once."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from data_prep import manifest
from tests.data_prep.vendors import HEADER, write_manifest

GOOD = {"slide_id": "a", "image": "a.tif", "platform": "image"}


def faults(path: Path, split_by: str = "donor", root: Path | None = None) -> list[str]:
    """The lines of the error that a manifest raises."""
    with pytest.raises(ValueError) as caught:
        manifest.read(path, root, split_by)
    return str(caught.value).splitlines()


def test_rows_and_defaults(tmp_path: Path) -> None:
    rows = [
        GOOD,
        {"slide_id": "b", "image": "/abs/b.svs", "measurement": "b/outs", "platform": "visium", "mpp": "0.25",
         "split": "val", "section": "c", "assume_aligned": "True", "license": "CC0-1.0"},
    ]  # fmt: skip
    one, other = manifest.read(write_manifest(tmp_path / "m.csv", rows))
    assert (one.image, one.measurement, one.mpp, one.split, one.section) == (tmp_path / "a.tif", None, None, "", "a")
    assert (other.image, other.measurement) == (Path("/abs/b.svs"), tmp_path / "b/outs")
    assert (other.mpp, other.split, other.section, other.assume_aligned) == (0.25, "val", "c", True)


def test_root_replaces_the_manifests_folder(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "m.csv", [GOOD])
    assert manifest.read(path, tmp_path / "else")[0].image == tmp_path / "else" / "a.tif"


def test_a_parquet_manifest_reads_alike(tmp_path: Path) -> None:
    row = dict.fromkeys(HEADER) | GOOD | {"donor": "d1", "study": "s1", "organ": "skin", "species": "human"}
    parquet.write_table(pa.table({k: pa.array([v], pa.string()) for k, v in row.items()}), tmp_path / "m.parquet")
    assert manifest.read(tmp_path / "m.parquet") == manifest.read(write_manifest(tmp_path / "m.csv", [GOOD]))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"slide_id": "a.b"}, "line 2, column slide_id: slide_id 'a.b': use 1 to 64"),
        ({"slide_id": ""}, "line 2, column slide_id: is blank"),
        ({"donor": ""}, "line 2, column donor: is blank; name the person"),
        ({"image": ""}, "line 2, column image: is blank"),
        ({"image": "../x.tif"}, "line 2, column image: '../x.tif' leaves its root"),
        ({"platform": "visum"}, "line 2, column platform: 'visum' is unknown (nearest: visium)"),
        ({"unit": "hexagon"}, "column unit: 'hexagon' is none of cell, square<N>um"),
        ({"format": "zip"}, "column format: 'zip' is none of st, visium"),
        ({"space_um": "0"}, "column space_um: '0' is no um per unit of the measurement"),
        ({"platform": "st"}, "column measurement: is blank; give the file or folder that st wrote"),
        ({"measurement": "x"}, "column measurement: must be blank for platform image"),
        ({"species": "yeast"}, "column species: 'yeast' is none of human, mouse"),
        ({"split": "training"}, "column split: 'training' is none of train, val, test"),
        ({"mpp": "500"}, "column mpp: '500' is no um per level-0 pixel"),
        ({"mpp": "half"}, "column mpp: 'half' is no um"),
        ({"assume_aligned": "maybe"}, "column assume_aligned: 'maybe' is none of true, false"),
    ],
)
def test_a_fault_names_line_column_and_cure(tmp_path: Path, change: dict[str, str], expected: str) -> None:
    (fault,) = faults(write_manifest(tmp_path / "m.csv", [GOOD | change]))
    assert fault.startswith(f"{tmp_path / 'm.csv'}: ")
    assert expected in fault


def test_all_faults_come_together(tmp_path: Path) -> None:
    rows = [GOOD | {"donor": ""}, GOOD | {"slide_id": "b.c", "organ": ""}, GOOD]
    found = faults(write_manifest(tmp_path / "m.csv", rows))
    assert [f.split(": ")[1] for f in found] == [
        "line 2, column donor",
        "line 3, column organ",
        "line 3, column slide_id",
        "line 4, column slide_id",
    ]
    assert "'a' is already on line 2" in found[-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (",".join([*HEADER, "spilt"]), "line 1: 'spilt' is no column (nearest: split)"),
        (",".join([*HEADER, "patient"]), "line 1: 'patient' is no column (known: slide_id, "),
        (",".join(HEADER[1:]), "line 1: column slide_id is missing"),
        (",".join([*HEADER, "organ"]), "line 1: column organ comes twice"),
        ("", "is empty"),
        (",".join(HEADER), "holds no slide"),
        (",".join(HEADER) + "\na,b", "line 2: 2 cells, the header has 8"),
    ],
)
def test_faults_of_the_header_and_the_shape(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    assert expected in faults(tmp_path / "m.csv")[0]


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_another_separator_is_one_fault(tmp_path: Path, mark: str, name: str) -> None:
    (tmp_path / "m.csv").write_text("\n".join([mark.join(HEADER), mark.join("abcdefgh")]))
    (fault,) = faults(tmp_path / "m.csv")
    assert fault.endswith(f"m.csv: line 1: its columns are separated by {name}; save it as csv with commas")


def test_an_apostrophe_before_a_formula_is_no_part_of_the_cell(tmp_path: Path) -> None:
    rows = [GOOD | {"image": "'=a.tif", "donor": "'-1", "study": "'quoted'"}]
    (row,) = manifest.read(write_manifest(tmp_path / "m.csv", rows))
    assert (row.image, row.donor, row.study) == (tmp_path / "=a.tif", "-1", "'quoted'")


def test_check_says_what_it_read_and_fails_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_manifest(tmp_path / "m.csv", [GOOD, GOOD | {"slide_id": "b"}])
    assert manifest.main(["check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 2 slides of 1 donors, no fault\n"
    assert manifest.main(["check", str(write_manifest(path, [GOOD | {"donor": ""}]))]) == 2
    assert "line 2, column donor: is blank" in capsys.readouterr().err


def test_no_manifest_and_no_text(tmp_path: Path) -> None:
    assert "no such manifest" in faults(tmp_path / "absent.csv")[0]
    (tmp_path / "m.csv").write_bytes(b"\xff\xfe\x00s")
    assert "not UTF-8" in faults(tmp_path / "m.csv")[0]


def test_a_donor_in_two_splits_needs_split_by_section(tmp_path: Path) -> None:
    rows = [GOOD | {"split": "train"}, GOOD | {"slide_id": "b", "split": "test"}]
    path = write_manifest(tmp_path / "m.csv", rows)
    (fault,) = faults(path)
    assert "line 3, column split: donor 'd1' of study 's1' is in test here and in train on line 2" in fault
    assert "split_by=section" in fault
    assert len(manifest.read(path, None, "section")) == 2
    shared = write_manifest(tmp_path / "n.csv", [row | {"section": "cut1"} for row in rows])
    assert "section 'cut1'" in faults(shared, "section")[0]


def test_equal_donor_names_of_two_studies_are_two_donors(tmp_path: Path) -> None:
    rows = [GOOD | {"split": "train"}, GOOD | {"slide_id": "b", "split": "test", "study": "s2"}]
    assert len(manifest.read(write_manifest(tmp_path / "m.csv", rows))) == 2


def test_empty_columns_that_spreadsheets_add_behind_the_last_one(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "m.csv", [GOOD])
    path.write_text("".join(f"{line},,\n" for line in path.read_text().splitlines()) + ",,,,\n")
    assert manifest.read(path)[0].image == tmp_path / "a.tif"
    path.write_text(path.read_text().replace(",,\n", ",,slip\n").replace("slip", "", 1))
    assert "cells, the header has" in faults(path)[0]


@pytest.mark.parametrize("hidden", ["\u00a0", "\u200b", "\x00", "\u2028", "\x0b", "\x1b[2J"])
def test_donors_that_only_look_alike_are_refused(tmp_path: Path, hidden: str) -> None:
    path = write_manifest(tmp_path / "m.csv", [GOOD | {"donor": f"d{hidden}1"}])
    (fault,) = faults(path)
    assert f"line 2, column donor: 'd{repr(hidden)[1:-1]}1' holds U+{ord(hidden[0]):04X}" in fault


def test_a_cell_without_end_is_a_fault_of_its_line(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "m.csv", [GOOD | {"license": "x" * 200_000}])
    assert "field larger than field limit" in faults(path)[0]


def test_blank_cells_are_told_by_column_and_faults_have_an_end(tmp_path: Path) -> None:
    rows = [GOOD | {"slide_id": f"s{n}", "donor": "" if n != 5 else "d", "organ": ""} for n in range(60)]
    donor, organ = faults(write_manifest(tmp_path / "m.csv", rows))
    assert "column donor is blank on lines 2-6, 8-61 (59 rows); name the person" in donor
    assert "column organ is blank on lines 2-61 (60 rows)" in organ
    found = faults(write_manifest(tmp_path / "m.csv", [row | {"mpp": "half"} for row in rows]))
    assert len(found) == 21 and found[-1].endswith("and 42 more faults; mend these first")


def test_a_link_that_leads_out_says_so(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "data").symlink_to(tmp_path / "far")
    path = write_manifest(tmp_path / "near" / "m.csv", [GOOD | {"image": "data/a.tif"}])
    (fault,) = faults(path)
    assert "'data/a.tif' leaves its root 'near' through a link (links count as what they lead to)" in fault
    assert fault.endswith("write the absolute path, or give --root with a folder above it")
    assert manifest.read(path, tmp_path)[0].image == tmp_path / "data" / "a.tif"
    (fault,) = faults(write_manifest(tmp_path / "near" / "m.csv", [GOOD | {"image": "../a.tif"}]))
    assert "through a link" not in fault


def test_check_says_what_it_checks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        manifest.main(["check", "--help"])
    assert "Validate a manifest as text" in " ".join(capsys.readouterr().out.split())


def test_an_accent_typed_on_two_machines_is_one_donor(tmp_path: Path) -> None:
    rows = [{**GOOD, "donor": "Ren\u00e9", "split": "train"},
            {**GOOD, "slide_id": "b", "donor": "Rene\u0301", "split": "test"}]  # fmt: skip
    (fault,) = faults(write_manifest(tmp_path / "m.csv", rows))
    assert "donor 'Ren\u00e9' of study 's1' is in test here and in train on line 2" in fault


@pytest.mark.parametrize("data", [b"", b"PAR1 and no more PAR1", b"slide_id,image\n"])
def test_a_parquet_manifest_that_is_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.parquet").write_bytes(data)
    (fault,) = faults(tmp_path / "m.parquet")
    assert fault.startswith(f"{tmp_path / 'm.parquet'}: no readable parquet (")
    assert fault.endswith("write the manifest again, or as csv")


def test_columns_of_parquet_that_come_twice_and_numbers_that_are_missing(tmp_path: Path) -> None:
    row = dict.fromkeys(HEADER, "x") | GOOD | {"measurement": None, "species": "human"}
    table = pa.table({k: pa.array([v], pa.string()) for k, v in row.items()} | {"mpp": pa.array([float("nan")])})
    parquet.write_table(table, tmp_path / "m.parquet")
    assert manifest.read(tmp_path / "m.parquet")[0].mpp is None
    parquet.write_table(table.append_column("donor", table["donor"]), tmp_path / "m.parquet")
    assert faults(tmp_path / "m.parquet") == [f"{tmp_path / 'm.parquet'}: line 1: column donor comes twice"]


def test_a_path_that_leads_nowhere_is_a_fault_of_its_line(tmp_path: Path) -> None:
    (tmp_path / "loop.tif").symlink_to("loop.tif")
    rows = [{**GOOD, "image": name, "slide_id": f"s{i}"} for i, name in enumerate(("loop.tif", "a\0b.tif"))]
    assert manifest.main(["check", str(write_manifest(tmp_path / "m.csv", rows))]) == 2
    found = faults(tmp_path / "m.csv")
    assert "line 3, column image: 'a\\x00b.tif' is no path (embedded null byte); give one below" in found[-1]
    assert len(found) == 1 or "line 2, column image: 'loop.tif' is no path" in found[0]  # Python 3.13 asks no further
