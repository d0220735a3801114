"""Remote shards, from a real HTTP server on this machine: ranges, failures, slowness, damage, and the shared cache."""

import hashlib
import http.server
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storm import files
from storm.data.corpus import open_corpus
from storm.data.remote import Cache, RemoteError, Server, check_url
from storm.data.stream import GroupStream, StreamError, batches
from storm.shards import MANIFEST
from tests.data.corpora import GROUPS, config, stream, write


class Handler(http.server.SimpleHTTPRequestHandler):
    """Ranges, and whatever the server was told to do wrong."""

    server: "Shelf"

    def do_GET(self) -> None:
        """Answer as the server's script says."""
        self.server.asked.append((self.path, self.headers.get("Range", "")))
        fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        if fault == "slow":
            time.sleep(5)
        if fault.isdigit():
            self.send_error(int(fault))
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found and fault != "whole":
            first, last = int(found[1]), min(int(found[2]), len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if fault == "cut":
            data = data[: len(data) // 2]
            self.close_connection = True
        self.wfile.write(data if fault != "damaged" else b"x" * len(data))

    def log_message(self, *_: object) -> None:
        """Nothing."""


class Shelf(http.server.ThreadingHTTPServer):
    """A server of a folder that can be told to fail: `faults` of the next requests, `always` of those after."""

    faults: list[str]
    always: str
    asked: list[tuple[str, str]]
    url: str


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven groups in two shards."""
    return write(tmp_path_factory.mktemp("remote") / "set", [(f"s{i % 3}", i // 3) for i in range(GROUPS)])


@pytest.fixture
def shelf(shards: Path) -> Iterator[Shelf]:
    """A server of the shard set's folder."""
    server = Shelf(("127.0.0.1", 0), lambda *of: Handler(*of, directory=str(shards.parent)))
    server.faults, server.always, server.asked, server.daemon_threads = [], "", [], True
    server.url = f"http://127.0.0.1:{server.server_port}/set"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def remote(shelf: Shelf, cache: Path, **changes: Any) -> GroupStream:
    """The stream over the server's shards: quick to give up."""
    keys = {"cache_dir": str(cache), "remote_timeout_s": 1.0, "remote_retries": 2, **changes}
    return stream(open_corpus(config(shelf.url, **keys)), **keys)


def test_a_remote_set_gives_the_batches_of_a_local_one(shards: Path, shelf: Shelf, tmp_path: Path) -> None:
    here = stream(shards, window_shards=1)
    far = remote(shelf, tmp_path, window_shards=1)
    assert far.order_hash == here.order_hash and far.step_at(here.position(5)) == 5
    for found, told in zip(batches(far, 0, 3, 0), batches(here, 0, 3, 0), strict=True):
        assert all(torch.equal(found[name], told[name]) for name in told)
    ranges = [asked for path, asked in shelf.asked if path.endswith(".tar")]
    assert len(ranges) == GROUPS and all(asked.startswith("bytes=") for asked in ranges), "each group asked for once"
    before = len(shelf.asked)
    again = remote(shelf, tmp_path, window_shards=1)
    assert [
        torch.equal(a["tiles"], b["tiles"])
        for a, b in zip(batches(again, 0, 3, 0), batches(here, 0, 3, 0), strict=True)
    ]
    assert [path for path, _ in shelf.asked[before:]] == [f"/set/{MANIFEST}"], "all else lay in the cache"


def test_failures_and_slowness_that_pass_are_waited_out(shelf: Shelf, tmp_path: Path) -> None:
    far = remote(shelf, tmp_path)
    for faults in (["503", "500"], ["slow"], ["cut"]):
        shelf.faults = faults.copy()
        far.corpus.groups.parts[0].reader.cache = Cache(tmp_path / "none" / faults[0], 1e9)  # type: ignore[attr-defined]
        assert len(far.corpus.groups.read([0])[0].profiles) and shelf.faults == []


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("503", r"000000\.tar: no answer in 3 attempts over \d+ s \(the last: .*503.*see to the server, or raise data"),
        ("404", r"000000\.tar: FileNotFoundError; restore it"),
        ("whole", "does not answer ranges"),
    ],
)
def test_failures_that_stay_are_told_once_and_never_skipped(
    shelf: Shelf, tmp_path: Path, fault: str, told: str
) -> None:
    far = remote(shelf, tmp_path, on_error="skip", window_shards=1)
    shelf.always = fault
    with pytest.raises(RemoteError, match=told):
        far.corpus.groups.read([0])
    with pytest.raises(StreamError, match=r"attempts|restore|ranges"):
        next(batches(far, 0, 1, workers=0))


