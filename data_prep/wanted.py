"""Which slides a store folder should hold: `<hash of the manifest's path>.manifest.json`, written before any build.

In: a manifest's path and its slide ids. Out: a small file per manifest, so that a slide whose build died before it left
a record is missing to pack and verify too. Every task of an array writes the same file; an edited manifest replaces its
own, and two manifests do not meet.
"""

from collections.abc import Iterable
from pathlib import Path

from storm import files

SUFFIX = ".manifest.json"


def write(folder: Path, manifest: Path, slide_ids: Iterable[str]) -> None:
    """Write down what a manifest asks for, complete or not at all. Nothing of the path can be read from the file."""
    name = files.sha256_of(str(manifest.resolve()).encode())[:12]
    files.write_json(folder / f"{name}{SUFFIX}", {"slides": sorted(slide_ids)})


def read(folder: Path) -> dict[str, str]:
    """slide id -> name of a file that asks for it, over all manifests that were built into a folder.

    Raises:
        ValueError: a file is damaged.
    """
    found = dict[str, str]()
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        told = files.read_json(path)
        names = told.get("slides") if isinstance(told, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}: is no list of slides; delete it and run data_prep.build")
        found |= {name: path.name for name in names if name not in found}
    return found
