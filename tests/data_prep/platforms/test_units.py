"""The column unit: what each form says, and what is no form."""

from pathlib import Path

import pytest

from data_prep import manifest
from data_prep.platforms.units import Footprint, footprint
from storm.schema import DISC, SQUARE
from tests.data_prep.vendors import write_manifest


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


def test_the_manifest_takes_other_spots_and_pitches(tmp_path: Path) -> None:
    row = {"slide_id": "a", "image": "a.tif", "measurement": "a.tsv", "platform": "st"}
    path = write_manifest(tmp_path / "m.csv", [row | {"unit": "disc150um", "space_um": "110"}])
    source = manifest.read(path)[0].source
    assert source is not None
    assert (source.unit, source.space_um, source.species) == ("disc150um", 110.0, "human")
    write_manifest(path, [row | {"space_um": "2000"}])
    with pytest.raises(ValueError, match=r"column space_um: '2000' is no um per unit.* between 0\.02 and 1000\.0"):
        manifest.read(path)
