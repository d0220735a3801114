"""Imported by the process that test_durability.py forks: one run loads libraries, gene tables and caches."""

import contextlib
import io
import tempfile
from pathlib import Path

import cv2
import numpy as np

from data_prep import build, pack
from tests.data_prep.vendors import tissue, write_manifest, write_tiff, write_visium

TILES = ("tile_px=56", "tile_mpp=1.0", "max_image_mpx=1")


def write_corpus(folder: Path, whole: bool = False) -> Path:
    """The manifest of two small slides, one to train on and one to test on, and of an image that needs scratch."""
    rows: list[dict[str, str]] = []
    for name, split in (("one", "train"), ("two", "test")):
        write_tiff(folder / f"{name}.tif", tissue(450, 600 + len(rows)))
        write_visium(folder / name, side=4)
        rows.append({"slide_id": name, "image": f"{name}.tif", "measurement": name, "platform": "visium",
                     "donor": name, "split": split})  # fmt: skip
    if whole:
        pixels = np.full((1000, 1100, 3), 245, np.uint8)
        pixels[:200, :200] = tissue(200, 400)[:, :200]
        cv2.imwrite(str(folder / "whole.png"), pixels)
        rows.append({"slide_id": "whole", "image": "whole.png", "platform": "image", "donor": "three", "mpp": "1"})
    return write_manifest(folder / "manifest.csv", rows)


# Not the image that needs scratch: libvips has threads, and does not survive a fork.
with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
    manifest = write_corpus(Path(name))
    build.main([str(manifest), "--store", f"{name}/stores", "--workers", "1", *TILES])
    pack.main(["--store", f"{name}/stores", "--out", f"{name}/shards", *TILES])
