"""Drafts of manifests: pairs that one name or folder ties, blanks for the rest, and nothing that is overwritten."""

import csv
import os
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

from data_prep import draft, manifest
from data_prep.synthetic.cells import draw_cells
from data_prep.synthetic.cosmx import CONTROLS, PIXEL_UM, write_cosmx
from storm import genes
from tests.data_prep.vendors import tissue, write_st, write_tiff, write_visium

GENES = ["TP53", "EGFR", "ERBB2", "MKI67", "CD3E", "CD4", "CD8A", "MS4A1", "EPCAM", "VIM", "ACTB"]


def init(*words: str | Path) -> int:
    return manifest.main(["init", *map(str, words)])


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    """slide id -> the cells of its row that are not blank."""
    with path.open(newline="") as handle:
        return {r["slide_id"]: {k: v for k, v in r.items() if v and k != "slide_id"} for r in csv.DictReader(handle)}


def test_unfilled_blanks_are_the_only_faults_of_a_draft(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "manifest.csv").unlink()
    assert init(corpus) == 0
    told = capsys.readouterr().out.splitlines()
    path = corpus / "manifest.csv"
    found = draft.draft(corpus, corpus)
    with pytest.raises(ValueError) as caught:
        manifest.read(path)
    lines = {row["slide_id"]: n for n, row in enumerate(found.rows, 2)}
    faults = {line.split(": ")[1].partition(";")[0] for line in str(caught.value).splitlines()}
    all_rows = {f"column {name} is blank on lines 2-4 (3 rows)" for name in ("donor", "study", "organ")}
    assert faults == {*all_rows, f"line {lines['i']}, column species"}
    assert sorted(found.blanks) == sorted([(s, c) for s in lines for c in ("donor", "study", "organ")] + [
        ("i", "species")])  # fmt: skip
    assert told[-1].startswith("split is blank too, and may stay so; but nothing can be evaluated unless some donors")
    assert told[-6:-1] == [
        "10 cells are blank and must be filled in:",
        "  donor: all rows",
        "  study: all rows",
        "  organ: all rows",
        "  species: i",
    ]


def test_a_filled_draft_reads_and_names_every_file(corpus: Path) -> None:
    write_st(corpus / "t", genes=GENES)
    (corpus / "manifest.csv").unlink()
    assert init(corpus) == 0
    path = corpus / "manifest.csv"
    rows = rows_of(path)
    assert rows["v"] == {"image": "images/v.tif", "measurement": "v/outs", "platform": "visium", "species": "human"}
    assert rows["i"] == {"image": "images/i.tif", "platform": "image"}
    lines = path.read_text().splitlines()
    columns = lines[0].split(",")
    filled = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    for row in filled:
        row |= {"donor": "d", "study": "s", "organ": "skin", "species": "human"}
    path.write_text("\n".join([lines[0], *(",".join(row.values()) for row in filled)]) + "\n")
    assert [r.slide_id for r in manifest.read(path)] == list(rows)


def test_pairs_by_name_by_token_and_by_folder(tmp_path: Path) -> None:
    for name in ("A1", "B2", "C3", "D4"):
        counts, _ = write_st(tmp_path / "cnt", genes=GENES)
        counts.rename(tmp_path / "cnt" / f"{name}.tsv.gz")
        (tmp_path / "cnt" / "spots.tsv").rename(tmp_path / "cnt" / f"{name}_selection.tsv")
    for place in ("A1.tif", "scan_b2_HE.tif", "C3/5714.tif", "D4_one.tif", "D4_two.tif"):
        (tmp_path / "img" / place).parent.mkdir(parents=True, exist_ok=True)
        write_tiff(tmp_path / "img" / place, tissue(64, 64))
    found = draft.draft(tmp_path, tmp_path)
    pairs = {row["slide_id"]: (row.get("image"), row.get("spots")) for row in found.rows}
    assert pairs == {
        "A1": ("img/A1.tif", "cnt/A1_selection.tsv"),
        "B2": ("img/scan_b2_HE.tif", "cnt/B2_selection.tsv"),
        "C3": ("img/C3/5714.tif", "cnt/C3_selection.tsv"),
        "D4": (None, "cnt/D4_selection.tsv"),
    }
    assert found.notes == [
        "cnt/D4.tsv.gz: image left blank, several images are tied to it (img/D4_one.tif, img/D4_two.tif); choose one"
    ]


