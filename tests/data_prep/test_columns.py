"""Cells: what a spreadsheet would run carries an apostrophe, and loses it again."""

import pytest

from data_prep import columns


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@x", "\tx", "\rx"])
def test_a_formula_is_inert_and_reads_back(cell: str) -> None:
    assert columns.inert(cell) == f"'{cell}"
    assert columns.bare(columns.inert(cell)) == cell


@pytest.mark.parametrize("cell", ["", "a=b", "'", "'quoted'", "images/a.tif"])
def test_other_cells_stay_as_they_are(cell: str) -> None:
    assert columns.inert(cell) == cell
    assert columns.bare(cell) == cell
