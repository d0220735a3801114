"""Whether a folder of slide stores is whole: every byte read again, every store beside its record.

In: the folder. Out: per store its faults, each a line with its cure; and what lies there that should not.
"""

import time
import zipfile
import zlib
from pathlib import Path

import numpy as np

from data_prep import records, wanted
from storm import files, schema, store

# What reading a damaged file may raise, whatever library does it.
READ_ERRORS = (ValueError, KeyError, TypeError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
_BLOCK_BYTES = 1 << 20
_AGAIN = "delete it and run data_prep.build"


def check_store(path: Path) -> list[str]:
    """The faults of one store."""
    record = records.read(path.parent, path.name.removesuffix(store.SUFFIX))
    sha256 = files.sha256_file(path)
    try:
        faults = _zip_faults(path)
        faults += [] if faults else _content_faults(path)
    except READ_ERRORS as error:
        faults = [f"does not read ({_one_line(error)}); {_AGAIN}"]
    if record is None:
        faults.append("has no record, its build did not end; run data_prep.build")
    elif record.state == "built" and sha256 != record.sha256:
        faults.append(f"its sha256 is not that of its record; {_AGAIN}")
    return [f"{path.name}: {fault.removeprefix(f'{path}: ')}" for fault in faults]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _zip_faults(path: Path) -> list[str]:
    """Members whose checksum does not hold; the JPEG bytes have checksums of their own, tile by tile."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.startswith("tiles/jpeg/c/"):
                continue
            try:
                with archive.open(entry) as member:
                    while member.read(_BLOCK_BYTES):
                        pass
            except zipfile.BadZipFile:
                return [f"{entry.filename} is damaged (crc32); {_AGAIN}"]
    return []


def _content_faults(path: Path) -> list[str]:
    opened = store.SlideStore(path)
    faults = [fault for i in range(len(opened)) if (fault := _tile_fault(opened, i))][:1]
    places = opened.places()
    n, tiles, genes = len(places), len(opened), len(opened.genes())
    indptr, lengths = opened.indptr, opened.lengths()
    expected = {
        **{f"profiles/{name}": n for name in ("xy_um", "footprint_um", "footprint_kind")},
        **{f"quality/{name}": n for name in schema.PROFILE_QUALITY},
        "profiles/polygon_indptr": n + 1, "profiles/polygon_um": int(places.polygon_indptr[-1]),
        "counts/indptr": n + 1, "counts/gene": int(indptr[-1]), "counts/count": int(indptr[-1]),
        "genes/total": genes, "tiles/offsets": tiles + 1, "tiles/crc32": tiles, "tiles/quality": tiles,
    }  # fmt: skip
    wrong = [
        f"{name} ({lengths.get(name)}, not {size})" for name, size in expected.items() if lengths.get(name) != size
    ]
    if wrong:
        faults.append(f"arrays of other lengths than the rest: {', '.join(wrong[:3])}; {_AGAIN}")
    if int(opened.info.facts.get("profiles", 0)) != n:
        faults.append(f"tells of {opened.info.facts.get('profiles')} profiles and holds {n}; {_AGAIN}")
    if (np.diff(indptr) < 0).any():
        faults.append(f"counts/indptr does not ascend; {_AGAIN}")
    if f"{opened.info.slide_id}{store.SUFFIX}" != path.name:
        faults.append(f"holds slide {opened.info.slide_id}; give it its own name back")
    return faults


def _tile_fault(opened: store.SlideStore, i: int) -> str:
    try:
        opened.jpeg(i)
    except ValueError as error:
        return str(error)
    return ""


def check_folder(folder: Path) -> tuple[list[str], list[str]]:
    """(faults, notes) of a folder besides its stores: records without a store, failures, slides that were never built,
    and what builds left."""
    faults, notes = [], []
    for record in records.every(folder):
        if record.state == "failed":
            faults.append(f"{record.slide_id}: failed to build: {record.reason}")
        elif not store.store_path(folder, record.slide_id).is_file():
            faults.append(f"{record.slide_id}: has a record and no store; run data_prep.build")
    faults += _never_built(folder)
    for left in files.leftovers(folder):
        age = max(0.0, time.time() - left.path.stat().st_mtime) / 3600
        text = f"{left.path.name}: left {age:.1f} hours ago by {left.owner}"
        if left.dead:
            faults.append(f"{text}, which is gone; the next build of the slide removes it, or delete it")
        else:
            notes.append(f"{text}, which may be at work")
    return faults, notes


def _never_built(folder: Path) -> list[str]:
    """Slides of the manifests that were built into a folder, without a store and a record."""
    try:
        asked = wanted.read(folder)
    except ValueError as error:
        return [str(error).removeprefix(f"{folder}/")]
    return [
        f"{slide_id}: not built; run data_prep.build, or, where the slide is not wanted any more, delete {name}"
        for slide_id, name in sorted(asked.items())
        if not store.store_path(folder, slide_id).is_file() and not records.record_path(folder, slide_id).is_file()
    ]
