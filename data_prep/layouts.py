"""What lies in a folder: measurements by their layout and content, and images.

In: a folder. Out: a `Found` for each measurement (Space Ranger outs, Visium HD, Xenium, CosMx, HEST-1k, SpatialData,
legacy ST, h5ad), and the images that may be slides. Only names, headers and lists of genes are read; nothing is
believed that the files do not tell.
"""

import csv
import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py

from data_prep.platforms import VENDORS, Source, cosmx
from storm import files, genes

_MATRIX = re.compile(r"(.+_)?(filtered|raw)_feature_bc_matrix(\.h5)?")
_POSITIONS = re.compile(r"tissue_positions(_list)?\.(csv|parquet)")
# Folders inside a measurement that hold no slide and no other measurement.
_VENDORS_OWN = re.compile(
    r"(.+_)?(spatial|analysis|binned_outputs|segmented_outputs|square_\d{3}um|(filtered|raw)_(feature|probe)_bc_matrix|"
    r"morphology_focus|aux_outputs|cell_feature_matrix|CellLabels|CellComposite|CellOverlay|Morphology2D|RunSummary)"
)
_SQUARE = re.compile(r"square_\d{3}um")
_XENIUM_WITHOUT_ITS_FILE = (
    {"cells.parquet", "cell_feature_matrix.h5"}, {"transcripts.parquet", "nucleus_boundaries.parquet"}
)  # fmt: skip
_COSMX = re.compile(r"(?P<id>.*?)_?exprMat_file\.csv(\.gz)?")
_TABLE = re.compile(r"(?P<id>.+?)\.(tsv|csv|txt)(\.gz)?")
_GENERAL_TABLES = {"counts", "count_matrix", "matrix", "stdata", "expression"}
_PLACE = re.compile(r"\d+(\.\d+)?x\d+(\.\d+)?")
_SPOT_COLUMNS = {"x", "y", "pixel_x", "pixel_y"}
_LINE_BYTES = 1 << 24  # the longest first line of a table that is looked at
_FEW_COLUMNS = 4  # a table of counts has more
_NAMES = 3000  # genes that are asked for the species
# What vendors write beside a measurement, and what is no slide: never one to cut tiles from.
_NO_SLIDE = re.compile(
    r"tissue_(hires|lowres)_image|aligned_fiducials|aligned_tissue_image|detected_tissue_image|cytassist|"
    r"morphology|ch\d{4}_|celllabels|cellcomposite|(^|[_.-])(thumb(nail)?|label|macro|mask|overlay)([_.-]|$)",
    re.IGNORECASE,
)
_IMAGES = (".svs", ".ndpi", ".scn", ".mrxs", ".bif", ".vms", ".tif", ".tiff", ".btf", ".jpg", ".jpeg", ".png")
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\xff\xd8\xff", b"\x89PNG")
_HEST_PLATFORMS = {"visium": "visium", "visium hd": "visium_hd", "xenium": "xenium", "spatial transcriptomics": "st"}
_SPECIES = {"homo sapiens": "human", "human": "human", "mus musculus": "mouse", "mouse": "mouse"}


@dataclass
class Found:
    """One measurement on disk."""

    name: str  # what it is called there
    platform: str  # blank where the files do not tell
    path: Path  # for the manifest's column measurement
    home: Path  # the folder that is its own
    image: Path | None = None
    cells: dict[str, str] = field(default_factory=dict)  # other cells that its files tell
    paths: dict[str, Path] = field(default_factory=dict)  # other columns that are files: spots, alignment
    notes: list[str] = field(default_factory=list)


@dataclass
class Content:
    """All that was found in a folder."""

    measurements: list[Found] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)
    spots: list[Path] = field(default_factory=list)  # tables of spots of legacy ST, the likeliest first
    strange: list[Path] = field(default_factory=list)  # named like a slide, and none by their first bytes
    linked: list[Path] = field(default_factory=list)  # links to folders, which are not followed
    unread: list[Path] = field(
        default_factory=list
    )  # no files (broken links, pipes), not readable, or named in no UTF-8


