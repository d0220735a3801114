"""Genes of five known classes and what a section's profiles count of them.

In: cells with latents, footprints, a section's depth. Out: integer counts and the oracle, the expected composition.
Class a follows cell types and density, b the arrangement (gland or scattered), c the niche, d fields that no pixel
shows, e nothing but donor and noise. Each class has a fixed share of the molecules in every cell, so that the closure
of compositions carries nothing from one class to another. A spot is the sum of the cells under its footprint.
"""

import functools
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse, spatial

from data_prep.synthetic.tissue import LATENTS, NICHE_NEUTRAL, Floats, Tissue
from storm import genes

CLASSES = ("a", "b", "c", "d", "e")
GENE_SHARES = (0.20, 0.20, 0.20, 0.15, 0.25)
MOLECULE_SHARES = (0.52, 0.12, 0.12, 0.10, 0.14)
PLATFORMS = ("visium", "st", "xenium")
# mostly protein-coding: neither RNA genes nor receptor segments
_ORDINARY = re.compile(r"(?!MIR|LINC|SNOR|RNU|RNA|LOC|IG[HKL]|TR[ABDG]|MT|SCARNA|VTRNA)[A-Z]{2,5}\d{0,2}[A-Z]?")


@dataclass(frozen=True)
class GenePanel:
    """G genes: names, class and how their log expression answers to the latents."""

    ids: npt.NDArray[np.str_]
    symbols: npt.NDArray[np.str_]
    kind: npt.NDArray[np.str_]  # [G] of CLASSES
    level: Floats  # [G] log mean
    loading: Floats  # [len(LATENTS), G]
    efficiency: Floats  # [platform, G] log
    stain_programme: npt.NDArray[np.bool_]  # [G] genes of class e that rise with the section's stain in training donors

    def only(self, genes: npt.NDArray[np.int64]) -> "GenePanel":
        """The panel of some of its genes, in their order."""
        return GenePanel(
            self.ids[genes], self.symbols[genes], self.kind[genes], self.level[genes], self.loading[:, genes],
            self.efficiency[:, genes], self.stain_programme[genes],
        )  # fmt: skip


@functools.cache
def choose_genes(count: int, seed: int) -> GenePanel:
    """`count` human genes with unambiguous, ordinary symbols, their classes and loadings."""
    rng = np.random.default_rng([seed, 101])
    table = genes.shipped("human")
    names, first, times = np.unique(np.array(table.symbols), return_index=True, return_counts=True)
    usable = [i for i, name, n in zip(first, names, times, strict=True) if n == 1 and _ORDINARY.fullmatch(name)]
    chosen = np.sort(rng.choice(np.array(usable), count, replace=False))
    kind = np.repeat(CLASSES, np.diff(np.rint(np.cumsum([0, *GENE_SHARES]) * count).astype(np.int64)))
    rng.shuffle(kind)
    programme = (kind == "e") & (rng.random(count) < 1 / 3)
    level = rng.normal(0, 0.8, count)
    spots = rng.normal(0, 0.6, (2, count))
    cells = np.random.default_rng([seed, 105]).normal(0, 0.75, (1, count))
    efficiency = np.concatenate([spots, cells])
    ids, symbols = np.array(table.ids)[chosen], np.array(table.symbols)[chosen]
    return GenePanel(ids, symbols, kind, level, _loadings(rng, kind), efficiency, programme)


def _loadings(rng: np.random.Generator, kind: npt.NDArray[np.str_]) -> Floats:
    """[len(LATENTS), G]: a gene answers to latents of its own class alone."""
    count = len(kind)
    sign = np.where(rng.permutation(count) % 2, 1.0, -1.0)
    strength = sign * rng.uniform(0.8, 1.2, count)
    loading = np.zeros((len(LATENTS), count))
    marker = rng.choice([0, 1, 2, 4], count, p=[0.25, 0.30, 0.20, 0.25])  # latent that a class-a gene follows
    a = np.flatnonzero(kind == "a")
    loading[marker[a], a] = np.where(marker[a] == 4, 1.1 * strength[a], 6.0 * np.abs(strength[a]))
    loading[LATENTS.index("gland"), kind == "b"] = 0.7 * strength[kind == "b"]
    loading[LATENTS.index("niche"), kind == "c"] = 1.5 * strength[kind == "c"]
    field = LATENTS.index("field0") + rng.integers(0, 3, count)
    d = np.flatnonzero(kind == "d")
    loading[field[d], d] = 0.6 * strength[d]
    return loading


def targeted(panel: GenePanel, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Which `count` genes a probe panel measures, ascending: of each class the share that it has of all genes."""
    rng = np.random.default_rng([seed, 106])
    wanted = np.diff(np.rint(np.cumsum([0, *GENE_SHARES]) * count).astype(np.int64))
    parts = [
        rng.choice(np.flatnonzero(panel.kind == c), n, replace=False) for c, n in zip(CLASSES, wanted, strict=True)
    ]
    return np.sort(np.concatenate(parts))


def cell_expression(panel: GenePanel, latent: Floats, shift: Floats) -> Floats:
    """Composition [C, G] of cells with `latent` [C, L]; `shift` [G] is what platform and donor add to the log."""
    centred = latent - np.eye(len(LATENTS))[LATENTS.index("niche")] * NICHE_NEUTRAL
    expression = np.exp(panel.level + shift + centred @ panel.loading)
    for name, share in zip(CLASSES, MOLECULE_SHARES, strict=True):
        own = panel.kind == name
        expression[:, own] *= share / expression[:, own].sum(1, keepdims=True)
    return expression


def under_discs(tissue: Tissue, centres_um: Floats, diameter_um: float) -> sparse.csr_array:
    """Incidence [N, C] of cells under discs."""
    hits = spatial.KDTree(tissue.xy_um).query_ball_point(centres_um, diameter_um / 2, return_sorted=True)
    indptr = np.concatenate([[0], np.cumsum([len(h) for h in hits])]).astype(np.int64)
    columns = np.concatenate([np.asarray(h, np.int64) for h in hits]) if indptr[-1] else np.zeros(0, np.int64)
    return sparse.csr_array((np.ones(len(columns)), columns, indptr), shape=(len(hits), len(tissue.kind)))


def expected_composition(panel: GenePanel, tissue: Tissue, incidence: sparse.csr_array, shift: Floats) -> Floats:
    """The oracle [N, G]: the share of molecules expected in each profile, given the latents of the cells under it."""
    used = np.unique(incidence.indices)  # most cells lie between the spots
    total = incidence[:, used] @ cell_expression(panel, tissue.latent[used], shift)
    return total / total.sum(1, keepdims=True)


def measure(rng: np.random.Generator, expected: Floats, depth: Floats) -> npt.NDArray[np.int32]:
    """Counts [N, G], negative binomial about depth x expected composition (shape 10)."""
    return rng.poisson(depth[:, None] * expected * rng.gamma(10.0, 0.1, expected.shape)).astype(np.int32)
