"""A stored tile is decoded at the size that was promised; whatever else it claims to be is refused and named."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from storm import results, store
from storm.data.batch import collate
from storm.data.tile import decode_tile
from storm.data.view import plain_view
from storm.evaluate import sections
from tests import untrained
from tests.data import samples

PIXELS = np.random.default_rng(0).integers(60, 250, (32, 32, 3)).astype(np.uint8)
JPEG = simplejpeg.encode_jpeg(PIXELS)


def bomb(side_px: int = 30_000) -> bytes:
    """The tile with a frame header that promises another size: a few hundred bytes that ask for 2.7 GB."""
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + 2 * side_px.to_bytes(2, "big") + JPEG[at + 4 :]


def test_pixels_are_those_of_the_decoder() -> None:
    np.testing.assert_array_equal(decode_tile(JPEG, 32, "tile"), simplejpeg.decode_jpeg(JPEG))
    assert decode_tile(JPEG, 32, "tile", least_px=(7, 7)).shape == (8, 8, 3)


def test_another_size_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(simplejpeg, "decode_jpeg")
    with pytest.raises(ValueError, match=r"^tile 3 is 30000 x 30000 px, not 32; build"):
        decode_tile(bomb(), 32, "tile 3")


@pytest.mark.parametrize("data", [b"", b"no jpeg", JPEG[:200], JPEG[: len(JPEG) // 2]])
def test_damaged_bytes_are_refused_and_named(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^tile 3 is damaged \(.*\); build"):
        decode_tile(data, 32, "tile 3")


def test_every_reader_names_the_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = samples.group(1)
    group.tiles = {**group.tiles, (0, 0, 0): bomb(4000)}
    with pytest.raises(ValueError, match=r"slide s1: tile \(0, 0, 0\) is 4000 x 4000 px"):
        collate([group], [plain_view(group, True)], samples.spec())
    opened = store.SlideStore(untrained.write_store(tmp_path, side=3))
    monkeypatch.setattr(store.SlideStore, "jpeg", lambda self, i: bomb(4000))
    with pytest.raises(ValueError, match=r"slide1\.zarr\.zip: tile \(0, 0\) is 4000 x 4000 px"):
        sections.patches(opened, np.array([[50.0, 50.0]]))
    with pytest.raises(ValueError, match=r"slide1\.zarr\.zip: tile \(0, 0\) is 4000 x 4000 px"):
        results.thumbnail(opened)
