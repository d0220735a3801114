"""build: edited records, plans that are none, stores and records that a disk lost: nothing stops the other slides."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep import records
from storm import files, store
from tests.data_prep.vendors import write_manifest

Built = Callable[..., tuple[int, Path]]


@pytest.mark.parametrize("lost", [slice(0, None), slice(-30, None)], ids=["all", "end"])
def test_a_store_that_lost_its_bytes_is_built_again(built: Built, lost: slice) -> None:
    _, folder = built()
    path = store.store_path(folder, "v")
    whole = path.read_bytes()
    data = bytearray(whole)
    data[lost] = bytes(len(data[lost]))
    path.write_bytes(data)
    assert built()[0] == 0
    assert path.read_bytes() == whole


def test_a_record_that_cannot_be_written_stops_one_slide_alone(
    built: Built, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = built()
    path = records.record_path(folder, "v")
    path.unlink()
    path.mkdir()
    assert built("min_depth=3")[0] == 1
    told = capsys.readouterr().out
    assert "v: its store is built; its record was not written: " in told
    assert "2 built, 0 current, 1 failed" in told


@pytest.mark.parametrize(
    "change",
    [{"inputs": 5}, {"inputs": [5]}, {"bytes": "many"}, {"seconds": -1}, {"cost": []}, {"cost": {"tiles": "x"}},
     {"reason": 7}, {"seconds": 10**400}, {"state": "odd"}, {"slide_id": "../v"}],
)  # fmt: skip
def test_an_edited_record_is_no_record(built: Built, change: dict[str, Any]) -> None:
    _, folder = built()
    path = records.record_path(folder, "v")
    good = files.read_json(path)
    files.write_json(path, good | change)
    assert records.read(folder, "v") is None
    assert [record.slide_id for record in records.every(folder)] == ["i", "t"]
    files.write_json(path, good)
    assert records.read(folder, "v") is not None


@pytest.mark.parametrize(
    "text", ["[]", "{}", "null", '{"tasks": 5}', '{"tasks": [5]}', '{"tasks": ["v"]}', '{"tasks": {"0": ["v"]}}']
)
def test_what_is_no_plan(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    assert built("--plan", str(tmp_path / "p.json"), "--task", "0")[0] == 2
    assert "p.json: is no plan; write it with python -m data_prep.plan" in capsys.readouterr().err


def test_wrong_tasks_and_workers(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "p.json"
    plan.write_text('{"tasks": [], "manifest_sha256": ""}')
    for words, told in (
        (("--task", "0"), "--task 0 is of a plan; name it with --plan"),
        (("--plan", str(plan), "--task", "0"), "p.json: has no task, nothing was left to build"),
        (("--workers", "0"), "--workers 0: give 1 or more"),
    ):
        assert built(*words)[0] == 2
        assert told in capsys.readouterr().err
    plan.write_text('{"tasks": [["v"]], "manifest_sha256": "of another"}')
    assert built("--plan", str(plan), "--task", "0")[0] == 0
    assert "changed since" in capsys.readouterr().out


def test_a_disk_that_is_full_is_told_and_leaves_nothing_half_written(
    built: Built, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit of the shell stands for the disk: the system refuses the same write."""
    folder = tmp_path / "stores"
    words = f"-m data_prep.build {corpus / 'manifest.csv'} --store {folder} --workers 1 tile_px=112 tile_mpp=1.0"
    command = f"ulimit -f 64; exec {sys.executable} {words}"  # 64 kB; a store has some hundred
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    for name in "vti":
        assert f"{name}: {name}: File too large; check the path, the free space and the permissions" in done.stdout
        assert not store.store_path(folder, name).exists()
    assert [path for path in folder.iterdir() if path.name.startswith(".")] == []
    assert built()[0] == 0
    assert "3 built, 0 current, 0 failed" in capsys.readouterr().out


def test_no_folder_of_this_machine_is_in_a_record(built: Built, corpus: Path, tmp_path: Path) -> None:
    """A reader may name what lies beside its input: HEST's metadata lie in a folder above it."""
    (corpus / "hest" / "st").mkdir(parents=True)
    (corpus / "hest" / "st" / "a.h5ad").write_bytes(b"")
    row = {"slide_id": "a", "measurement": "hest/st/a.h5ad", "platform": "visium", "format": "hest"}
    code, folder = built(manifest=write_manifest(corpus / "hest.csv", [row]))
    assert code == 1
    record = records.read(folder, "a")
    assert record is not None and record.reason == "metadata/a.json: no such file; correct the manifest"
