"""Legacy ST: a table of counts and a table of spots -> a Measurement.

In: counts as tsv or csv, gzipped or not, rows `XxY` and columns genes (or the reverse), and a spot file that says where
the places lie in the image, and which were selected. Its forms: x, y with pixel_x, pixel_y (`*_selection.tsv`,
alignment tables, labels); `XxY` or x, y with X, Y or HE_X, HE_Y. Out: the selected spots that have counts, as discs of
100 um on a 200 um lattice (other arrays: `unit` disc<N>um, and `space_um` for the um between neighbouring places).

Where no file tells pixels, the own space is the lattice itself: expression alone, or with an image by `alignment`, a
3 x 3 matrix from lattice places to level-0 px; nine numbers between spaces, as the ST pipeline wrote them, have the
translation in their last row.
"""

import csv
import gzip
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from data_prep.platforms import GENE, Measurement, Source, counts_in_memory, units, whole_counts
from storm.schema import DISC

if TYPE_CHECKING:
    import pandas as pd

PITCH_UM = 200.0
MAX_LOST = 0.02  # share of spots without a place or without coordinates that is left out; above it the files are wrong
MOST_EMPTY = 0.1  # share of selected spots without counts that is not remarked on: a few are in any section
_FEW_PLACES = 16  # fewer say nothing about the array they come from
_PLACE = re.compile(r"(\d+(?:\.\d+)?)x(\d+(?:\.\d+)?)")
_LATTICE = (("x", "y"), ("xcoord", "ycoord"))
_PIXELS = (("pixel_x", "pixel_y"), ("HE_X", "HE_Y"), ("X", "Y"))
_ROWS = 256  # of the table of counts that are made sparse at once


@dataclass
class _Spots:
    """Places and what is known of each; `xy` is in px of the image, or in lattice units where no file tells pixels."""

    xy: dict[str, tuple[float, float]] = field(default_factory=dict)
    selected: dict[str, bool] | None = None  # None: the file does not tell
    pixels: bool = False
    blank: int = 0  # lines without coordinates


@dataclass(frozen=True)
class _Counts:
    """The table of counts as CSR over spots."""

    ids: list[str]  # rounded places
    exact: list[tuple[float, float]]  # as they were written
    genes: list[str]
    indptr: npt.NDArray[np.int64]
    column: npt.NDArray[np.int32]
    count: npt.NDArray[np.int32]


def inputs(source: Source) -> list[Path]:
    """The counts and the spot file."""
    return [source.measurement, *([source.spots] if source.spots else [])]


def _first_line(path: Path) -> str:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as handle:
        return handle.readline().decode("utf-8-sig").rstrip("\r\n")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _table(path: Path, index: bool) -> "pd.DataFrame":
    """A table of tabs or commas; a headless one of two columns of numbers is x, y."""
    import pandas as pd

    if not path.is_file():
        raise ValueError(f"{path}: no such file; correct its path")
    try:
        first = _first_line(path)
        separator = "\t" if "\t" in first else ","
        header = next(csv.reader([first], delimiter=separator), [])
        if not index and len(header) == 2 and all(map(_is_number, header)):
            return pd.read_csv(path, sep=separator, header=None, names=["x", "y"])
        # Genes are called NA and nan, too: only a blank is no value.
        table = pd.read_csv(
            path, sep=separator, index_col=0 if index else None, low_memory=False, keep_default_na=False, na_values=[""]
        )
        if not index and not isinstance(table.index, pd.RangeIndex):  # as R writes row names: the header is one short
            table = table.reset_index()
        unnamed = max(0, table.shape[1] - len(header))
        named = header[max(0, len(header) - table.shape[1]) :]
        table.columns = pd.Index([*table.columns[:unnamed], *named])  # pandas renames those that come twice
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: not readable as a table ({error}); restore the file") from error
    return table


def _place(name: object) -> tuple[float, float] | None:
    """'10.05x12.9' -> (10.05, 12.9), None for what is no place."""
    match = _PLACE.fullmatch(str(name))
    return (float(match[1]), float(match[2])) if match else None


def _rounded(x: float, y: float) -> str:
    return f"{round(x)}x{round(y)}"


def _twice(ids: list[str]) -> list[str]:
    return [name for name, n in Counter(ids).items() if n > 1]


