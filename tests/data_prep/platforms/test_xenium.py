"""Xenium: cells against what was written, every vintage of the files, alignment."""

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import align
from data_prep.manifest import ManifestRow
from data_prep.one_slide import build_slide
from data_prep.platforms import CONTROL, GENE, OTHER, xenium
from data_prep.profiles import place, polygon_areas, profiles_of
from data_prep.synthetic.cells import CellSection
from data_prep.synthetic.xenium import CONTROLS, PIXEL_UM, write_alignment, write_xenium
from storm.prep_config import PrepConfig
from storm.schema import DISC, POLYGON
from storm.store import SlideStore
from tests.data_prep.platforms.helpers import dense
from tests.data_prep.platforms.xenium_files import CELLS, GENES, as_first_version, drawn_section, source
from tests.data_prep.vendors import tissue, write_tiff

TINY = PrepConfig(tile_px=56, tile_mpp=1.0)


def test_cells_are_read_as_they_were_written(xenium_written: Path, section: CellSection) -> None:
    found = xenium.read(source(xenium_written))
    assert (found.platform, found.kind, found.ids[:2]) == ("xenium", "cell", ["aaaaaaaa-1", "aaaaaaab-1"])
    np.testing.assert_allclose(found.xy * PIXEL_UM, section.xy_um)  # px of the morphology image, not um
    assert found.space_um == PIXEL_UM
    assert (found.matrix, found.matrix_source) == (None, "none")
    np.testing.assert_array_equal(dense(found), section.counts.toarray())
    assert found.names == [*section.gene_ids, *section.controls]
    assert found.symbols == [*section.symbols, *section.controls]
    assert found.column_kind.tolist() == [GENE] * GENES + [CONTROL] * len(CONTROLS)
    assert found.footprint_kind.tolist() == [POLYGON] * CELLS
    assert found.facts == {"analysis_sw_version": "xenium-3.0.0.15", "panel_name": "Synthetic panel"}
    assert found.notes == [
        "5 features that are no gene expression are left out (1 Deprecated Codeword, 1 Genomic Control, 1 Negative "
        "Control Codeword, 1 Negative Control Probe, 1 Unassigned Codeword)"
    ]


def test_polygons_lose_their_closing_vertex_and_nothing_else(xenium_written: Path, section: CellSection) -> None:
    found = xenium.read(source(xenium_written))
    assert found.polygon_indptr is not None
    assert found.polygon_xy is not None
    np.testing.assert_array_equal(np.diff(found.polygon_indptr), np.diff(section.polygon_indptr) - 1)
    first = section.polygon_um[: section.polygon_indptr[1] - 1]
    np.testing.assert_allclose(found.polygon_xy[: len(first)] * PIXEL_UM, first)
    area = polygon_areas(found.polygon_indptr, found.polygon_xy * PIXEL_UM)
    np.testing.assert_allclose(area, section.area_um2, rtol=1e-4)


def test_control_counts_become_a_share_and_no_genes(xenium_written: Path, section: CellSection, tmp_path: Path) -> None:
    row = ManifestRow("x", None, xenium_written, "xenium")
    store = SlideStore(build_slide(row, tmp_path, TINY))
    gene_counts, controls = section.totals
    np.testing.assert_array_equal(store.quality()["control"], controls)
    np.testing.assert_array_equal(store.quality()["depth"], gene_counts)
    assert controls.sum() > 0
    assert store.genes().ids == tuple(sorted(section.gene_ids))
    assert (store.info.mpp, store.info.mpp_source, store.info.image) == (PIXEL_UM, "matrix", False)
    stored = (Path(tmp_path) / "x.zarr.zip").read_bytes()
    for private in (b"of a user", b"XETG", str(tmp_path).encode()):
        assert private not in stored


def test_the_first_version_has_numbers_as_ids_and_csv_alone(bundle: Path, xenium_written: Path) -> None:
    as_first_version(bundle)
    assert sorted(p.suffix for p in xenium.inputs(source(bundle))) == [".gz", ".gz", ".h5", ".xenium"]
    new, old = xenium.read(source(xenium_written)), xenium.read(source(bundle))
    assert old.ids[:3] == ["1", "2", "3"]
    np.testing.assert_allclose(old.xy, new.xy)
    np.testing.assert_allclose(old.polygon_xy, new.polygon_xy, rtol=1e-5)  # type: ignore[arg-type]
    np.testing.assert_array_equal(dense(old), dense(new))