def _lines(path: Path, count: int) -> list[str]:
    """The first lines of a text, gzipped or not; none where it is no text."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as handle:
            lines = [handle.readline(_LINE_BYTES) for _ in range(count)]
        return [line.decode().rstrip("\r\n") for line in lines if line]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return []


def _h5_names(path: Path) -> list[str]:
    """Ids of genes in a 10x matrix or an AnnData file; none where it is neither."""
    places = ("matrix/features/id", "matrix/features/name", "matrix/genes", "var/gene_ids", "var/_index", "var/index")
    try:
        with h5py.File(path, "r") as root:
            index = root["var"].attrs.get("_index") if "var" in root else None
            for place in [*places, f"var/{index}"]:
                if isinstance(root.get(place), h5py.Dataset):
                    return [v.decode() if isinstance(v, bytes) else str(v) for v in root[place][:_NAMES]]
    except (OSError, KeyError, ValueError, TypeError, RuntimeError):  # of h5py, for what is of another form
        pass
    return []


def _matrix_names(path: Path) -> list[str]:
    """Ids of genes in a matrix of Space Ranger, as h5 or as a folder."""
    if path.suffix == ".h5":
        return _h5_names(path)
    tables = sorted(p for p in path.glob("*") if re.fullmatch(r"(.+_)?(features|genes)\.tsv(\.gz)?", p.name))
    return [line.split("\t")[0] for line in _lines(tables[0], _NAMES)] if tables else []


def _species(names: Sequence[str]) -> dict[str, str]:
    species = genes.species_of(names[:_NAMES]) if names else ""
    return {"species": species} if species else {}


def _json(path: Path) -> dict[str, Any]:
    """The names and values in a JSON file; none where there is no file, or another kind of one."""
    try:
        values = files.read_json(path) if path.is_file() else {}
    except ValueError:
        values = {}
    return values if isinstance(values, dict) else {}


def _own_name(folder: Path) -> str:
    """What a measurement's folder is called: its own name, or that above a general one."""
    general = {"outs", "outputs", "output", "binned_outputs", "data", "spatial"}
    while folder.name.lower() in general and folder.parent != folder:
        folder = folder.parent
    return folder.name


def _home(folder: Path) -> Path:
    """The folder whose other content belongs to this measurement too."""
    return folder.parent if folder.name == "outs" else folder


def _first(folder: Path, pattern: str) -> Path | None:
    return next((p for p in sorted(folder.glob(pattern)) if p.is_file()), None)


def _space_ranger(folder: Path, names: set[str]) -> Found | None:
    spatial = [folder / n for n in sorted(names) if n == "spatial" or n.endswith("_spatial")]
    if not any(_POSITIONS.search(p.name) for s in spatial if s.is_dir() for p in s.iterdir()):
        return None
    matrices = sorted(n for n in names if _MATRIX.fullmatch(n))
    if not matrices:
        return None
    return Found(
        _own_name(folder), "visium", folder, _home(folder), cells=_species(_matrix_names(folder / matrices[0]))
    )


def _visium_hd(folder: Path, names: set[str]) -> Found | None:
    binned = folder / "binned_outputs" if "binned_outputs" in names else folder
    squares = sorted(p for p in binned.iterdir() if p.is_dir() and _SQUARE.fullmatch(p.name))
    if not squares:
        return None
    image = _first(folder, "*tissue_image.*") or _first(folder, "microscope_image/*")
    matrices = sorted(p for p in squares[-1].iterdir() if _MATRIX.fullmatch(p.name))
    cells = _species(_matrix_names(matrices[0])) if matrices else {}
    return Found(_own_name(folder), "visium_hd", folder, _home(folder), image, cells)


def _xenium(folder: Path, names: set[str]) -> Found | None:
    if "experiment.xenium" not in names and not any(two <= names for two in _XENIUM_WITHOUT_ITS_FILE):
        return None
    image = _first(folder, "*he_image*.ome.tif")
    cells = _species(_h5_names(folder / "cell_feature_matrix.h5"))
    about = _json(folder / "experiment.xenium")
    if species := _SPECIES.get(str(about.get("panel_organism", "")).lower()):
        cells["species"] = species
    found = Found(_own_name(folder), "xenium", folder, _home(folder), image, cells)
    if not names & {"cells.parquet", "cells.csv.gz", "cells.csv"}:
        found.notes.append("has no table of cells; add the column unit, with square8um or so, to pool its transcripts")
    alignment = _first(folder, "*alignment.csv") or _first(folder, "*keypoints*.csv")
    if alignment:
        found.paths["alignment"] = alignment
    elif image:
        found.notes.append("no file tells where its cells lie on the image; give its matrix in the column alignment")
    return found


def _cosmx(folder: Path, names: set[str]) -> Found | None:
    tables = [m for n in sorted(names) if (m := _COSMX.fullmatch(n))]
    if not tables or not any("metadata_file" in n for n in names):
        return None
    header = _lines(folder / tables[0][0], 1)
    cells = _species(header[0].replace('"', "").split(",")[2:]) if header else {}
    found = Found(tables[0]["id"] or _own_name(folder), "cosmx", folder, folder, cells=cells)
    try:
        frame = cosmx.frame(Source("cosmx", folder))
        if frame:
            cells["space_um"] = f"{frame.space_um:g}"
    except (OSError, EOFError, zlib.error, ValueError):
        found.notes.append(
            "its files do not tell the size of a pixel; give um per pixel in the column space_um (0.12028 on "
            "commercial instruments, 0.18 on the first prototypes)"
        )
    found.notes.append("CosMx brings no H&E; give image and alignment, or leave both blank for expression alone")
    return found


def _hest(folder: Path, names: set[str]) -> Iterator[Found]:
    """The samples of a HEST root, with what their metadata tell."""
    for path in sorted((folder / "st").glob("*.h5ad")):
        about = folder / "metadata" / f"{path.stem}.json"
        image = folder / "wsis" / f"{path.stem}.tif"
        found = Found(path.stem, "", path, folder / "st" / path.stem, image if image.is_file() else None)
        found.cells = {"format": "hest"}
        text = {key: str(value).strip() for key, value in _json(about).items() if value is not None}
        found.platform = _HEST_PLATFORMS.get(text.get("st_technology", "").lower(), "")
        told = {
            "donor": text.get("patient", ""), "study": text.get("dataset_title", ""), "organ": text.get("organ", ""),
            "species": _SPECIES.get(text.get("species", "").lower(), ""), "license": text.get("license", ""),
            "mpp": text.get("pixel_size_um_estimated", ""),
        }  # fmt: skip
        found.cells |= {column: " ".join(value.split()) for column, value in told.items() if value}
        yield found


