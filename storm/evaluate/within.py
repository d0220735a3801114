"""The second model of protocol 6: trained on the target platform, by other donors than are tested.

In: an export, the shard sets it was trained on, the test sections it will be asked about. Out: the export, where it may
stand beside a transfer. An export names no donor; its shard sets do, and are known to be its own by their hash.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storm.data.corpus import sets_hash
from storm.evaluate.expression import Cohort
from storm.evaluate.sections import Section
from storm.export import Pretrained, load
from storm.shards import ShardSet

TRAIN, VAL = "train", "val"


@dataclass(frozen=True)
class Within:
    """An export and who trained it."""

    pretrained: Pretrained
    source: Path  # names it in errors
    donors: frozenset[tuple[str, str]]  # (study, its name there) of its training and validation sections
    slides: frozenset[str]


def open_within(export: Path, shards: Sequence[Path], symmetries: int = 1) -> Within:
    """Load an export with the donors of its training sections.

    Raises:
        ValueError: the export or a shard set does not open, or they do not belong together.
    """
    pretrained = dataclasses.replace(load(export), symmetries=symmetries)
    manifests = [ShardSet(folder).manifest for folder in shards]
    if sets_hash(shards) != pretrained.data["shards_hash"]:
        raise ValueError(
            f"{export}: was trained on other shards than {', '.join(map(str, shards))}; name its own by "
            "--within-shards, in the order of data.shards: they tell which donors trained it"
        )
    _check_split(export, pretrained, _slides(manifests, (TRAIN,)))
    slides = _slides(manifests, (TRAIN, VAL))  # by its validation a checkpoint may have been chosen
    donors = frozenset((entry["study"], entry["donor"]) for entry in slides.values())
    return Within(pretrained, export, donors, frozenset(slides))


def _slides(manifests: list[dict[str, Any]], splits: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Slide -> its entry, of some splits of several shard sets."""
    found = [(m, m["splits"][split]["slides"]) for m in manifests for split in splits if split in m["splits"]]
    return {name: manifest["slides"][name] for manifest, names in found for name in names}


def _check_split(export: Path, pretrained: Pretrained, slides: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError where the export was trained on another split than `train`."""
    told = {name: entry["slides"] for name, entry in pretrained.data["platforms"].items()}
    found = [entry["platform"] for entry in slides.values()]
    if told != {name: found.count(name) for name in set(found)}:
        raise ValueError(
            f"{export}: says it was trained on {told} slides per platform, which is not split {TRAIN} of its shards; "
            f"train it with data.split={TRAIN}"
        )


def check(within: Within, cohort: Cohort, targets: dict[str, list[Section]]) -> None:
    """Refuse a model that is no yardstick for the test sections [platform -> sections].

    Raises:
        ValueError: it was not trained on a target platform, its training or validation holds a test donor, or it lacks
            shared genes.
    """
    trained = set(within.pretrained.data["platforms"])
    for platform, sections in targets.items():
        if platform not in trained:
            fact = f"was trained on {', '.join(sorted(trained))}, not on the target platform {platform}"
            raise ValueError(f"{within.source}: {fact}; give an export trained on {platform}")
        seen = [s for s in sections if s.donor in within.donors or s.slide_id in within.slides]
        if seen:
            told = f"{len(seen)} of {len(sections)} sections of {platform}"
            fact = f"its training or validation holds the donors of {told}"
            cure = f"train it without these donors (that of slide {seen[0].slide_id}, as one)"
            raise ValueError(f"{within.source}: {fact} that are tested; {cure}")
    panel, index = within.pretrained.panel, within.pretrained.genes.index
    absent = [gene for gene in cohort.gene_ids if gene not in index or not panel[index[gene]]]
    if absent:
        fact = f"its reference panel lacks {len(absent)} of {len(cohort.gene_ids)} shared genes (as {absent[0]})"
        raise ValueError(f"{within.source}: {fact}; train both models on one vocabulary (data_prep.pack --append)")
