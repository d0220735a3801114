"""one_slide: a measurement on an image that shows no tissue is told; one without counts, or with too many, refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storm.store import SlideStore, store_path
from tests.data_prep.platforms.helpers import edit
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


def test_a_measurement_without_a_single_count_is_refused(
    corpus: Path, built: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(corpus / "v" / "outs" / "filtered_feature_bc_matrix.h5", "data", np.zeros_like)
    code, folder = built()
    assert code == 1
    assert "v: outs: none of its 64 profiles has a count of a gene; restore the counts" in capsys.readouterr().out
    assert not store_path(folder, "v").exists()


def test_counts_whose_sum_no_tissue_has_are_refused(
    corpus: Path, built: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two columns of one gene: the sum would come round to a negative number."""
    path = corpus / "v" / "outs" / "filtered_feature_bc_matrix.h5"
    edit(path, "data", lambda data: np.full_like(data, 2**30))
    for name in ("id", "name"):
        edit(path, f"features/{name}", lambda names: np.where(np.arange(len(names)) < 5, b"TP53", names))
    code, _ = built()
    assert code == 1
    assert "outs: a profile counts " in (told := capsys.readouterr().out)
    assert "of one gene, which none can; restore the counts" in told