def test_an_image_that_two_measurements_claim_is_given_to_neither(tmp_path: Path) -> None:
    for name in ("s1", "s2"):
        write_visium(tmp_path / name / "outs")
    write_tiff(tmp_path / "s1_s2.tif", tissue(64, 64))
    found = draft.draft(tmp_path, tmp_path)
    assert [row.get("image") for row in found.rows] == [None, None]
    assert "image left blank, also tied to another measurement (s1_s2.tif); choose one" in found.notes[0]


def test_one_measurement_and_one_image_belong_together(tmp_path: Path) -> None:
    write_visium(tmp_path / "outs")
    write_tiff(tmp_path / "scan.tif", tissue(64, 64))
    (row,) = draft.draft(tmp_path, tmp_path).rows
    assert row["image"] == "scan.tif"


def test_thumbnails_and_what_is_no_slide_are_left_out_and_told(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "tiny.png"), np.zeros((300, 400, 3), np.uint8))
    (tmp_path / "odd.svs").write_bytes(b"text")
    write_tiff(tmp_path / "good.tif", tissue(64, 64))
    found = draft.draft(tmp_path, tmp_path)
    assert [row["slide_id"] for row in found.rows] == ["good"]
    assert found.notes == [
        "tiny.png: too small for a slide, left out",
        "odd.svs: is named like a slide and is none, left out",
    ]


