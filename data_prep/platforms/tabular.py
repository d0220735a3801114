"""Tables of the vendors in batches: parquet, csv, csv.gz, so that memory does not grow with the file.

In: a file and the columns that are wanted. Out: batches of them, numbers as float64, names as codes into a list.
"""

import csv
import gzip
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

_ROWS = 1 << 18  # of a batch of parquet
_CSV_BYTES = 1 << 22  # of a batch of csv
_DAMAGED = (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException)


class Words(NamedTuple):
    """A column of names."""

    code: npt.NDArray[np.int64]  # [n] index into names
    names: list[str]

    def texts(self) -> list[str]:
        """[n] the names themselves."""
        return [self.names[c] for c in self.code]


class Batch(NamedTuple):
    """Consecutive rows of a table."""

    numbers: dict[str, npt.NDArray[np.float64]]
    words: dict[str, Words]


def _fault(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not readable as a table ({error}); restore the file")


def header(path: Path) -> list[str]:
    """The names of a table's columns. Raises ValueError where it is none."""
    try:
        if path.suffix == ".parquet":
            with pa.parquet.ParquetFile(path) as table:
                return [str(name) for name in table.schema_arrow.names]
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as handle:
            return next(csv.reader(handle), [])
    except _DAMAGED as error:
        raise _fault(path, error) from error


def columns_of(path: Path, wanted: Sequence[str]) -> list[str]:
    """`wanted` itself. Raises ValueError where the table lacks one of them."""
    there = header(path)
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ValueError(f"{path}: columns {missing} are missing; restore the file that the vendor wrote")
    return list(wanted)


def _parquet(
    path: Path, columns: list[str], words: Collection[str], within: tuple[str, float, float] | None
) -> Iterator[Any]:
    with pa.parquet.ParquetFile(path, read_dictionary=list(words), pre_buffer=False, buffer_size=1 << 20) as table:
        groups = [g for g in range(table.num_row_groups) if within is None or _may_hold(table.metadata, g, *within)]
        if groups:
            yield from table.iter_batches(_ROWS, groups, columns, use_threads=False)


def _may_hold(metadata: Any, group: int, column: str, low: float, high: float) -> bool:
    """Whether a row group may hold a value of [low, high): by its statistics, where it has them."""
    found = metadata.row_group(group)
    for k in range(found.num_columns):
        if found.column(k).path_in_schema == column:
            told = found.column(k).statistics
            return not (told and told.has_min_max and (told.max < low or told.min >= high))
    return True


def record_batches(path: Path, columns: Sequence[str], kinds: dict[str, Any]) -> Iterator[Any]:
    """Batches of a csv or csv.gz as pyarrow has them.

    Args:
        kinds: pyarrow's type of each column.

    Raises:
        ValueError: the file is damaged, or a value is of another type.
    """
    try:
        with pa.input_stream(str(path), compression="gzip" if path.suffix == ".gz" else None) as stream:
            yield from pa.csv.open_csv(
                stream,
                read_options=pa.csv.ReadOptions(block_size=_CSV_BYTES, use_threads=False),
                convert_options=pa.csv.ConvertOptions(include_columns=list(columns), column_types=kinds),
            )
    except _DAMAGED as error:
        raise _fault(path, error) from error


def batches(
    path: Path, numbers: Sequence[str], words: Sequence[str] = (), within: tuple[str, float, float] | None = None
) -> Iterator[Batch]:
    """The wanted columns of a table, some hundred thousand rows at a time.

    Args:
        within: (column, low, high): parts of a parquet file that hold no value of [low, high) may be left out.

    Raises:
        ValueError: the file is damaged, lacks a column, or holds text where numbers belong.
    """
    columns = columns_of(path, [*numbers, *words])
    try:
        if path.suffix == ".parquet":
            found = _parquet(path, columns, words, within)
        else:
            kinds = dict.fromkeys(numbers, pa.float64()) | dict.fromkeys(words, pa.string())
            found = record_batches(path, columns, kinds)
        for batch in found:
            yield Batch({n: _number(batch.column(n)) for n in numbers}, {n: _words(batch.column(n)) for n in words})
    except _DAMAGED as error:
        raise _fault(path, error) from error


def _number(column: Any) -> npt.NDArray[np.float64]:
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)


def _words(column: Any) -> Words:
    """A column of text, bytes or whole numbers; a missing value is the empty name."""
    if not pa.types.is_dictionary(column.type):
        column = column.cast(pa.string()).dictionary_encode()
    code = column.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    used, own = np.unique(code, return_inverse=True)
    known = column.dictionary.take(pa.array(np.maximum(used, 0))).to_pylist() if len(column.dictionary) else [""]
    names = ["" if c < 0 or v is None else v.decode() if isinstance(v, bytes) else str(v)
             for c, v in zip(used.tolist(), known, strict=False)]  # fmt: skip
    return Words(own.astype(np.int64), names)


def whole(path: Path, numbers: Sequence[str], words: Sequence[str] = ()) -> Batch:
    """The wanted columns of a table that fits into memory. Raises ValueError as `batches`, or for no rows at all."""
    parts = list(batches(path, numbers, words))
    if not sum(len(next(iter(p.numbers.values()))) for p in parts):
        raise ValueError(f"{path}: holds no row; restore the file that the vendor wrote")
    together: dict[str, Words] = {}
    for name in words:
        texts = [text for part in parts for text in part.words[name].texts()]
        together[name] = Words(np.arange(len(texts)), texts)
    return Batch({n: np.concatenate([p.numbers[n] for p in parts]) for n in numbers}, together)