def test_what_is_damaged_on_the_way_is_found_out(shelf: Shelf, tmp_path: Path) -> None:
    far = remote(shelf, tmp_path)
    shelf.always = "damaged"
    with pytest.raises(StreamError, match=r"set/train/00000\d\.tar: group s\d_0000\d: damaged \(sha256\)"):
        next(batches(far, 0, 1, workers=0))
    with pytest.raises(ValueError, match="not readable as JSON"):
        remote(shelf, tmp_path)


def test_loader_processes_read_remote_shards(shards: Path, shelf: Shelf, tmp_path: Path) -> None:
    far = remote(shelf, tmp_path, remote_timeout_s=30.0)
    found = list(batches(far, 0, 1, workers=1))
    told = list(batches(stream(shards, window_shards=32), 0, 1, workers=0))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(found, told, strict=True) for name in b)


@pytest.mark.parametrize(
    ("url", "fact"),
    [
        ("http://example.org/set", "shards are read by https, s3 and from folders"),
        ("ftp://example.org/set", "shards are read by"),
        ("https://me:secret@example.org/set", r"https://\.\.\.@example\.org: leave user and password out"),
    ],
)
def test_other_schemes_are_refused(url: str, fact: str) -> None:
    with pytest.raises(ValueError, match=fact) as refused:
        open_corpus(config(url))
    assert "secret" not in str(refused.value)
    assert check_url("s3://bucket/set/") == "s3://bucket/set" and check_url("https://a.b/set") == "https://a.b/set"


def test_s3_asks_for_ranges_too(shards: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same server, spoken to as S3: a bucket is the first part of the path."""
    pytest.importorskip("s3fs")
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1",
                        "ENDPOINT_URL": shelf.url.removesuffix("/set")}.items():  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    server = Server("s3://set", 5.0, 0)
    tar = (shards / "train" / "000000.tar").read_bytes()
    assert server.ranges([("train/000000.tar", 512, 1024), ("train/000000.tar", 0, 10)]) == [tar[512:1024], tar[:10]]
    assert server.file(MANIFEST) == (shards / MANIFEST).read_bytes()


def test_a_missing_library_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(RemoteError, match=r"s3://none: .*install the extras train and s3"):
        Server("s3://none", 1.0, 0).file(MANIFEST)


def of(number: int) -> tuple[bytes, bytes]:
    """(sha256, bytes) number `number`: 1,000 bytes."""
    data = number.to_bytes(4, "little") * 250
    return hashlib.sha256(data).digest(), data


def test_the_cache_is_bounded_and_gives_back_only_what_was_put(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "groups", 20_000)
    for number in range(100):
        cache.put(*of(number))
        os.utime(cache._path(of(number)[0]), ns=(number, number))
    cache.evict()
    kept = [number for number in range(100) if cache.get(of(number)[0]) is not None]
    assert len(kept) <= 20 and kept == list(range(100 - len(kept), 100))
    path = cache._path(of(99)[0])
    path.write_bytes(b"torn")
    assert cache.get(of(99)[0]) is None and not path.exists()


def _use(folder: str, seed: int, rounds: int) -> None:
    cache = Cache(Path(folder), 30_000)
    for number in np.random.default_rng(seed).integers(0, 60, rounds).tolist():
        sha256, data = of(number)
        found = cache.get(sha256)
        assert found is None or found == data
        if found is None:
            cache.put(sha256, data)


def test_processes_share_a_cache_and_one_that_is_killed_blocks_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "groups"
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=_use, args=(str(folder), seed, 400)) for seed in range(3)]
    for process in running:
        process.start()
    time.sleep(0.2)
    running[0].kill()
    for process in running:
        process.join()
    assert [process.exitcode for process in running][1:] == [0, 0]
    _use(str(folder), 9, 200)
    Cache(folder, 30_000).evict()
    left = [path for path in folder.rglob("*") if path.is_file()]
    assert all(not path.name.startswith(".") for path in left), "what the killed one was writing is swept"
    assert sum(path.stat().st_size for path in left) <= 30_000
    assert all(files.sha256_file(path) == path.name for path in left)
