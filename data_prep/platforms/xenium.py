"""Xenium: the folder of a bundle -> a Measurement of its cells, or of squares pooled from its transcripts.

In: experiment.xenium, cells.parquet or cells.csv.gz, cell_feature_matrix.h5, cell_boundaries (parquet or csv), or for
squares transcripts (parquet or csv); names may carry an `<id>_` prefix. The alignment with the H&E is the file of the
column `alignment`, else the only `*alignment.csv` of the folder. Out: cells with their polygons, or squares.

The vendor's coordinates are um of the morphology image; the own space here is its pixels. Xenium Explorer's 3 x 3 csv
maps H&E PIXELS TO MORPHOLOGY PIXELS, so it is inverted. Counts and cells are joined by id, never by row.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep import align
from data_prep.platforms import (
    CONTROL,
    GENE,
    OTHER,
    Frame,
    Measurement,
    Source,
    found,
    polygons,
    pooling,
    tabular,
    tenx,
    units,
)
from storm import genes, schema

MIN_QV = 20.0  # the vendor's own limit for transcripts that count
UNKNOWN_CELL_UM = 10.0  # diameter of a cell of which neither polygon nor area is known
_CURE = "give the folder that the Xenium instrument or Xenium Ranger wrote"
_STRANGE_GENES = 0.05  # share of the transcripts' genes that the matrix may lack before it is called another run's
_PIXEL_RANGE = (0.05, 2.0)
_FACTS = ("analysis_sw_version", "panel_name")  # of experiment.xenium; all else may name people, runs and machines
_CELLS = ("cells.parquet", "cells.csv.gz", "cells.csv")
_POLYGONS = ("cell_boundaries.parquet", "cell_boundaries.csv.gz", "cell_boundaries.csv")
_TRANSCRIPTS = ("transcripts.parquet", "transcripts.csv.gz", "transcripts.csv")


class _Files(NamedTuple):
    experiment: Path | None
    alignment: Path | None
    matrix: Path | None
    cells: Path | None = None
    polygons: Path | None = None
    transcripts: Path | None = None


def _alignment_of(source: Source) -> Path | None:
    if source.alignment:
        return source.alignment
    there = sorted(source.measurement.glob("*alignment.csv"))
    if len(there) > 1:
        names = ", ".join(path.name for path in there)
        raise ValueError(f"{source.measurement}: holds {names}; name the one of this image in the column alignment")
    return there[0] if there else None


def _locate(source: Source) -> _Files:
    folder = source.measurement
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no folder; {_CURE}")
    experiment, matrix = (found.maybe(folder, (name,)) for name in ("experiment.xenium", "cell_feature_matrix.h5"))
    shared = (experiment, _alignment_of(source), matrix)
    if pooling.square_of(source.unit, "xenium"):
        return _Files(*shared, transcripts=found.one(folder, _TRANSCRIPTS, "transcripts", _CURE))
    cells = found.one(folder, _CELLS, "table of cells", f"{_CURE}, or pool transcripts with unit square<N>um")
    if matrix is None:
        raise ValueError(f"{folder}: has no counts (cell_feature_matrix.h5); {_CURE}")
    return _Files(*shared, cells=cells, polygons=found.maybe(folder, _POLYGONS))


def inputs(source: Source) -> list[Path]:
    """The files of the bundle that `read` reads, and the alignment."""
    return [path for path in _locate(source) if path is not None]


def read(source: Source) -> Measurement:
    """One profile for each cell of the matrix, in its order; or, for unit square<N>um, for each square with a gene.

    Raises:
        ValueError: files are missing, damaged, or not of one section.
    """
    files = _locate(source)
    told = _experiment(files.experiment)
    space_um = _space_um(source, told, files.experiment)
    square = pooling.square_of(source.unit, "xenium")
    made = _squares(files, square, space_um) if square else _cells(files, space_um)
    matrix, word, facts, notes = _aligned(files.alignment, space_um)
    made["notes"] += notes
    if square and matrix is not None and (turn := _turn(matrix)) > 2:
        made["notes"].append(
            f"the squares are turned by {turn:.0f} degrees on the image; their footprints stay upright"
        )
    facts |= {key: told[key] for key in _FACTS if _is_word(told.get(key))}
    return Measurement("xenium", space_um=space_um, matrix=matrix, matrix_source=word, facts=facts, **made)


def frame(source: Source) -> Frame:
    """The space of the bundle, without its cells. Raises ValueError as `read` does."""
    files = _locate(source)
    space_um = _space_um(source, _experiment(files.experiment), files.experiment)
    matrix, word, _, _ = _aligned(files.alignment, space_um)
    return Frame(space_um, matrix, word)


def _is_word(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and not schema.BREAKS.search(value)


def _experiment(path: Path | None) -> dict[str, Any]:
    """The entries of experiment.xenium; none without the file."""
    if path is None:
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); restore the file") from None
    if not isinstance(told, dict):
        raise ValueError(f"{path}: holds no names with values; restore the file")
    return told


def _space_um(source: Source, told: dict[str, Any], path: Path | None) -> float:
    """um per pixel of the morphology image."""
    if source.space_um is not None:
        return source.space_um
    size, (low, high) = told.get("pixel_size"), _PIXEL_RANGE
    if path is None or size is None:
        raise ValueError(
            f"{path or source.measurement}: has no {'pixel_size' if path else 'experiment.xenium'}; restore it, or "
            "give um per pixel of the morphology image in the column space_um (0.2125 on all instruments so far)"
        )
    if isinstance(size, bool) or not isinstance(size, int | float) or not low <= size <= high:
        raise ValueError(f"{path}: pixel_size {size!r} is no um per pixel between {low} and {high}; restore the file")
    return float(size)


def _aligned(path: Path | None, space_um: float) -> tuple[align.Matrix | None, str, dict[str, Any], list[str]]:
    """(morphology px -> H&E px, who told it, facts, notes)."""
    if path is None:
        return None, "none", {}, []
    told = align.read_alignment(path, from_slide=True)
    notes = align.check_scale(told.matrix, space_um, path)
    if np.linalg.det(told.matrix) < 0:
        notes.append("WARNING: the alignment mirrors the cells, which is right only for an image that was flipped")
    facts, more = told.residual()
    return told.matrix, told.source, facts, notes + more


def _turn(matrix: align.Matrix) -> float:
    """How far a map turns the axes, to the nearest quarter turn, in degrees."""
    angle = float(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0]))) % 90
    return min(angle, 90 - angle)


def _cells(files: _Files, space_um: float) -> dict[str, Any]:
    """The parts of a Measurement of cells."""
    assert files.cells is not None and files.matrix is not None  # _locate gives both
    counts = tenx.open_matrix(files.matrix)
    ids: list[str] = counts.barcodes.to_pylist()
    xy_um, area_um2, notes = _table(files.cells, ids, files.matrix)
    notes += counts.notes()
    drawn = _polygons(files.polygons, ids, xy_um) if files.polygons else polygons.none_of(len(ids))
    kind = drawn.kinds
    size = np.sqrt(4 / np.pi * area_um2)
    known = np.isfinite(size) & (size > 0)
    disc = kind == schema.DISC
    if (disc & known).any():
        notes.append(f"{(disc & known).sum()} cells have no polygon and are discs of their area")
    if (disc & ~known).any():
        notes.append(f"{(disc & ~known).sum()} cells have neither polygon nor area: discs of {UNKNOWN_CELL_UM:.0f} um")
    return {
        "kind": "cell", "ids": ids, "xy": xy_um / space_um,
        "footprint_um": np.where(known, size, UNKNOWN_CELL_UM).astype(np.float32), "footprint_kind": kind,
        "counts": counts.counts, "names": counts.names, "symbols": counts.symbols, "column_kind": counts.kinds,
        "polygon_indptr": drawn.indptr, "polygon_xy": drawn.xy / space_um,
        "notes": notes,
    }  # fmt: skip


def _table(
    path: Path, ids: list[str], matrix: Path
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], list[str]]:
    """(centre [N, 2] um, area [N] um2, notes) of the cells of the matrix."""
    table = tabular.whole(path, ("x_centroid", "y_centroid", "cell_area"), ("cell_id",))
    known = table.words["cell_id"].texts()
    row = {name: r for r, name in enumerate(known)}
    for names, where in ((known, path), (ids, matrix)):
        if len(set(names)) < len(names):
            seen: set[str] = set()
            twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise ValueError(f"{where}: cell {twice!r} comes twice; restore the file")
    strangers = [name for name in ids if name not in row]
    if strangers or not ids:
        raise ValueError(
            f"{matrix}: {len(strangers)} of {len(ids)} cells (as {next(iter(strangers), '')!r}) are not in {path.name} "
            f"(as {known[0]!r}); give counts and cells of one run"
        )
    rows = np.array([row[name] for name in ids], np.int64)
    xy = np.column_stack([table.numbers["x_centroid"], table.numbers["y_centroid"]])[rows]
    bad = np.flatnonzero(~np.isfinite(xy).all(axis=1))
    if bad.size:
        raise ValueError(f"{path}: cell {ids[bad[0]]!r} has no place; restore the file")
    more = len(known) - len(ids)
    notes = [f"{more} cells of {path.name} are not in the matrix and are left out"] if more else []
    return xy, table.numbers["cell_area"][rows], notes


def _polygons(path: Path, ids: list[str], xy_um: npt.NDArray[np.float64]) -> polygons.Polygons:
    row = {name: r for r, name in enumerate(ids)}

    def parts() -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
        for batch in tabular.batches(path, ("vertex_x", "vertex_y"), ("cell_id",)):
            cell = batch.words["cell_id"]
            owner = np.array([row.get(name, -1) for name in cell.names], np.int64)[cell.code]
            yield owner, np.column_stack([batch.numbers["vertex_x"], batch.numbers["vertex_y"]])

    made = polygons.gather(parts(), len(ids), path, lambda r: repr(ids[r]))
    polygons.check_centres(made, xy_um, path)
    return made


def _squares(files: _Files, square: units.Footprint, space_um: float) -> dict[str, Any]:
    """The parts of a Measurement of squares."""
    assert files.transcripts is not None  # _locate gives it
    panel = _Panel(files.transcripts, tenx.open_matrix(files.matrix) if files.matrix else None)
    made = pooling.squares(panel.stream, square.size_um, panel.column_kind)
    if not len(made.key):
        raise ValueError(f"{files.transcripts}: holds no gene with qv {MIN_QV:.0f} or more; restore the file")
    side = int(square.size_um)
    return {
        "kind": square.kind, "ids": [f"square{side}um_{i}_{j}" for i, j in made.place.tolist()],
        "xy": made.centre_um / space_um, "footprint_um": np.full(len(made.key), square.size_um, np.float32),
        "footprint_kind": np.full(len(made.key), square.shape, np.uint8), "counts": made.counts,
        "names": panel.names, "symbols": panel.symbols, "column_kind": panel.column_kind, "notes": panel.notes,
    }  # fmt: skip


class _Panel:
    """The columns of pooled transcripts: those of the matrix where there is one, and all others that are named."""

    def __init__(self, path: Path, matrix: tenx.Matrix | None) -> None:
        self.path = path
        self.names = list(matrix.names) if matrix else []
        self.symbols = list(matrix.symbols) if matrix else []
        kinds = matrix.kinds.tolist() if matrix else []
        self._column = {symbol: k for k, symbol in reversed(list(enumerate(self.symbols)))}
        self.notes: list[str] = []
        named = self._named()
        strange = [name for name, is_gene in named.items() if is_gene and name not in self._column]
        if matrix and len(strange) > _STRANGE_GENES * max(1, sum(named.values())):
            raise ValueError(
                f"{matrix.path}: lacks {len(strange)} of the {sum(named.values())} genes of {path.name} (as "
                f"{strange[0]!r}); give files of one run, or remove it"
            )
        for name, is_gene in named.items():
            if name not in self._column:
                self._column[name] = len(self.names)
                self.names.append(name)
                self.symbols.append(name)
                kinds.append(GENE if is_gene else CONTROL)
        self.column_kind = np.array(kinds, np.uint8)
        if matrix is None:
            self.notes.append("no cell_feature_matrix.h5: the panel is the genes that the transcripts name")

    def _named(self) -> dict[str, bool]:
        """Every name among the transcripts, of whatever qv, and whether it is that of a gene."""
        told = ["is_gene"] if "is_gene" in tabular.header(self.path) else []
        found_: dict[str, bool] = {}
        low = total = 0
        for batch in tabular.batches(self.path, ("qv", *told), ("feature_name",)):
            low, total = low + int((~(batch.numbers["qv"] >= MIN_QV)).sum()), total + len(batch.numbers["qv"])
            word = batch.words["feature_name"]
            genes_ = np.zeros(len(word.names), bool)
            genes_[word.code[batch.numbers["is_gene"] == 1] if told else slice(None)] = True
            for name, is_gene in zip(word.names, genes_.tolist(), strict=True):
                found_[name] = is_gene and not genes.is_control(name)
        self.notes += [f"{low} of {total} transcripts have a qv under {MIN_QV:.0f} and are left out"] if low else []
        return found_

    def stream(self, low_um: float, high_um: float) -> Iterator[pooling.Molecules]:
        """The transcripts that count. Raises ValueError where one has no place."""
        within = ("y_location", low_um, high_um)
        for batch in tabular.batches(self.path, ("x_location", "y_location", "qv"), ("feature_name",), within):
            word = batch.words["feature_name"]
            column = np.array([self._column[name] for name in word.names], np.int64)[word.code]
            xy = np.column_stack([batch.numbers["x_location"], batch.numbers["y_location"]])
            if not np.isfinite(xy).all():
                raise ValueError(f"{self.path}: a transcript has no place; restore the file")
            # Names that measure no RNA, as antibodies, are no molecules.
            good = (batch.numbers["qv"] >= MIN_QV) & (self.column_kind[column] != OTHER)
            yield pooling.Molecules(xy[good], column[good])
