"""Who is still there, and what a step waits for: a thread in every rank, beside the training.

In: each rank's beat, once a second, in the store of rank 0 (or of torchrun). Out: the end of all ranks within a minute
where one has left or failed, its cause told once; a line where no step ends for a while.

A rank that is killed takes its connections down, which the others' collectives report at once but without its name, or
not at all (NCCL). So beats are compared: one that no longer changes is of a rank that has left. Each rank looks at the
next one's only, so that a look costs the same for any number of ranks.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # its stubs do not export them

from storm.train.ranks import Place
from storm.train.stop import FAULT, USAGE, RankLeftError, ToldError

BEAT_S = 1.0
LOST_BEATS = 30  # compiled code may hold Python's lock for seconds; only where no collective has failed
SUSPECT_BEATS = 5  # where one has
END_S = 10.0  # how long a rank may take to end, once the job's end is known
_WHY = "why"  # key of what ends the job


@dataclass
class Progress:
    """What a rank does now, for the others to see."""

    step: int = 0
    waits_for: str = "its start"

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Inside, the rank waits for `what`."""
        before, self.waits_for = self.waits_for, what
        yield  # an error leaves it as it was when the error came
        self.waits_for = before


class Watch:
    """The thread, for as long as a `with` block trains; all ranks enter it, and leave it where nothing fails.

    Raises, at the block's end:
        RankLeftError: another rank has left; the error in the block only followed.
        ToldError: another rank tells the same or the first error.
    """

    def __init__(self, place: Place, progress: Progress, stall_s: float) -> None:
        self.place, self.progress, self.stall_s = place, progress, stall_s
        self._store: Store | None = None
        self._count, self._last, self._still = 0, b"", 0
        self._step, self._since = -1, time.monotonic()
        self._ending, self._claimed, self._lock = False, False, threading.Lock()
        self._left = threading.Event()

    def __enter__(self) -> "Watch":
        if self.place.size > 1:
            # A connection of its own: the process group's may be blocked for as long as a rank waits.
            store = TCPStore(
                self.place.address, self.place.port, is_master=False, timeout=timedelta(seconds=LOST_BEATS * BEAT_S)
            )
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = PrefixStore(f"watch{attempt}", store)
            self._beat()
            torch.distributed.barrier()  # from here on every rank has a beat
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._store is not None:
            if error is None:
                self._ending = True  # who passes the barrier first may be gone before the others' next beat
                torch.distributed.barrier()
            elif isinstance(error, Exception):
                self._fail(error)
        self._left.set()

    def _run(self) -> None:
        while not self._left.wait(BEAT_S):
            self._tell_stall()
            if self._store is None:
                continue
            try:
                self._beat()
                if self._store.check([_WHY]):
                    why = json.loads(self._store.get(_WHY))
                    return None if why["by"] == self.place.rank else _end_in(2 * BEAT_S, why["code"])
                lost = self._next_lost()
            except RuntimeError:
                lost = "" if self._ending else self._no_store()
            if lost and self._claim(lost, FAULT):
                print(f"error: {lost}", file=sys.stderr, flush=True)
            if lost:
                return _end_in(3 * BEAT_S, FAULT)  # rank 0 may hold the store, in which the others read the reason

    def _beat(self) -> None:
        self._count += 1
        state = {"count": self._count, "host": self.place.host, "waits_for": self.progress.waits_for}
        assert self._store is not None
        self._store.set(_key(self.place.rank), json.dumps(state))

    def _next_lost(self) -> str:
        """Whether the next rank's beat has stood still for long."""
        assert self._store is not None
        rank = (self.place.rank + 1) % self.place.size
        beat = self._store.get(_key(rank))
        self._last, self._still = beat, self._still + 1 if beat == self._last else 0
        return _left({rank: json.loads(beat)}, LOST_BEATS * BEAT_S) if self._still >= LOST_BEATS else ""

    def _beats(self) -> dict[int, dict[str, Any]]:
        """Each rank's last beat."""
        if self._store is None:
            return {0: {"count": 0, "host": self.place.host, "waits_for": self.progress.waits_for}}
        beats = self._store.multi_get([_key(rank) for rank in range(self.place.size)])
        return {rank: json.loads(beat) for rank, beat in enumerate(beats)}

    def _no_store(self) -> str:
        return f"no sign of rank 0: its store at {self.place.address}:{self.place.port} is gone; the others end"

    def _fail(self, error: Exception) -> None:
        """Find out whose fault an error of this rank is, and let the others know."""
        code = FAULT if isinstance(error, RuntimeError) else getattr(error, "code", USAGE)
        _end_in(SUSPECT_BEATS * BEAT_S + END_S, code)  # whatever hangs from here on
        lost = self._left_now() if isinstance(error, RuntimeError) else ""
        first = self._claim(lost or f"{self.place}: {type(error).__name__}: {error}", code)
        if self.place.rank == 0:
            time.sleep(2 * BEAT_S)  # it may hold the store, in which the others read the reason
        if lost and first:
            raise RankLeftError(lost) from error
        if not first and (lost or isinstance(error, ValueError | OSError | ArithmeticError)):
            raise ToldError(code) from error

    def _left_now(self) -> str:
        """Which ranks have left, by a look at all beats and another one; '' where all go on."""
        try:
            before = self._beats()
            time.sleep(SUSPECT_BEATS * BEAT_S)
            after = self._beats()
        except RuntimeError:
            return self._no_store()
        still = {rank: beat for rank, beat in after.items() if beat["count"] == before[rank]["count"]}
        return _left(still, SUSPECT_BEATS * BEAT_S)

    def _claim(self, text: str, code: int) -> bool:
        """Whether this thread of this rank is the first to say why the job ends."""
        with self._lock:
            if self._claimed:
                return False
            self._claimed = True
        mine = json.dumps({"text": text, "code": code, "by": self.place.rank})
        assert self._store is not None
        try:
            return bool(self._store.compare_set(_WHY, "", mine).decode() == mine)
        except RuntimeError:
            return True  # no store, so nobody else to tell

    def _tell_stall(self) -> None:
        """Rank 0: a line for each `stall_s` in which no step ended, with what the ranks wait for."""
        if self.place.rank:
            return
        now = time.monotonic()
        if self.progress.step != self._step:
            self._step, self._since = self.progress.step, now
        if now - self._since >= self.stall_s:
            self._since = now
            waits = self._waits()
            print(f"warning: no step ended for {self.stall_s:.0f} s after step {self._step}: {waits}", flush=True)

    def _waits(self) -> str:
        found: dict[str, list[str]] = {}
        try:
            for rank, beat in self._beats().items():
                found.setdefault(beat["waits_for"], []).append(f"rank {rank} on {beat['host']}")
        except RuntimeError:
            return self._no_store()
        return "; ".join(f"{_some(ranks)} waits for {what}" for what, ranks in found.items())


def _key(rank: int) -> str:
    return f"beat{rank}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _left(beats: dict[int, dict[str, Any]], seconds: float) -> str:
    ranks = [f"rank {rank} on {beat['host']} (it waited for {beat['waits_for']})" for rank, beat in beats.items()]
    return f"no sign for {seconds:.0f} s of {_some(ranks)}: gone; the others end" if ranks else ""


def _end_in(seconds: float, code: int) -> None:
    """End this process, whatever its other threads wait for."""

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
