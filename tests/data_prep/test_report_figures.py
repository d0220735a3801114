"""Figures of the report: bins that all slides share, profiles drawn where they lie, pictures that fit their budget."""

import base64
import io
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_prep import report_figures
from data_prep.report_figures import AXES
from storm import schema, store
from storm.genes import GeneTable

WIDTH, HEIGHT, MPP = 4000, 3000, 0.5


def write_store(folder: Path, xy_um: np.ndarray, footprint_um: float, overview: np.ndarray | None) -> store.SlideStore:
    """A store of profiles whose depth rises from 1 on, with or without a picture."""
    n = len(xy_um)
    info = store.SlideInfo(
        "s", "s", "d", "t", "skin", "human", "xenium", "cell", "", MPP, "matrix", WIDTH, HEIGHT, 224, 0.5,
        np.eye(3).tolist(), "file", None, image=overview is not None, facts={"notes": []},
    )  # fmt: skip
    depth = np.arange(1, n + 1, dtype=np.int32)
    profiles = schema.Profiles(
        [f"c{i}" for i in range(n)], xy_um.astype(np.float64), np.full(n, footprint_um, np.float32),
        np.zeros(n, np.uint8), np.arange(n + 1), np.zeros(n, np.int32), depth,
    )  # fmt: skip
    quality = {name: np.zeros(n, dtype) for name, dtype in schema.PROFILE_QUALITY.items()}
    jpeg = simplejpeg.encode_jpeg(overview, 90, "RGB") if overview is not None else b""
    with store.writing(folder, "s") as writer:
        writer.put_tiles([])
        counts = schema.CountBlock(profiles.indptr, profiles.gene, profiles.count)
        writer.put_counts([counts] if n else [], GeneTable(("ENSG00000141510",), ("TP53",)))
        writer.put_profiles(profiles, quality | {"depth": depth, "genes": np.ones(n)})
        writer.put_overview(jpeg, b"")
        writer.close(info, store.store_path(folder, "s"))
    return store.SlideStore(store.store_path(folder, "s"))


def decoded(uri: str, kind: str) -> bytes:
    head, _, text = uri.partition(",")
    assert head == f"data:image/{kind};base64"
    return base64.b64decode(text)


def test_values_go_to_their_bin_and_what_lies_outside_to_the_last_one() -> None:
    axis = AXES["depth"]  # an eighth of a decade a bin
    counts = axis.counts(np.array([0, 1, 9.99, 10, 1e7, np.nan]))
    assert {i: n for i, n in enumerate(counts.tolist()) if n} == {0: 2, 7: 1, 8: 1, 47: 1}
    assert (axis.label(0), axis.label(8), axis.label(32)) == ("1", "10", "10k")
    assert AXES["tissue"].counts(np.array([0.0, 0.049, 0.05, 1.0])).tolist() == [2, 1, *[0] * 16, 0, 1]


def test_the_shown_bins_hold_nearly_all_values_of_all_slides() -> None:
    one, other = np.zeros(48, np.int64), np.zeros(48, np.int64)
    one[10], other[20], one[40] = 500, 600, 1
    assert report_figures.span([one, other]) == (10, 21)
    assert report_figures.span([np.eye(48, dtype=np.int64)[47]]) == (44, 48)
    assert report_figures.span([np.eye(48, dtype=np.int64)[0]]) == (0, 4)


def test_a_histogram_has_a_bar_per_filled_bin_and_keeps_what_is_cut_off() -> None:
    counts = np.zeros(20, np.int64)
    counts[[0, 5, 6, 19]] = 1, 4, 2, 1
    svg = report_figures.svg("tissue", counts, (4, 8))
    bars = re.findall(r"M([\d.]+) 46v-([\d.]+)", svg)
    assert bars == [("0.0", "10.5"), ("40.0", "42.0"), ("80.0", "21.0"), ("120.0", "10.5")]
    assert 'aria-label="tissue per tile, 8 values"' in svg
    assert ">0.2<" in svg and ">0.4<" in svg


def test_profiles_are_drawn_where_they_lie_in_the_colour_of_their_depth(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    xy_um = rng.uniform(0, 1, (300, 2)) * (WIDTH * MPP, HEIGHT * MPP)
    opened = write_store(tmp_path, xy_um, 1.0, np.full((300, 400, 3), 250, np.uint8))
    depth = opened.quality()["depth"]
    found = report_figures.picture(opened, depth, 10**6)
    assert (found.width, found.height, found.shown) == (400, 300, 300)
    image = Image.open(io.BytesIO(decoded(found.profiles, "png")))
    assert image.info["transparency"] == 0
    colour, (low, high) = report_figures.levels(depth)
    assert found.depths == (low, high) and low < high
    assert (colour.min(), colour.max()) == (1, 15)
    pixels = np.asarray(image)
    at = np.floor(xy_um / (WIDTH * MPP) * 400).astype(int)
    places, last = np.unique(at[::-1], axis=0, return_index=True)  # of profiles in one px the last one shows
    assert (pixels[places[:, 1], places[:, 0]] == colour[::-1][last]).all()
    assert (pixels > 0).sum() == len(places)


def test_large_footprints_are_discs_and_cells_beyond_a_limit_are_thinned(tmp_path: Path) -> None:
    spot = write_store(tmp_path / "a", np.array([[1000.0, 750.0]]), 100.0, np.full((300, 400, 3), 250, np.uint8))
    pixels = np.asarray(Image.open(io.BytesIO(decoded(report_figures.picture(
        spot, np.array([5]), 10**6).profiles, "png"))))  # fmt: skip
    assert (pixels > 0).sum() == pytest.approx(np.pi * 10**2, rel=0.15)
    assert pixels[150, 200] > 0
    many = np.random.default_rng(1).uniform(0, 1500, (50_000, 2))
    cells = write_store(tmp_path / "b", many, 8.0, None)
    found = report_figures.picture(cells, cells.quality()["depth"], 10**6)
    assert found.shown == 20_000
    assert found.small.startswith("data:image/png")  # without an image the profiles are its picture


def test_a_picture_fits_its_budget(tmp_path: Path) -> None:
    """The hardest one: noise that JPEG cannot pack, under as many cells as are drawn; 1,200 of it make 36 MB."""
    rng = np.random.default_rng(2)
    noise = cv2.GaussianBlur(rng.integers(0, 255, (768, 1024, 3), dtype=np.uint8), (0, 0), 1.0)
    opened = write_store(tmp_path, rng.uniform(0, 1500, (30_000, 2)), 8.0, noise)
    depth = rng.permutation(opened.quality()["depth"])
    sizes = []
    for budget in (10**6, 30_000):
        found = report_figures.picture(opened, depth, budget)
        assert len(decoded(found.slide, "jpeg")) + len(decoded(found.profiles, "png")) <= budget
        sizes.append(found.width)
    assert sizes[0] == 560 and sizes[1] < 400


def test_an_image_alone_has_no_profiles_to_draw(tmp_path: Path) -> None:
    opened = write_store(tmp_path, np.zeros((0, 2)), 8.0, np.full((300, 400, 3), 250, np.uint8))
    found = report_figures.picture(opened, opened.quality()["depth"], 10**6)
    assert (found.profiles, found.shown) == ("", 0)
    assert simplejpeg.decode_jpeg_header(decoded(found.small, "jpeg"))[:2] == (54, 72)
    assert report_figures.histograms(opened, opened.quality()) == {}
