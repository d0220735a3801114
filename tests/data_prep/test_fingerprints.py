"""Fingerprints: copies are found however they were written, neighbours and strangers are not; splits stay apart."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from data_prep import build, fingerprints, tissue
from data_prep.slides import Grid, Pixels, open_slide
from storm import store
from storm.genes import GeneTable
from storm.schema import CountBlock
from storm.store import SlideInfo
from tests.conftest import PREP_TINY
from tests.data_prep.pictures import overview_of, section

GENES = 60


def table(order: npt.NDArray | None = None) -> GeneTable:
    ids = [f"ENSG{i:011d}" for i in (range(GENES) if order is None else order)]
    return GeneTable(tuple(ids), tuple(ids))


def blocks(counts: npt.NDArray, size: int = 100) -> list[CountBlock]:
    """Dense counts [N, G] as consecutive blocks."""
    found = []
    for part in np.split(counts, range(size, len(counts), size)):
        row, gene = np.nonzero(part)
        indptr = np.searchsorted(row, np.arange(len(part) + 1))
        found.append(CountBlock(indptr, gene.astype(np.int32), part[row, gene].astype(np.int32)))
    return found


def sketch(counts: npt.NDArray, genes: GeneTable | None = None, size: int = 100) -> str:
    made = fingerprints.ProfileSketch(genes or table())
    given = blocks(counts, size)
    assert list(made.watch(given)) == given
    return made.text()


def measured(seed: int, profiles: int = 3000) -> npt.NDArray:
    rng = np.random.default_rng(seed)
    return rng.poisson(np.exp(rng.normal(0, 1, GENES)), (profiles, GENES))


def info(name: str, donor: str = "d1", profiles: str = "", image: str = "", section: str = "") -> SlideInfo:
    return SlideInfo(
        slide_id=name, section=section or name, donor=donor, study="s", organ="o", species="human", platform="st",
        kind="spot", split="", mpp=1.0, mpp_source="manifest", width_px0=1, height_px0=1, tile_px=112, tile_mpp=1.0,
        alignment=[], alignment_source="", residual_px0=None,
        facts={"fingerprints": {"image": image, "profiles": profiles}},
    )  # fmt: skip


def signs(pixels: Pixels, mpp: float) -> str:
    seen = overview_of(pixels, mpp)
    return fingerprints.image_signs(seen, tissue.tissue_mask(seen.rgb, seen.px_px0 * mpp, seen.glass))


def alike(a: str, b: str) -> float:
    """What `duplicates` would tell of two pictures."""
    found = fingerprints.duplicates([info("a", image=a), info("b", image=b)])
    return found[0].image if found else 0.0


def jpeg(pixels: Pixels, quality: int) -> Pixels:
    return np.asarray(cv2.imdecode(cv2.imencode(".jpg", pixels[..., ::-1], [1, quality])[1], 1))[..., ::-1]


COPIES = {
    "JPEG at quality 70": lambda p: (jpeg(p, 70), 2.0),
    "half the resolution": lambda p: (cv2.resize(p, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), 4.0),
    "another pyramid": lambda p: (cv2.resize(p, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA), 2.0 / 0.7),
    "turned": lambda p: (np.rot90(p).copy(), 2.0),
    "turned twice and flipped": lambda p: (np.rot90(p, 2)[:, ::-1].copy(), 2.0),
    "flipped": lambda p: (p[:, ::-1].copy(), 2.0),
    "on a larger glass": lambda p: (np.pad(p, ((200, 50), (30, 400), (0, 0)), mode="edge"), 2.0),
    "by another scanner": lambda p: ((p * np.array([0.95, 0.9, 0.97])).astype(np.uint8), 2.0),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_of_a_picture_are_found(copy: str) -> None:
    _, pixels = section(3)
    assert alike(signs(pixels, 2.0), signs(*COPIES[copy](pixels))) > 0.85


def test_other_sections_are_not_taken_for_copies() -> None:
    found = fingerprints.duplicates([info(f"s{seed}", image=signs(section(seed)[1], 2.0)) for seed in range(5)])
    assert found == []


def test_real_neighbours_differ_and_their_copies_do_not(real_data: Path, tmp_path: Path) -> None:
    """her2st C2, C3, C4 are neighbouring sections of one donor; C4 once more, in JPEG tiles of quality 70."""
    paths = sorted((real_data / "her2st/data/ST-imgs/C").glob("*/*.jpg"))
    pictures = [np.asarray(cv2.imread(str(path), cv2.IMREAD_REDUCED_COLOR_4))[..., ::-1] for path in paths]
    made = [info(path.parent.name, image=signs(picture, 2.76)) for path, picture in zip(paths, pictures, strict=True)]
    larger = np.ascontiguousarray(np.asarray(cv2.imread(str(paths[2]), cv2.IMREAD_REDUCED_COLOR_2))[..., ::-1])
    tifffile.imwrite(tmp_path / "copy.tif", larger, tile=(256, 256), photometric="rgb", compression="jpeg",
                     compressionargs={"level": 70}, metadata=None)  # fmt: skip
    slide = open_slide(tmp_path / "copy.tif", 150)
    seen = tissue.read_overview(slide, Grid.over(slide, 112 / 1.38))
    mask = tissue.tissue_mask(seen.rgb, seen.px_px0 * 1.38, seen.glass)
    (pair,) = fingerprints.duplicates([*made, info("copy", image=fingerprints.image_signs(seen, mask))])
    assert (pair.first.slide_id, pair.second.slide_id) == ("C4", "copy")
    assert pair.image > 0.9


def test_a_slide_without_tissue_has_no_picture_to_compare() -> None:
    empty = np.full((400, 400, 3), 240, np.uint8)
    assert (signs(empty, 2.0), alike(signs(empty, 2.0), signs(empty, 2.0))) == ("", 0.0)
    assert fingerprints.of_slide(None, None, None) == {"image": "", "profiles": ""}


def share(a: npt.NDArray, b: npt.NDArray) -> float:
    found = fingerprints.duplicates([info("a", profiles=sketch(a)), info("b", profiles=sketch(b))])
    return found[0].profiles if found else 0.0


def test_the_share_of_profiles_that_two_slides_have_is_estimated() -> None:
    whole, rng = measured(0), np.random.default_rng(9)
    kept = whole[rng.permutation(3000)[:2400]]  # 80 %, in another order
    half = np.concatenate([whole[:1200], measured(1, 1200)])
    assert share(whole, whole) == 1.0
    assert share(whole, kept) == 1.0  # all of the smaller slide's profiles
    assert share(whole, half) == pytest.approx(0.5, abs=0.08)
    assert share(whole, np.concatenate([whole[:450], measured(2, 2550)])) == pytest.approx(0.15, abs=0.06)
    assert share(whole, measured(3)) == 0.0
    assert share(whole[:200], whole[100:300]) == pytest.approx(0.5)  # sketches that are not full are exact
    assert share(whole[:10], whole[:10]) == 0.0  # too few to judge by


def test_a_sketch_depends_on_profiles_by_gene_and_count_alone() -> None:
    counts, rng = measured(0, 300), np.random.default_rng(4)
    genes, rows = rng.permutation(GENES), rng.permutation(300)
    assert sketch(counts) == sketch(counts[rows], size=37) == sketch(counts[:, genes], table(genes))
    assert sketch(counts) != sketch(counts, table(genes))
    moved = counts.copy()
    moved[:, [0, 1]] = counts[:, [1, 0]]
    assert sketch(moved) != sketch(counts)


def test_profiles_of_few_genes_are_not_compared() -> None:
    poor = np.zeros((500, GENES), int)
    poor[:, :7] = 1
    assert (sketch(poor), share(poor, poor)) == ("", 0.0)


def test_pairs_tell_what_is_grave() -> None:
    one, other = sketch(measured(0, 100)), sketch(measured(1, 100))
    slides = [info("a", "d1", one, section="x"), info("b", "d1", one, section="x"), info("c", "d2", one),
              info("d", "d3", other), info("e", "d1", other)]  # fmt: skip
    found = fingerprints.notes(slides)
    assert [note["slides"] for note in found] == [["a", "c"], ["b", "c"], ["d", "e"]]  # a and b: said by the manifest
    assert all(note["grave"] for note in found)
    assert found[0]["text"] == "a and c share about 100% of the profiles, of different donors by the manifest"
    json.dumps(found, allow_nan=False)
    assert [note["grave"] for note in fingerprints.notes([info("a", "d1", one), info("b", "d1", one)])] == [False]


def test_duplicates_across_splits_are_faults() -> None:
    one = sketch(measured(0, 100))
    slides = [info("a", "d1", one), info("b", "d2", one), info("c", "d3", one), info("left_out", "d4", one)]
    split_of = {"a": "train", "b": "test", "c": "test"}
    faults = fingerprints.across_splits(slides, split_of)
    assert len(faults) == 2
    assert faults[0] == (
        "a and b share about 100% of the profiles, of different donors by the manifest, but a is in train and b "
        "in test; leave one out, or give both one donor and one split"
    )
    assert fingerprints.across_splits(slides, dict.fromkeys("abc", "train")) == []


def test_stores_without_fingerprints_are_compared_with_none() -> None:
    slides = [info("a"), info("b")]
    slides[0].facts.clear()
    assert fingerprints.duplicates(slides) == []


def stores(manifest: Path, folder: Path) -> dict[str, Any]:
    assert build.main([str(manifest), "--store", str(folder), "--config", str(PREP_TINY), "--workers", "1"]) == 0
    return {found.slide_id: found for found in (store.SlideStore(path).info for path in store.paths(folder))}


def test_sections_of_a_corpus_and_a_copy_under_another_name(
    synthetic_tiny: Path, tiny_store: Path, tmp_path: Path
) -> None:
    """A section once more, its image as PNG, said to be of another donor."""
    known = [store.SlideStore(path).info for path in store.paths(tiny_store)]
    assert fingerprints.duplicates(known) == []
    lines = (synthetic_tiny / "manifest.csv").read_text().splitlines()
    header, row = lines[0].split(","), next(line.split(",") for line in lines[1:] if "visium" in line)
    cells = dict(zip(header, row, strict=True))
    slide_id = cells["slide_id"]
    pixels = tifffile.imread(synthetic_tiny / cells["image"], key=0)
    cv2.imwrite(str(tmp_path / "copy.png"), pixels[..., ::-1])
    cells |= {"slide_id": "copy", "donor": "another", "section": "copy", "image": str(tmp_path / "copy.png"),
              "measurement": str(synthetic_tiny / cells["measurement"])}  # fmt: skip
    manifest = tmp_path / "m.csv"
    manifest.write_text(",".join(header) + "\n" + ",".join(cells[name] for name in header) + "\n")
    again = stores(manifest, tmp_path / "stores")
    (pair,) = fingerprints.duplicates([*known, again["copy"]])
    assert {pair.first.slide_id, pair.second.slide_id} == {slide_id, "copy"}
    assert (pair.image > 0.95, pair.profiles, pair.one_donor) == (True, 1.0, False)
    split_of = {found.slide_id: "train" for found in known} | {"copy": "test"}
    assert len(fingerprints.across_splits([*known, again["copy"]], split_of)) == 1
