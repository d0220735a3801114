"""A run folder has one owner: a living one is refused, a dead one is followed."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from storm.train import engine
from storm.train.owner import owned
from tests.train.jobs import environment

HOLD = """
import sys
from pathlib import Path
from storm.train import engine
from storm.train.owner import owned
with owned(Path(sys.argv[1]), engine.connect()):
    print("holds", flush=True)
    sys.stdin.read()
engine.disconnect()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process, which trains in tmp_path."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment())
    assert process.stdout and process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.communicate()


def test_a_living_owner_is_refused_and_a_killed_one_is_followed(
    holder: subprocess.Popen, world: engine.World, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"process {holder.pid} of host .* trains here"), owned(tmp_path, world):
        pass
    assert holder.poll() is None and len(list(tmp_path.iterdir())) == 1, "it keeps the folder"
    holder.kill()
    holder.wait()
    with owned(tmp_path, world):
        (mine,) = tmp_path.iterdir()
    assert not list(tmp_path.iterdir()) and f".{holder.pid}." not in mine.name


def test_a_folder_that_stays_empty_is_removed_if_it_was_made(world: engine.World, tmp_path: Path) -> None:
    for name, content in (("new", None), ("written", "log.jsonl"), ("before", None)):
        if name == "before":
            (tmp_path / name).mkdir()
        with owned(tmp_path / name, world):
            if content:
                (tmp_path / name / content).touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "written"]


@pytest.mark.parametrize(("restart", "taken"), [("0", False), ("1", True)])
def test_a_requeue_of_the_same_job_follows_the_process_of_another_node(
    world: engine.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart: str, taken: bool
) -> None:
    before = tmp_path / ".owner.othernode.c-7r0.123.456.0123abcd.tmp"
    before.touch()
    for name, value in (("CLUSTER_NAME", "c"), ("JOB_ID", "7"), ("RESTART_COUNT", restart)):
        monkeypatch.setenv(f"SLURM_{name}", value)
    if taken:
        with owned(tmp_path, world):
            assert not before.exists()
    else:
        with pytest.raises(ValueError, match=r"host othernode, job c-7 trains here; .*remove \.owner\.othernode"):
            owned(tmp_path, world).__enter__()
        assert [path.name for path in tmp_path.iterdir()] == [before.name]
