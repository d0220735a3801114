"""The manifest's column `unit`: what a profile covers.

In: `cell`, `square<N>um`, `disc<N>um` or blank. Out: kind, shape and size of the footprint.
"""

import re
from dataclasses import dataclass

from storm.schema import DISC, SQUARE

USUAL_DISC_UM = {"visium": 55.0, "st": 100.0}  # what a spot of these platforms covers unless told otherwise
_SHAPE = re.compile(r"(square|disc)(\d{1,3})um")


@dataclass(frozen=True)
class Footprint:
    """One footprint for all profiles of a measurement."""

    kind: str  # of schema.KINDS
    shape: int  # schema.DISC or SQUARE
    size_um: float  # diameter or side


def footprint(unit: str, platform: str) -> Footprint | None:
    """What `unit` says, or blank the platform's usual spot; None for cells, or where nothing is told.

    Raises:
        ValueError: `unit` is none of the forms, or has no size.
    """
    if unit == "cell":
        return None
    if not unit:
        usual = USUAL_DISC_UM.get(platform)
        return Footprint("spot", DISC, usual) if usual else None
    match = _SHAPE.fullmatch(unit)
    if not match or not int(match[2]):
        raise ValueError(f"unit {unit!r} is none of cell, square<N>um, disc<N>um; correct it")
    if match[1] == "disc":
        return Footprint("spot", DISC, float(match[2]))
    return Footprint("bin", SQUARE, float(match[2]))
