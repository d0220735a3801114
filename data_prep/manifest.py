"""The user's table of slides, validated as a whole.

    python -m data_prep.manifest init DIR [-o FILE] [--force]     draft one from a folder
    python -m data_prep.manifest check FILE [--root DIR]          validate one

In: a csv or parquet file, one row per section. Out: `ManifestRow`s with resolved paths, or one ValueError that lists
every fault of the file with its line, its column and its cure.

    required    slide_id image measurement platform donor study organ species
    optional    format unit spots mpp space_um alignment split section assume_aligned tissue license
                use_terms

`platform` is st, visium, visium_hd, xenium, cosmx, or image (H&E alone, `measurement` left blank); a blank `image` is
expression alone. `format` says in whose files the measurement lies where they are not the vendor's: hest, h5ad or
spatialdata. Paths are relative to the manifest's folder or to a given root, and stay inside it; an absolute path is
taken as it is.
"""

import argparse
import csv
import io
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.columns import IMAGE_ONLY as IMAGE_ONLY
from data_prep.columns import OPTIONAL, REQUIRED, bare
from data_prep.platforms import FORMATS, VENDORS, Source
from storm import files, schema
from storm.commands import guarded
from storm.presets import nearest

SPECIES = ("human", "mouse")
MPP_RANGE = (0.02, 20.0)  # outside it a value is a slip of the pen
SPACE_RANGE = (0.02, 1000.0)  # the unit may be a mm, or the pitch of a lattice
_MOST_FAULTS, _MOST_RANGES = 20, 8  # that are told at once
_NAMES = ("donor", "study", "organ", "section")  # of which equal ones belong together
_UNIT = re.compile(r"cell|(square|disc)\d{1,3}um")


@dataclass(frozen=True)
class ManifestRow:
    """One section: its files and what is known of it. Blank text = not given; `section` defaults to the slide's id."""

    slide_id: str
    image: Path | None
    measurement: Path | None = None
    platform: str = IMAGE_ONLY
    donor: str = "unknown"
    study: str = "unknown"
    organ: str = "unknown"
    species: str = "human"
    spots: Path | None = None
    mpp: float | None = None
    alignment: Path | None = None
    split: str = ""
    section: str = ""
    assume_aligned: bool = False
    license: str = ""
    use_terms: str = ""
    format: str = ""
    unit: str = ""
    space_um: float | None = None
    tissue: Path | None = None

    @property
    def source(self) -> Source | None:
        """What the reader named `reader` is given; None for an image alone."""
        if self.measurement is None:
            return None
        return Source(self.platform, self.measurement, self.spots, self.alignment, self.unit, self.space_um,
                      self.assume_aligned, self.species)  # fmt: skip

    @property
    def reader(self) -> str:
        """The name of the reader among platforms.FORMATS."""
        return self.format or self.platform


