"""The benchmark of images: its slides are real ones, its ways read the same tiles, its tables say what was asked."""

from pathlib import Path

import numpy as np
import pytest

from data_prep import benchmark, benchmark_builds, benchmark_packing, slides
from data_prep.slides import segments
from data_prep.slides.reference import ReferenceSlide


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[benchmark.Case]:
    """A slide of JPEG and one of JPEG 2000, 2 x 3 segments each, in place of the large ones."""
    monkeypatch.setattr(benchmark, "_TEXTURE_PX", 512)
    texture = benchmark._texture(512, 0.5)
    cases = []
    for name, encode, codec in (("a", benchmark._jpeg, segments.JPEG), ("b", benchmark._jpeg2000, 33005)):
        encoded = benchmark._segments(texture, encode)
        path = benchmark.write_repeated(tmp_path / f"{name}.svs", 2, 3, encoded, codec, 0.5)
        cases.append(benchmark.Case(name, path, 0.5))
    return [*cases, cases[0]]


def test_its_slides_are_slides_for_openslide(small: list[benchmark.Case]) -> None:
    for case in small:
        slide, reference = slides.open_slide(case.path, 150), ReferenceSlide(case.path)
        assert (slide.facts["reader"], slide.embedded_mpp, slide.width_px0, slide.height_px0) == ("tiff", 0.5, 768, 512)
        found = slide.read(0, 0, 512, 512, 512)
        np.testing.assert_array_equal(found, reference.read(0, 0, 512, 512, 512))
        assert found.std() > 10
        np.testing.assert_array_equal(found[:, :256], slide.read(512, 0, 512, 512, 512)[:, :256])  # over and over


def test_all_ways_count_the_same_tiles(small: list[benchmark.Case]) -> None:
    for way in (benchmark._plain, benchmark._ours, benchmark._limit):
        assert way(small[0])() == 12


def test_the_tables(
    small: list[benchmark.Case], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "synthetic_cases", lambda folder: small)
    words = ["images", "--slide", str(small[1].path), "--repeats", "1", "--sizes", "1"]
    assert benchmark.main(words) == 0
    text = capsys.readouterr().out
    assert "| b.svs, 768 x 512 px, 0.5 read at 0.5 |" in text
    assert "| b.svs, 768 x 512 px, 0.5 read at its own |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| processor time |")]
    assert all(0 < float(cell) < 4 for cell in line.split("|")[2:4])  # ours, and the limit
    (line,) = [line for line in text.splitlines() if line.startswith("| 768 px")]
    assert 0.05 < float(line.split("|")[2]) < 1.5


def test_a_slide_without_a_pixel_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["images", "--slide", str(tmp_path / "absent.svs")]) == 1
    assert "absent.svs: no such image" in capsys.readouterr().err


def test_packing_is_measured_beside_a_copy_and_webdataset(tiny_store: Path) -> None:
    lines = benchmark_packing.table(tiny_store, repeats=1).splitlines()
    assert "| pack | copied | verify stores | verify shards | webdataset |" in lines[0]
    assert all(float(cell) > 0 for cell in lines[2].split("|")[2:-1])


def test_large_sections_are_written_and_built() -> None:
    lines = benchmark_builds.table(share=0.002).splitlines()
    assert lines[0].endswith("| profiles | tiles | M counts | peak MB | s |") and len(lines) == 2 + 5
    assert [int(line.split("|")[2].replace(",", "")) for line in lines[2:5]] == [1024, 576, 600]
    assert all(50 < float(line.split("|")[5].replace(",", "")) < 1500 for line in lines[2:])
