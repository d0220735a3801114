"""What the outs folders of Visium and Visium HD share: positions, the join of barcodes, scale factors, the probe set.

In: files of Space Ranger 1 to 4. Out: positions as columns, and the row of the positions for each barcode of a matrix.

The columns of a positions file are barcode, in_tissue, array_row, array_col, pxl_row_in_fullres, pxl_col_in_fullres:
ROW FIRST, so x is the last one. Whether it is parquet or csv, gzipped or not, with a header or without, is told by its
content, not by its name.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.platforms import GENE, OTHER, mex
from data_prep.platforms.found import maybe
from data_prep.platforms.tenx import Matrix

COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
MAX_STRANGERS = 0.05  # share of a matrix's barcodes that may lack a position before it is called the wrong section
_ENDLESS = 1e9  # px or um: no length of a slide
_CURE = "restore it from Space Ranger's outs"
# What a barcode is beside a sample's name before or after it: bases, a bin, a cell; and the number of its well.
_BARCODE = (
    r"^(?P<before>.*?)(?P<core>[ACGTN]{10,}|s_\d{3}um_\d{5}_\d{5}|cellid_\d{9})(?P<gem>-\d+)?(?P<after>(?:[^0-9].*)?)$"
)


@dataclass(frozen=True)
class Positions:
    """The places of M barcodes as columns."""

    barcodes: pa.Array  # [M] of strings
    in_tissue: npt.NDArray[np.int8]  # [M] 1 or 0
    array: npt.NDArray[np.float64]  # [M, 2] array_col, array_row: x first
    xy: npt.NDArray[np.float64]  # [M, 2] x, y in px of the full-resolution image


def _bad_row(path: Path, number: int, reason: object) -> ValueError:
    return ValueError(
        f"{path}: row {number} is not barcode, in_tissue, array_row, array_col, pxl_row, pxl_col ({reason}); {_CURE}"
    )


def read_positions(path: Path) -> Positions:
    """The positions of a parquet or csv file.

    Raises:
        ValueError: columns are missing, a field is no number, a barcode comes twice, or there is none.
    """
    with path.open("rb") as handle:
        is_parquet = handle.read(4) == b"PAR1"
    found = _from_parquet(path) if is_parquet else _from_csv(path)
    if not len(found.barcodes):
        raise ValueError(f"{path}: holds no spot; {_CURE}")
    bad = np.flatnonzero(~np.isfinite(found.xy).all(axis=1))
    if bad.size:
        raise _bad_row(path, int(bad[0]) + 1, "its place is no number")
    twice = repeated(found.barcodes)
    if twice is not None:
        raise _bad_row(path, twice[0] + 1, f"{twice[1]} comes twice")
    return found


def repeated(names: pa.Array) -> tuple[int, str] | None:
    """(index, name) of the first that came before, or None."""
    if len(pc.unique(names)) == len(names):
        return None
    first = np.unique(pc.index_in(names, value_set=names).to_numpy(), return_index=True)[1]
    later = np.setdiff1d(np.arange(len(names)), first)[0]
    return int(later), names[int(later)].as_py()


def _from_parquet(path: Path) -> Positions:
    try:
        file = pq.ParquetFile(path)
        missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"{path}: columns {missing} are missing; {_CURE}")
        table = file.read(columns=list(COLUMNS)).combine_chunks()
        if any(table[name].null_count for name in COLUMNS):
            raise ValueError(f"{path}: has blank cells; {_CURE}")
        barcodes = table["barcode"].cast(pa.string()).combine_chunks()
        in_tissue, row, col, y, x = (table[name].cast(pa.float64()).to_numpy() for name in COLUMNS[1:])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no readable parquet ({error}); {_CURE}") from error
    return Positions(barcodes, (in_tissue == 1).astype(np.int8), np.column_stack([col, row]), np.column_stack([x, y]))


def _from_csv(path: Path) -> Positions:
    rows = list(csv.reader(mex.lines(path)))
    order = list(range(len(COLUMNS)))
    if rows and not (len(rows[0]) > 1 and rows[0][1].strip().isdigit()):  # a header: its second field is a name
        header = [name.strip() for name in rows.pop(0)]
        missing = [name for name in COLUMNS if name not in header]
        if rows and missing:
            raise ValueError(f"{path}: columns {missing} are missing; {_CURE}")
        order = [header.index(name) for name in COLUMNS] if rows else order
    barcodes: list[str] = []
    numbers: list[tuple[float, ...]] = []
    for number, row in enumerate(rows, 1):
        try:
            barcode, in_tissue, array_row, array_col, y, x = (row[i] for i in order)
            numbers.append((float(in_tissue), int(array_row), int(array_col), float(y), float(x)))
        except (ValueError, IndexError) as error:
            raise _bad_row(path, number, error) from None
        barcodes.append(barcode)
    in_tissue_, row_, col, y_, x_ = np.array(numbers, np.float64).reshape(-1, 5).T
    return Positions(
        pa.array(barcodes, pa.string()), (in_tissue_ == 1).astype(np.int8), np.column_stack([col, row_]),
        np.column_stack([x_, y_]),
    )  # fmt: skip


def _bare(names: pa.Array, path: Path) -> pa.Array:
    """The barcodes without a sample's name, '-1' added where no number is given; null where there is no barcode.

    Raises:
        ValueError: they are of several samples.
    """
    parts = pc.extract_regex(names, _BARCODE)
    before, core, gem, after = (pc.struct_field(parts, name) for name in ("before", "core", "gem", "after"))
    samples = pc.unique(pc.drop_null(pc.binary_join_element_wise(before, after, "*")))
    if len(samples) > 1:
        told = ", ".join(sorted(samples.to_pylist())[:3])
        raise ValueError(f"{path}: its barcodes are of {len(samples)} samples ({told}); give the files of one section")
    return pc.binary_join_element_wise(core, pc.if_else(pc.equal(gem, ""), "-1", gem), "")


def join(matrix: Matrix, positions: Positions, where: Path) -> npt.NDArray[np.int64]:
    """[N] row of `positions` for each barcode of the matrix, -1 for the few that have none.

    A sample's name around the barcodes, and '-1' that is on one side only, are ignored. Any other number is another
    section's.

    Raises:
        ValueError: more than MAX_STRANGERS have no position, or a barcode comes twice.
    """
    names, known = matrix.barcodes, positions.barcodes
    found = pc.index_in(names, value_set=known)
    if found.null_count:
        names, known = _bare(names, matrix.path), _bare(known, where)
        found = pc.index_in(names, value_set=pc.fill_null(known, ""))
        found = pc.if_else(pc.is_null(names), None, found)
    rows = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    twice = repeated(matrix.barcodes) or repeated(pa.array(rows[rows >= 0]))
    if twice is not None:
        at = twice[0] if repeated(matrix.barcodes) else int(np.flatnonzero(rows >= 0)[twice[0]])
        raise ValueError(f"{matrix.path}: barcode {matrix.barcodes[at].as_py()!r} comes twice; {_CURE}")
    strangers = np.flatnonzero(rows < 0)
    if len(strangers) > MAX_STRANGERS * len(rows):
        raise ValueError(
            f"{matrix.path}: {len(strangers)} of {len(rows)} barcodes (as "
            f"{matrix.barcodes[int(strangers[0])].as_py()!r}) are not in {where.name} (as "
            f"{positions.barcodes[0].as_py()!r}); give the positions of the same section"
        )
    return rows


def stranger_note(rows: npt.NDArray[np.int64], what: str) -> list[str]:
    """What is said of the barcodes that `join` left without a place."""
    count = int((rows < 0).sum())
    return [f"{count} barcodes without {what} are left out"] if count else []


def scale_factors(path: Path) -> dict[str, Any]:
    """scalefactors_json.json. Raises ValueError where it is no mapping, or one of its lengths is none."""
    try:
        scale = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); {_CURE}") from error
    if not isinstance(scale, dict):
        raise ValueError(f"{path}: holds no names with numbers; {_CURE}")
    for name in ("spot_diameter_fullres", "bin_size_um", "microns_per_pixel"):
        value = scale.get(name)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _ENDLESS):
            continue
        raise ValueError(f"{path}: {name} is no positive number; {_CURE}")
    return scale


def probe_set(outs: Path) -> Path | None:
    """The probe set of a run on fixed tissue; None where the run had none."""
    return maybe(outs, ("probe_set.csv",))


def measured_kinds(matrix: Matrix, probes: Path | None) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """([K] kinds of the columns, notes): genes that the probe set does not reach are not measured, which is not zero.

    Raises:
        ValueError: the probe set is unreadable, or of other genes.
    """
    kinds, notes = matrix.kinds, matrix.notes()
    if probes is None:
        return kinds, notes
    rows = list(csv.reader(line for line in mex.lines(probes) if not line.startswith("#")))
    header = rows[0] if rows else []
    if "gene_id" not in header:
        raise ValueError(f"{probes}: has no column gene_id; {_CURE}")
    gene, used = header.index("gene_id"), header.index("included") if "included" in header else None
    whole = [row for row in rows[1:] if len(row) == len(header)]
    reached = {row[gene] for row in whole if used is None or row[used].strip().lower() == "true"}
    missing = np.array([name not in reached for name in matrix.names]) & (kinds == GENE)
    if missing.all() or missing.sum() == (kinds == GENE).sum():
        raise ValueError(f"{probes}: reaches no gene of {matrix.path.name}; give the files of one run")
    if missing.any():
        notes.append(f"{int(missing.sum())} genes that the probe set does not reach are not measured")
    kinds[missing] = OTHER
    return kinds, notes
