"""inspect: what a store, a folder, a set, a shard and a sample hold, in words; damage is one line."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep import inspect, records
from storm import shards, store
from tests.data_prep.test_pack import info, write_store


def told(path: Path, *words: str) -> str:
    return "\n".join(inspect.text(path, *words))


def test_a_store(tiny_store: Path) -> None:
    path = store.paths(tiny_store)[0]
    opened = store.SlideStore(path)
    text = told(path)
    places, quality = opened.places(), opened.quality()
    assert text.startswith(f"{path.name}: slide store, ")
    assert f"profiles: {len(places)} of {len(opened.genes())} genes, {int(opened.indptr[-1])} counts" in text
    assert f"tiles: {len(opened)}" in text
    first = next(line.split() for line in text.splitlines() if line.startswith(places.ids[0]))
    assert first[1:3] == [f"{v:.2f}" for v in places.xy_um[0]]
    assert first[-3:] == ["disc", str(quality["depth"][0]), str(quality["genes"][0])]
    best = int(np.argmax(opened.gene_totals()))
    assert f"most counts: {opened.genes().symbols[best]} {opened.gene_totals()[best]}," in text
    for note in opened.info.facts["notes"]:
        assert note in text
    for word in ("low_depth", "sharpness", "mpp_source", "alignment (measurement -> level-0 px)", "record: built"):
        assert word in text


def test_a_folder(tiny_store: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_store, tmp_path / "stores"))
    damaged = store.paths(folder)[0]
    damaged.write_bytes(b"cut")
    records.write(folder, records.Record("gone", "failed", "its image is cut short; restore it"))
    text = told(folder)
    assert text.startswith("stores: folder of 3 slide stores, 1 failed")
    assert f"{damaged.name}  does not read" in text
    assert "gone: FAILED: its image is cut short; restore it" in text


def test_a_set_its_shards_and_samples(tiny_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = shards.ShardSet(tiny_shards)
    text = told(tiny_shards)
    assert f"shard set of {len(opened.manifest['slides'])} slides" in text
    index = opened.index("train")
    assert f"  {index.key(0)}" in text
    tar = tiny_shards / "train" / "000000.tar"
    assert told(tar).startswith(f"000000.tar: shard of {len(index)} samples, ")
    for i in (0, len(index) - 1):
        group = opened.read("train", index, i)
        sample = told(tiny_shards, index.key(i))
        assert sample == told(tar, index.key(i))
        assert f"{index.key(i)}: sample of {len(group.meta.regions)} regions" in sample
        assert f"profiles: {len(group.profiles)}, {len(group.profiles.gene)} counts" in sample
        best = int(np.argmax(np.bincount(group.profiles.gene, group.profiles.count)))
        assert f"most counts: {opened.genes.symbols[best]} " in sample
    assert inspect.main([str(tiny_shards), "--key", "nobody"]) == 2
    assert "holds no sample 'nobody'; look without --key" in capsys.readouterr().err


def test_a_tile_the_whole_slide_and_its_tissue(tiny_store: Path, tmp_path: Path) -> None:
    path = store.paths(tiny_store)[0]
    opened = store.SlideStore(path)
    row, col = opened.place[3]
    out, tissue = tmp_path / "x.jpg", tmp_path / "x.geojson"
    assert inspect.main([str(path), "--tile", f"{row},{col}", "--out", str(out)]) == 0
    assert out.read_bytes() == opened.jpeg(3)
    assert inspect.main([str(path), "--overview", "--out", str(out), "--tissue", str(tissue)]) == 0
    picture = cv2.imread(str(out))
    assert picture is not None and picture.ndim == 3
    assert json.loads(tissue.read_text())["type"] == "FeatureCollection"


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--tile", "900,900", "--out", "x"], "has no tile at row 900, column 900"),
        (["--tile", "a,b", "--out", "x"], "--tile a,b: write ROW,COL"),
        (["--tile", "1,1"], "--out FILE goes with either --tile ROW,COL or --overview"),
        (["--out", "x"], "--out FILE goes with either --tile ROW,COL or --overview"),
        (["--overview", "--out", "x"], "holds no picture of the slide: it has no image"),
        (["--tissue", "x"], "holds no tissue outline: it has no image"),
    ],
)
def test_what_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], fault: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_store(tmp_path / "stores", info("s", "d"), 12)
    assert inspect.main([str(tmp_path / "stores" / "s.zarr.zip"), *words]) == 2
    assert fault in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["stores"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"no such thing" * 99)])
@pytest.mark.parametrize("what", ["store", "tar", "manifest", "index"])
def test_damage_is_one_line(
    tiny_store: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object], what: str,
) -> None:  # fmt: skip
    packed = Path(shutil.copytree(tiny_shards, tmp_path / "set"))
    path = {
        "store": Path(shutil.copy(store.paths(tiny_store)[0], tmp_path)), "tar": packed / "train" / "000000.tar",
        "manifest": packed / "manifest.json", "index": packed / "train" / "index.npy",
    }[what]  # fmt: skip
    damage(path)
    if what == "tar" and not path.stat().st_size:
        assert told(path).startswith("000000.tar: shard of 0 samples")
        return
    assert inspect.main([str(path if what in ("store", "tar") else packed)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_what_others_wrote_cannot_command_a_terminal(tmp_path: Path) -> None:
    strange = dataclasses.replace(info("s", "d"), license="\x1b[31mred\nline", organ="a\rb")
    write_store(tmp_path, strange, 12)
    text = told(tmp_path / "s.zarr.zip") + told(tmp_path)
    assert "\x1b" not in text
    assert "\r" not in text
    assert "[31mred line" in text


def test_other_paths_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, fact in ((tmp_path, "is no slide store, no folder of them"), (tmp_path / "nowhere", "no such file")):
        assert inspect.main([str(path)]) == 2
        assert fact in capsys.readouterr().err


def test_an_image_alone_is_called_so_and_numbers_are_short(built: Callable[..., tuple[int, Path]]) -> None:
    _, folder = built()
    text = told(folder / "i.zarr.zip")
    (platform,) = [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith("  platform ")]
    assert platform == "image alone"
    assert "a .. b .. c: the smallest, the median, the largest" in text
    assert "image alone" in next(line for line in told(folder).splitlines() if line.startswith("i "))
    assert inspect._short(0.123456789) == "0.1235" and inspect._short(25321.7) == "25322"
    assert inspect._short([1.0, 0.33333333]) == "[1, 0.3333]"
    assert "smallest" not in told(folder)


def test_what_it_takes_is_told(tmp_path: Path) -> None:
    (tmp_path / "he.tif").write_bytes(b"II*\0" + bytes(600))
    for name, fact in (("he.tif", "is no slide store and no shard"), ("absent", "no such file or folder")):
        with pytest.raises(ValueError, match=rf"{fact}; give a store \(<slide_id>\.zarr\.zip\), a folder of stores"):
            inspect.text(tmp_path / name)
