"""The genes of a shard set: their order, their expected share of counts, and the panels as masks over them.

In: slide stores with their splits. Out: a `Vocabulary`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storm import files, genes, store

_PSEUDOCOUNT = 0.5  # per gene and donor, so that no measured gene has share 0
_ROUNDS = 50


@dataclass(frozen=True)
class Vocabulary:
    """All genes that any slide measured, with `share`; panel id -> mask; slide id -> panel id."""

    table: genes.GeneTable
    panels: dict[str, npt.NDArray[np.bool_]]
    panel_of: dict[str, str]


def shares(counts: npt.NDArray[np.float64], measured: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """[G] expected fraction of counts per gene, from D donors' summed counts [D, G] and what each measured [D, G].

    A donor's composition is known within its own panel only. It is scaled by the share that the panel holds by the
    current estimate, and averaged over the donors that measured the gene; repeated until it stands still. With one
    panel this is the mean composition. A gene that no donor measured gets the smallest share.
    """
    inside = np.where(measured, counts + _PSEUDOCOUNT, 0.0)
    composition = inside / inside.sum(axis=1, keepdims=True)
    donors = measured.sum(axis=0)
    share = np.full(counts.shape[1], 1.0 / counts.shape[1])
    for _ in range(_ROUNDS):
        held = (measured * share).sum(axis=1, keepdims=True)
        share = (composition * held).sum(axis=0) / np.maximum(donors, 1)
        share = np.where(donors > 0, share, share[donors > 0].min())
        share /= share.sum()
    return share


def collect(slides: Sequence[tuple[Path, str]]) -> Vocabulary:
    """The vocabulary of (store, split) pairs; one slide is in memory at a time. Shares come from split train alone."""
    tables = {path: store.SlideStore(path).genes() for path, _ in slides}
    table = genes.union(list(tables.values()))
    panels: dict[str, npt.NDArray[np.bool_]] = {}
    panel_of: dict[str, str] = {}
    donors: dict[tuple[str, str], tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]] = {}
    for path, split in slides:
        opened = store.SlideStore(path)
        index = np.array([table.index[g] for g in tables[path].ids], dtype=np.int64)
        mask = np.zeros(len(table), bool)
        mask[index] = True
        panel = files.sha256_of(genes.pack_panel(mask).encode())[:12]
        panels[panel] = mask
        panel_of[opened.info.slide_id] = panel
        if split == "train":
            counts, measured = donors.setdefault((opened.info.study, opened.info.donor),
                                                 (np.zeros(len(table)), np.zeros(len(table), bool)))  # fmt: skip
            profiles = opened.profiles()
            np.add.at(counts, index[profiles.gene], profiles.count)
            measured |= mask
    share = shares(np.array([c for c, _ in donors.values()]), np.array([m for _, m in donors.values()]))
    return Vocabulary(genes.GeneTable(table.ids, table.symbols, share), panels, panel_of)
