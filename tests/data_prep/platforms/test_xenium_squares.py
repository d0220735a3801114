"""Squares of Xenium's transcripts against pandas, in many passes, of every vintage."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from data_prep.platforms import CONTROL, pooling, xenium
from data_prep.synthetic.cells import CellSection
from data_prep.synthetic.xenium import CONTROLS, PIXEL_UM, write_alignment
from storm.schema import SQUARE
from tests.data_prep.platforms.helpers import dense
from tests.data_prep.platforms.xenium_files import GENES, as_first_version, pooled, source, squares_of


def test_squares_are_those_that_pandas_makes(xenium_written: Path, section: CellSection) -> None:
    assert squares_of(xenium_written, 16) == pooled(xenium_written, 16)
    found = xenium.read(source(xenium_written, unit="square16um"))
    assert (found.kind, set(found.footprint_kind), set(found.footprint_um)) == ("bin", {SQUARE}, {16.0})
    first = np.array([int(part) for part in found.ids[0].split("_")[1:]])
    np.testing.assert_allclose(found.xy[0] * PIXEL_UM, (first + 0.5) * 16)  # multiples of 16 um
    assert found.names[:GENES] == section.gene_ids  # the panel is that of the matrix
    counts = dense(found)
    assert counts[:, :GENES].sum() == section.totals[0].sum()
    assert 0 < counts[:, GENES:].sum() <= section.totals[1].sum()  # controls in the squares of genes, of qv 20
    assert found.notes[0].endswith("transcripts have a qv under 20 and are left out")
    names = {p.name for p in xenium.inputs(source(xenium_written, unit="square16um"))}
    assert names == {"experiment.xenium", "cell_feature_matrix.h5", "transcripts.parquet"}


def test_squares_in_many_passes_over_small_parts_of_the_file(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pooled(bundle, 8)
    table = pq.read_table(bundle / "transcripts.parquet")
    pq.write_table(table, bundle / "transcripts.parquet", row_group_size=97)
    monkeypatch.setattr(pooling, "_PASS_MOLECULES", 150)
    monkeypatch.setattr(pooling, "_PENDING", 64)
    assert squares_of(bundle, 8) == expected
    found = xenium.read(source(bundle, unit="square8um"))
    rows = np.arange(0, len(found.ids), 3)
    assert len(list(found.counts(rows))) > 5
    np.testing.assert_array_equal(dense(found, rows), dense(found)[rows])


def test_squares_of_a_csv_without_is_gene_are_told_by_name(bundle: Path) -> None:
    expected = pooled(bundle, 16)
    as_first_version(bundle)
    assert squares_of(bundle, 16) == expected
    (bundle / "cell_feature_matrix.h5").unlink()
    found = xenium.read(source(bundle, unit="square16um"))
    assert "no cell_feature_matrix.h5: the panel is the genes that the transcripts name" in found.notes
    assert squares_of(bundle, 16) == expected
    kinds = dict(zip(found.names, found.column_kind.tolist(), strict=True))
    assert {name for name, kind in kinds.items() if kind == CONTROL} <= set(CONTROLS)


def test_squares_on_a_turned_image_are_told(bundle: Path) -> None:
    angle = np.radians(100)
    matrix = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    write_alignment(bundle / "he_imagealignment.csv", matrix)
    notes = xenium.read(source(bundle, unit="square16um")).notes
    assert "the squares are turned by 10 degrees on the image; their footprints stay upright" in notes


def test_transcripts_without_a_qv_are_counted_among_those_left_out(bundle: Path) -> None:
    before = xenium.read(source(bundle, unit="square16um")).notes[0]
    table = pd.read_parquet(bundle / "transcripts.parquet")
    good = table.index[table["qv"] >= 20][:3]
    table.loc[good, "qv"] = np.nan
    table.to_parquet(bundle / "transcripts.parquet")
    found = xenium.read(source(bundle, unit="square16um")).notes[0]
    assert int(found.split()[0]) == int(before.split()[0]) + 3