def _sparse(table: "pd.DataFrame", path: Path) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
    """(indptr, column, count): the table itself is the only dense copy."""
    values = table.to_numpy()
    if not np.issubdtype(values.dtype, np.number):
        raise ValueError(f"{path}: holds cells that are no numbers; restore the file")
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32))]
    for start in range(0, len(values), _ROWS):
        block = values[start : start + _ROWS]
        if np.isnan(block).any():
            raise ValueError(f"{path}: holds cells that are no numbers; restore the file")
        row, column = np.nonzero(block)
        parts.append((row + start, column.astype(np.int32), whole_counts(block[row, column], path)))
    rows, columns, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return np.searchsorted(rows, np.arange(len(values) + 1)).astype(np.int64), columns, counts


def _counts(path: Path) -> _Counts:
    table = _table(path, index=True)
    places = [_place(name) for name in table.index]
    if not all(places):
        table = table.T
        places = [_place(name) for name in table.index]
    if not all(places) or not places:
        raise ValueError(f"{path}: neither its rows nor its columns are all named XxY (as 10x13); this is no ST table")
    exact = [place for place in places if place]
    ids = [_rounded(*place) for place in exact]
    if twice := _twice(ids):
        raise ValueError(f"{path}: spots {twice[:3]} come twice after rounding; keep one row for each spot")
    return _Counts(ids, exact, [str(c) for c in table.columns], *_sparse(table, path))


def _pair(table: "pd.DataFrame", pairs: tuple[tuple[str, str], ...], path: Path) -> npt.NDArray[np.float64] | None:
    """[N, 2] the first pair of columns that the table has."""
    import pandas as pd

    for pair in pairs:
        found = [c for c in pair if c in table.columns]
        if len(found) == 1:
            missing = [c for c in pair if c not in found]
            raise ValueError(f"{path}: columns {missing} are missing; a spot file has x, y, pixel_x, pixel_y")
        if found:
            return np.column_stack([pd.to_numeric(table[c], errors="coerce") for c in pair]).astype(np.float64)
    return None


def _lattice_places(table: "pd.DataFrame", path: Path) -> npt.NDArray[np.float64]:
    """[N, 2] where each line lies on the lattice: by its columns, else by names XxY in its first column."""
    places = _pair(table, _LATTICE, path)
    if places is not None:
        return places
    named = [_place(name) for name in table.iloc[:, 0]]
    if any(named):
        return np.array([place or (np.nan, np.nan) for place in named])
    places = _pair(table, (("X", "Y"),), path)
    if places is None:
        raise ValueError(
            f"{path}: columns ['x', 'y'] are missing, and its first is not named XxY; a spot file has x, y, pixel_x, "
            "pixel_y"
        )
    return places


def _spots(path: Path) -> _Spots:
    """Raises ValueError: columns are missing or come twice, spots come twice, or many lines have no coordinates."""
    table = _table(path, index=False)
    if twice := _twice([str(c) for c in table.columns]):
        raise ValueError(f"{path}: columns {twice} come twice; keep one of each")
    places = _lattice_places(table, path)
    named = any(_place(name) for name in table.iloc[:, 0]) or {"x", "xcoord"} & set(table.columns)
    pixels = _pair(table, _PIXELS if named else _PIXELS[:2], path)
    adjusted = _pair(table, (("new_x", "new_y"),), path)
    xy = next(found for found in (pixels, adjusted, places) if found is not None)
    bad = np.flatnonzero(~np.isfinite(np.column_stack([places, xy])).all(axis=1))
    if len(bad) > MAX_LOST * len(table):
        raise ValueError(f"{path}: {len(bad)} of {len(table)} lines (as line {bad[0] + 2}) have no coordinates; "
                         "complete or remove them")  # fmt: skip
    good = np.setdiff1d(np.arange(len(table)), bad)
    names = [_rounded(x, y) for x, y in places[good].tolist()]
    if twice := _twice(names):
        raise ValueError(f"{path}: spot {twice[0]} comes twice after rounding; keep one line for each spot")
    selected = None
    if "selected" in table.columns:
        selected = dict(zip(names, (table["selected"] == 1).to_numpy()[good].tolist(), strict=True))
    known = {name: (float(x), float(y)) for name, (x, y) in zip(names, xy[good].tolist(), strict=True)}
    return _Spots(known, selected, pixels is not None, len(bad))


