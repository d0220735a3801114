"""build: edited records, plans that are none, stores and records that a disk lost: nothing stops the other slides."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep import records
from storm import files, store

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
     {"reason": 7}, {"state": "odd"}, {"slide_id": "../v"}],
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
