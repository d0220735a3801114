"""Genes: canonical ids, summed duplicates, dropped controls, panels, hashes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storm import genes


@pytest.mark.parametrize(
    ("name", "species", "expected"),
    [
        ("ENSG00000141510.17", "human", "ENSG00000141510"),
        ("TP53", "human", "ENSG00000141510"),
        ("tp53", "human", "ENSG00000141510"),
        ("2-Sep", "human", "ENSG00000168385"),
        ("SEPT2", "human", "ENSG00000168385"),
        ("TP53_ENSG00000141510", "human", "ENSG00000141510"),
        ("Trp53", "mouse", "ENSMUSG00000059552"),
        ("NOSUCHGENE", "human", "symbol:NOSUCHGENE"),
    ],
)
def test_canonical(name: str, species: str, expected: str) -> None:
    assert genes.canonical(name, species) == expected


def test_columns_of_one_gene_share_an_index_and_controls_have_none() -> None:
    names = ["TP53", "BLANK-0001", "EGFR", "ENSG00000141510.2", "NegPrb3", "NOSUCHGENE"]
    found = genes.map_columns(names, names, "human")
    assert found.column[0] == found.column[3] >= 0
    assert found.column[1] == found.column[4] == -1
    assert found.mapped_share == pytest.approx(3 / 4)
    assert list(found.table.ids) == sorted(found.table.ids)
    assert found.table.symbols[found.column[0]] == "TP53"


@pytest.mark.parametrize(
    "name",
    [
        "NegControlProbe_00042", "NegControlCodeword_0500", "BLANK_0069", "BLANK-0001", "Blank-12", "antisense_PROKR2",
        "UnassignedCodeword_0001", "DeprecatedCodeword_0321", "Intergenic_Region_10013", "GenomicControl_1", "NegPrb12",
        "Negative1", "Negative01", "NegProbe-WTX", "Negative Control Probe", "SystemControl1", "FalseCode12",
    ],
)  # fmt: skip
def test_controls_are_told_by_their_names(name: str) -> None:
    assert genes.is_control(name)


@pytest.mark.parametrize("species", ["human", "mouse"])
def test_no_gene_is_taken_for_a_control(species: str) -> None:
    assert [symbol for symbol in genes.shipped(species).symbols if genes.is_control(symbol)] == []
    assert not any(map(genes.is_control, ("NEGR1", "BLK", "ENSG00000141510", "MALAT1_ENSG00000251562", "Blnk")))


def test_aliases_are_asked_first(tmp_path: Path) -> None:
    path = tmp_path / "aliases.tsv"
    path.write_text("mygene\tTP53\n")
    assert genes.canonical("mygene", "human", genes.read_aliases(path)) == "ENSG00000141510"
    path.write_text("one\n")
    with pytest.raises(ValueError, match="line 1 has not two"):
        genes.read_aliases(path)


def test_an_unknown_species_is_named() -> None:
    with pytest.raises(ValueError, match="'yeast' has no gene table"):
        genes.shipped("yeast")


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_panel_round_trip(mask: list[bool]) -> None:
    packed = genes.pack_panel(np.array(mask))
    assert genes.unpack_panel(packed, len(mask)).tolist() == mask


def test_table_round_trip_and_hash(tmp_path: Path) -> None:
    table = genes.GeneTable(("A", "B"), ("a", "b"), np.array([0.25, 0.75]))
    path = tmp_path / "genes.tsv"
    path.write_bytes(table.to_tsv())
    again = genes.GeneTable.read(path)
    assert (again.ids, again.symbols, again.hash) == (table.ids, table.symbols, table.hash)
    assert again.share is not None
    np.testing.assert_allclose(again.share, [0.25, 0.75])
    assert genes.GeneTable(("B", "A"), ("b", "a")).hash != table.hash
    path.write_text("x\ty\n")
    with pytest.raises(ValueError, match="this is no gene table"):
        genes.GeneTable.read(path)


@pytest.mark.parametrize("symbol", ['"TP53', 'T"P53"', "TP\u202853", "TP\x0c53", "'", ""])
def test_odd_symbols_are_read_as_they_were_written(tmp_path: Path, symbol: str) -> None:
    table = genes.GeneTable(("A", "B", "C"), ("a", symbol, "c"))
    path = tmp_path / "genes.tsv"
    path.write_bytes(table.to_tsv())
    assert genes.GeneTable.read(path) == table


@pytest.mark.parametrize("symbol", ["TP\t53", "TP\n53"])
def test_a_table_that_fell_apart_is_named(tmp_path: Path, symbol: str) -> None:
    path = tmp_path / "genes.tsv"
    path.write_bytes(genes.GeneTable(("A", "B"), (symbol, "b")).to_tsv())
    with pytest.raises(ValueError, match=r"genes\.tsv: line [23] has not 2 tab-separated columns"):
        genes.GeneTable.read(path)


def test_union_is_sorted_and_first_symbol_wins() -> None:
    one, other = genes.GeneTable(("B",), ("first",)), genes.GeneTable(("A", "B"), ("a", "second"))
    assert genes.union([one, other]) == genes.GeneTable(("A", "B"), ("a", "first"))


@pytest.mark.parametrize(
    ("names", "species"),
    [
        (["ENSG00000141510.18", "EGFR"], "human"),
        (["Trp53", "Egfr", "Actb"], "mouse"),
        (["TP53", "Egfr"], ""),
        (["one", "two"], ""),
        ([], ""),
    ],
)
def test_species_of_names(names: list[str], species: str) -> None:
    assert genes.species_of(names) == species