def test_ids_as_bytes_in_parquet_and_a_prefix_before_names(bundle: Path, xenium_written: Path) -> None:
    for name in ("cells.parquet", "cell_boundaries.parquet"):
        table = pq.read_table(bundle / name)
        column = table.column("cell_id").cast(pa.binary())
        pq.write_table(table.set_column(0, "cell_id", column), bundle / f"Xenium_FFPE_{name}")
        (bundle / name).unlink()
    found = xenium.read(source(bundle))
    assert found.ids == xenium.read(source(xenium_written)).ids
    assert (found.footprint_kind == POLYGON).all()


def test_cells_are_joined_by_id_and_never_by_row(bundle: Path, xenium_written: Path) -> None:
    table = pd.read_parquet(bundle / "cells.parquet")
    table.sample(frac=1, random_state=0).to_parquet(bundle / "cells.parquet")
    found, straight = xenium.read(source(bundle)), xenium.read(source(xenium_written))
    assert found.ids == straight.ids
    np.testing.assert_array_equal(found.xy, straight.xy)


def test_cells_that_the_matrix_does_not_count_are_told(bundle: Path) -> None:
    table = pd.read_parquet(bundle / "cells.parquet")
    extra = table.iloc[:2].assign(cell_id=["zzzzzzza-1", "zzzzzzzb-1"])
    pd.concat([extra, table]).to_parquet(bundle / "cells.parquet")
    found = xenium.read(source(bundle))
    assert (len(found.ids), found.notes[0]) == (
        CELLS,
        "2 cells of cells.parquet are not in the matrix and are left out",
    )


def test_proteins_are_neither_genes_nor_controls(bundle: Path) -> None:
    with h5py.File(bundle / "cell_feature_matrix.h5", "a") as root:
        root["matrix/features/feature_type"][0] = b"Protein Expression"
    found = xenium.read(source(bundle))
    assert found.column_kind.tolist()[:2] == [OTHER, GENE]


def test_cells_without_a_polygon_are_discs_of_their_area(bundle: Path, section: CellSection) -> None:
    table = pd.read_parquet(bundle / "cell_boundaries.parquet")
    of = table.groupby("cell_id", sort=False).cumcount()
    ids = xenium.read(source(bundle)).ids
    two = (table["cell_id"] == ids[3]) & (of >= 2)
    table[~two & (table["cell_id"] != ids[5])].to_parquet(bundle / "cell_boundaries.parquet")  # 2 vertices; none
    cells = pd.read_parquet(bundle / "cells.parquet")
    cells.loc[5, "cell_area"] = np.nan
    cells.to_parquet(bundle / "cells.parquet")
    found = xenium.read(source(bundle))
    assert np.flatnonzero(found.footprint_kind == DISC).tolist() == [3, 5]
    assert found.footprint_um[3] == pytest.approx(np.sqrt(4 / np.pi * section.area_um2[3]), rel=1e-3)
    assert found.footprint_um[5] == 10
    assert "1 cells have no polygon and are discs of their area" in found.notes
    assert "1 cells have neither polygon nor area: discs of 10 um" in found.notes


def test_without_boundaries_all_cells_are_discs(bundle: Path, section: CellSection) -> None:
    (bundle / "cell_boundaries.parquet").unlink()
    found = xenium.read(source(bundle))
    assert (found.footprint_kind == DISC).all()
    np.testing.assert_allclose(np.pi / 4 * found.footprint_um**2, section.area_um2, rtol=1e-3)
    assert f"{CELLS} cells have no polygon and are discs of their area" in found.notes


# H&E px -> morphology px, of an H&E at 0.25 um/px.
_S = 0.25 / PIXEL_UM
ALIGNMENTS = {
    "shifted": np.array([[_S, 0, -50], [0, _S, -80], [0, 0, 1]]),
    "turned by 90 degrees": np.array([[0, _S, -60], [-_S, 0, 1000], [0, 0, 1]]),
    "mirrored": np.array([[-_S, 0, 1000], [0, _S, -80], [0, 0, 1]]),
}


