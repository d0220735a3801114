"""Staging: copies beside the stream, complete or absent, within their room; the batches are the same without."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from storm import files
from storm.data import places
from storm.data.stage import stage_folder
from storm.data.stream import GroupStream, batches
from storm.shards import MANIFEST
from tests.data.corpora import config, stream, write

GROUPS = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve groups in six shards of about one size."""
    return write(tmp_path_factory.mktemp("staged") / "set", [(f"s{i % 3}", i // 3) for i in range(GROUPS)], per_shard=2)


def told(shards: Path) -> dict[str, dict]:
    """sha256 -> entry of each shard."""
    return {entry["sha256"]: entry for entry in files.read_json(shards / MANIFEST)["splits"]["train"]["shards"]}


def until(holds: Callable[[], bool]) -> None:
    """Wait for the stager's thread."""
    end = time.monotonic() + 60
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    assert holds()


def names(folder: Path) -> set[str]:
    """What lies in the staging folder, without what is being written."""
    return {path.stem for path in (folder / "storm-stage").glob("[!.]*.tar")}


def same(one: GroupStream, other: GroupStream, first: int, last: int) -> None:
    """Two streams give the same batches."""
    for a, b in zip(batches(one, first, last, 0), batches(other, first, last, 0), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_corpus_that_fits_is_copied_once_and_read_from_the_copy(shards: Path, tmp_path: Path) -> None:
    own = stream(shards, stage_dir=str(tmp_path))
    same(own, stream(shards), 0, 3)
    until(lambda: names(tmp_path) == told(shards).keys())
    for digest in names(tmp_path):
        assert files.sha256_file(tmp_path / "storm-stage" / f"{digest}.tar") == digest
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "storm-stage").iterdir()}
    assert own.corpus.stager
    own.corpus.stager.join()
    again = stream(shards, stage_dir=str(tmp_path))
    part = again.corpus.groups.parts[0]
    part.reader.source.folder = tmp_path / "gone"  # type: ignore[attr-defined]
    same(again, stream(shards), 1, 4)
    assert again.corpus.stager
    again.corpus.stager.join()
    assert written == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "storm-stage").iterdir()}


def test_windows_that_come_are_copied_and_past_ones_make_room(shards: Path, tmp_path: Path) -> None:
    entries = told(shards)
    room = 2.5 * max(entry["bytes"] for entry in entries.values())
    own = stream(shards, stage_dir=str(tmp_path), stage_gb=room / 1e9, window_shards=1, global_batch_size=2)
    numbers = {entry["name"]: digest for digest, entry in entries.items()}
    digests = [numbers[name] for name in sorted(numbers)]
    assert own.corpus.stager
    for step in (0, 3, 5):
        own.corpus.stager.follow(own.order, step)
        ahead = list(dict.fromkeys(digests[number] for number in own.order.shards_ahead(step * 2)))[:2]
        until(lambda ahead=ahead: names(tmp_path) == set(ahead))  # type: ignore[misc]
    same(own, stream(shards, window_shards=1, global_batch_size=2), 4, 9)


def test_a_damaged_copy_is_removed_and_the_source_read(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    own = stream(shards, stage_dir=str(tmp_path))
    for digest, entry in told(shards).items():
        (tmp_path / "storm-stage" / f"{digest}.tar").write_bytes(bytes(entry["bytes"]))
    same(own, stream(shards), 0, 1)
    assert "damaged (xxh3)" in (error := capsys.readouterr().err) and "the copy is removed" in error


def test_a_damaged_shard_is_not_staged(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = stream(shards, stage_dir=str(tmp_path))
    digest = min(told(shards))
    stager = own.corpus.stager
    assert stager
    at = [shard.sha256 for shard in stager.shards].index(digest)
    stager.shards[at] = type(stager.shards[at])(stager.shards[at].source, (at + 1) % 6, digest, stager.shards[at].size)
    stager.follow(own.order, 0)
    stager.join(60)
    assert names(tmp_path) == told(shards).keys() - {digest}
    assert "not staged: its sha256 is not that of the manifest" in capsys.readouterr().err


_COPY = """
import sys
from pathlib import Path
from storm.data import stage
from tests.data.corpora import stream
own = stream(Path(sys.argv[1]), stage_dir=sys.argv[2])
stage._BLOCK_BYTES = 64
print("ready", flush=True)
own.corpus.stager.follow(own.order, 0)
own.corpus.stager.join()
"""


def test_a_killed_copy_is_swept_and_the_rest_goes_on(shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _COPY, str(shards), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        until(lambda: any((tmp_path / "storm-stage").iterdir()) or process.poll() is not None)
        process.kill()
    kept = names(tmp_path)
    for digest in kept:
        assert files.sha256_file(tmp_path / "storm-stage" / f"{digest}.tar") == digest
    own = stream(shards, stage_dir=str(tmp_path))
    assert own.corpus.stager
    own.corpus.stager.follow(own.order, 0)
    own.corpus.stager.join(60)
    assert {path.name for path in (tmp_path / "storm-stage").iterdir()} == {f"{digest}.tar" for digest in told(shards)}


def test_one_process_of_a_node_copies(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    own = stream(shards, stage_dir=str(tmp_path))
    same(own, stream(shards), 0, 2)
    assert own.corpus.stager and own.corpus.stager.ident is None and names(tmp_path) == set()


def test_auto_stages_far_shards_in_a_jobs_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_TMPDIR", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    auto = config("x")
    assert stage_folder(auto, far=True) is None, "no job"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert stage_folder(auto, far=True) == tmp_path / "t" / "storm-stage"
    (tmp_path / "s").mkdir()
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "s"))
    assert stage_folder(auto, far=True) == tmp_path / "s" / "storm-stage"
    assert stage_folder(auto, far=False) is None and stage_folder(config("x", stage_dir=""), far=True) is None
    monkeypatch.setattr(places, "file_system", lambda path: "tmpfs")
    assert stage_folder(auto, far=True) is None, "memory is no disk"
