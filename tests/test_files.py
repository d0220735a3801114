"""Durable files: complete or absent, canonical, inside their root."""

import os
from pathlib import Path

import pytest

from storm import files


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_folder_leaves_the_old_one(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "set" / "old", b"1")
    with pytest.raises(ValueError, match="stop"), files.replacing_folder(tmp_path / "set") as folder:
        (folder / "new").write_bytes(b"2")
        raise ValueError("stop")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["set", "set/old"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "set" / "old", b"1")
    with files.replacing_folder(tmp_path / "set") as folder:
        (folder / "new").write_bytes(b"2")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["set", "set/new"]


HEX = "0123456789ab"


def test_what_a_killed_write_left_is_removed_by_the_next(tmp_path: Path) -> None:
    others = {f".b.bin.{HEX}.tmp", f".xa.bin.{HEX}.tmp", ".a.bin.mine.tmp", f".a.bin.{HEX}.old.bak"}
    for name in others | {f".a.bin.{HEX}.tmp"}:
        (tmp_path / name).write_bytes(b"half")
    files.write_bytes(tmp_path / "a.bin", b"1")
    assert {p.name for p in tmp_path.iterdir()} == others | {"a.bin"}


def test_what_a_killed_write_of_a_folder_left_is_removed(tmp_path: Path) -> None:
    for name in ("set", f".set.{HEX}.tmp", f".set.{HEX}.old"):
        files.write_bytes(tmp_path / name / "file", b"1")
    with files.replacing_folder(tmp_path / "set") as folder:
        (folder / "new").write_bytes(b"2")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["set", "set/new"]


def test_a_folder_that_a_killed_write_moved_aside_is_not_lost(tmp_path: Path) -> None:
    for name in (f".set.{HEX}.tmp", f".set.{HEX}.old"):
        files.write_bytes(tmp_path / name / name[-3:], b"1")
    with pytest.raises(ValueError, match="stop"), files.replacing_folder(tmp_path / "set"):
        raise ValueError("stop")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["set", "set/old"]


def test_json_is_canonical_and_refuses_nan(tmp_path: Path) -> None:
    assert files.dump_json({"b": 1, "a": [2]}) == files.dump_json({"a": [2], "b": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        files.dump_json({"a": float("nan")})
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: not readable as JSON"):
        files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc/passwd", "link/secret"])
def test_no_path_leaves_its_root(tmp_path: Path, path: str) -> None:
    (tmp_path / "root").mkdir()
    os.symlink(tmp_path, tmp_path / "root" / "link")
    with pytest.raises(ValueError, match="leaves its root"):
        files.inside(tmp_path / "root", path)


def test_paths_inside_their_root(tmp_path: Path) -> None:
    assert files.inside(tmp_path, "a/../b") == tmp_path.resolve() / "b"
    (tmp_path / "f").write_bytes(b"x" * 3_000_000)
    assert files.sha256_file(tmp_path / "f") == files.sha256_of(b"x" * 3_000_000)
