"""Xenium bundles that are refused, each with its message."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from data_prep.manifest import ManifestRow
from data_prep.platforms import xenium
from data_prep.profiles import place, profiles_of
from data_prep.synthetic.xenium import write_alignment
from storm.prep_config import PrepConfig
from tests.data_prep.platforms.helpers import dense
from tests.data_prep.platforms.xenium_files import CELLS, source


def on_table(name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        change(pd.read_parquet(folder / name)).to_parquet(folder / name)

    return edit


def on_matrix(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        with h5py.File(folder / "cell_feature_matrix.h5", "a") as root:
            values = change(root["matrix"][name][...])
            del root["matrix"][name]
            root["matrix"][name] = values

    return edit


def on_experiment(**told) -> Callable[[Path], object]:
    return lambda folder: (folder / "experiment.xenium").write_text(json.dumps(told))


def removed(*names: str) -> Callable[[Path], object]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def csv_cells(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        (folder / "cells.parquet").unlink()
        (folder / "cells.csv.gz").write_bytes(change((folder / "cells.csv.gz").read_bytes()))

    return edit


def two_alignments(folder: Path) -> None:
    for name in "ab":
        write_alignment(folder / f"{name}alignment.csv", np.eye(3))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no table of cells": (
        removed("cells.parquet", "cells.csv.gz"),
        r"bundle: has no table of cells \(cells\.parquet or cells\.csv\.gz or cells\.csv\); give the folder",
    ),
    "no matrix": (removed("cell_feature_matrix.h5"), r"bundle: has no counts \(cell_feature_matrix\.h5\)"),
    "no experiment.xenium": (removed("experiment.xenium"), r"bundle: has no experiment\.xenium; restore it, or"),
    "experiment is no JSON": (
        lambda folder: (folder / "experiment.xenium").write_text("{"),
        r"experiment\.xenium: not readable as JSON",
    ),
    "experiment is brackets alone": (
        lambda folder: (folder / "experiment.xenium").write_text("[" * 100_000),
        r"experiment\.xenium: not readable as JSON",
    ),
    "no pixel size": (on_experiment(run_name="x"), r"experiment\.xenium: has no pixel_size"),
    "pixel size as text": (on_experiment(pixel_size="0.2125"), r"pixel_size '0\.2125' is no um per pixel"),
    "pixel size of nothing": (on_experiment(pixel_size=21.25), r"pixel_size 21\.25 is no um per pixel"),
    "cells of another run": (
        on_table("cells.parquet", lambda t: t.assign(cell_id="z" + t["cell_id"])),
        r"cell_feature_matrix\.h5: 150 of 150 cells \(as 'aaaaaaaa-1'\) are not in cells\.parquet \(as 'zaaaaaaaa-1'\)",
    ),
    "a cell twice in the table": (
        on_table("cells.parquet", lambda t: t.iloc[[*range(CELLS), 7]]),
        r"cells\.parquet: cell 'aaaaaaah-1' comes twice",
    ),
    "a cell twice in the matrix": (
        on_matrix("barcodes", lambda v: v[[0, 0, *range(2, CELLS)]]),
        r"cell_feature_matrix\.h5: cell 'aaaaaaaa-1' comes twice",
    ),
    "a cell without a place": (
        on_table("cells.parquet", lambda t: t.assign(x_centroid=t["x_centroid"].where(t.index != 4))),
        r"cells\.parquet: cell 'aaaaaaae-1' has no place",
    ),
    "no column of places": (
        on_table("cells.parquet", lambda t: t.drop(columns="y_centroid")),
        r"cells\.parquet: columns \['y_centroid'\] are missing",
    ),
    "an empty table of cells": (on_table("cells.parquet", lambda t: t.iloc[:0]), r"cells\.parquet: holds no row"),
    "a truncated gz": (csv_cells(lambda data: data[:-200]), r"cells\.csv\.gz: not readable as a table"),
    "plain text named gz": (csv_cells(gzip.decompress), r"cells\.csv\.gz: not readable as a table"),
    "text where a number belongs": (
        csv_cells(lambda data: gzip.compress(gzip.decompress(data).replace(b"aaaaaaab-1,", b"aaaaaaab-1,near "))),
        r"cells\.csv\.gz: not readable as a table \(.*near",
    ),
    "parquet that is none": (
        lambda folder: (folder / "cells.parquet").write_bytes(b"PAR0" * 9),
        r"cells\.parquet: not readable as a table",
    ),
    "a vertex without a place": (
        on_table("cell_boundaries.parquet", lambda t: t.assign(vertex_x=t["vertex_x"].where(t.index != 3))),
        r"cell_boundaries\.parquet: a vertex of cell 'aaaaaaaa-1' has no place",
    ),
    "polygons torn apart": (
        on_table("cell_boundaries.parquet", lambda t: t.iloc[[*range(3, len(t)), 0, 1, 2]]),
        r"the vertices of cell 'aaaaaaaa-1' do not follow each other",
    ),
    "polygons in pixels": (
        on_table("cell_boundaries.parquet", lambda t: t.assign(vertex_x=t.vertex_x / 0.2125)),
        r"cell_boundaries\.parquet: 1\d\d of 150 polygons do not lie around their cells",
    ),
    "polygons of another section": (
        on_table("cell_boundaries.parquet", lambda t: t.assign(cell_id="z" + t["cell_id"])),
        r"cell_boundaries\.parquet: holds no polygon of these cells",
    ),
    "two alignments": (
        two_alignments,
        r"bundle: holds aalignment\.csv, balignment\.csv; name the one of this image in the column alignment",
    ),
    "an alignment of 4 columns": (
        lambda folder: (folder / "alignment.csv").write_text("1,0,0,0\n0,1,0,0\n0,0,1,0\n0,0,0,1"),
        r"alignment\.csv: no invertible affine 3 x 3 matrix",
    ),
    "an alignment without inverse": (
        lambda folder: write_alignment(folder / "alignment.csv", np.diag([1.0, 0, 1])),
        r"alignment\.csv: no invertible affine 3 x 3 matrix",
    ),
    "an alignment in mm": (
        lambda folder: write_alignment(folder / "alignment.csv", np.diag([2.5e-4, 2.5e-4, 1])),
        r"alignment\.csv: makes a pixel of the slide 5\.31e-05 um wide",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(bundle: Path, name: str) -> None:
    spoil, message = BAD[name]
    spoil(bundle)
    with pytest.raises(ValueError, match=message):
        xenium.read(source(bundle))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: np.where(np.arange(len(v)) == 5, -1, v), "holds -1, which is no count; give the raw counts"),
        (lambda v: v * 0.5, r"holds [\d.]+, which is no count"),
    ],
)
def test_counts_that_are_none(bundle: Path, change: Callable[[np.ndarray], np.ndarray], message: str) -> None:
    on_matrix("data", change)(bundle)
    with pytest.raises(ValueError, match=message):
        dense(xenium.read(source(bundle)))


BAD_SQUARES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no transcripts": (removed("transcripts.parquet"), r"bundle: has no transcripts \(transcripts\.parquet or"),
    "a transcript without a place": (
        on_table("transcripts.parquet", lambda t: t.assign(y_location=t["y_location"].where(t.index != 9))),
        r"transcripts\.parquet: a transcript has no place",
    ),
    "all of low quality": (
        on_table("transcripts.parquet", lambda t: t.assign(qv=1.0)),
        r"transcripts\.parquet: holds no gene with qv 20 or more",
    ),
    "genes of another panel": (
        on_table("transcripts.parquet", lambda t: t.assign(feature_name="x" + t["feature_name"])),
        r"cell_feature_matrix\.h5: lacks \d+ of the \d+ genes of transcripts\.parquet \(as 'x",
    ),
    "no qv": (on_table("transcripts.parquet", lambda t: t.drop(columns="qv")), r"columns \['qv'\] are missing"),
}


@pytest.mark.parametrize("name", BAD_SQUARES)
def test_squares_that_are_refused(bundle: Path, name: str) -> None:
    spoil, message = BAD_SQUARES[name]
    spoil(bundle)
    with pytest.raises(ValueError, match=message):
        xenium.read(source(bundle, unit="square16um"))


def test_discs_are_refused(bundle: Path) -> None:
    with pytest.raises(ValueError, match=r"unit disc55um: xenium is read as cells or pooled into squares; write cell"):
        xenium.inputs(source(bundle, unit="disc55um"))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none: is no folder; give the folder that the Xenium instrument"):
        xenium.inputs(source(tmp_path / "none"))


def placed(folder: Path) -> None:
    row = ManifestRow("x", None, folder, "xenium")
    measured = xenium.read(source(folder))
    profiles_of(row, measured, place(row, None, measured, PrepConfig()), PrepConfig())


@pytest.mark.parametrize("where_um", [1e6, -1e9, 1e30])
def test_a_cell_far_off_every_slide(bundle: Path, where_um: float) -> None:
    """Without an image there is no frame that it could lie beside: the frame would be made to hold it."""
    on_table("cells.parquet", lambda t: t.assign(x_centroid=[where_um, *t["x_centroid"][1:]]))(bundle)
    with pytest.raises(
        ValueError, match=r"its profiles lie up to \S+ mm apart, and no slide is so large; correct thei"
    ):
        placed(bundle)


def test_a_cell_larger_than_any_profile(bundle: Path) -> None:
    """Its footprint would be searched for tiles for ever."""
    removed("cell_boundaries.parquet")(bundle)
    on_table("cells.parquet", lambda t: t.assign(cell_area=[1e30, *t["cell_area"][1:]]))(bundle)
    with pytest.raises(ValueError, match=r"1 profiles \(as 'aaaaaaaa-1'\) cover more than 5 mm, which none does"):
        placed(bundle)