def test_ids_are_legal_and_unique(tmp_path: Path) -> None:
    for place in ("a/x 1.tif", "b/x 1.tif", "b/c/x.1.tif", "-y.tif"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        write_tiff(tmp_path / place, tissue(64, 64))
    ids = [row["slide_id"] for row in draft.draft(tmp_path, tmp_path).rows]
    assert ids == ["y", "a_x_1", "b_x_1", "x"]


def test_a_cell_that_starts_a_formula_is_inert_and_reads_back(tmp_path: Path) -> None:
    write_tiff(tmp_path / "=cmd.tif", tissue(64, 64))
    assert init(tmp_path) == 0
    text = (tmp_path / "manifest.csv").read_text()
    assert "cmd,'=cmd.tif," in text
    (tmp_path / "manifest.csv").write_text(text.replace("image,,,,,,,", "image,,,,d,s,o,human"))
    (row,) = manifest.read(tmp_path / "manifest.csv")
    assert row.image == tmp_path / "=cmd.tif"


def test_a_manifest_is_not_overwritten_unless_forced(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (corpus / "manifest.csv").read_bytes()
    assert init(corpus) == 2
    assert "is there already; choose another name with -o, or replace it with --force" in capsys.readouterr().err
    assert (corpus / "manifest.csv").read_bytes() == before
    assert init(corpus, "--force") == 0
    assert (corpus / "manifest.csv").read_bytes() != before


def test_paths_of_a_manifest_elsewhere_start_from_the_folder(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(corpus, "-o", tmp_path / "out" / "m.csv") == 0
    assert f"give every command --root {corpus}\n" in capsys.readouterr().out
    assert rows_of(tmp_path / "out" / "m.csv")["v"]["image"] == "images/v.tif"
    assert init(corpus, "-o", tmp_path / "m.csv") == 0
    assert rows_of(tmp_path / "m.csv")["v"]["image"] == "corpus/images/v.tif"


@pytest.mark.parametrize(("folder", "fault"), [("absent", "is no folder"), ("empty", "holds no measurement")])
def test_nothing_to_draft(tmp_path: Path, folder: str, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert init(tmp_path / folder) == 2
    assert fault in capsys.readouterr().err


def test_real_folders(real_data: Path) -> None:
    found = draft.draft(real_data, real_data)
    rows = {row["measurement"]: row for row in found.rows if row.get("measurement")}
    platforms = {path: row["platform"] for path, row in rows.items()}
    assert platforms["seurat_visium_hd/tests/testdata/visium_hd"] == "visium_hd"
    assert platforms["multiqc_xenium/data/modules/xenium/sample1"] == "xenium"
    assert platforms["cosmx_dbkero/inst/extdata/CosMx_DBKero_Tiny"] == "cosmx"
    assert platforms["scmuscle_visium/visium_data/Vis5A_2dpi"] == "visium"
    assert rows["scmuscle_visium/visium_data/Vis5A_2dpi"]["species"] == "mouse"
    own = manifest.read(Path(__file__).parents[2] / "configs" / "her2st.csv", real_data / "her2st", "section")
    for row in own:  # the manifest that a person wrote for these sections names the same files
        assert row.measurement and row.image and row.spots
        drafted = rows[row.measurement.relative_to(real_data).as_posix()]
        assert (real_data / drafted["image"], real_data / drafted["spots"]) == (row.image, row.spots)
        assert drafted["species"] == "human"


def test_what_cannot_be_read_does_not_stop_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, elsewhere = tmp_path / "data", tmp_path / "scanner"
    elsewhere.mkdir()
    write_tiff(elsewhere / "far.tif", tissue(64, 64))
    folder.mkdir()
    write_tiff(folder / "a.tif", tissue(64, 64))
    (folder / "far.tif").symlink_to(elsewhere / "far.tif")  # large slides lie elsewhere, and are linked
    (folder / "broken.tif").symlink_to(tmp_path / "gone.tif")
    (folder / "circle.tif").symlink_to(folder / "circle.tif")
    for name in ("pipe.tif", "pipe.csv", "pipe.h5ad", "experiment.xenium"):
        os.mkfifo(folder / name)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "line\nbreak.tif").write_bytes(b"II*\0")
    (folder / "wide.csv").write_text("a" * 200_000 + "\n1,2,3,4,5,6\n")
    (folder / "deep").mkdir()
    (folder / "deep" / "experiment.xenium").write_text("[" * 100_000)
    with h5py.File(folder / "odd.h5ad", "w") as root:
        root.create_group("var")["gene_ids"] = 5
    assert init(folder) == 0
    told = capsys.readouterr().out
    for name in ("broken.tif", "circle.tif", "pipe.tif", "pipe.csv", "pipe.h5ad", "experiment.xenium"):
        assert f"note: {name}: is no file that can be read, left out" in told
    assert "note: line\\nbreak.tif: is no file that can be read" in told
    assert "note: linked: is a link to a folder, which is not followed" in told
    rows = rows_of(folder / "manifest.csv")
    assert sorted(rows) == ["a", "deep", "far", "odd"]
    assert rows["far"]["image"] == str(elsewhere / "far.tif")


def test_an_he_and_its_alignment_beside_a_xenium_bundle(tmp_path: Path) -> None:
    bundle = tmp_path / "s" / "outs"
    bundle.mkdir(parents=True)
    (bundle / "experiment.xenium").write_text("{}")
    (bundle / "cells.parquet").touch()
    write_tiff(tmp_path / "s_he_image.ome.tif", tissue(64, 64))
    write_tiff(tmp_path / "other.tif", tissue(64, 64))
    (tmp_path / "s_he_imagealignment.csv").write_text("1,0,0\n0,1,0\n0,0,1\n")
    found = draft.draft(tmp_path, tmp_path)
    row = next(row for row in found.rows if row["platform"] == "xenium")
    assert (row["image"], row["alignment"]) == ("s_he_image.ome.tif", "s_he_imagealignment.csv")
    assert found.notes == ["s/outs: s_he_imagealignment.csv lies beside it and is taken for its alignment"]
    (tmp_path / "t_alignment.csv").touch()
    found = draft.draft(tmp_path, tmp_path)
    assert "alignment" not in next(row for row in found.rows if row["platform"] == "xenium")
    assert "name the one of its image in the column alignment: s_he_imagealignment.csv, t_al" in found.notes[0]


def test_the_pixel_of_cosmx_and_the_platform_of_an_h5ad(tmp_path: Path) -> None:
    known = genes.shipped("human")
    drawn = draw_cells(400, list(known.ids[:20]), list(known.symbols[:20]), CONTROLS["1.3.2"], 0, genes_per_cell=4)
    write_cosmx(tmp_path / "flat", drawn, "1.3.2")
    with h5py.File(tmp_path / "a.h5ad", "w"):
        pass
    assert init(tmp_path) == 0
    rows = rows_of(tmp_path / "manifest.csv")
    (flat,) = [row for row in rows.values() if row.get("platform") == "cosmx"]
    assert float(flat["space_um"]) == pytest.approx(PIXEL_UM)
    found = draft.draft(tmp_path, tmp_path)
    assert "a.h5ad: write what measured it in the column platform: st, visium, visium_hd, xenium, cosmx" in found.notes
    (positions,) = (tmp_path / "flat").glob("*fov_positions*")
    positions.unlink()
    (note,) = [note for note in draft.draft(tmp_path, tmp_path).notes if "space_um" in note]
    assert "flat: its files do not tell the size of a pixel" in note
