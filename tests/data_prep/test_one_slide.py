"""one_slide: a measurement on an image that shows no tissue under it is told."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from storm.store import SlideStore, store_path
from tests.data_prep.vendors import write_tiff


def test_profiles_on_bare_glass_are_a_warning(corpus: Path, built: Callable[..., tuple[int, Path]]) -> None:
    def notes(name: str) -> list[str]:
        code, folder = built(name=name)
        assert code == 0
        found = SlideStore(store_path(folder, "v")).info.facts["notes"]
        return [note for note in found if "the image shows no tissue" in note]

    assert notes("right") == []
    write_tiff(corpus / "images" / "v.tif", np.full((950, 1000, 3), 245, np.uint8))
    assert notes("wrong") == [
        "WARNING: 100% of the profiles lie where the image shows no tissue; is it the image that was measured, and are "
        "they aligned?"
    ]