class _Reader:
    """Turns the cells of one line into values and keeps the faults it meets."""

    def __init__(self, line: int, cells: dict[str, str], root: Path) -> None:
        self.line, self.cells, self.root = line, cells, root
        self.faults: list[str] = []
        self.blanks: list[tuple[str, str]] = []  # (column, cure) of required cells without text

    def fault(self, column: str, text: str) -> None:
        self.faults.append(f"line {self.line}, column {column}: {text}")

    def text(self, column: str) -> str:
        value = bare(self.cells.get(column, "").strip())
        # An accent is one character or two, by the machine on which it was typed: the donor is the same.
        return unicodedata.normalize("NFC", value) if column in _NAMES else value

    def required(self, column: str, cure: str) -> str:
        value = self.text(column)
        if not value:
            self.blanks.append((column, cure))
        return value

    def path(self, column: str) -> Path | None:
        value = self.text(column)
        if not value:
            return None
        if Path(value).is_absolute():
            return Path(value)
        try:
            return files.inside(self.root, value)
        except ValueError as error:
            self.fault(column, self._outside(value) if "leaves its root" in str(error) else str(error))
            return None

    def _outside(self, value: str) -> str:
        """Why a path is refused; a link that leads out of the root looks as if it did not."""
        link = ".." not in Path(value).parts
        why = " through a link (links count as what they lead to)" if link else ""
        return (
            f"{value!r} leaves its root {self.root.resolve().name!r}{why}; write the absolute path, or give "
            "--root with a folder above it"
        )

    def one_of(self, column: str, value: str, known: tuple[str, ...]) -> str:
        if value and value not in known:
            self.fault(column, f"{value!r} is none of {', '.join(known)}")
        return value

    def length_um(self, column: str, what: str, limits: tuple[float, float] = MPP_RANGE) -> float | None:
        value = self.text(column)
        if not value:
            return None
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not limits[0] <= number <= limits[1]:
            self.fault(column, f"{value!r} is no um per {what} between {limits[0]} and {limits[1]}")
        return number

    def unit(self) -> str:
        value = self.text("unit")
        if value and not _UNIT.fullmatch(value):
            self.fault("unit", f"{value!r} is none of cell, square<N>um (as square8um), disc<N>um; or leave it blank")
        return value

    def platform(self) -> str:
        known = [*VENDORS, IMAGE_ONLY]
        value = self.required("platform", f"write one of {', '.join(known)}")
        if value and value not in known:
            self.fault("platform", f"{value!r} is unknown{nearest(value, known)}")
        return value

    def slide_id(self) -> str:
        value = self.required("slide_id", "give each slide an id of its own")
        if value:
            try:
                schema.check_slide_id(value)
            except ValueError as error:
                self.fault("slide_id", str(error))
        return value

    def measurement(self, platform: str) -> Path | None:
        value = self.path("measurement")
        if platform == IMAGE_ONLY and self.text("measurement"):
            self.fault("measurement", "must be blank for platform image; name the platform that measured it")
        if platform in VENDORS and not self.text("measurement"):
            self.fault("measurement", f"is blank; give the file or folder that {platform} wrote, or platform image")
        return value

    def check_seen(self) -> None:
        """Two donors that look alike would be two donors: a space that does not break, a mark of width zero."""
        for column in _NAMES:
            hidden = next((c for c in self.text(column) if not c.isprintable()), None)
            if hidden:
                self.fault(column, f"{self.text(column)!r} holds U+{ord(hidden):04X}, which nobody sees; type it again")

    def row(self) -> ManifestRow:
        """The row as far as it could be read; it counts only where `faults` stayed empty."""
        self.check_seen()
        platform = self.platform()
        slide_id = self.slide_id()
        if not self.text("image") and platform == IMAGE_ONLY:
            self.fault("image", "is blank; give the slide's file")
        return ManifestRow(
            slide_id=slide_id, image=self.path("image"), measurement=self.measurement(platform),
            platform=platform, donor=self.required("donor", "name the person or animal: splits are made by it"),
            study=self.required("study", "name the study: donors are told apart within it"),
            organ=self.required("organ", "name the organ, or write unknown"),
            species=self.one_of("species", self.required("species", "write human or mouse"), SPECIES),
            spots=self.path("spots"), mpp=self.length_um("mpp", "level-0 pixel"), alignment=self.path("alignment"),
            split=self.one_of("split", self.text("split"), schema.SPLITS), section=self.text("section") or slide_id,
            assume_aligned=self.one_of("assume_aligned", self.text("assume_aligned").lower(), ("true", "false"))
            == "true",
            license=self.text("license"), use_terms=self.text("use_terms"),
            format=self.one_of("format", self.text("format"), FORMATS), unit=self.unit(),
            tissue=self.path("tissue"), space_um=self.length_um("space_um", "unit of the measurement", SPACE_RANGE),
        )  # fmt: skip


