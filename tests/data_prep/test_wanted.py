"""What a store folder should hold: a slide whose build left nothing is missing to pack and verify, unless told."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import pack, records, verify, wanted
from storm import files, shards, store

Built = Callable[..., tuple[int, Path]]


def packed(folder: Path, *words: str) -> int:
    return pack.main(["--store", str(folder), "--out", str(folder.parent / "out"), "tile_px=112", "tile_mpp=1.0",
                      *words])  # fmt: skip


def test_a_build_that_died_without_a_record_is_missing(
    built: Built, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = built()
    assert packed(folder) == 0
    store.store_path(folder, "t").unlink()
    records.record_path(folder, "t").unlink()
    (listed,) = folder.glob(f"*{wanted.SUFFIX}")
    capsys.readouterr()
    assert packed(folder) == 2
    told = capsys.readouterr().err
    assert "1 slides are missing; " in told and f"\n  t: not built; or not wanted: then delete {listed.name}\n" in told
    verdict = verify.verify(folder)
    assert verdict.faults == [
        f"t: not built; run data_prep.build, or, where the slide is not wanted any more, delete {listed.name}"
    ]
    assert packed(folder, "--manifest", str(corpus / "manifest.csv")) == 2
    assert "\n  t: not built\n" in capsys.readouterr().err
    assert packed(folder, "--allow-missing") == 0
    assert set(shards.ShardSet(folder.parent / "out").manifest["slides"]) == {"v"}
    listed.unlink()
    assert packed(folder) == 0
    assert verify.verify(folder).faults == []


def test_a_task_lists_all_slides_of_the_manifest(built: Built, corpus: Path, tmp_path: Path) -> None:
    sha256 = files.sha256_file(corpus / "manifest.csv")
    files.write_json(tmp_path / "plan.json", {"tasks": [["v"], ["t"], ["i"]], "manifest_sha256": sha256})
    code, folder = built("--plan", str(tmp_path / "plan.json"), "--task", "2")
    assert (code, [path.name for path in store.paths(folder)]) == (0, ["i.zarr.zip"])
    assert set(wanted.read(folder)) == {"v", "t", "i"}
    assert packed(folder) == 2


def test_an_edited_manifest_replaces_its_list_and_others_keep_theirs(tmp_path: Path) -> None:
    stores = tmp_path / "stores"
    wanted.write(stores, tmp_path / "secret" / "one.csv", ["b", "a"])
    wanted.write(stores, tmp_path / "secret" / "two.csv", ["b", "c"])
    assert set(wanted.read(stores)) == {"a", "b", "c"}
    wanted.write(stores, tmp_path / "secret" / "one.csv", ["b"])
    assert set(wanted.read(stores)) == {"b", "c"}
    assert len(list(stores.iterdir())) == 2
    for path in stores.iterdir():
        assert "secret" not in path.name + path.read_text()


@pytest.mark.parametrize("text", ["{", "[]", '{"slides": 3}', '{"slides": [["a"]]}'])
def test_a_damaged_list_is_told(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / f"0123{wanted.SUFFIX}").write_text(text)
    with pytest.raises(ValueError, match=r"0123\.manifest\.json: (not readable as JSON|is no list of slides; delete)"):
        wanted.read(tmp_path)
    assert verify.main([str(tmp_path)]) == 1
    assert "0123.manifest.json: " in capsys.readouterr().out


def test_a_folder_in_which_every_build_died(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted.write(tmp_path, tmp_path / "m.csv", ["a"])
    assert json.loads(next(tmp_path.iterdir()).read_text()) == {"slides": ["a"]}
    assert verify.main([str(tmp_path)]) == 1
    assert "a: not built" in capsys.readouterr().out
    assert packed(tmp_path) == 2
    assert "\n  a: not built; or not wanted" in capsys.readouterr().err
