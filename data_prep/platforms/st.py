"""Legacy ST: a table of counts and a table of spots -> a Measurement.

In: counts as tsv or csv, gzipped or not, rows `XxY` and columns genes (or the reverse), and a spot file with x, y,
pixel_x, pixel_y and, where spots were chosen by hand, selected. Out: the selected spots that have counts, as discs of
100 um on a 200 um lattice.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from data_prep.platforms import GENE, Measurement, Source, counts_in_memory, whole_counts
from storm.schema import DISC

if TYPE_CHECKING:
    import pandas as pd

PITCH_UM, SPOT_UM = 200.0, 100.0
_PLACE = re.compile(r"(\d+(?:\.\d+)?)x(\d+(?:\.\d+)?)")
_COLUMNS = ("x", "y", "pixel_x", "pixel_y")


def inputs(source: Source) -> list[Path]:
    """The counts and the spot file."""
    if source.spots is None:
        raise ValueError(f"{source.measurement}: legacy ST needs its spot file in the column spots")
    return [source.measurement, source.spots]


def _table(path: Path, index: bool) -> "pd.DataFrame":
    import pandas as pd

    if not path.is_file():
        raise ValueError(f"{path}: no such file; correct the manifest")
    separator = "," if ".csv" in path.suffixes else "\t"
    try:
        header = pd.read_csv(path, sep=separator, header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0]
        table = pd.read_csv(path, sep=separator, index_col=0 if index else None, low_memory=False)
        table.columns = pd.Index(header.iloc[len(header) - table.shape[1] :])  # pandas renames those that come twice
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not readable as a table ({error}); restore the file") from error
    return table


def _rounded(name: str) -> str | None:
    """'10.05x12.9' -> '10x13', None for what is no place."""
    match = _PLACE.fullmatch(str(name))
    return f"{round(float(match[1]))}x{round(float(match[2]))}" if match else None


def _counts(path: Path) -> tuple[list[str], list[str], npt.NDArray[np.int64]]:
    """Spot ids, gene names, counts [spots, genes]."""
    table = _table(path, index=True)
    places = [_rounded(name) for name in table.index]
    if not all(places):
        table = table.T
        places = [_rounded(name) for name in table.index]
    if not all(places) or not places:
        raise ValueError(f"{path}: neither its rows nor its columns are all named XxY (as 10x13); this is no ST table")
    ids = [place for place in places if place]
    twice = sorted({i for i in ids if ids.count(i) > 1})[:3] if len(set(ids)) < len(ids) else []
    if twice:
        raise ValueError(f"{path}: spots {twice} come twice after rounding; keep one row for each spot")
    values = table.to_numpy()
    if not np.issubdtype(values.dtype, np.number) or np.isnan(values.astype(np.float64)).any():
        raise ValueError(f"{path}: holds cells that are no numbers; restore the file")
    return ids, [str(c) for c in table.columns], whole_counts(values.reshape(-1), path).reshape(values.shape)


def _spots(path: Path) -> dict[str, tuple[float, float, bool]]:
    """Spot id -> (pixel_x, pixel_y, selected)."""
    import pandas as pd

    table = _table(path, index=False)
    missing = [c for c in _COLUMNS if c not in table.columns]
    if missing:
        raise ValueError(f"{path}: columns {missing} are missing; a spot file has {', '.join(_COLUMNS)}")
    twice = sorted({c for c in table.columns if list(table.columns).count(c) > 1})
    if twice:
        raise ValueError(f"{path}: columns {twice} come twice; keep one of each")
    places = np.column_stack([pd.to_numeric(table[c], errors="coerce") for c in _COLUMNS])
    bad = np.flatnonzero(~np.isfinite(places).all(axis=1))
    if bad.size:
        raise ValueError(f"{path}: line {int(bad[0]) + 2} has no coordinates; complete or remove it")
    selected = table["selected"] == 1 if "selected" in table.columns else np.ones(len(table), bool)
    found: dict[str, tuple[float, float, bool]] = {}
    for (x, y, px, py), keep in zip(places.tolist(), selected, strict=True):
        name = f"{round(x)}x{round(y)}"
        if name in found:
            raise ValueError(f"{path}: spot {name} comes twice after rounding; keep one line for each spot")
        found[name] = (float(px), float(py), bool(keep))
    return found


def read(source: Source) -> Measurement:
    """The selected spots that have counts, in the order of the counts.

    Raises:
        ValueError: no spot file, a spot with counts that the spot file does not know, a table of another form.
    """
    counts_path, spots_path = inputs(source)
    ids, genes, counts = _counts(counts_path)
    known = _spots(spots_path)
    strangers = [i for i in ids if i not in known]
    if strangers:
        raise ValueError(
            f"{counts_path}: {len(strangers)} of {len(ids)} spots (as {strangers[0]}) are not in {spots_path.name}; "
            "give the spot file of the same section"
        )
    rows = np.array([r for r, i in enumerate(ids) if known[i][2]], dtype=np.int64)
    chosen = {i for i, (_, _, keep) in known.items() if keep}
    notes = [
        text.format(n)
        for text, n in (
            ("{} selected spots have no counts and are left out", len(chosen - set(ids))),
            ("{} spots with counts are not selected and are left out", len(ids) - len(rows)),
        )
        if n
    ]
    kept = [ids[r] for r in rows]
    if not kept:
        raise ValueError(f"{spots_path}: selects none of the {len(ids)} spots with counts; correct its column selected")
    xy = np.array([known[i][:2] for i in kept])
    lattice = np.array([[int(part) for part in i.split("x")] for i in kept], dtype=np.float64) * PITCH_UM
    row, column = np.nonzero(counts[rows])
    indptr = np.searchsorted(row, np.arange(len(kept) + 1)).astype(np.int64)
    return Measurement(
        "st", "spot", kept, xy, np.full(len(kept), SPOT_UM, np.float32), np.full(len(kept), DISC, np.uint8),
        counts_in_memory(indptr, column, counts[rows][row, column]), genes, genes,
        np.full(len(genes), GENE, np.uint8), lattice_um=lattice, lattice_xy=xy, notes=notes,
    )  # fmt: skip
