"""What the tests of Xenium share: the section behind the bundle, its first version, pooling by pandas."""

from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from data_prep.platforms import GENE, Source, xenium
from data_prep.synthetic.cells import CellSection, draw_cells
from data_prep.synthetic.xenium import CONTROLS
from storm import genes
from tests.data_prep.platforms.helpers import dense

CELLS, GENES = 150, 40


def drawn_section() -> CellSection:
    known = genes.shipped("human")
    return draw_cells(CELLS, list(known.ids[:GENES]), list(known.symbols[:GENES]), list(CONTROLS), 0, genes_per_cell=12)


def source(folder: Path, **more) -> Source:
    return Source("xenium", folder, **more)


def as_first_version(folder: Path) -> None:
    """The bundle of version 1: whole numbers as ids, csv alone."""
    for name in ("cells.parquet", "cells.csv.gz", "cell_boundaries.parquet", "transcripts.parquet"):
        if name.endswith(".parquet"):
            table = pd.read_parquet(folder / name)
            table["cell_id"] = pd.factorize(table["cell_id"])[0] + 1
            table = table.drop(columns=["label_id", "is_gene", "codeword_category", "codeword_index"], errors="ignore")
            (folder / name).unlink()
            table.to_csv(folder / name.replace(".parquet", ".csv.gz"), index=False)
    with h5py.File(folder / "cell_feature_matrix.h5", "a") as root:
        count = len(root["matrix/barcodes"])
        del root["matrix/barcodes"]
        root["matrix/barcodes"] = [str(k + 1).encode() for k in range(count)]


def pooled(folder: Path, side: float) -> dict[tuple[int, int, str], int]:
    """The squares of a transcripts file, by pandas alone."""
    path = next(p for p in folder.iterdir() if "transcripts" in p.name)
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    text = table["feature_name"].map(lambda v: v.decode() if isinstance(v, bytes) else v)
    is_gene = table["is_gene"] if "is_gene" in table else ~text.str.contains("^(?:BLANK|NegControl|antisense|Unass)")
    table = table.assign(name=text)[(table["qv"] >= 20) & is_gene]
    groups = table.groupby([table["x_location"] // side, table["y_location"] // side, "name"]).size()
    return {(int(i), int(j), str(name)): int(n) for (i, j, name), n in groups.items()}


def squares_of(folder: Path, side: int, **more) -> dict[tuple[int, int, str], int]:
    found = xenium.read(source(folder, unit=f"square{side}um", **more))
    table = dense(found) * (found.column_kind == GENE)
    places = [tuple(int(part) for part in name.split("_")[1:]) for name in found.ids]
    return {(*places[r], found.symbols[c]): int(table[r, c]) for r, c in zip(*np.nonzero(table), strict=True)}  # type: ignore[misc]
