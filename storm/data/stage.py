"""Staging: shards copied to a disk of the node's own while the run goes on; what is not there comes from its source.

In: the corpus's readers and the order. Out: `<stage_dir>/storm-stage/<sha256>.tar`, each complete and of that hash or
absent. All shards where they fit, else those of the coming windows; those of past windows make room. One process of a
node copies (local rank 0), all read; a copy that a kill cut short is swept, complete ones stay for the next start.
"""

import os
import shutil
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Protocol

from storm import files
from storm.config import DataConfig
from storm.data import places
from storm.data.order import Order
from storm.index import DamagedError, Span
from storm.shards import Tars

_BLOCK_BYTES = 1 << 20
_OF_FREE = 0.8
_GB = 1e9


class Source(Protocol):
    """The reader whose shards are copied."""

    def read(self, spans: Sequence[Span]) -> list[bytes]: ...

    def path(self, number: int) -> str: ...

    def open(self, number: int) -> BinaryIO: ...


@dataclass(frozen=True)
class Shard:
    """A shard to be copied: its number among those of its source, its hash and size."""

    source: Source
    number: int
    sha256: str
    size: int


class Staged:
    """Reads from copies where there are some, else from the source; as `shards.Tars` does."""

    def __init__(self, source: Source, folder: Path, digests: Sequence[str]) -> None:
        self.source, self._near = source, Tars(folder, [f"{digest}.tar" for digest in digests])

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of groups, verified. Raises DamagedError as the source does."""
        found = {span.key: self._copy(span) for span in spans}
        missing = [span for span in spans if found[span.key] is None]
        found |= zip([span.key for span in missing], self.source.read(missing) if missing else [], strict=True)
        return [data for span in spans if (data := found[span.key]) is not None]

    def _copy(self, span: Span) -> bytes | None:
        if not self._near.has(span.shard):
            return None
        try:
            return self._near.read([span])[0]
        except DamagedError as error:
            print(f"{error}: the copy is removed, and the group read from its source", file=sys.stderr, flush=True)
            Path(self._near.path(span.shard)).unlink(missing_ok=True)
            return None

    def path(self, number: int) -> str:
        """Where the shard itself lies."""
        return self.source.path(number)


def stage_folder(data: DataConfig, far: bool) -> Path | None:
    """The folder to copy to; None for none. `auto` copies what lies far, in a job that has a folder of its own.

    Raises:
        ValueError: the folder is another user's.
    """
    named = places.job_folder() if data.stage_dir == "auto" and far else None
    if data.stage_dir not in ("", "auto"):
        named = Path(data.stage_dir)
    return places.own_folder(named / "storm-stage") if named else None


class Stager(threading.Thread):
    """Copies the shards of the coming groups, as far as they fit."""

    def __init__(self, folder: Path, shards: Sequence[Shard], limit_gb: float) -> None:
        """`shards` in the numbering of the order."""
        super().__init__(name="stager", daemon=True)
        self.folder, self.shards, self._limit_gb = folder, list(shards), limit_gb
        self._spoiled: set[str] = set()
        self._moved = threading.Event()

    def follow(self, order: Order, step: int) -> None:
        """Tell which step is taken next; the first call begins to copy, in one process of the node alone."""
        self._order, self._at = order, step * order.global_batch_size
        self._moved.set()
        first = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
        if first and self.ident is None:
            self.start()

    def run(self) -> None:
        """Copy for as long as the process lives, or until all is there."""
        try:
            files.sweep(self.folder)
            while True:
                self._moved.clear()
                wanted = self._wanted()
                missing = [shard for shard in wanted if not self._path(shard).is_file()]
                if missing:
                    self._make_room(wanted)
                    self._copy(missing[0])
                elif len(wanted) + len(self._spoiled) >= len(self.shards) or not self._order.window_shards:
                    return
                else:
                    self._moved.wait()
        except OSError as error:
            print(
                f"{self.folder}: staging ends ({error}); the rest is read from its source", file=sys.stderr, flush=True
            )

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _wanted(self) -> list[Shard]:
        """The shards to have, the most urgent first, as many as the limit allows."""
        there = sum(shard.size for shard in self.shards if self._path(shard).is_file())
        limit = self._limit_gb * _GB or _OF_FREE * (shutil.disk_usage(self.folder).free + there)
        wanted: dict[str, Shard] = {}
        for number in self._order.shards_ahead(self._at):
            shard = self.shards[number]
            if shard.sha256 in wanted or shard.sha256 in self._spoiled:
                continue
            limit -= shard.size
            if limit < 0:
                break
            wanted[shard.sha256] = shard
        return list(wanted.values())

    def _make_room(self, wanted: list[Shard]) -> None:
        """Remove this corpus's shards that are not wanted; an open one stays readable."""
        for shard in {shard.sha256: shard for shard in self.shards}.values():
            if shard not in wanted:
                self._path(shard).unlink(missing_ok=True)

    def _copy(self, shard: Shard) -> None:
        new, digest = files.temporary(self._path(shard)), sha256()
        try:
            with shard.source.open(shard.number) as source, new.open("wb") as target:
                while block := source.read(_BLOCK_BYTES):
                    digest.update(block)
                    target.write(block)
            if digest.hexdigest() == shard.sha256:
                files.put(new, self._path(shard))
                return
            fact = "its sha256 is not that of the manifest"
        except ValueError as error:  # a server that does not answer
            fact = str(error)
        finally:
            new.unlink(missing_ok=True)
        self._spoiled.add(shard.sha256)
        print(f"{shard.source.path(shard.number)}: not staged: {fact}", file=sys.stderr, flush=True)
