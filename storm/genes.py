"""Genes: Ensembl ids, symbols and aliases, panels as masks, and the hash that names a gene list.

In: what a measurement calls its columns. Out: canonical ids (version stripped, duplicates to be summed), the share that
was mapped, and `GeneTable`, the ordered gene list of a store, a shard set or an export. numpy only.
"""

import functools
import gzip
import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storm import files

_COLUMNS = ["ensembl_id", "symbol", "share"]
_ENSEMBL = re.compile(r"(ENS[A-Z]*G\d{11})(\.\d+)?(_PAR_Y)?")
# Excel turned SEPT2 into 2-Sep and MARCH1 into 1-Mar; HGNC has since renamed the families to SEPTIN and MARCHF.
_MONTHS = {"sep": "SEPTIN", "mar": "MARCHF", "dec": "DELEC"}
_DATE = re.compile(r"(\d{1,2})-(sep|mar|dec)", re.IGNORECASE)
_RENAMED = re.compile(r"(SEPT|MARCH)(\d{1,2})", re.IGNORECASE)
# Names of control features: Xenium (NegControlProbe_, BLANK_, antisense_, UnassignedCodeword_), CosMx (NegPrb1,
# Negative1, SystemControl1, FalseCode1) and MERSCOPE (Blank-1). No symbol of the shipped tables begins like one.
_CONTROL = re.compile(
    r"(blank[-_ ]|blank\d|neg(ative)?[-_ ]?(control|prb|probe|\d)|unassigned|deprecated|antisense|systemcontrol"
    r"|falsecode|intergenic|genomic[-_ ]?control)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class GeneTable:
    """An ordered list of genes: canonical ids, display symbols, and `share`, the expected fraction of counts."""

    ids: tuple[str, ...]
    symbols: tuple[str, ...]
    share: npt.NDArray[np.float64] | None = None  # [G], sums to 1; from training donors

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """Ensembl id -> position."""
        return {gene_id: i for i, gene_id in enumerate(self.ids)}

    @property
    def hash(self) -> str:
        """sha256 of the ids in their order: two things with one hash index genes alike."""
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()

    def to_tsv(self) -> bytes:
        """The table as tsv: ensembl_id, symbol and, where known, share."""
        share = [] if self.share is None else [[f"{s:.9e}" for s in self.share]]
        header = _COLUMNS[: 2 + len(share)]
        rows = zip(self.ids, self.symbols, *share, strict=True)
        return ("\n".join("\t".join(row) for row in [header, *rows]) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> "GeneTable":
        """The table in a tsv file. Raises ValueError naming the file where its columns are others."""
        # As to_tsv writes it: no quoting, and no line breaks but "\n".
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is no UTF-8 text ({error.reason}); restore the gene table") from None
        rows = [line.split("\t") for line in text.removesuffix("\n").split("\n")]
        if rows[0] not in (_COLUMNS, _COLUMNS[:2]):
            raise ValueError(f"{path}: the first line must be 'ensembl_id<TAB>symbol'; this is no gene table")
        bad = next((n for n, row in enumerate(rows, 1) if len(row) != len(rows[0])), None)
        if bad is not None:
            raise ValueError(f"{path}: line {bad} has not {len(rows[0])} tab-separated columns; restore the gene table")
        share = _shares([r[2] for r in rows[1:]], path) if len(rows[0]) > 2 else None
        return cls(tuple(r[0] for r in rows[1:]), tuple(r[1] for r in rows[1:]), share)


def _shares(words: list[str], path: Path) -> npt.NDArray[np.float64]:
    try:
        found = np.array([float(word) for word in words])
    except ValueError:
        found = np.full(1, np.nan)
    if not (np.isfinite(found) & (found >= 0)).all():
        raise ValueError(f"{path}: the column share holds what is no share of counts; restore the gene table")
    return found


@functools.cache
def shipped(species: str) -> GeneTable:
    """The GENCODE table that comes with the package, for 'human' or 'mouse'; its sha256 is checked.

    Raises:
        ValueError: no table for this species, or the installed file is damaged.
    """
    folder = resources.files("storm") / "tables"
    name = f"genes_{species}.tsv.gz"
    known = files.read_json(Path(str(folder / "tables.json")))
    if name not in known:
        raise ValueError(f"species {species!r} has no gene table; known: human, mouse")
    data = gzip.decompress((folder / name).read_bytes())
    if files.sha256_of(data) != known[name]["sha256"]:
        raise ValueError(f"{name}: its sha256 is not that of tables.json; reinstall storm-tissue")
    rows = [line.split("\t") for line in data.decode().splitlines()[1:]]
    return GeneTable(tuple(r[0] for r in rows), tuple(r[1] for r in rows))


@functools.cache
def _by_symbol(species: str) -> dict[str, str]:
    """Symbol -> id; a symbol that names several ids is given its first id in the table's order."""
    table = shipped(species)
    found: dict[str, str] = {}
    for gene_id, symbol in zip(table.ids, table.symbols, strict=True):
        found.setdefault(symbol, gene_id)
    return found


def repair_symbol(symbol: str) -> str:
    """The current symbol of a gene that a spreadsheet or a renaming mangled: '2-Sep' and 'SEPT2' -> 'SEPTIN2'."""
    if match := _DATE.fullmatch(symbol):
        return f"{_MONTHS[match[2].lower()]}{int(match[1])}"
    if match := _RENAMED.fullmatch(symbol):
        return f"{'SEPTIN' if match[1].upper() == 'SEPT' else 'MARCHF'}{match[2]}"
    return symbol


def is_control(name: str) -> bool:
    """Whether a feature's name marks a technical control, which is no gene."""
    return _CONTROL.match(name) is not None


def canonical(name: str, species: str, aliases: dict[str, str] | None = None) -> str:
    """The canonical id of a column's name: Ensembl without version, else by symbol, else 'symbol:<NAME>'.

    `aliases` maps a user's names to Ensembl ids or current symbols and is asked first.
    """
    name = (aliases or {}).get(name, name).strip()
    if match := _ENSEMBL.fullmatch(name):
        return match[1]
    if match := re.search(r"_(ENS[A-Z]*G\d{11})", name):  # 'symbol_ENSG...' columns of some ST tables
        return match[1]
    symbols = _by_symbol(species)
    for candidate in (name, repair_symbol(name), name.upper() if species == "human" else name.capitalize()):
        if candidate in symbols:
            return symbols[candidate]
    return f"symbol:{name}"


def species_of(names: Sequence[str]) -> str:
    """human or mouse where ids or symbols, as they are written, are clearly those of one; else blank."""
    bare = {name.partition(".")[0] if name.startswith("ENS") else name for name in names}
    shares = {}
    for species in ("human", "mouse"):
        table = shipped(species)
        shares[species] = len(bare & {*table.ids, *table.symbols}) / max(1, len(bare))
    (best, share), (_, other) = sorted(shares.items(), key=lambda item: -item[1])
    return best if share >= 0.5 and share > 4 * other else ""


@dataclass(frozen=True)
class GeneMap:
    """Where each column of a measurement goes: `column[i]` = index in `table`, -1 for a dropped control."""

    table: GeneTable
    column: npt.NDArray[np.int64]
    mapped_share: float  # of the non-control columns, by number


def map_columns(names: list[str], symbols: list[str], species: str, aliases: dict[str, str] | None = None) -> GeneMap:
    """Canonical genes of a measurement's columns; columns of one gene share an index (their counts are summed).

    Args:
        names: the column names that identify a gene best (Ensembl ids where the file has them, else symbols).
        symbols: display symbols, same order.
    """
    gene_ids = [None if is_control(n) or is_control(s) else canonical(n, species, aliases)
                for n, s in zip(names, symbols, strict=True)]  # fmt: skip
    first = {g: i for i, g in reversed(list(enumerate(gene_ids))) if g is not None}
    ordered = tuple(sorted(first))
    table = GeneTable(ordered, tuple(symbols[first[g]] for g in ordered))
    column = np.array([-1 if g is None else table.index[g] for g in gene_ids], dtype=np.int64)
    known = [not g.startswith("symbol:") for g in gene_ids if g is not None]
    return GeneMap(table, column, float(np.mean(known)) if known else 0.0)


def read_aliases(path: Path) -> dict[str, str]:
    """A user's two-column tsv (name, Ensembl id or current symbol) as a dict. Raises ValueError naming the file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; correct the config's key aliases")
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    bad = next((i for i, row in enumerate(rows, 1) if len(row) != 2), None)
    if bad is not None:
        raise ValueError(f"{path}: line {bad} has not two tab-separated columns (name, Ensembl id or symbol)")
    return dict(rows)


def read_ids(path: Path) -> frozenset[str]:
    """The Ensembl ids of a file, one a line, without version. Raises ValueError naming the file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give one with an Ensembl id per line")
    names = path.read_text(encoding="utf-8").split()
    bad = next((name for name in names if not _ENSEMBL.fullmatch(name)), None)
    if bad is not None or not names:
        fact = "holds no gene" if bad is None else f"{bad!r} is no Ensembl id"
        raise ValueError(f"{path}: {fact}; give one with an Ensembl id per line")
    return frozenset(name.partition(".")[0] for name in names)


def without(table: GeneTable, ids: Collection[str]) -> GeneTable:
    """The table without some genes, and without shares."""
    kept = [i for i, gene_id in enumerate(table.ids) if gene_id not in ids]
    return GeneTable(tuple(table.ids[i] for i in kept), tuple(table.symbols[i] for i in kept))


def pack_panel(mask: npt.NDArray[np.bool_]) -> str:
    """A panel (bool [G]) as hex text, for a JSON manifest."""
    return np.packbits(mask).tobytes().hex()


def unpack_panel(text: str, size: int) -> npt.NDArray[np.bool_]:
    """The bool [size] mask of `pack_panel`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:size].astype(bool)


def union(tables: list[GeneTable]) -> GeneTable:
    """All genes of several tables, sorted by id; the first table that has a gene gives its symbol."""
    symbols: dict[str, str] = {}
    for table in tables:
        for gene_id, symbol in zip(table.ids, table.symbols, strict=True):
            symbols.setdefault(gene_id, symbol)
    ordered = tuple(sorted(symbols))
    return GeneTable(ordered, tuple(symbols[g] for g in ordered))
