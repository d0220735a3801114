"""Which slide stores are packed, by their records alone.

In: a folder of stores, perhaps its manifest, perhaps older shard sets that are appended to. Out: the stores with their
sha256, those that are missing, and what the older sets hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep import records, wanted
from data_prep.manifest import ManifestRow
from storm import files, genes, shards, store

_NOT_BUILT = "not built"
_NAMED = 10  # of a long list so many are named
_TOLD = ("split", "donor", "study", "section")  # of a manifest's row, by which a store's slide is given its split


@dataclass(frozen=True)
class Source:
    """One slide store on its way into shards."""

    slide_id: str
    path: Path
    sha256: str


@dataclass(frozen=True)
class Held:
    """What the shard sets hold that a new one is appended to, the newest last."""

    manifests: tuple[str, ...] = ()  # sha256 of each
    slides: dict[str, dict[str, Any]] = field(default_factory=dict)  # slide id -> its entry in the shard manifest
    table: genes.GeneTable | None = None
    reference: dict[str, Any] = field(default_factory=dict)


def named(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _below(lines: Sequence[str]) -> str:
    """The first lines of a list, each on a line of its own, and how many more there are."""
    more = [f"and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else []
    return "".join(f"\n  {line}" for line in [*lines[:_NAMED], *more])


def missing(store_dir: Path, rows: Sequence[ManifestRow]) -> dict[str, str]:
    """slide id -> why it cannot be packed: it failed, its store is gone or cut short, or no one has built it.

    Without rows, the manifests that were built into the folder say which slides there should be.

    Raises:
        ValueError: a list of them is damaged.
    """
    found = {}
    for record in records.every(store_dir):
        if record.state == "failed":
            found[record.slide_id] = f"failed: {record.reason}"
        elif not store.store_path(store_dir, record.slide_id).is_file():
            found[record.slide_id] = "its store is gone"
        elif not records.is_complete(store_dir, record):
            found[record.slide_id] = "its store is damaged: not of the size that was built"
    if rows:
        asked = dict.fromkeys((row.slide_id for row in rows), _NOT_BUILT)
    else:
        lists = wanted.read(store_dir).items()
        asked = {slide_id: f"{_NOT_BUILT}; or not wanted: then delete {name}" for slide_id, name in lists}
    for slide_id, reason in asked.items():
        if slide_id not in found and not store.store_path(store_dir, slide_id).is_file():
            found[slide_id] = reason
    return dict(sorted(found.items()))


def listed(store_dir: Path, left_out: dict[str, str]) -> list[Source]:
    """The stores of a folder by slide id, each with the sha256 of its record; one without a record is read for it.

    Raises:
        ValueError: the folder holds no store.
    """
    found = []
    for path in store.paths(store_dir):
        slide_id = path.name.removesuffix(store.SUFFIX)
        if slide_id not in left_out:
            record = records.read(store_dir, slide_id)
            found.append(Source(slide_id, path, record.sha256 if record else files.sha256_file(path)))
    return found


def told(left_out: dict[str, str]) -> str:
    """Every slide that a set is packed without, with its reason."""
    return "\n".join(
        [f"{len(left_out)} slides are missing and left out:", *(f"  {name}: {why}" for name, why in left_out.items())]
    )


def check_missing(store_dir: Path, left_out: dict[str, str]) -> None:
    """Raises ValueError where a slide is missing, naming slides and reasons."""
    if left_out:
        raise ValueError(
            f"{store_dir}: {len(left_out)} slides are missing; build them (data_prep.plan tells what stops them), or "
            f"pack without them by --allow-missing:{_below([f'{name}: {why}' for name, why in left_out.items()])}"
        )


def check_rows(store_dir: Path, sources: Sequence[Source], rows: Sequence[ManifestRow]) -> None:
    """Raises ValueError where a store says another split, donor, study or section than its row: the store would win."""
    by_id = {row.slide_id: row for row in rows}
    lines = []
    for source in sources:
        row = by_id.get(source.slide_id)
        if row:
            info = store.SlideStore(source.path).info
            pairs = [(name, getattr(info, name) or "(blank)", getattr(row, name) or "(blank)") for name in _TOLD]
            apart = [f"{name} {old}, the manifest {new}" for name, old, new in pairs if old != new]
            if apart:
                lines.append(f"{source.slide_id}: its store says {'; '.join(apart)}")
    if lines:
        raise ValueError(
            f"{store_dir}: {len(lines)} slides were built from another manifest, or before this one was edited; run "
            f"data_prep.build again, then pack:{_below(lines)}"
        )


def held(folders: Sequence[Path]) -> Held:
    """What a chain of shard sets holds.

    Raises:
        ValueError: a set does not open, holds a slide of an earlier one, or has other genes.
    """
    slides: dict[str, dict[str, Any]] = {}
    sets = [shards.ShardSet(folder) for folder in folders]
    for opened in sets:
        twice = sorted(slides.keys() & opened.manifest["slides"].keys())
        if twice:
            raise ValueError(f"{opened.folder}: slide {twice[0]} is in an earlier set of the chain too; name each once")
        if opened.genes.hash != sets[0].genes.hash:
            raise ValueError(f"{opened.folder}: has other genes than {sets[0].folder}; append to sets of one chain")
        slides |= opened.manifest["slides"]
    if not sets:
        return Held()
    manifests = tuple(files.sha256_file(opened.folder / shards.MANIFEST) for opened in sets)
    return Held(manifests, slides, sets[0].genes, sets[0].manifest["reference"])