def _h5ad(path: Path) -> Found:
    found = Found(path.stem, "", path, path.parent / path.stem, cells={"format": "h5ad", **_species(_h5_names(path))})
    found.notes.append(f"write what measured it in the column platform: {', '.join(VENDORS)}")
    return found


def _cells(line: str, path: Path) -> list[str]:
    try:
        return next(csv.reader([line], delimiter="," if ".csv" in path.suffixes else "\t"), [])
    except csv.Error:  # a cell of more than 128 KiB
        return []


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _st_table(path: Path) -> tuple[str, list[str]]:
    """('counts', genes) of a table XxY by genes, ('transposed', []), ('spots', columns), or ('', [])."""
    lines = [_cells(line, path) for line in _lines(path, 2)]
    if len(lines) < 2 or min(map(len, lines)) < 2:
        return "", []
    header, row = lines
    if set(header) >= _SPOT_COLUMNS:
        return "spots", header
    if len(row) <= _FEW_COLUMNS or not all(_is_number(cell) for cell in row[1:50]):
        return "", []
    if _PLACE.fullmatch(row[0]):
        return "counts", header[len(header) - len(row) + 1 :]
    return ("transposed", []) if all(_PLACE.fullmatch(cell) for cell in header[1:]) else ("", [])


def is_named_as_slide(path: Path) -> bool:
    """Whether a file's name is one that a slide may have."""
    return path.suffix.lower() in _IMAGES and not _NO_SLIDE.search(path.name.split(".")[0] + ".")


def is_image(path: Path) -> bool:
    """Whether a file's first bytes, or for MIRAX its folder, are those of an image."""
    if path.suffix.lower() == ".mrxs":
        return (path.with_suffix("") / "Slidedat.ini").is_file()
    with path.open("rb") as handle:
        return handle.read(4).startswith(tuple(magic[:4] for magic in _MAGIC))


def _claimed(folder: Path, names: set[str]) -> list[Found]:
    """The measurements of which this very folder is the root."""
    if {"st", "wsis"} <= names:
        return list(_hest(folder, names))
    if folder.suffix == ".zarr" and {"table", "tables"} & names:
        return [Found(folder.stem, "", folder, folder, cells={"format": "spatialdata"})]
    for detect in (_visium_hd, _xenium, _space_ranger, _cosmx):
        if found := detect(folder, names):
            return [found]
    return []


def _file(path: Path, content: Content) -> None:
    """Add what a single file is, if it is anything."""
    if path.suffix == ".h5ad":
        content.measurements.append(_h5ad(path))
    elif is_named_as_slide(path):
        (content.images if is_image(path) else content.strange).append(path)
    elif match := _TABLE.fullmatch(path.name):
        kind, columns = _st_table(path)
        if kind == "spots":
            # A table that says which spots were selected is the spot file itself, others repeat its columns.
            content.spots.insert(0 if "selected" in columns else len(content.spots), path)
        elif kind:
            own = match["id"].lower() not in _GENERAL_TABLES  # else the folder is what tells it from others
            name, home = (match["id"], path.parent / match["id"]) if own else (path.parent.name, path.parent)
            content.measurements.append(Found(name, "st", path, home, cells=_species(columns)))


def _readable(folder: Path, names: list[str], content: Content) -> list[str]:
    """Those of a folder's names that are not hidden and can be read: a pipe would be waited for, and one broken link
    must not stop the rest."""
    kept = []
    for name in sorted(name for name in names if not name.startswith(".")):
        path = folder / name
        usable = name.isprintable() and (path.is_file() or path.is_dir()) and os.access(path, os.R_OK)
        if usable:
            kept.append(name)
        else:
            content.unread.append(path)
    return kept


def look(root: Path) -> Content:
    """All measurements and images below a folder, in the order of their paths; links to folders are not followed.

    Raises:
        ValueError: no such folder.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: is no folder; give the one that holds the data")
    content = Content()
    for place, folders, names in os.walk(root):
        folder = Path(place)
        folders[:], names = _readable(folder, folders, content), _readable(folder, names, content)
        content.linked += [folder / f for f in folders if (folder / f).is_symlink()]
        found = _claimed(folder, {*folders, *names})
        content.measurements += found
        if found:
            folders[:] = [f for f in folders if not _VENDORS_OWN.fullmatch(f)]
        if found and "format" in found[0].cells:  # a HEST root or a SpatialData zarr is told whole by its own lists
            folders.clear()
            continue
        own = {found[0].image} if found else set()
        for name in names:
            path = folder / name
            if path not in own and (not found or is_named_as_slide(path)):
                _file(path, content)
    return content
