"""Where a vendor's files lie: names bare or behind an `<id>_` prefix.

In: a folder and the names that a file may have. Out: the one that is there, or the refusal that says what is missing.
"""

from pathlib import Path

OUTS = "give the outs folder that Space Ranger wrote"


def maybe(folder: Path, names: tuple[str, ...], but: tuple[str, ...] = ()) -> Path | None:
    """The only entry of a folder that is one of `names`, bare or behind an `<id>_` prefix; earlier names win.

    Args:
        but: names that end like one of `names` and are something else.

    Raises:
        ValueError: several fit.
    """
    for name in names:
        if (folder / name).exists():
            return folder / name
        found = [path for path in sorted(folder.glob(f"*_{name}")) if not path.name.endswith(but)]
        if len(found) > 1:
            raise ValueError(f"{folder}: holds {len(found)} files *_{name}; leave one, of this section")
        if found:
            return found[0]
    return None


def one(folder: Path, names: tuple[str, ...], what: str, cure: str = OUTS) -> Path:
    """As `maybe`. Raises ValueError where there is none."""
    found = maybe(folder, names)
    if found is None:
        raise ValueError(f"{folder}: has no {what} ({' or '.join(names)}); {cure}")
    return found
