"""The genes of a shard set: their order, their expected share of counts, and the panels as masks over them.

In: the gene lists of slide stores, and each gene's total on training donors. Out: a `Vocabulary`. No profile is read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storm import files, genes, store

_PSEUDOCOUNT = 0.5  # per gene and donor, so that no measured gene has share 0
_ROUNDS = 50

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Vocabulary:
    """All genes with `share`; panel id -> mask; id of a store's gene list -> its panel, and how many it leaves out."""

    table: genes.GeneTable
    panels: dict[str, Mask]
    panel_of: dict[str, str]
    left_out: dict[str, int]


@dataclass
class Composition:
    """Summed compositions of the donors that measured the same genes."""

    measured: Mask  # [G]
    total: npt.NDArray[np.float64]  # [G] sum of the donors' fractions, each summing to 1 over what was measured
    donors: int


def composition(counts: npt.NDArray[np.float64], measured: Mask) -> Composition:
    """One donor's, from its summed counts [G]."""
    inside = np.where(measured, counts + _PSEUDOCOUNT, 0.0)
    return Composition(measured, inside / inside.sum(), 1)


def merged(parts: Iterable[Composition]) -> list[Composition]:
    """The same with one entry per set of measured genes, in the order in which these first come."""
    found: dict[bytes, Composition] = {}
    for part in parts:
        key = np.packbits(part.measured).tobytes()
        if key not in found:
            found[key] = Composition(part.measured, part.total.copy(), part.donors)
        else:
            found[key].total += part.total
            found[key].donors += part.donors
    return list(found.values())


def shares(parts: Sequence[Composition]) -> npt.NDArray[np.float64]:
    """[G] expected fraction of counts per gene.

    A donor's composition is known within its own panel only. It is scaled by the share that the panel holds by the
    current estimate, and averaged over the donors that measured the gene; repeated until it stands still. With one
    panel this is the mean composition. A gene that no donor measured gets the smallest share.
    """
    measured = np.array([part.measured for part in parts])
    total = np.array([part.total for part in parts])
    donors = np.array([part.donors for part in parts]) @ measured
    share = np.full(measured.shape[1], 1.0 / measured.shape[1])
    for _ in range(_ROUNDS):
        held = (measured * share).sum(axis=1, keepdims=True)
        share = (total * held).sum(axis=0) / np.maximum(donors, 1)
        share = np.where(donors > 0, share, share[donors > 0].min())
        share /= share.sum()
    return share


def columns(table: genes.GeneTable, vocabulary: genes.GeneTable) -> npt.NDArray[np.int32]:
    """[genes of `table`] their index in the vocabulary, -1 where it lacks them."""
    return np.array([vocabulary.index.get(gene_id, -1) for gene_id in table.ids], dtype=np.int32)


def over(tables: dict[str, genes.GeneTable], kept: genes.GeneTable | None = None) -> Vocabulary:
    """The vocabulary of some gene lists by their ids, without shares: their union, or `kept` where it is given."""
    union = kept or genes.union(list(tables.values()))
    panels: dict[str, Mask] = {}
    panel_of, left_out = {}, {}
    for name, table in tables.items():
        column = columns(table, union)
        mask = np.zeros(len(union), bool)
        mask[column[column >= 0]] = True
        panel = files.sha256_of(genes.pack_panel(mask).encode())[:12]
        panels[panel] = mask
        panel_of[name] = panel
        left_out[name] = int((column < 0).sum())
    return Vocabulary(union, panels, panel_of, left_out)


def donor_composition(stores: Sequence[tuple[Path, npt.NDArray[np.int32]]], size: int) -> Composition:
    """One donor's composition from its stores, each with its `columns`."""
    counts, measured = np.zeros(size), np.zeros(size, bool)
    for path, column in stores:
        known = column >= 0
        np.add.at(counts, column[known], store.SlideStore(path).gene_totals()[known])
        measured[column[known]] = True
    return composition(counts, measured)
