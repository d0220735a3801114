"""Durable files: complete or absent, canonical, inside their root; what dead owners left is removed, and only that."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from storm import files
from storm.commands import explain


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_names_what_was_written(tmp_path: Path, code: int) -> None:
    """The system's own error tells no file, or one of a name that is gone a moment later."""
    with pytest.raises(OSError) as caught, files.replacing(tmp_path / "a.bin"):
        raise OSError(code, "full")
    assert explain(caught.value).startswith(f"{tmp_path / 'a.bin'}: full; check the path, the free space")
    with pytest.raises(OSError) as caught, files.scratch_folder(tmp_path / "b") as folder:
        raise OSError(code, "full", str(folder / "c"))
    assert caught.value.filename == str(tmp_path / "b")
    with pytest.raises(OSError) as caught, files.scratch_folder(tmp_path / "b"):
        raise OSError(errno.EIO, "damaged", "slide.svs")
    assert caught.value.filename == "slide.svs"
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_folder_leaves_the_old_one(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "set" / "old", b"1")
    with pytest.raises(ValueError, match="stop"), files.replacing_folder(tmp_path / "set") as folder:
        (folder / "new").write_bytes(b"2")
        raise ValueError("stop")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["set", "set/old"]


def test_a_new_folder_that_vanishes_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_bytes(tmp_path / "set" / "old", b"1")
    files.write_bytes(tmp_path / "new" / "file", b"2")
    rename = os.rename

    def overtaken(source: Path, target: Path) -> None:
        if source == tmp_path / "new":
            raise FileNotFoundError(2, "gone", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", overtaken)
    with pytest.raises(FileNotFoundError):
        files.install_folder(tmp_path / "new", tmp_path / "set")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*old*")) == ["set/old"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "set" / "old", b"1")
    with files.replacing_folder(tmp_path / "set") as folder:
        (folder / "new").write_bytes(b"2")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["set", "set/new"]


def killed(work: Callable[[], None]) -> None:
    """Run `work` in a process that ends by SIGKILL, in it or after it."""
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def half(path: Path) -> None:
    """Write a file, and be killed before it is whole."""
    with files.replacing(path) as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_what_a_killed_write_left_is_removed_by_the_next(tmp_path: Path) -> None:
    others = {".a.bin.mine.tmp", ".xa.bin.0123abcd.tmp", ".a.bin"}
    for name in others:
        (tmp_path / name).write_bytes(b"a user's")
    killed(lambda: half(tmp_path / "b.bin"))
    (left,) = {p.name for p in tmp_path.iterdir()} - others
    killed(lambda: half(tmp_path / "a.bin"))
    assert len(names(tmp_path)) == 5
    files.write_bytes(tmp_path / "a.bin", b"1")
    assert {p.name for p in tmp_path.iterdir()} == others | {left, "a.bin"}
    assert [p.name for p in files.sweep(tmp_path)] == [left]
    assert {p.name for p in tmp_path.iterdir()} == others | {"a.bin"}


def test_two_may_write_one_path(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "a.bin") as one:
        one.write_bytes(b"1")
        killed(lambda: files.write_bytes(tmp_path / "a.bin", b"2"))
        assert (tmp_path / "a.bin").read_bytes() == b"2"
        assert files.sweep(tmp_path) == []
    assert (tmp_path / "a.bin").read_bytes() == b"1"
    assert names(tmp_path) == ["a.bin"]


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path: Path) -> None:
    mine = files.temporary(tmp_path / "a.bin")
    *before, pid, started, end, kind = mine.name.split(".")
    for name in (mine.name, ".".join([*before, pid, str(int(started) + 1), end, kind])):
        (tmp_path / name).write_bytes(b"half")
    files.sweep(tmp_path)
    assert names(tmp_path) == [mine.name]


def test_of_another_machine_only_what_slurm_started_again_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue: what it cannot tell stays; tests/slurm has one
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    owners = ("0r0", "lab-7r0", "lab-7r1", "lab-7r2", "lab-8r0", "west-7r0")
    left = {owner: f".a.bin.far-away.{owner}.4242.99.0123abcd.tmp" for owner in owners}
    for name in left.values():
        (tmp_path / name).write_bytes(b"half")
    files.write_bytes(tmp_path / "a.bin", b"1")
    assert len(names(tmp_path)) == 1 + len(left)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "lab")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    files.write_bytes(tmp_path / "a.bin", b"1")  # SLURM sets no SLURM_RESTART_COUNT in the first run
    assert len(names(tmp_path)) == 1 + len(left)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    files.write_bytes(tmp_path / "a.bin", b"1")
    assert names(tmp_path) == sorted(
        ["a.bin", *(left[owner] for owner in owners if owner not in {"lab-7r0", "lab-7r1"})]
    )
    assert ".lab-7r2." in files.temporary(tmp_path / "a.bin").name


def test_what_a_killed_write_of_a_folder_left_is_removed(tmp_path: Path) -> None:
    def write(kill: bool) -> None:
        with files.replacing_folder(tmp_path / "set") as folder:
            (folder / "new").write_bytes(b"2")
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)

    killed(lambda: write(kill=True))
    assert len(names(tmp_path)) == 2
    write(kill=False)
    assert names(tmp_path) == ["set", "set/new"]


def test_a_folder_that_a_killed_write_moved_aside_is_not_lost(tmp_path: Path) -> None:
    def aside() -> None:
        os.rename(tmp_path / "set", files.temporary(tmp_path / "set", "old"))

    files.write_bytes(tmp_path / "set" / "old", b"1")
    killed(aside)
    with pytest.raises(ValueError, match="stop"), files.replacing_folder(tmp_path / "set"):
        raise ValueError("stop")
    assert names(tmp_path) == ["set", "set/old"]
    os.rename(tmp_path / "set", tmp_path / "kept")
    killed(lambda: os.rename(tmp_path / "kept", files.temporary(tmp_path / "set", "old")))
    files.write_bytes(tmp_path / "set" / "new", b"2")  # the set is there again: what was aside is not wanted
    files.sweep(tmp_path)
    assert names(tmp_path) == ["set", "set/new"]


def test_json_is_canonical_and_refuses_nan(tmp_path: Path) -> None:
    assert files.dump_json({"b": 1, "a": [2]}) == files.dump_json({"a": [2], "b": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        files.dump_json({"a": float("nan")})
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: not readable as JSON"):
        files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000], ids=["brackets", "digits"])
def test_json_that_harms_its_reader_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json: not readable as JSON .*; restore"):
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
