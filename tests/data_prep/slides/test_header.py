"""Headers of slides: what an open slide tells, without a pixel decoded or a scratch file written."""

from pathlib import Path

import cv2
import pytest

from data_prep import slides
from tests.data_prep.vendors import tissue, write_tiff


def test_a_header_tells_what_the_open_slide_tells(tmp_path: Path, real_data: Path) -> None:
    write_tiff(tmp_path / "a.tif", tissue(300, 500))
    cv2.imwrite(str(tmp_path / "b.jpg"), tissue(300, 500))
    paths = [tmp_path / "a.tif", tmp_path / "b.jpg", real_data / "wsi/tests/fixtures/svs-images/cmu-1-small-region.svs"]
    for path in paths:
        found, slide = slides.header(path, 150), slides.open_slide(path, 150)
        assert (found.width_px0, found.height_px0) == (slide.width_px0, slide.height_px0)
        assert found.embedded_mpp == slide.embedded_mpp
        slide.close()


def test_nothing_is_decoded_and_no_scratch_file_written(tmp_path: Path) -> None:
    path = tmp_path / "b.jpg"
    cv2.imwrite(str(path), tissue(1200, 1000))
    path.write_bytes(path.read_bytes()[:3000])  # the header is whole, the pixels are not
    assert slides.header(path, 150).width_px0 == 1000
    assert slides.header(path, 1, tmp_path / "scratch").height_px0 == 1200
    assert not (tmp_path / "scratch").exists()
    with pytest.raises(ValueError, match="does not decode"):
        slides.open_slide(path, 150)


def test_what_a_header_refuses(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "b.png"), tissue(1200, 1000))
    (tmp_path / "c.svs").write_bytes(b"no slide")
    with pytest.raises(
        ValueError, match=r"b\.png: 1 megapixels would be decoded at once, max_image_mpx is 1; raise it"
    ):
        slides.header(tmp_path / "b.png", 1)
    with pytest.raises(ValueError, match=r"c\.svs: is no slide and no image that can be read"):
        slides.header(tmp_path / "c.svs", 150)
    with pytest.raises(ValueError, match=r"d\.svs: no such image; correct its path"):
        slides.header(tmp_path / "d.svs", 150)