def he_row(folder: Path, image: Path | None = None, **more) -> ManifestRow:
    if image is None:
        image = folder.parent / "he.tif"
        write_tiff(image, tissue(900, 1000), mpp=0.25)
    return ManifestRow("x", image, folder, "xenium", **more)


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_cells_lie_where_the_alignment_puts_them(bundle: Path, section: CellSection, name: str) -> None:
    write_alignment(bundle / "S1_he_imagealignment.csv", ALIGNMENTS[name])
    assert bundle / "S1_he_imagealignment.csv" in xenium.inputs(source(bundle))
    store = SlideStore(build_slide(he_row(bundle), bundle.parent, TINY))
    he_px = store.places().xy_um / store.info.mpp
    np.testing.assert_allclose(align.apply(ALIGNMENTS[name], he_px) * PIXEL_UM, section.xy_um, atol=1e-3)
    assert store.info.mpp == pytest.approx(0.25)
    assert (store.info.mpp_source, store.info.alignment_source) == ("matrix", "file")
    told = [note for note in store.info.facts["notes"] if "the alignment mirrors the cells" in note]
    assert len(told) == (name == "mirrored")
    np.testing.assert_allclose(store.places().area_um2, section.area_um2, rtol=1e-3)  # polygons turn with their cells
    found = store.places()
    corner = align.apply(np.linalg.inv(ALIGNMENTS[name]), section.polygon_um[:1].astype(float) / PIXEL_UM) * 0.25
    np.testing.assert_allclose(found.polygon_um[0] + found.xy_um[0], corner[0], atol=1e-2)


def test_the_column_alignment_wins_over_the_bundles_file(bundle: Path) -> None:
    write_alignment(bundle / "he_imagealignment.csv", ALIGNMENTS["shifted"])
    other = bundle.parent / "mine.csv"
    write_alignment(other, ALIGNMENTS["mirrored"])
    matrix = xenium.read(source(bundle, alignment=other)).matrix
    np.testing.assert_allclose(np.linalg.inv(matrix), ALIGNMENTS["mirrored"], atol=1e-9)  # type: ignore[arg-type]


def test_key_points_align_and_their_residual_is_told(bundle: Path) -> None:
    fixed = np.random.default_rng(0).uniform(0, 800, (12, 2))
    moving = align.apply(np.linalg.inv(ALIGNMENTS["turned by 90 degrees"]), fixed)
    moving += np.random.default_rng(1).normal(0, 1.0, moving.shape)
    table = pd.DataFrame(np.hstack([fixed, moving]), columns=["fixedX", "fixedY", "alignmentX", "alignmentY"])
    table.to_csv(bundle / "he_imagealignment.csv", index=False)
    found = xenium.read(source(bundle))
    assert found.matrix_source == "key points"
    points = found.facts["key_points"]
    assert points["points"] == 12
    assert 0.5 < points["residual_px0"] < 2
    assert any(note.startswith("aligned by 12 key points") for note in found.notes)
    np.testing.assert_allclose(align.apply(found.matrix, fixed), moving, atol=4)  # type: ignore[arg-type]


def test_without_an_alignment_nothing_is_guessed(bundle: Path) -> None:
    with pytest.raises(ValueError, match=r"no file tells where it lies on .*give its matrix in the column alignment"):
        build_slide(he_row(bundle), bundle.parent, TINY)
    store = SlideStore(build_slide(he_row(bundle, assume_aligned=True, mpp=PIXEL_UM), bundle.parent, TINY))
    assert store.info.alignment_source == "assumed"


def test_a_matrix_in_the_wrong_direction_is_refused(bundle: Path) -> None:
    """By the image's own pixel size, or by the cells that it puts beside the image."""
    far = ALIGNMENTS["turned by 90 degrees"] @ np.diag([2.0, 2.0, 1])  # an H&E at 0.5 um/px
    write_alignment(bundle / "he_imagealignment.csv", np.linalg.inv(far))
    images = [bundle.parent / "told.tif", bundle.parent / "plain.tif"]
    write_tiff(images[0], tissue(450, 500), mpp=0.5)
    with pytest.raises(ValueError, match=r"mpp 0\.0903 \(matrix\) and 0\.5000 \(embedded\) are 454 % apart"):
        build_slide(he_row(bundle, images[0]), bundle.parent, TINY)
    write_tiff(images[1], tissue(450, 500), mpp=None)
    with pytest.raises(ValueError, match=r"1\d\d of 150 profiles lie beside the image .*or its alignment matrix"):
        build_slide(he_row(bundle, images[1]), bundle.parent, TINY)


def test_the_same_section_gives_the_same_bytes(xenium_written: Path, tmp_path: Path) -> None:
    write_xenium(tmp_path, drawn_section())
    for path in xenium_written.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_placed_without_an_image_all_cells_lie_in_the_frame(xenium_written: Path, section: CellSection) -> None:
    row = ManifestRow("x", None, xenium_written, "xenium")
    measured = xenium.read(source(xenium_written))
    placed = place(row, None, measured, TINY)
    found, _, facts = profiles_of(row, measured, placed, TINY)
    np.testing.assert_allclose(found.xy_um - found.xy_um[0], section.xy_um - section.xy_um[0])
    assert facts["controls"] == len(CONTROLS)
    assert (found.xy_um >= 199).all()
