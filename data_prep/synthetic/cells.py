"""A section of single cells with known truth, for the writers of Xenium and CosMx.

In: a number of cells, genes, a seed. Out: `CellSection`: places and polygons in um, counts as CSR over all features of
an instrument's panel. All draws follow from the seed.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

PITCH_UM = 12.0  # between neighbouring cells


@dataclass(frozen=True)
class CellSection:
    """N cells: places and polygons (x right, y down) in um, counts [N, K] over the genes, then the controls."""

    xy_um: npt.NDArray[np.float64]  # [N, 2] centres
    polygon_indptr: npt.NDArray[np.int64]  # [N + 1]
    polygon_um: npt.NDArray[np.float32]  # [V, 2] vertices; the last of a polygon repeats its first
    counts: sparse.csr_matrix
    gene_ids: list[str]
    symbols: list[str]
    controls: list[str]

    def __len__(self) -> int:
        return len(self.xy_um)

    @property
    def area_um2(self) -> npt.NDArray[np.float64]:
        """[N] by the shoelace formula."""
        x, y = self.polygon_um.astype(np.float64).T
        cross = np.concatenate([[0.0], np.cumsum(x[:-1] * y[1:] - x[1:] * y[:-1])])
        return np.asarray(np.abs(cross[self.polygon_indptr[1:] - 1] - cross[self.polygon_indptr[:-1]]) / 2)

    @property
    def totals(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Counts of genes [N] and of controls [N]."""
        genes = len(self.gene_ids)
        return tuple(np.asarray(part.sum(axis=1)).ravel().astype(np.int64)
                     for part in (self.counts[:, :genes], self.counts[:, genes:]))  # type: ignore[return-value]  # fmt: skip

    def molecules(self, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """(cell, column, xy in um) of every molecule that was counted: each lies near the centre of its cell."""
        counts = self.counts.tocoo()
        cell, column = (np.repeat(part, counts.data).astype(np.int64) for part in (counts.row, counts.col))
        away = np.random.default_rng([seed, 7]).uniform(-2.5, 2.5, (len(cell), 2))
        return cell, column, self.xy_um[cell] + away


def draw_cells(
    count: int, gene_ids: list[str], symbols: list[str], controls: list[str], seed: int, genes_per_cell: int = 60,
    vertices: int = 24,
) -> CellSection:  # fmt: skip
    """Cells on a jittered grid, with polygons of about `vertices` corners and about `genes_per_cell` genes each."""
    rng = np.random.default_rng([seed, 0])
    columns = int(np.ceil(np.sqrt(count)))
    at = np.arange(count)
    xy = np.column_stack([at % columns, at // columns]) * PITCH_UM + 20 + rng.uniform(-2, 2, (count, 2))
    corners = rng.integers(max(3, vertices - 3), vertices + 4, count)
    indptr = np.concatenate([[0], np.cumsum(corners + 1)])
    owner = np.repeat(at, corners + 1)
    step = np.arange(indptr[-1]) - indptr[owner]
    angle = 2 * np.pi * (step % corners[owner]) / corners[owner]
    radius = rng.uniform(3.5, 5.0, count)[owner] * (1 + 0.15 * np.cos(3 * angle))
    polygon = xy[owner] + radius[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
    return CellSection(
        xy, indptr, polygon.astype(np.float32), _counts(rng, count, len(gene_ids), len(controls), genes_per_cell),
        gene_ids, symbols, controls,
    )  # fmt: skip


def _counts(rng: np.random.Generator, count: int, genes: int, controls: int, per_cell: int) -> sparse.csr_matrix:
    """Genes that differ in abundance; one control molecule in about every tenth cell."""
    share = rng.gamma(0.8, size=genes)
    wanted = rng.poisson(per_cell, count).clip(1)
    cell = np.repeat(np.arange(count), wanted)
    gene = rng.choice(genes, len(cell), p=share / share.sum())
    some = np.flatnonzero(rng.random(count) < 0.1) if controls else np.zeros(0, np.int64)
    row = np.concatenate([cell, some])
    column = np.concatenate([gene, genes + rng.integers(0, max(1, controls), len(some))])
    value = np.concatenate([1 + rng.geometric(0.7, len(cell)) // 2, np.ones(len(some), np.int64)])
    found = sparse.csr_matrix((value, (row, column)), shape=(count, genes + controls), dtype=np.int32)
    found.sort_indices()
    return found
