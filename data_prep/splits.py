"""Which slide belongs to which split.

In: the facts of all slides, where the manifest may have named a split. Out: a split for each. What belongs together
(the slides of a donor, and donors that share a section; with split_by=section the rows of a section) is never parted.
"""

import hashlib
from collections.abc import Sequence

from storm.prep_config import PrepConfig
from storm.store import SlideInfo


def _unit_names(info: SlideInfo, split_by: str) -> list[str]:
    """What ties a slide to others: study and donor, and study and section."""
    section = f"section/{info.study}/{info.section}"
    return [section] if split_by == "section" else [f"donor/{info.study}/{info.donor}", section]


def units(infos: Sequence[SlideInfo], split_by: str) -> list[list[SlideInfo]]:
    """The slides put together into parts that must not be divided, in the order of their first slide."""
    first: dict[str, int] = {}  # what ties -> the first slide that is tied by it
    root = list(range(len(infos)))  # of each slide, an earlier one of its part, or itself

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for i, info in enumerate(infos):
        for name in _unit_names(info, split_by):
            one, other = find(i), find(first.setdefault(name, i))
            root[max(one, other)] = min(one, other)
    parts: dict[int, list[SlideInfo]] = {}
    for i, info in enumerate(infos):
        parts.setdefault(find(i), []).append(info)
    return list(parts.values())


def _told(unit: list[SlideInfo], split_by: str) -> str:
    """The split that the manifest gives a unit, '' where it gives none.

    Raises:
        ValueError: it gives two.
    """
    told = {info.split: info for info in unit if info.split}
    if len(told) > 1:
        first, second = list(told.values())[:2]
        name = f"donor {first.donor!r}" if split_by == "donor" else f"section {first.section!r}"
        cure = ", or ask for split_by=section" if split_by == "donor" else ""
        raise ValueError(
            f"{name} of study {first.study!r} is in two splits: slide {first.slide_id} in {first.split}, "
            f"slide {second.slide_id} in {second.split}; give them one split in the manifest and build again{cure}"
        )
    return next(iter(told), "")


def _order(unit: list[SlideInfo], seed: int, split_by: str) -> str:
    """A number in (0, 1) as text that depends on the unit and the seed alone, not on which others there are."""
    name = min(name for info in unit for name in _unit_names(info, split_by))
    return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()


def assign(infos: Sequence[SlideInfo], config: PrepConfig) -> dict[str, str]:
    """slide_id -> train, val or test: as told by the manifest, the others by `val_share` and `test_share` of units.

    Raises:
        ValueError: the manifest divides a donor (or, with split_by=section, a section).
    """
    splits: dict[str, str] = {}
    blank = []
    for unit in units(infos, config.split_by):
        told = _told(unit, config.split_by)
        splits |= {info.slide_id: told for info in unit}
        if not told:
            blank.append(unit)
    blank.sort(key=lambda unit: _order(unit, config.seed, config.split_by))
    test, val = (max(1, round(s * len(blank))) if s and blank else 0 for s in (config.test_share, config.val_share))
    for i, unit in enumerate(blank):
        split = "test" if i < test else "val" if i < test + val else "train"
        splits |= {info.slide_id: split for info in unit}
    return splits


def empty_lines(infos: Sequence[SlideInfo], config: PrepConfig) -> list[str]:
    """A line for each split that would hold no slide, for a set without one measures nothing or learns nothing."""
    filled, unit = set(assign(infos, config).values()), config.split_by
    lines = []
    for split, lack in (("train", "nothing can be trained"), ("test", "nothing can be evaluated")):
        given, cure = "too few are free", f"leave the column blank for more {unit}s"
        if split == "test" and not config.test_share:
            given, cure = "no row names it, and test_share is 0", f"leave it blank for some {unit}s and set test_share"
        elif all(info.split for info in infos):
            given = "every row that counts names another split"
        if split not in filled:
            lines.append(
                f"warning: no {split} split: none of the {len(infos)} slides would be in it ({given}), so {lack}; give "
                f"rows of some {unit}s the split {split}, or {cure}"
            )
    return lines
