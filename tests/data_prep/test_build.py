"""build: stores that are right, reproducible, current and free of traces; faults are listed while the rest goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
import tifffile

from data_prep import manifest, one_slide, pack, platforms, profiles, records, wanted
from storm import files, store
from storm.prep_config import PrepConfig
from tests.data_prep.slides.images import damage, write_tiles
from tests.data_prep.vendors import (
    MPP,
    SYMBOLS,
    tissue,
    write_manifest,
    write_st,
    write_tiff,
    write_visium,
)

Built = Callable[..., tuple[int, Path]]


def opened(folder: Path, slide_id: str) -> store.SlideStore:
    return store.SlideStore(folder / f"{slide_id}{store.SUFFIX}")


def test_stores_of_a_corpus(built: Built, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, folder = built()
    assert code == 0
    assert [p.name for p in store.paths(folder)] == ["i.zarr.zip", "t.zarr.zip", "v.zarr.zip"]
    # A store and a record each, what the manifest asks for, and nothing else.
    assert len(list(folder.iterdir())) == 2 * 3 + 1
    assert set(wanted.read(folder)) == {"i", "t", "v"}
    assert "3 built, 0 current, 0 failed" in capsys.readouterr().out
    visium = opened(folder, "v")
    measured = platforms.reader("visium").read(platforms.Source("visium", corpus / "v" / "outs"))
    (block,) = measured.counts(np.arange(len(measured.ids)))
    profiles, genes = visium.profiles(), visium.genes()
    assert profiles.ids == measured.ids
    np.testing.assert_allclose(profiles.xy_um, measured.xy * visium.info.mpp)
    assert sorted(genes.symbols) == sorted(SYMBOLS)
    for name in SYMBOLS:  # each gene's counts, summed over the slide, went to that gene
        total = block.count[block.gene == measured.names.index(name)].sum()
        assert profiles.count[profiles.gene == genes.symbols.index(name)].sum() == total
    assert visium.info.mpp == pytest.approx(MPP, rel=1e-4)
    assert (visium.info.mpp_source, opened(folder, "i").info.mpp_source) == ("lattice", "embedded")
    image = opened(folder, "i")
    assert (image.info.platform, len(image.profiles()), len(image.genes())) == ("unknown", 0, 0)
    assert (opened(folder, "t").info.split, opened(folder, "t").info.section) == ("test", "t")


def test_tiles_are_the_slides_pixels(built: Built, corpus: Path) -> None:
    _, folder = built("jpeg_quality=100")
    image = opened(folder, "i")
    picture = tissue(950, 1000)
    row, col = 2, 1
    found = simplejpeg.decode_jpeg(image.jpeg(image.tile_index[row, col]))
    truth = picture[row * 112 : row * 112 + 112, col * 112 : col * 112 + 112]
    assert np.abs(found.astype(int) - truth).mean() < 3
    # Tissue fills the left half; of an image alone nothing else is kept.
    assert {c for _, c in image.tile_index} == {0, 1, 2, 3, 4}
    assert len(image) == 9 * 5
    order = [one_slide._block_order((r, c)) for r, c in image.place.tolist()]
    assert order == sorted(order)


def test_every_tile_that_a_profile_reads_is_kept(built: Built) -> None:
    _, folder = built("min_tissue=1")
    found = opened(folder, "t")
    tile_um = found.info.tile_um
    for x, y in found.profiles().xy_um:
        assert (int(y // tile_um), int(x // tile_um)) in found.tile_index


def test_two_builds_are_byte_identical(built: Built, corpus: Path) -> None:
    _, one = built()
    _, other = built("--workers", "2", name="again")
    for path in store.paths(one):
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_a_rerun_builds_only_what_changed(built: Built, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def states(*words: str) -> dict[str, str]:
        capsys.readouterr()
        built(*words)
        lines = [line.split(": ") for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
        return {line[0]: line[1] for line in lines if line[0] in {"v", "t", "i"}}

    assert set(states().values()) == {"built"}
    assert set(states().values()) == {"current"}
    assert set(states("max_profiles=9", "seed=3").values()) == {"current"}  # pack's keys
    assert set(states("jpeg_quality=80").values()) == {"built"}
    assert set(states("jpeg_quality=80").values()) == {"current"}
    write_tiff(corpus / "images" / "i.tif", tissue(950, 1000)[::-1].copy())
    assert states("jpeg_quality=80") == {"v": "current", "t": "current", "i": "built"}
    path = corpus / "manifest.csv"
    path.write_text(path.read_text().replace("d2", "d9"))
    assert states("jpeg_quality=80") == {"v": "current", "t": "built", "i": "current"}


def test_stores_of_other_tiles_are_replaced_and_told(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    built()
    assert "replaced" not in capsys.readouterr().out
    _, folder = built("tile_px=224")
    out = capsys.readouterr().out
    assert out.startswith("note: 3 stores have other tiles than 224 px at 1.0 um/px and are replaced as they are built")
    assert all(f"{name}: built (replaced, was 112 px at 1.0 um/px): " in out for name in "vti")
    assert opened(folder, "v").info.tile_px == 224


def test_a_damaged_store_is_built_again(built: Built) -> None:
    _, folder = built()
    path = folder / "v.zarr.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert built()[0] == 0
    assert path.read_bytes() == whole


def test_faults_are_listed_and_the_rest_goes_on(built: Built, corpus: Path, tmp_path: Path) -> None:
    (corpus / "images" / "broken.svs").write_bytes(b"no slide")
    write_tiff(corpus / "images" / "no_mpp.tif", tissue(300, 300), mpp=None)
    write_visium(corpus / "stranger" / "outs", suffix="-7")
    write_visium(corpus / "odd" / "outs", genes=["AAA1X", "BBB2X", "CCC3X", "TP53", "EGFR"])
    rows = [
        {"slide_id": "good", "image": "images/i.tif", "platform": "image"},
        {"slide_id": "broken", "image": "images/broken.svs", "platform": "image"},
        {"slide_id": "absent", "image": "images/absent.svs", "platform": "image"},
        {"slide_id": "no_mpp", "image": "images/no_mpp.tif", "platform": "image"},
        {"slide_id": "stranger", "image": "images/v.tif", "measurement": "stranger/outs", "platform": "visium"},
        {"slide_id": "odd", "image": "images/v.tif", "measurement": "odd/outs", "platform": "visium"},
        {"slide_id": "small", "image": "images/no_mpp.tif", "measurement": "v/outs", "platform": "visium"},
        {"slide_id": "coarse", "image": "images/i.tif", "platform": "image", "mpp": "2.5"},
        {"slide_id": "bomb", "image": "bomb.png", "platform": "image", "mpp": "1"},
    ]
    write_visium(corpus / "broken_name" / "outs", genes=["TP53\n", "EGFR", "ERBB2", "MKI67", "CD3E"])
    write_visium(corpus / "control" / "outs", genes=["BLANK-1", "BLANK-2", "NegPrb1", "NegPrb2", "NegPrb3"])
    for name in ("broken_name", "control"):
        rows.append({"slide_id": name, "image": "images/v.tif", "measurement": f"{name}/outs", "platform": "visium"})
    rows.append({"slide_id": "huge", "image": "images/huge.tif", "platform": "image"})
    with tifffile.TiffFile(write_tiff(corpus / "images" / "huge.tif", tissue(300, 300), levels=1), mode="r+") as huge:
        for name, side in {
            "ImageWidth": 10**6,
            "ImageLength": 10**6,
            "TileWidth": 200_000,
            "TileLength": 200_000,
        }.items():
            huge.pages.first.tags[name].overwrite(side, dtype="I")
    cv2.imwrite(str(corpus / "bomb.png"), np.zeros((2000, 1000, 3), np.uint8))
    path = write_manifest(corpus / "faults.csv", rows)
    code, folder = built("max_image_mpx=1", manifest=path)
    assert code == 1
    reasons = records.failures(folder)
    assert [p.name for p in store.paths(folder)] == ["good.zarr.zip"]
    expected = {
        "broken": "broken.svs: is no slide",
        "absent": "absent.svs: no such file; correct the manifest",
        "no_mpp": "no_mpp.tif: the pixel size (mpp) is unknown; give um per pixel in the column mpp",
        "stranger": "64 of 64 barcodes",
        "odd": "only 40.0 % of the columns map to human genes",
        "small": "of 64 profiles lie beside the image (300 x 300 px)",
        "coarse": "2.50 um per pixel is too coarse",
        "broken_name": "outs: the name 'TP53\\n' holds a control or line-break character",
        "control": "outs: all 5 columns are technical controls",
        "huge": "huge.tif: its header tells 1000000 x 1000000 px",
        "bomb": "2 megapixels would be decoded at once, max_image_mpx is 1",
    }
    assert reasons.keys() == expected.keys()
    for slide_id, text in expected.items():
        assert text in reasons[slide_id], slide_id
        assert str(tmp_path) not in reasons[slide_id]
    write_manifest(path, rows[:1])
    assert built("max_image_mpx=1", manifest=path)[0] == 0
    assert records.read(folder, "good").state == "built"  # type: ignore[union-attr]


def test_a_tile_that_does_not_decode_is_dropped_and_recorded(built: Built, corpus: Path) -> None:
    whole, hurt = (corpus / "images" / f"{name}.tif" for name in ("whole", "hurt"))
    for path in (whole, hurt):
        write_tiles(path, [np.ascontiguousarray(tissue(448, 896)[:, :448])], "jpeg rgb")
    damage(hurt, 7)  # of 7 in a row, each of 64 px: x 0 to 64, y 64 to 128
    rows = [{"slide_id": p.stem, "image": f"images/{p.name}", "platform": "image", "mpp": "1"} for p in (whole, hurt)]
    code, folder = built("max_failed_tiles=0.2", manifest=write_manifest(corpus / "two.csv", rows))
    assert code == 0
    good, bad = opened(folder, "whole"), opened(folder, "hurt")
    assert (good.info.facts["failed_tiles"], bad.info.facts["failed_tiles"]) == ([], [[0, 0], [1, 0]])
    assert "2 tiles do not decode and are left out" in bad.info.facts["notes"]
    assert good.tile_index.keys() - bad.tile_index.keys() == {(0, 0), (1, 0)}
    for place, i in bad.tile_index.items():  # the others are as if nothing had happened
        assert bad.jpeg(i) == good.jpeg(good.tile_index[place])


def test_an_internal_fault_stops_one_slide_alone(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    real = profiles.place

    def place(row: manifest.ManifestRow, *rest: Any) -> Any:
        return [].no_such_thing if row.slide_id == "t" else real(row, *rest)  # type: ignore[attr-defined]

    monkeypatch.setattr(one_slide, "place", place)
    code, folder = built()
    reason = records.failures(folder)["t"]
    assert (code, [p.name for p in store.paths(folder)]) == (1, ["i.zarr.zip", "v.zarr.zip"])
    assert reason.startswith(
        "internal fault: AttributeError: 'list' object has no attribute 'no_such_thing' (test_build"
    )


def test_a_stale_store_of_another_manifest_stays_listed(built: Built, corpus: Path) -> None:
    built()
    (corpus / "images" / "v.tif").write_bytes(b"no slide")
    code, folder = built()
    assert (code, (folder / "v.zarr.zip").is_file()) == (1, True)
    other = write_manifest(corpus / "m.csv", [{"slide_id": "n", "image": "images/i.tif", "platform": "image"}])
    assert built(manifest=other)[0] == 0
    assert records.failures(folder).keys() == {"v"}  # pack must go on leaving it out
    write_tiff(corpus / "images" / "v.tif", tissue(950, 1000))
    assert built()[0] == 0
    assert not records.failures(folder)


def test_aliases_are_told_by_their_content(built: Built, corpus: Path, tmp_path: Path) -> None:
    aliases = tmp_path / MARK / "aliases.tsv"
    code, folder = built(f"aliases={aliases}")
    reasons = records.failures(folder)
    assert (code, reasons["v"]) == (1, "aliases.tsv: no such file; correct the config's key aliases")
    files.write_bytes(aliases, b"mine\tTP53\n")
    assert built(f"aliases={aliases}")[0] == 0
    words = ["--store", str(folder), "--out", str(tmp_path / "shards"), "tile_px=112", "tile_mpp=1.0"]
    assert pack.main([*words, f"aliases={aliases}"]) == 0
    found = (tmp_path / "shards" / "manifest.json").read_text()
    assert json.loads(found)["prep"]["aliases"] == files.sha256_file(aliases)
    assert MARK not in found


def test_wrong_usage_is_2(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert built(manifest=tmp_path / "absent.csv")[0] == 2
    assert "no such manifest" in capsys.readouterr().err
    assert built("tile_pxx=3")[0] == 2
    assert "tile_pxx is no key (nearest: tile_px)" in capsys.readouterr().err


def test_an_alignment_maps_the_measurement_onto_another_image(built: Built, corpus: Path) -> None:
    write_tiff(corpus / "images" / "half.tif", tissue(500, 520), mpp=None)
    (corpus / "half.csv").write_text("0.5,0,10\n0,0.5,20\n0,0,1\n")
    rows = [{"slide_id": "h", "image": "images/half.tif", "measurement": "v/outs", "platform": "visium",
             "alignment": "half.csv"}]  # fmt: skip
    code, folder = built("max_upsampling=3", manifest=write_manifest(corpus / "m.csv", rows))
    info = opened(folder, "h").info
    assert code == 0
    assert info.mpp == pytest.approx(2 * MPP, rel=1e-4)
    assert info.alignment_source == "file"
    first = opened(folder, "h").profiles().xy_um[0]
    np.testing.assert_allclose(first, [60 + 10 * info.mpp, 80 + 20 * info.mpp], rtol=1e-3)


def test_a_manifests_mpp_overrides_a_bad_lattice(built: Built, corpus: Path) -> None:
    write_st(corpus / "rough", jitter_um=60)
    row = {"slide_id": "r", "image": "images/t.tif", "measurement": "rough/counts.tsv.gz", "platform": "st",
           "spots": "rough/spots.tsv"}  # fmt: skip
    assert built(manifest=write_manifest(corpus / "m.csv", [row]))[0] == 1
    code, folder = built(manifest=write_manifest(corpus / "m.csv", [row | {"mpp": str(MPP)}]))
    info = opened(folder, "r").info
    assert (code, info.mpp, info.mpp_source) == (0, MPP, "manifest")
    assert any("lattice" in note for note in info.facts["notes"])


def test_columns_of_one_gene_are_summed(built: Built, corpus: Path) -> None:
    genes = ["TP53", "ENSG00000141510.3", "BLANK-01", "EGFR", "CD3E"]
    outs = write_visium(corpus / "double" / "outs", genes=genes)
    rows = [{"slide_id": "d", "image": "images/v.tif", "measurement": "double/outs", "platform": "visium"}]
    _, folder = built(manifest=write_manifest(corpus / "m.csv", rows))
    found, measured = opened(folder, "d"), platforms.reader("visium").read(platforms.Source("visium", outs))
    (block,) = measured.counts(np.arange(len(measured.ids)))
    assert set(found.genes().symbols) == {"TP53", "EGFR", "CD3E"}
    table = found.genes()
    total = found.profiles().count[found.profiles().gene == table.index["ENSG00000141510"]].sum()
    assert total == block.count[block.gene < 2].sum()
    assert found.info.facts["controls"] == 1


def test_a_slide_without_a_manifest(corpus: Path, tmp_path: Path) -> None:
    row = manifest.ManifestRow("alone", corpus / "images" / "v.tif", corpus / "v" / "outs", "visium")
    path = one_slide.build_slide(row, tmp_path / "out", PrepConfig())
    found = store.SlideStore(path)
    assert (found.info.section, found.info.donor, len(found.profiles())) == ("alone", "unknown", 64)


MARK = "mArKeR"


def test_whole_slides_of_real_scanners(built: Built, real_data: Path, tmp_path: Path) -> None:
    fixtures = "wsi/tests/fixtures"
    names = {"good": "svs-images/cmu-1-small-region.svs", "broken": "svs-images/broken.svs", "bad": "unreadable.svs"}
    rows = [{"slide_id": k, "image": f"{fixtures}/{v}", "platform": "image"} for k, v in names.items()]
    path = write_manifest(tmp_path / "m.csv", rows)
    code, folder = built("--root", str(real_data), manifest=path)
    assert code == 1
    assert [p.name for p in store.paths(folder)] == ["good.zarr.zip"]
    reasons = records.failures(folder)
    assert "is no slide" in reasons["broken"]
    assert "1 of 1 tiles do not decode" in reasons["bad"]
    info = opened(folder, "good").info
    assert (info.mpp, info.mpp_source) == (0.499, "embedded")
    assert info.facts["slide"] == {"reader": "tiff", "objective_power": 20.0, "levels": 1.0}