def _chosen(counts: _Counts, spots: _Spots, source: Source) -> tuple[npt.NDArray[np.int64], list[str]]:
    """(rows of the counts that are selected and have a place, notes on what is left out)."""
    strangers = [i for i in counts.ids if i not in spots.xy]
    if len(strangers) > MAX_LOST * len(counts.ids):
        raise ValueError(
            f"{source.measurement}: {len(strangers)} of {len(counts.ids)} spots (as {strangers[0]}) are not in "
            f"{source.spots.name if source.spots else ''} (limit {100 * MAX_LOST:.0f} %); give the spot file of the "
            "same section"
        )
    known = spots.selected or dict.fromkeys(spots.xy, True)
    chosen = {i for i, selected in known.items() if selected}
    empty = len(chosen - set(counts.ids))
    without = f"{{}} {'selected ' if spots.selected else ''}spots have no counts and are left out"
    if spots.selected and empty > MOST_EMPTY * len(chosen):
        without = f"WARNING: {{}} of {len(chosen)} selected spots have no counts; is the table of counts whole?"
    rows = np.array([r for r, i in enumerate(counts.ids) if known.get(i)], dtype=np.int64)
    if not rows.size:
        raise ValueError(f"{source.spots}: selects none of the {len(counts.ids)} spots with counts; correct its column "
                         "selected")  # fmt: skip
    notes = {
        "{} lines of the spot file have no coordinates and are left out": spots.blank,
        "{} spots with counts are not in the spot file and are left out": len(strangers),
        without: empty,
        "{} spots with counts are not selected and are left out": len(counts.ids) - len(strangers) - len(rows),
    }
    return rows, [text.format(n) for text, n in notes.items() if n]


def _pitch(source: Source, counts: _Counts) -> float:
    """um between neighbouring places of the lattice."""
    if source.space_um:
        return source.space_um
    odd = [i for i in counts.ids if sum(map(int, i.split("x"))) % 2]
    if len(counts.ids) >= _FEW_PLACES and not odd:
        raise ValueError(
            f"{source.measurement}: x + y is even for each of its {len(counts.ids)} spots, so this is no array of "
            f"{PITCH_UM:.0f} um between neighbours; give the um between place 1 and 2 in space_um (100 for the array "
            "of 2,000 spots)"
        )
    return PITCH_UM


def _transform(path: Path | None) -> npt.NDArray[np.float64] | None:
    """The matrix in a file of the ST pipeline; None for one of another form, which `align.read_matrix` reads."""
    words = path.read_text(encoding="utf-8").split() if path and path.is_file() else []
    if len(words) != 9 or not all(map(_is_number, words)):
        return None
    matrix = np.array(words, dtype=np.float64).reshape(3, 3)
    matrix = matrix.T if np.array_equal(matrix[:, 2], [0, 0, 1]) else matrix
    if not np.array_equal(matrix[2], [0, 0, 1]) or not abs(np.linalg.det(matrix)) > 0:
        raise ValueError(f"{path}: its nine numbers are no invertible affine matrix; give that of the ST pipeline")
    return matrix


def read(source: Source) -> Measurement:
    """The selected spots that have counts, in the order of the counts.

    Raises:
        ValueError: too many spots with counts are not in the spot file, or a table is of another form.
    """
    covered = units.footprint(source.unit, "st")
    if covered is None or covered.shape != DISC:
        raise ValueError(
            f"{source.measurement}: unit {source.unit!r} is no spot of ST; leave it blank or say disc<N>um"
        )
    counts = _counts(source.measurement)
    pitch = _pitch(source, counts)
    spots = _spots(source.spots) if source.spots else _Spots(dict(zip(counts.ids, counts.exact, strict=True)))
    rows, notes = _chosen(counts, spots, source)
    kept = [counts.ids[r] for r in rows]
    xy = np.array([spots.xy[i] for i in kept])
    lattice = np.array([[int(part) for part in i.split("x")] for i in kept], dtype=np.float64) * pitch
    matrix = None if spots.pixels else _transform(source.alignment)
    stream = counts_in_memory(counts.indptr, counts.column, counts.count)
    n = len(kept)
    return Measurement(
        "st", covered.kind, kept, xy, np.full(n, covered.size_um, np.float32), np.full(n, DISC, np.uint8),
        lambda chosen: stream(rows[chosen]), counts.genes, counts.genes, np.full(len(counts.genes), GENE, np.uint8),
        space_um=None if spots.pixels else pitch, matrix=matrix,
        matrix_source="measured on this image" if matrix is None else "ST pipeline",
        in_tissue=np.full(n, 1 if spots.selected else -1, np.int8), notes=notes,
        lattice_um=lattice if spots.pixels else None, lattice_xy=xy if spots.pixels else None,
    )  # fmt: skip
