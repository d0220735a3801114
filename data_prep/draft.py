"""A manifest drafted from a folder: a row per section, with blanks where no file tells.

In: a folder. Out: the csv's rows, the cells that somebody has to fill in, and notes. Images and measurements are paired
where one name or one folder ties them and nothing else does; whatever is open stays blank and is told.
"""

import csv
import io
import os
import re
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from data_prep import layouts
from data_prep.columns import IMAGE_ONLY, REQUIRED, inert
from data_prep.layouts import Content, Found
from storm import files

COLUMNS = (
    "slide_id", "image", "measurement", "platform", "format", "spots", "alignment", "donor", "study", "organ",
    "species", "mpp", "space_um", "split", "license",
)  # fmt: skip
_MOST_NAMES = 20  # slides that a line names
_MIN_MPX = 2.0  # a smaller JPEG or PNG is a thumbnail: 1.5 x 1.5 mm at 1 um/px


@dataclass
class Draft:
    """The rows of a manifest to be; `blanks` are (slide id, column) of required cells that no file tells."""

    rows: list[dict[str, str]] = field(default_factory=list)
    blanks: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def csv(self) -> bytes:
        """The csv's bytes; a cell that starts like a formula carries an apostrophe, which manifest.read takes off."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([inert(row.get(column, "")) for column in COLUMNS] for row in self.rows)
        return text.getvalue().encode()


def draft(folder: Path, base: Path) -> Draft:
    """Draft the manifest of a folder.

    Args:
        base: the folder that the paths are written from.

    Raises:
        ValueError: no such folder, or nothing in it is known.
    """
    content = layouts.look(folder)
    result = Draft()
    small = [path for path in content.images if _is_small(path)]
    content.images = [path for path in content.images if path not in small]
    result.notes += [f"{_name(path, folder)}: too small for a slide, left out" for path in small]
    result.notes += [f"{_name(path, folder)}: is named like a slide and is none, left out" for path in content.strange]
    result.notes += [f"{_name(path, folder)}: is no file that can be read, left out" for path in content.unread]
    result.notes += [f"{_name(path, folder)}: is a link to a folder, which is not followed" for path in content.linked]
    _pair(content, folder, result)
    for found in content.measurements:
        result.rows.append(_row(found, base))
        result.notes += [f"{_name(found.path, folder)}: {note}" for note in found.notes]
    used = {found.image for found in content.measurements}
    for path in content.images:
        if path not in used:
            result.rows.append(_row(Found(path.name.partition(".")[0], IMAGE_ONLY, path, path), base))
    if not result.rows:
        raise ValueError(f"{folder}: holds no measurement and no slide that is known; write the manifest by hand")
    _name_slides(result.rows)
    result.blanks = [
        (row["slide_id"], column)
        for row in result.rows
        for column in REQUIRED
        if not row.get(column) and column not in ("image", "measurement")
    ]
    return result


def _name(path: Path, folder: Path) -> str:
    """A path for people, also where its bytes are no text or would steer a terminal."""
    text = os.fsencode(path.relative_to(folder)).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _is_small(path: Path) -> bool:
    """Whether a plain image has fewer pixels than any slide, by its header alone."""
    if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        return False
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # only the header is read here
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            return image.width * image.height < _MIN_MPX * 1e6
    except (OSError, SyntaxError):
        return False  # build or plan will say what is wrong with it
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _tokens(name: str) -> set[str]:
    """The parts of a name that may be an id, in lower case; with the whole name."""
    stem = name.partition(".")[0].lower()
    return {stem, *re.split(r"[^a-z0-9]+", stem)} - {""}


def _score(found: Found, path: Path, root: Path) -> int:
    """How much ties a file to a measurement: its name, its folders, or that it lies in the measurement's own folder."""
    name = found.name.lower()
    above = path.relative_to(root).parts[:-1]
    score = 3 * (path.name.partition(".")[0].lower() == name) + 2 * (name in _tokens(path.name))
    score += 2 * any(name == part.lower() for part in above)
    return score + 4 * (path.is_relative_to(found.home) and found.home != root)


def _best(found: Found, paths: list[Path], root: Path) -> list[Path]:
    """The files that most ties to a measurement; none where nothing does."""
    scores = {path: _score(found, path, root) for path in paths}
    top = max(scores.values(), default=0)
    return [path for path, score in scores.items() if score == top and top > 0]


def _pair(content: Content, root: Path, result: Draft) -> None:
    """Give each measurement its spots and its image, where exactly one is the likeliest."""
    for found in content.measurements:
        if found.platform == "st" and "spots" not in found.paths:
            best = _best(found, content.spots, root)
            if best:
                found.paths["spots"] = best[0]  # the likeliest kind of table comes first
            else:
                found.notes.append("no table of spots is tied to it by its name; give it in the column spots")
    _tie_above(content, root)
    claims = {id(f): _best(f, content.images, root) for f in content.measurements if f.image is None}
    single = [f for f in content.measurements if f.image is None]
    if len(single) == 1 and len(content.images) == 1 and not claims[id(single[0])]:
        claims[id(single[0])] = list(content.images)  # there is nothing else that they could belong to
    wanted = Counter(paths[0] for paths in claims.values() if len(paths) == 1)
    for found in single:
        best = claims[id(found)]
        if len(best) == 1 and wanted[best[0]] == 1:
            found.image = best[0]
        elif best:
            several = ", ".join(_name(path, root) for path in best[:3])
            why = "also tied to another measurement" if len(best) == 1 else "several images are tied to it"
            found.notes.append(f"image left blank, {why} ({several}); choose one")
        elif found.platform != "cosmx":
            found.notes.append("no image is tied to it; give one, or leave it blank for expression alone")
    taken = [f.image for f in content.measurements if f.image]
    open_images = {path for paths in claims.values() for path in paths} - set(taken)
    content.images = [path for path in content.images if path not in open_images]