def _cells(path: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Header, and (line number, cells) of every line that is not blank."""
    if not path.is_file():
        raise ValueError(f"{path}: no such manifest")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as parquet

        try:
            with parquet.ParquetFile(path) as file:
                table = file.read()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: no readable parquet ({error}); write the manifest again, or as csv") from None
        # A missing number is NaN where pandas had the column.
        columns = [["" if v is None or v != v else str(v) for v in column.to_pylist()] for column in table.columns]
        return table.column_names, iter(list(enumerate(map(list, zip(*columns, strict=True)), 2)))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}); save the manifest as csv in UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        lines = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num + 1}: {error}; is a quote missing?") from None
    if not lines:
        raise ValueError(f"{path}: is empty; the first line names the columns {', '.join(REQUIRED)}")
    return lines[0][1], iter([(n, row) for n, row in lines[1:] if any(cell.strip() for cell in row)])


def _header_faults(header: list[str]) -> list[str]:
    known = [*REQUIRED, *OPTIONAL]
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and mark in header[0]:
            return [f"line 1: its columns are separated by {name}; save it as csv with commas"]
    faults = [f"line 1: {name!r} is no column{nearest(name, known)}" for name in header if name not in known]
    faults += [f"line 1: column {name} is missing; add it" for name in REQUIRED if name not in header]
    faults += [f"line 1: column {name} comes twice" for name in sorted({n for n in header if header.count(n) > 1})]
    return faults


def _duplicates(rows: list[tuple[int, ManifestRow]]) -> list[str]:
    first: dict[str, int] = {}
    return [
        f"line {line}, column slide_id: {row.slide_id!r} is already on line {first[row.slide_id]}; ids are unique"
        for line, row in rows
        if row.slide_id and first.setdefault(row.slide_id, line) != line
    ]


def _two_splits(rows: list[tuple[int, ManifestRow]], split_by: str) -> list[str]:
    """A donor (or, when splitting by section, a section) that is put into more than one split."""
    name: Callable[[ManifestRow], str] = lambda row: row.donor if split_by == "donor" else row.section  # noqa: E731
    seen: dict[tuple[str, str], tuple[int, str]] = {}
    faults = []
    for line, row in rows:
        if not row.split:
            continue
        before, split = seen.setdefault((row.study, name(row)), (line, row.split))
        if split != row.split:
            cure = "; give it one split, or ask for split_by=section" if split_by == "donor" else "; give it one split"
            faults.append(
                f"line {line}, column split: {split_by} {name(row)!r} of study {row.study!r} is in {row.split} here "
                f"and in {split} on line {before}{cure}"
            )
    return faults


def _ranges(lines: Sequence[int]) -> str:
    """Ascending numbers as 2-9, 12; at most a few of them."""
    parts: list[list[int]] = []
    for line in lines:
        if parts and line == parts[-1][1] + 1:
            parts[-1][1] = line
        else:
            parts.append([line, line])
    text = ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in parts[:_MOST_RANGES])
    return text + (", ..." if len(parts) > _MOST_RANGES else "")


def _blank_faults(blanks: dict[tuple[str, str], list[int]]) -> list[str]:
    """A line for each column that is blank somewhere, however many rows leave it so."""
    return [
        f"line {lines[0]}, column {column}: is blank; {cure}" if len(lines) == 1
        else f"column {column} is blank on lines {_ranges(lines)} ({len(lines)} rows); {cure}"
        for (column, cure), lines in blanks.items()
    ]  # fmt: skip


def _shown(faults: list[str]) -> list[str]:
    """Faults that a person still reads; the rest is counted."""
    more = len(faults) - _MOST_FAULTS
    return faults if more <= 0 else [*faults[:_MOST_FAULTS], f"and {more} more faults; mend these first"]


def read(path: Path, root: Path | None = None, split_by: str = "donor") -> list[ManifestRow]:
    """The rows of a manifest, in its order.

    Args:
        root: folder that relative paths start from; by default the manifest's own.
        split_by: 'donor', or 'section' where one donor may be in several splits.

    Raises:
        ValueError: the faults (20 at most), each with file, line, column and cure; blank cells once per column.
    """
    header, lines = _cells(path)
    header = [name.strip() for name in header]
    while header and not header[-1]:  # spreadsheets write the empty columns behind the last one
        header.pop()
    faults = _header_faults(header)
    rows = []
    blanks: dict[tuple[str, str], list[int]] = {}
    if not faults:
        for line, cells in lines:
            if not any(cell.strip() for cell in cells[len(header) :]):
                cells = cells[: len(header)]
            if len(cells) != len(header):
                faults.append(f"line {line}: {len(cells)} cells, the header has {len(header)}; quote cells with commas")
                continue
            reader = _Reader(line, dict(zip(header, cells, strict=True)), root or path.parent)
            rows.append((line, reader.row()))
            faults += reader.faults
            for blank in reader.blanks:
                blanks.setdefault(blank, []).append(line)
        faults = _blank_faults(blanks) + faults
        faults += _duplicates(rows) + _two_splits(rows, split_by)
        if not rows and not faults:
            faults.append("holds no slide; add a line per slide")
    if faults:
        raise ValueError("\n".join(f"{path}: {fault}" for fault in _shown(faults)))
    return [row for _, row in rows]


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.manifest", description="Draft or validate a manifest.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = "Draft a manifest from a folder; what cannot be known stays blank."
    init = commands.add_parser("init", help="draft a manifest from a folder", description=text)
    init.add_argument("folder", type=Path, help="folder that holds slides and measurements")
    init.add_argument("-o", "--out", type=Path, help="file to write (default: manifest.csv in the folder)")
    init.add_argument("--force", action="store_true", help="replace the file where it is there")
    text = (
        "Validate a manifest as text: columns, cells, ids, splits, and that paths stay below their root. No slide or "
        "measurement is opened; that is python -m data_prep.plan MANIFEST --store DIR --dry-run."
    )
    check = commands.add_parser("check", help="validate a manifest, and nothing else", description=text)
    check.add_argument("manifest", type=Path)
    check.add_argument("--root", type=Path, help="folder that relative paths start from (default: the manifest's)")
    check.add_argument("--split-by", choices=("donor", "section"), default="donor")
    return guarded(lambda: _run(parser.parse_args(words)))


def _run(args: argparse.Namespace) -> int:
    if args.command == "init":
        from data_prep import draft  # it reads what lies in a folder; whoever reads a manifest needs none of that

        print(draft.write(args.folder, args.out or args.folder / "manifest.csv", args.force))
        return 0
    rows = read(args.manifest, args.root, args.split_by)
    print(f"{args.manifest}: {len(rows)} slides of {len({(r.study, r.donor) for r in rows})} donors, no fault")
    return 0


if __name__ == "__main__":
    sys.exit(main())
