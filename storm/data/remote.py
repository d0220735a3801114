"""Shards behind a URL: ranges of bytes by fsspec, asked again when they fail, and kept in a bounded local cache.

In: a URL (https, s3; http of this machine alone), spans. Out: the groups' bytes, verified.

    <cache>/sets/<name>/        manifest, genes, index: a shard set without tars, opened as any other
    <cache>/groups/ab/abcd...   a group's bytes under their own sha256

A group comes by its own range, so a node reads what its ranks take and not whole shards, and the first batch after a
resume waits for itself alone. The cache needs no lock: a file is complete under its name or absent, its name says what
it must hold, and whoever finds it gone asks the server again.
"""

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from storm import files
from storm.index import INDEX, Span
from storm.shards import GENES, MANIFEST, check_span, shard_name

SCHEMES = ("https", "s3")
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_FILLED = 0.9  # of the cache's limit is left by an eviction
_LOOKS = 32  # evictions are thought of whenever a process has added this part of the limit

Found = TypeVar("Found")


class RemoteError(ValueError):
    """A server does not give what it should; no fault of a single group, so nothing is skipped for it."""


def is_url(name: str) -> bool:
    """Whether a shard set is named by a URL."""
    return "://" in name


def check_url(url: str) -> str:
    """The URL without a slash at its end. Raises ValueError where its scheme is not one of those that are read."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise ValueError(f"{url}: shards are read by {', '.join(SCHEMES)} and from folders; name one of these")
    if parts.username or parts.password:
        raise ValueError(f"{parts.scheme}://...@{parts.hostname}: leave user and password out of the URL; for s3 set "
                         "them as the AWS tools read them")  # fmt: skip
    return url.rstrip("/")


@dataclass(frozen=True)
class Server:
    """Files below a URL, and how long to try for them."""

    url: str
    timeout_s: float
    retries: int

    @functools.cached_property
    def _files(self) -> Any:
        import fsspec

        scheme = urlsplit(self.url).scheme
        if scheme == "s3":
            limits = {"connect_timeout": self.timeout_s, "read_timeout": self.timeout_s, "retries": {"max_attempts": 1}}
            return fsspec.filesystem("s3", config_kwargs=limits, use_listings_cache=False)
        import aiohttp

        limit = aiohttp.ClientTimeout(total=None, sock_connect=self.timeout_s, sock_read=self.timeout_s)
        return fsspec.filesystem(scheme, client_kwargs={"timeout": limit}, use_listings_cache=False)

    def __reduce__(self) -> Any:
        return Server, (self.url, self.timeout_s, self.retries)  # a connection is no other process's

    def file(self, path: str) -> bytes:
        """A whole file. Raises RemoteError."""
        return self._again(path, lambda: bytes(self._files.cat_file(f"{self.url}/{path}")))

    def ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """The bytes [start, end) of files, asked for at once. Raises RemoteError."""
        paths, starts, ends = map(list, zip(*wanted, strict=True))
        paths = [f"{self.url}/{path}" for path in paths]
        return self._again(wanted[0][0], lambda: list(self._files.cat_ranges(paths, starts, ends, on_error="raise")))

    def open(self, path: str) -> BinaryIO:
        """A file from its beginning."""
        found: BinaryIO = self._again(
            path, lambda: self._files.open(f"{self.url}/{path}", "rb", cache_type="readahead")
        )
        return found

    def _again(self, path: str, ask: Callable[[], Found]) -> Found:
        began, wait = time.monotonic(), _FIRST_WAIT_S
        for attempt in range(self.retries + 1):
            try:
                return ask()
            except ImportError as error:
                raise RemoteError(f"{self.url}: {error}; install the extras train and s3 of storm-tissue") from None
            except (FileNotFoundError, PermissionError) as error:
                raise RemoteError(
                    f"{self.url}/{path}: {type(error).__name__}; restore it, or see to its access"
                ) from None
            except Exception as error:  # noqa: BLE001  # of aiohttp, botocore, sockets: no common base
                last = f"{type(error).__name__}: {error}".strip(": ")
            if attempt < self.retries:
                time.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT_S)
        raise RemoteError(
            f"{self.url}/{path}: no answer in {self.retries + 1} attempts over {time.monotonic() - began:.0f} s (the "
            f"last: {last}); see to the server, or raise data.remote_timeout_s or data.remote_retries"
        )


def mirror(server: Server, split: str, cache: Path) -> Path:
    """A folder with the manifest, the genes and a split's index of a remote shard set.

    Raises:
        RemoteError: they do not come.
    """
    folder = cache / "sets" / hashlib.sha256(server.url.encode()).hexdigest()[:16]
    manifest = server.file(MANIFEST)
    told = files.parse_json(manifest, f"{server.url}/{MANIFEST}")
    wanted = {GENES: told.get("genes_sha256")} if isinstance(told, dict) else {}
    entry = told["splits"].get(split) if wanted and isinstance(told.get("splits"), dict) else None
    if entry:
        wanted[f"{split}/{INDEX}"] = entry.get("index_sha256")
    for name, sha256 in wanted.items():
        if not (folder / name).is_file() or files.sha256_file(folder / name) != sha256:
            files.write_bytes(folder / name, server.file(name))
    files.write_bytes(folder / MANIFEST, manifest)
    return folder


class Cache:
    """Bytes under their own sha256, the longest unused removed when they are too many."""

    def __init__(self, folder: Path, limit_bytes: float) -> None:
        self.folder, self.limit_bytes, self._added = folder, limit_bytes, 0

    def _path(self, sha256: bytes) -> Path:
        name = sha256.hex()
        return self.folder / name[:2] / name

    def get(self, sha256: bytes) -> bytes | None:
        """The bytes, or None where they are not here (or were just removed)."""
        try:
            data = self._path(sha256).read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(data).digest() != sha256:
            self._path(sha256).unlink(missing_ok=True)
            return None
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._path(sha256))
        return data

    def put(self, sha256: bytes, data: bytes) -> None:
        """Keep bytes. Not fsynced: what a crash spoils is found out by its hash and asked for again."""
        path = self._path(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = files.temporary(path)
        new.write_bytes(data)
        os.replace(new, path)
        self._added += len(data)
        if self._added > self.limit_bytes / _LOOKS:
            self._added = 0
            self.evict()

    def evict(self) -> None:
        """Remove the longest unused until nine tenths of the limit are left, and what dead processes left half-written.

        Safe beside readers and other evictions: an open file stays readable, a missing one is asked for again.
        """
        found = []
        for part in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            files.sweep(part)
            with os.scandir(part) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue  # of a process that is writing it
                    with contextlib.suppress(FileNotFoundError):
                        stat = entry.stat()
                        found.append((stat.st_mtime_ns, stat.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        if total <= self.limit_bytes:
            return
        for _, size, path in sorted(found):
            if total <= _FILLED * self.limit_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= size


class RemoteTars:
    """The tars of a split behind a URL; reads as `shards.Tars` does."""

    def __init__(self, server: Server, split: str, cache: Cache) -> None:
        self.server, self.split, self.cache = server, split, cache

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of groups, from the cache or by one round of requests for all that are missing.

        Raises:
            DamagedError: bytes are not those that were packed.
            RemoteError: the server does not answer.
        """
        found = {span.sha256: self.cache.get(span.sha256) for span in spans}
        missing = list({span.sha256: span for span in spans if found[span.sha256] is None}.values())
        wanted = [(self._name(s.shard), s.offset, s.offset + s.size) for s in missing]
        for span, data in zip(missing, self.server.ranges(wanted) if wanted else [], strict=True):
            if len(data) > span.size:
                raise RemoteError(f"{self.server.url}: the server does not answer ranges; use one that does, or copy "
                                  "the shards to a folder")  # fmt: skip
            check_span(data, span, f"{self.server.url}/{self._name(span.shard)}", foreign=True)
            self.cache.put(span.sha256, data)
            found[span.sha256] = data
        return [kept for span in spans if (kept := found[span.sha256]) is not None]

    def _name(self, number: int) -> str:
        return f"{self.split}/{shard_name(number)}"

    def path(self, number: int) -> str:
        """The URL of a shard."""
        return f"{self.server.url}/{self._name(number)}"

    def open(self, number: int) -> BinaryIO:
        """A shard from its beginning, to be copied."""
        return self.server.open(self._name(number))
