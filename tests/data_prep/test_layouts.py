"""Layouts: measurements and images known by what lies in them, each of the vendors' own forms."""

import gzip
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep import layouts
from tests.data_prep.vendors import tissue, write_st, write_tiff, write_visium

MOUSE = ["ENSMUSG00000051951", "ENSMUSG00000033845.14", "ENSMUSG00000025903"]


def write_h5(path: Path, ids: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as root:
        root["matrix/features/id"] = [name.encode() for name in ids]


def found(root: Path) -> dict[str, layouts.Found]:
    return {m.path.relative_to(root).as_posix(): m for m in layouts.look(root).measurements}


def test_space_ranger_in_its_three_forms(tmp_path: Path) -> None:
    write_visium(tmp_path / "s1" / "outs")
    write_visium(tmp_path / "flat").rename(tmp_path / "s2")
    for old in (tmp_path / "s2").iterdir():
        old.rename(tmp_path / "s2" / f"GSM1_{old.name}")
    write_visium(tmp_path / "s3" / "outs")
    (tmp_path / "s3" / "outs" / "filtered_feature_bc_matrix.h5").unlink()
    mex = tmp_path / "s3" / "outs" / "raw_feature_bc_matrix"
    mex.mkdir()
    (mex / "features.tsv.gz").write_bytes(gzip.compress("\n".join(f"{g}\tx\tGene Expression" for g in MOUSE).encode()))
    all_found = found(tmp_path)
    assert {path: (m.platform, m.name) for path, m in all_found.items()} == {
        "s1/outs": ("visium", "s1"), "s2": ("visium", "s2"), "s3/outs": ("visium", "s3"),
    }  # fmt: skip
    assert all_found["s1/outs"].cells == {"species": "human"}
    assert all_found["s3/outs"].cells == {"species": "mouse"}


@pytest.mark.parametrize("binned", ["binned_outputs", "."])
def test_visium_hd_with_its_image(tmp_path: Path, binned: str) -> None:
    outs = tmp_path / "h" / "outs"
    for square in ("square_008um", "square_016um"):
        write_h5(outs / binned / square / "filtered_feature_bc_matrix.h5", MOUSE)
        (outs / binned / square / "spatial").mkdir()
        (outs / binned / square / "spatial" / "tissue_positions.parquet").touch()
    (outs / "microscope_image").mkdir()
    image = write_tiff(outs / "microscope_image" / "x.btf", tissue(64, 64))
    ((path, hd),) = found(tmp_path).items()
    assert (path, hd.platform, hd.name, hd.image, hd.cells) == ("h/outs", "visium_hd", "h", image, {"species": "mouse"})


def test_a_xenium_bundle_with_image_and_alignment(tmp_path: Path) -> None:
    bundle = tmp_path / "x"
    write_h5(bundle / "cell_feature_matrix.h5", ["NegControlProbe_1"])
    (bundle / "experiment.xenium").write_text(json.dumps({"panel_organism": "Mouse", "run_name": "secret"}))
    (bundle / "cells.parquet").touch()
    (bundle / "morphology_focus").mkdir()
    write_tiff(bundle / "morphology_focus" / "morphology_focus_0000.ome.tif", tissue(64, 64))
    write_tiff(bundle / "morphology.ome.tif", tissue(64, 64))
    image = write_tiff(bundle / "a_he_image.ome.tif", tissue(64, 64))
    content = layouts.look(tmp_path)
    (xenium,) = content.measurements
    assert (xenium.platform, xenium.image, xenium.cells) == ("xenium", image, {"species": "mouse"})
    assert content.images == []
    assert xenium.notes == [
        "no file tells where its cells lie on the image; give its matrix in the column alignment"
    ]  # fmt: skip
    (bundle / "a_he_imagealignment.csv").write_text("1,0,0\n0,1,0\n0,0,1\n")
    (aligned,) = layouts.look(tmp_path).measurements
    assert (aligned.paths, aligned.notes) == ({"alignment": bundle / "a_he_imagealignment.csv"}, [])


def test_a_xenium_folder_of_transcripts_alone(tmp_path: Path) -> None:
    for name in ("transcripts.parquet", "nucleus_boundaries.parquet"):
        (tmp_path / name).touch()
    (found,) = layouts.look(tmp_path).measurements
    assert found.platform == "xenium" and "add the column unit, with square8um" in found.notes[0]


def test_cosmx_flat_files(tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    (folder / "Lung5_exprMat_file.csv.gz").write_bytes(gzip.compress(b'"fov","cell_ID","TP53","EGFR"\n1,1,0,2\n'))
    (folder / "Lung5_metadata_file.csv.gz").touch()
    (folder / "CellLabels").mkdir()
    write_tiff(folder / "CellLabels" / "CellLabels_F001.tif", tissue(64, 64))
    content = layouts.look(tmp_path)
    (cosmx,) = content.measurements
    assert (cosmx.platform, cosmx.name, cosmx.path, cosmx.cells) == ("cosmx", "Lung5", folder, {"species": "human"})
    assert content.images == []


def test_a_hest_root_is_told_by_its_metadata(tmp_path: Path) -> None:
    for folder in ("st", "wsis", "metadata"):
        (tmp_path / folder).mkdir()
    for name in ("A1", "B2"):
        (tmp_path / "st" / f"{name}.h5ad").touch()
    image = write_tiff(tmp_path / "wsis" / "A1.tif", tissue(64, 64))
    about = {
        "st_technology": "Visium HD", "patient": "P 7", "dataset_title": "One\nstudy", "organ": "Bowel",
        "species": "Homo sapiens", "pixel_size_um_estimated": 0.27, "license": "CC BY-NC-SA 4.0", "tissue": None,
    }  # fmt: skip
    (tmp_path / "metadata" / "A1.json").write_text(json.dumps(about))
    (tmp_path / "metadata" / "B2.json").write_text("[1")
    known, unknown = layouts.look(tmp_path).measurements
    assert (known.platform, known.image) == ("visium_hd", image)
    assert known.cells == {
        "format": "hest", "donor": "P 7", "study": "One study", "organ": "Bowel", "species": "human",
        "license": "CC BY-NC-SA 4.0", "mpp": "0.27",
    }  # fmt: skip
    assert (unknown.platform, unknown.image, unknown.cells) == ("", None, {"format": "hest"})


def test_a_spatialdata_zarr_is_one_measurement(tmp_path: Path) -> None:
    (tmp_path / "a.zarr" / "tables" / "table").mkdir(parents=True)
    (tmp_path / "a.zarr" / "images").mkdir()
    (tmp_path / "b.zarr" / "images").mkdir(parents=True)
    (one,) = layouts.look(tmp_path).measurements
    assert (one.name, one.platform, one.path, one.cells) == ("a", "", tmp_path / "a.zarr", {"format": "spatialdata"})


def test_tables_of_legacy_st_are_known_by_content(tmp_path: Path) -> None:
    genes = ["TP53", "EGFR", "ERBB2", "MKI67", "CD3E", "CD4", "CD8A", "MS4A1", "EPCAM", "VIM", "ACTB"]
    write_st(tmp_path, genes=genes)
    (tmp_path / "labels.tsv").write_text("name\tx\ty\tpixel_x\tpixel_y\tlabel\n1x2\t1\t2\t3\t4\tfat\n")
    (tmp_path / "notes.txt").write_text("some words\nand more\n")
    (tmp_path / "small.tsv").write_text("\ta\tb\n1x2\t1\t2\n")
    (tmp_path / "odd.tsv.gz").write_bytes(b"no gzip")
    content = layouts.look(tmp_path)
    assert [(m.platform, m.path.name, m.cells) for m in content.measurements] == [
        ("st", "counts.tsv.gz", {"species": "human"})
    ]  # fmt: skip
    assert [p.name for p in content.spots] == ["spots.tsv", "labels.tsv"]


def test_images_are_known_by_name_and_first_bytes(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", tissue(64, 64))
    write_tiff(tmp_path / "a_label.tif", tissue(64, 64))
    (tmp_path / "b.svs").write_bytes(b"no slide")
    (tmp_path / "c.mrxs").touch()
    (tmp_path / "d.mrxs").touch()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "Slidedat.ini").touch()
    (tmp_path / ".hidden").mkdir()
    write_tiff(tmp_path / ".hidden" / "e.tif", tissue(64, 64))
    content = layouts.look(tmp_path)
    assert [p.name for p in content.images] == ["a.tif", "d.mrxs"]
    assert [p.name for p in content.strange] == ["b.svs", "c.mrxs"]


def test_an_h5ad_is_known_and_its_species_too(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5ad", "w") as root:
        root["var/_index"] = np.array([b"TP53", b"EGFR", b"ERBB2"])
    (tmp_path / "b.h5ad").write_bytes(b"no h5")
    one, other = layouts.look(tmp_path).measurements
    assert (one.platform, one.cells) == ("", {"format": "h5ad", "species": "human"})
    assert other.cells == {"format": "h5ad"}
