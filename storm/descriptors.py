"""Descriptors of genes: what a user's table (protein language model, scGPT, GO) knows of a gene beside its counts.

In: an npz of `gene_id`, n strings, and `descriptor`, n x C numbers. Out: `Descriptors`; and the standardised rows of a
gene list. numpy only; nothing is unpickled.
"""

import dataclasses
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storm.genes import GeneTable
from storm.presets import ModelConfig

Floats = npt.NDArray[np.float32]

_FORM = "an npz of gene_id (n strings) and descriptor (n x columns numbers)"


@dataclass(frozen=True)
class Descriptors:
    """A table as its file holds it; Ensembl ids without version."""

    ids: tuple[str, ...]
    values: Floats  # [n, C]
    source: str

    @property
    def columns(self) -> int:
        """C."""
        return self.values.shape[1]


class Described(NamedTuple):
    """The rows of a gene list: standardised over its genes that have one; 0, the mean, for those that have none."""

    values: Floats  # [G, C]
    centre: Floats  # [C]
    scale: Floats  # [C] standard deviations; 1 where a column is constant
    missing: tuple[str, ...]  # ids without a row


def read(path: Path) -> Descriptors:
    """The table in a file.

    Raises:
        ValueError: naming the file, what is wrong with it, and the form that is asked for.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give {_FORM}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids, values = arrays["gene_id"], arrays["descriptor"]
    except (OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not readable as a table of descriptors ({error}); give {_FORM}") from None
    faults = {
        f"gene_id is of type {ids.dtype}, not of strings": ids.dtype.kind != "U" or ids.ndim != 1,
        f"descriptor has the shape {values.shape}": values.ndim != 2 or len(values) != len(ids) or not values.size,
        f"descriptor is of type {values.dtype}, not of numbers": values.dtype.kind not in "fiu",
    }
    if fault := next((fault for fault, wrong in faults.items() if wrong), None):
        raise ValueError(f"{path}: {fault}; give {_FORM}")
    bare = tuple(str(name).partition(".")[0] if str(name).startswith("ENS") else str(name) for name in ids)
    if len(set(bare)) < len(bare):
        twice = next(name for i, name in enumerate(bare) if name in bare[:i])
        raise ValueError(f"{path}: gene_id {twice!r} is there twice; give each gene one row")
    with np.errstate(over="ignore"):
        found = values.astype(np.float32)
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found).all(1))[0])
        raise ValueError(f"{path}: descriptor of {bare[row]!r} is not finite; leave such genes out")
    return Descriptors(bare, found, str(path))


def rows_of(table: Descriptors, genes: GeneTable) -> Described:
    """The descriptors of a gene list.

    Raises:
        ValueError: the table has none of its genes.
    """
    row = {gene_id: i for i, gene_id in enumerate(table.ids)}
    at = np.array([row.get(gene_id, -1) for gene_id in genes.ids], dtype=np.int64)
    if not (at >= 0).any():
        raise ValueError(
            f"{table.source}: has none of the {len(genes)} genes (as {genes.ids[0]!r}; it has {table.ids[0]!r}); "
            "gene_id holds Ensembl ids"
        )
    own = table.values[at[at >= 0]].astype(np.float64)
    centre, scale = own.mean(0), own.std(0)
    scale[scale < 1e-6 * np.maximum(1, np.abs(centre))] = 1.0
    values = np.zeros((len(genes), table.columns), np.float32)
    values[at >= 0] = (own - centre) / scale
    missing = tuple(gene_id for gene_id, i in zip(genes.ids, at, strict=True) if i < 0)
    return Described(values, centre.astype(np.float32), scale.astype(np.float32), missing)


def fit(model: ModelConfig, path: str) -> tuple[ModelConfig, Descriptors | None]:
    """The model's config with as many columns as the table at `path` has, and the table; none where `path` is empty.

    Raises:
        ValueError: the config asks for another number of columns, or the file is no such table.
    """
    table = read(Path(path)) if path else None
    columns = table.columns if table else 0
    if model.descriptor_width not in (0, columns):
        fact = f"{path}: has {columns} columns" if table else "data.descriptors: names no table of descriptors"
        raise ValueError(f"{fact}, the config asks for {model.descriptor_width}; leave model.descriptor_width out")
    return dataclasses.replace(model, descriptor_width=columns), table
