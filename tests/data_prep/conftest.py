"""Fixtures of the tests of preparation: a small corpus of our own, and a way to build it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data_prep.vendors import tissue, write_manifest, write_st, write_tiff, write_visium


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with manifest.csv of a Visium slide, an ST slide and an image alone, each of its own donor."""
    folder = tmp_path / "corpus"
    (folder / "images").mkdir(parents=True)
    for name, seed in (("v", 0), ("t", 1), ("i", 0)):  # v and t lie in two splits: they may not be one section
        write_tiff(folder / "images" / f"{name}.tif", tissue(950, 1000, seed))
    write_visium(folder / "v" / "outs")
    write_st(folder / "t")
    rows = [
        {"slide_id": "v", "image": "images/v.tif", "measurement": "v/outs", "platform": "visium", "donor": "d1"},
        {"slide_id": "t", "image": "images/t.tif", "measurement": "t/counts.tsv.gz", "platform": "st", "donor": "d2",
         "spots": "t/spots.tsv", "split": "test"},
        {"slide_id": "i", "image": "images/i.tif", "platform": "image", "donor": "d3"},
    ]  # fmt: skip
    write_manifest(folder / "manifest.csv", rows)
    return folder


@pytest.fixture
def built(corpus: Path, tmp_path: Path) -> Callable[..., tuple[int, Path]]:
    """Runs build on a manifest (by default the corpus') with small tiles; returns (exit code, store folder)."""
    from data_prep import build

    def run(*words: str, manifest: Path = corpus / "manifest.csv", name: str = "stores") -> tuple[int, Path]:
        folder = tmp_path / name
        options = ["--store", str(folder), "--workers", "1", "tile_px=112", "tile_mpp=1.0", *words]
        return build.main([str(manifest), *options]), folder

    return run
