"""The column unit: what each form says, and what is no form."""

import pytest

from data_prep.platforms.units import Footprint, footprint
from storm.schema import DISC, SQUARE


@pytest.mark.parametrize(
    ("unit", "platform", "expected"),
    [
        ("", "visium", Footprint("spot", DISC, 55.0)),
        ("", "st", Footprint("spot", DISC, 100.0)),
        ("", "xenium", None),
        ("cell", "visium", None),
        ("disc150um", "st", Footprint("spot", DISC, 150.0)),
        ("square8um", "visium_hd", Footprint("bin", SQUARE, 8.0)),
    ],
)
def test_units(unit: str, platform: str, expected: Footprint | None) -> None:
    assert footprint(unit, platform) == expected


@pytest.mark.parametrize("unit", ["square0um", "disc", "8um", "square1000um"])
def test_units_with_faults(unit: str) -> None:
    with pytest.raises(ValueError, match=rf"unit '{unit}' is none of cell, square<N>um, disc<N>um"):
        footprint(unit, "st")
