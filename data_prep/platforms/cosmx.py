"""CosMx: the folder of an AtoMx flat-file export -> a Measurement of its cells, or of squares of its molecules.

In: `<id>_exprMat_file`, `<id>_metadata_file`, `<id>_fov_positions_file`, `<id>-polygons`, and for squares
`<id>_tx_file`, each csv or csv.gz, of the vintages from the prototype to AtoMx 1.3.2. Out: cells with their polygons,
or squares. A cell's key is (fov, cell_ID), for cell_ID starts again in every field of view; 0 is what lies in no cell.

The own space is the vendor's GLOBAL PIXELS, whose y axis points UP. The 3 x 3 matrix of the column `alignment` maps
them to level-0 px of the H&E and is applied to the vendor's own coordinates (of key points, `fixed` is CosMx). Where
there is none, y is turned over, so that the picture stands upright.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep import align
from data_prep.platforms import (
    CONTROL,
    GENE,
    Frame,
    Measurement,
    Rows,
    Source,
    cosmx_frame,
    found,
    polygons,
    pooling,
    tabular,
    units,
    whole_counts,
)
from data_prep.platforms.cosmx_frame import Fovs
from storm import genes
from storm.schema import CountBlock

UNKNOWN_CELL_UM = 10.0  # diameter of a cell of which neither polygon nor area is known
_CURE = "give the folder of the flat files that AtoMx exported"
_NO_TARGETS = {"fov", "cell_id", "cell", ""}  # columns of exprMat that count nothing, in lower case
_PX: dict[str, tuple[str, ...]] = {
    "x_local": ("x_local_px",), "y_local": ("y_local_px",), "x_global": ("x_global_px",), "y_global": ("y_global_px",),
}  # fmt: skip
_CENTRES: dict[str, tuple[str, ...]] = {
    "x_local": ("CenterX_local_px",), "y_local": ("CenterY_local_px",), "x_global": ("CenterX_global_px",),
    "y_global": ("CenterY_global_px",),
}  # fmt: skip
_FOV: dict[str, tuple[str, ...]] = {"fov": ("fov", "FOV")}
# The number of a cell; new exports have a text `cell_id` or `cell` beside it.
_CELL: dict[str, tuple[str, ...]] = {"cell": ("cell_ID", "cellID")}


class _Files(NamedTuple):
    fovs: Path | None
    alignment: Path | None
    counts: Path | None = None
    cells: Path | None = None
    polygons: Path | None = None
    molecules: Path | None = None


def _names(stem: str) -> tuple[str, str]:
    return f"{stem}.csv", f"{stem}.csv.gz"


def _locate(source: Source) -> _Files:
    folder = source.measurement
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no folder; {_CURE}")
    shared = (found.maybe(folder, _names("fov_positions_file")), source.alignment)
    if pooling.square_of(source.unit, "cosmx"):
        return _Files(*shared, molecules=found.one(folder, _names("tx_file"), "molecules", _CURE))
    drawn = sorted({p for name in _names("polygons") for p in (*folder.glob(f"*[-_]{name}"), *folder.glob(name))})
    if len(drawn) > 1:
        raise ValueError(f"{folder}: holds {', '.join(p.name for p in drawn)}; leave one, of this section")
    cure = f"{_CURE}, or pool its molecules with unit square<N>um"
    counts, cells = (
        found.one(folder, _names(f"{stem}_file"), what, cure)
        for stem, what in (("exprMat", "counts"), ("metadata", "cells"))
    )
    return _Files(*shared, counts, cells, drawn[0] if drawn else None)


def inputs(source: Source) -> list[Path]:
    """The files of the export that `read` reads, and the alignment."""
    return [path for path in _locate(source) if path is not None]


def read(source: Source) -> Measurement:
    """One profile for each cell of exprMat, in its order; or, for unit square<N>um, for each square with a gene.

    Raises:
        ValueError: files are missing, damaged, or not of one section; or nothing tells the size of a pixel.
    """
    files = _locate(source)
    square = pooling.square_of(source.unit, "cosmx")
    made = _squares(files, source.space_um, square) if square else _cells(files, source.space_um)
    notes: list[str] = made["notes"]
    if files.alignment:
        told = align.read_alignment(files.alignment)
        notes += align.check_scale(told.matrix, made["space_um"], files.alignment)
        facts, more = told.residual()
        return Measurement("cosmx", matrix=told.matrix, matrix_source=told.source, facts=facts, **made | {
            "notes": notes + more})  # fmt: skip
    if not source.assume_aligned:
        notes.append("no alignment: y, which points up in CosMx, is turned over")
        made["xy"][:, 1] *= -1
        if "polygon_xy" in made:
            made["polygon_xy"][:, 1] *= -1
    return Measurement("cosmx", matrix_source="none", **made)


def frame(source: Source) -> Frame | None:
    """The space of the export, without its cells; None where only their table tells it.

    Raises:
        ValueError: as `read` does.
    """
    files = _locate(source)
    fovs = Fovs(files.fovs)
    if source.space_um is None and fovs.mm and not fovs.px:
        return None
    space_um, _ = fovs.space_um(source.space_um, {}, source.measurement)
    if not files.alignment:
        return Frame(space_um, None, "none")
    told = align.read_alignment(files.alignment)
    align.check_scale(told.matrix, space_um, files.alignment)
    return Frame(space_um, told.matrix, told.source)


def _cells(files: _Files, told_um: float | None) -> dict[str, Any]:
    """The parts of a Measurement of cells."""
    assert files.counts is not None and files.cells is not None  # _locate gives both
    fovs = Fovs(files.fovs)
    columns = cosmx_frame.pick(files.cells, _FOV | _CELL | _CENTRES | {"area": ("Area",)}, ("fov", "cell"), _CURE)
    found_ = tabular.whole(files.cells, list(columns.values())).numbers
    table = {own: found_[name] for own, name in columns.items()}
    known = cosmx_frame.keys(table["fov"], table["cell"], files.cells)
    xy, seen_px = cosmx_frame.places(files.cells, table, fovs, told_um)
    space_um, notes = fovs.space_um(told_um, seen_px, files.cells.parent)
    targets, key, file_row, dropped = _counted(files.counts)
    notes += dropped
    rows = _joined(known, key, files)
    left = len(set(known.tolist())) - len(key) - int((known & 0xFFFFFFFF == 0).any())
    notes += [f"{left} cells of {files.cells.name} have no counts and are left out"] if left > 0 else []
    own = _polygons(files.polygons, key, xy[rows], fovs, space_um) if files.polygons else polygons.none_of(len(key))
    area = table["area"][rows] if "area" in table else np.full(len(key), np.nan)
    size = np.sqrt(4 / np.pi * area) * space_um
    sized = np.isfinite(size) & (size > 0)
    for chosen, text in ((sized, "have no polygon and are discs of their area"), (
            ~sized, f"have neither polygon nor area: discs of {UNKNOWN_CELL_UM:.0f} um")):  # fmt: skip
        count = int((chosen & ~own.drawn).sum())
        notes += [f"{count} cells {text}"] if count else []
    return {
        "kind": "cell", "ids": [cosmx_frame.name_of(k) for k in key.tolist()], "xy": xy[rows],
        "footprint_um": np.where(sized, size, UNKNOWN_CELL_UM).astype(np.float32), "footprint_kind": own.kinds,
        "counts": _Counts(files.counts, targets, file_row), "names": targets, "symbols": targets,
        "column_kind": _kinds(targets), "polygon_indptr": own.indptr, "polygon_xy": own.xy, "space_um": space_um,
        "notes": notes,
    }  # fmt: skip


def _kinds(targets: list[str]) -> npt.NDArray[np.uint8]:
    return np.array([CONTROL if genes.is_control(name) else GENE for name in targets], np.uint8)


def _counted(path: Path) -> tuple[list[str], npt.NDArray[np.int64], npt.NDArray[np.int64], list[str]]:
    """(targets, key [N] of each cell with counts, its row in the file, notes)."""
    columns = cosmx_frame.pick(path, _FOV | _CELL, ("fov", "cell"), _CURE)
    header = tabular.header(path)
    targets = [name for name in header if name.lower() not in _NO_TARGETS]
    twice = sorted({name for name in header if header.count(name) > 1})[:3] if len(set(header)) < len(header) else []
    if twice or not targets:
        fact = f"columns {twice} come twice" if twice else "has no column of counts"
        raise ValueError(f"{path}: {fact}; restore the file that AtoMx wrote")
    table = tabular.whole(path, list(columns.values())).numbers
    key = cosmx_frame.keys(table[columns["fov"]], table[columns["cell"]], path)
    file_row = np.flatnonzero(key & 0xFFFFFFFF)
    outside = len(key) - len(file_row)
    if not len(file_row):
        raise ValueError(f"{path}: holds no cell; restore the file that AtoMx wrote")
    notes = [f"{outside} rows of cell_ID 0, which lie in no cell, are left out"] if outside else []
    return targets, key[file_row], file_row, notes


def _joined(known: npt.NDArray[np.int64], key: npt.NDArray[np.int64], files: _Files) -> npt.NDArray[np.int64]:
    """The row of the metadata for each cell with counts."""
    for keys, path in ((known[known & 0xFFFFFFFF > 0], files.cells), (key, files.counts)):
        names, times = np.unique(keys, return_counts=True)
        if (times > 1).any():
            raise ValueError(f"{path}: cell {cosmx_frame.name_of(int(names[times > 1][0]))} comes twice; restore it")
    order = np.argsort(known, kind="stable")
    at = np.searchsorted(known, key, sorter=order).clip(0, len(known) - 1)
    strange = key[known[order[at]] != key]
    if strange.size:
        name, table = cosmx_frame.name_of(int(strange[0])), files.cells.name if files.cells else ""
        raise ValueError(
            f"{files.counts}: {len(strange)} of {len(key)} cells (as {name}) are not in {table}; give the files of one "
            "export"
        )
    return np.asarray(order[at], np.int64)


class _Counts:
    """The counts of exprMat as a stream: the table is read again each time, a batch of rows at a time."""

    def __init__(self, path: Path, targets: list[str], file_row: npt.NDArray[np.int64]) -> None:
        self.path, self.targets, self.file_row = path, targets, file_row

    def __call__(self, rows: Rows) -> Iterator[CountBlock]:
        wanted = self.file_row[rows]
        start = 0
        for batch in tabular.record_batches(self.path, self.targets, dict.fromkeys(self.targets, pa.float64())):
            first, last = np.searchsorted(wanted, [start, start + batch.num_rows])
            if first < last:
                yield self._block(batch, wanted[first:last] - start)
            start += batch.num_rows

    def _block(self, batch: Any, rows: npt.NDArray[np.int64]) -> CountBlock:
        dense = np.empty((len(rows), len(self.targets)))
        for k in range(len(self.targets)):
            dense[:, k] = batch.column(k).to_numpy(zero_copy_only=False)[rows]
        row, column = np.nonzero(dense)
        count = whole_counts(dense[row, column], self.path)
        indptr = np.searchsorted(row, np.arange(len(rows) + 1)).astype(np.int64)
        return CountBlock(indptr, column.astype(np.int32), count)


def _polygons(
    path: Path, key: npt.NDArray[np.int64], xy: npt.NDArray[np.float64], fovs: Fovs, space_um: float
) -> polygons.Polygons:
    columns = cosmx_frame.pick(path, _FOV | _CELL | _PX, ("fov", "cell"), _CURE)
    order = np.argsort(key)

    def parts() -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
        for batch in tabular.batches(path, list(columns.values())):
            table = {own: batch.numbers[name] for own, name in columns.items()}
            vertex = cosmx_frame.keys(table["fov"], table["cell"], path)
            at = order[np.searchsorted(key, vertex, sorter=order).clip(0, len(key) - 1)]
            yield np.where(key[at] == vertex, at, -1), cosmx_frame.places(path, table, fovs, space_um)[0]

    made = polygons.gather(parts(), len(key), path, lambda r: cosmx_frame.name_of(int(key[r])))
    polygons.check_centres(made, xy, path)
    return made


def _squares(files: _Files, told_um: float | None, square: units.Footprint) -> dict[str, Any]:
    """The parts of a Measurement of squares."""
    assert files.molecules is not None  # _locate gives it
    path, fovs = files.molecules, Fovs(files.fovs)
    columns = cosmx_frame.pick(path, _FOV | _PX | {"target": ("target",)}, ("fov", "target"), _CURE)
    name = columns.pop("target")
    column: dict[str, int] = {}
    seen_px: cosmx_frame.Places = {}
    for batch in tabular.batches(path, list(columns.values()), (name,)):
        for word in batch.words[name].names:
            column.setdefault(word, len(column))
        table = {own: batch.numbers[n] for own, n in columns.items()}
        seen_px = cosmx_frame.places(path, table, fovs, told_um)[1] | seen_px
    space_um, notes = fovs.space_um(told_um, seen_px, path.parent)

    def stream(low_um: float, high_um: float) -> Iterator[pooling.Molecules]:
        for batch in tabular.batches(path, list(columns.values()), (name,)):
            xy, _ = cosmx_frame.places(path, {o: batch.numbers[n] for o, n in columns.items()}, fovs, told_um)
            word = batch.words[name]
            yield pooling.Molecules(xy * space_um, np.array([column[w] for w in word.names], np.int64)[word.code])

    targets = list(column)
    kinds = _kinds(targets)
    made = pooling.squares(stream, square.size_um, kinds)
    if not len(made.key):
        raise ValueError(f"{path}: holds no molecule of a gene; restore the file that AtoMx wrote")
    side = int(square.size_um)
    return {
        "kind": square.kind, "ids": [f"square{side}um_{i}_{j}" for i, j in made.place.tolist()],
        "xy": made.centre_um / space_um, "footprint_um": np.full(len(made.key), square.size_um, np.float32),
        "footprint_kind": np.full(len(made.key), square.shape, np.uint8), "counts": made.counts, "names": targets,
        "symbols": targets, "column_kind": kinds, "space_um": space_um,
        "notes": [*notes, f"the panel is the {int((kinds == GENE).sum())} genes that {path.name} names"],
    }  # fmt: skip
