"""What a slide's store is made from, and whether it changed.

In: a manifest row and the config. Out: all files that a build will read, and one hash over the row, the config, the
content of every file and the code. A file whose size and time are those of the last build is not read again.
"""

import dataclasses
from pathlib import Path
from typing import Any

import storm
from data_prep import platforms, slides
from data_prep.manifest import ManifestRow
from data_prep.records import Record
from storm import files, genes, schema
from storm.prep_config import PrepConfig

# What a store depends on; the other keys of PrepConfig are pack's, or only refuse (max_tiles, max_px_per_byte).
_CONFIG_KEYS = (
    "tile_px", "tile_mpp", "jpeg_quality", "min_tissue", "min_mapped", "max_image_mpx", "max_upsampling",
    "max_failed_tiles", "min_depth", "min_genes", "max_control_share", "lattice_residual_px0", "lattice_anisotropy",
    "st_residual_um", "st_anisotropy", "mpp_warn", "mpp_refuse",
)  # fmt: skip


def files_of(row: ManifestRow, config: PrepConfig) -> list[Path]:
    """Every file that the row's store is made from, in a fixed order.

    Raises:
        ValueError: a file is missing.
    """
    found = slides.files_of(row.image) if row.image else []
    if row.source:
        found += platforms.reader(row.reader).inputs(row.source)
    if config.aliases:
        genes.read_aliases(Path(config.aliases))
        found.append(Path(config.aliases))
    found += [path for path in (row.alignment, row.tissue) if path]
    found = list(dict.fromkeys(found))
    for path in found:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; correct the manifest")
    return found


def _hashed(path: Path, known: dict[str, list[Any]]) -> list[Any]:
    """As Record.inputs; the content's hash is that of the last build where size and time are still the same."""
    stat = path.stat()
    name = files.sha256_of(str(path.absolute()).encode())[:16]
    before = known.get(name)
    if before and before[1:3] == [stat.st_size, stat.st_mtime_ns]:
        return before
    return [name, stat.st_size, stat.st_mtime_ns, files.sha256_file(path)]


def fingerprint(row: ManifestRow, config: PrepConfig, last: Record | None = None) -> tuple[str, list[list[Any]]]:
    """A hash of all that a slide's store is made from, and the facts of its files (see Record.inputs).

    Raises:
        ValueError, OSError: a file is missing.
    """
    known = {entry[0]: entry for entry in last.inputs} if last else {}
    found = [_hashed(path, known) for path in files_of(row, config)]
    facts = {
        "row": {k: v for k, v in dataclasses.asdict(row).items() if not isinstance(v, Path)},
        "config": {key: getattr(config, key) for key in _CONFIG_KEYS},
        "files": [[entry[3], entry[1]] for entry in found],
        "code": [storm.__version__, schema.SCHEMA_VERSION, genes.shipped(row.species).hash],
    }
    return files.sha256_of(files.dump_json(facts)), found
