"""profiles: genes that are those of another species than the manifest says are refused, by id and by symbol."""

from pathlib import Path

import numpy as np
import pytest

from data_prep import profiles
from data_prep.manifest import ManifestRow
from data_prep.platforms import GENE, Measurement, counts_in_memory
from storm import genes
from storm.prep_config import PrepConfig
from storm.schema import DISC


def measured(names: list[str]) -> Measurement:
    """Two spots over some genes."""
    none = np.zeros(0, np.int32)
    counts = counts_in_memory(np.zeros(3, np.int64), none, none)
    return Measurement(
        "st", "spot", ["a", "b"], np.zeros((2, 2)), np.full(2, 100, np.float32), np.full(2, DISC, np.uint8), counts,
        names, names, np.full(len(names), GENE, np.uint8),
    )  # fmt: skip


def mapped(names: list[str], species: str) -> float:
    row = ManifestRow("a", None, Path("counts.tsv"), "st", species=species)
    return profiles._gene_map(row, measured(names), PrepConfig())[2]


@pytest.mark.parametrize("kind", ["ids", "symbols"])
@pytest.mark.parametrize(("species", "other"), [("human", "mouse"), ("mouse", "human")])
def test_genes_of_another_species_are_refused(kind: str, species: str, other: str) -> None:
    """Nine of ten symbols of one are names of the other, and every Ensembl id maps to itself."""
    table, symbols = genes.shipped(species), set(genes.shipped(other).symbols)
    shared = [i for i, s in enumerate(table.symbols) if {s.upper(), s.capitalize()} & symbols][:500]
    names = [getattr(table, kind)[i] for i in shared]
    assert mapped(names, species) == 1.0
    told = f"counts.tsv: its genes are named as those of {species}, the manifest says {other}; write species {species}"
    with pytest.raises(ValueError, match=told):
        mapped(names, other)


def test_mouse_genes_in_capitals_are_of_the_mouse() -> None:
    names = [s.upper() for s in genes.shipped("mouse").symbols if s.isalnum() and s == s.capitalize()][:5000]
    assert genes.species_of(names) in ("human", "")
    assert mapped(names, "mouse") > 0.99


def test_a_measurement_of_both_is_of_neither() -> None:
    human, mouse = (genes.shipped(species).ids[:50] for species in ("human", "mouse"))
    assert genes.species_of([*human, *mouse]) == ""
    assert mapped([*human, *mouse], "human") == 1.0
