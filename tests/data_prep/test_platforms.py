"""Readers of vendor files: axes, joins, layouts, controls, and the traps of real ones."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from data_prep import align, platforms
from data_prep.platforms import Measurement, st
from storm.config import PrepConfig
from tests.data_prep.vendors import MPP, write_st


def dense(found: Measurement) -> np.ndarray:
    """[N, columns] counts."""
    table = np.zeros((len(found.ids), len(found.names)), np.int64)
    table[np.repeat(np.arange(len(found.ids)), np.diff(found.indptr)), found.column] = found.count
    return table


def fit(found: Measurement) -> align.LatticeFit:
    assert found.lattice_um is not None
    assert found.lattice_px0 is not None
    return align.fit_lattice(found.lattice_um, found.lattice_px0)


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
    assert platforms.reader("st").inputs(Path("a"), Path("b")) == [Path("a"), Path("b")]


def test_real_her2st(real_data: Path) -> None:
    folder = real_data / "her2st" / "data"
    for name, expected in {"A1": 346, "C2": 187, "C3": 180}.items():
        found = st.read(folder / "ST-cnts" / f"{name}.tsv.gz", folder / "ST-spotfiles" / f"{name}_selection.tsv")
        assert len(found.ids) == expected
        assert align.lattice_fault(fit(found), "st", PrepConfig()) is None
        assert fit(found).mpp == pytest.approx(0.917 if name[0] == "A" else 0.688, rel=0.005)