def _tie_above(content: Content, root: Path) -> None:
    """Give a Xenium bundle the only H&E and the only alignment that the vendor named and somebody put beside it."""
    bundles = [found for found in content.measurements if found.platform == "xenium"]
    above = Counter(found.home.parent for found in bundles)
    for found in bundles:
        folder = found.home.parent
        if above[folder] > 1 or found.home == root or not folder.is_relative_to(root):
            continue
        images = [path for path in content.images if path.parent == folder and "he_image" in path.name]
        if found.image is None and len(images) == 1:
            found.image = images[0]
        tables = sorted(path for path in folder.glob("*alignment.csv") if path.is_file())
        if found.image is None or "alignment" in found.paths or not tables:
            continue
        names = ", ".join(_name(path, root) for path in tables)
        found.notes = [note for note in found.notes if not note.startswith("no file tells where")]
        if len(tables) == 1:
            found.paths["alignment"] = tables[0]
            found.notes.append(f"{names} lies beside it and is taken for its alignment")
        else:
            found.notes.append(f"name the one of its image in the column alignment: {names}")


def _row(found: Found, base: Path) -> dict[str, str]:
    row = {"slide_id": found.name, "platform": found.platform, **found.cells}
    if found.platform == IMAGE_ONLY:
        found.image = found.path
    else:
        row["measurement"] = _from(found.path, base)
    if found.image:
        row["image"] = _from(found.image, base)
    return row | {column: _from(path, base) for column, path in found.paths.items()}


def _from(path: Path, base: Path) -> str:
    """The path from `base`; of a link that leads out of it the whole path, which a manifest takes as it is."""
    real, home = path.resolve(), base.resolve()
    return (real.relative_to(home) if real.is_relative_to(home) else real).as_posix()


def _name_slides(rows: list[dict[str, str]]) -> None:
    """Make the slides' ids legal and unique: names that come twice get the folder above, then a number."""
    for row in rows:
        row["slide_id"] = _legal(row["slide_id"])
    twice = {name for name, n in Counter(row["slide_id"] for row in rows).items() if n > 1}
    for row in rows:
        if row["slide_id"] in twice:
            parts = Path(row.get("measurement") or row["image"]).parts[:-1]
            above = [part for part in parts if _legal(part) != row["slide_id"] and part not in ("outs", "data")]
            row["slide_id"] = _legal("_".join([*above[-1:], row["slide_id"]]))
    seen: Counter[str] = Counter()
    for row in rows:
        name = row["slide_id"]
        seen[name] += 1
        if seen[name] > 1:
            row["slide_id"] = f"{name[:60]}_{seen[name]}"


def _legal(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-")[:64] or "slide"


def write(folder: Path, out: Path, force: bool) -> str:
    """Draft a folder's manifest into `out`; returns what to tell.

    Raises:
        ValueError: `out` is there and `force` is not given, or nothing in the folder is known.
    """
    if out.exists() and not force:
        raise ValueError(f"{out}: is there already; choose another name with -o, or replace it with --force")
    home = out.parent.resolve()
    inside = folder.resolve().is_relative_to(home)
    found = draft(folder, home if inside else folder)
    files.write_bytes(out, found.csv())
    counts = Counter(row["platform"] or "platform not told" for row in found.rows)
    lines = [f"{out}: {len(found.rows)} rows ({', '.join(f'{n} {name}' for name, n in sorted(counts.items()))})"]
    lines += [f"note: {note}" for note in found.notes]
    if not inside:
        lines.append(f"note: its paths start elsewhere; give every command --root {shlex.quote(str(folder))}")
    if found.blanks:
        lines.append(f"{len(found.blanks)} cells are blank and must be filled in:")
        for column in REQUIRED:
            slides = [slide for slide, blank in found.blanks if blank == column]
            if slides:
                lines.append(f"  {column}: {_listed(slides, len(found.rows))}")
    lines.append("split is blank too, and may stay so; but nothing can be evaluated unless some donors are named test "
                 "there, or plan and pack are given test_share=0.2 (val_share alike)")  # fmt: skip
    return "\n".join(lines)


def _listed(slides: list[str], rows: int) -> str:
    """Slides by name, or in a word where they are all or too many to read."""
    if len(slides) == rows > 1:
        return "all rows"
    return ", ".join(slides[:_MOST_NAMES]) + (f" and {len(slides) - _MOST_NAMES} more" if slides[_MOST_NAMES:] else "")
