"""kill -9 at any moment of build and pack: the same command run again ends as if nothing had happened.

The process group of a command is killed at moments spread over the whole run. STORM_TEST_KILLS is the number of moments
of each case (default 6, 8 of pack, 2 where every process imports the libraries anew).
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import records

MEASURED = ("seconds", "peak_mb", "cost")  # what a record holds that no two runs share

# Runs are forked from a process that has done it all once: most of a short run would be imports.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.data_prep.warm", __name__])


def _command(module: str, words: Sequence[str], ready: Connection) -> None:
    os.setpgid(0, 0)
    ready.send(True)
    sys.exit(importlib.import_module(module).main(words))


def run(module: str, words: Sequence[str], seconds: float | None = None) -> tuple[int | None, float]:
    """A command in a process group of its own, killed after some seconds: its exit code, -9 then, and its seconds."""
    ready, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_command, args=(module, words, sender))
    process.start()
    ready.recv()
    start = time.monotonic()
    process.join(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int(process.pid or 0), signal.SIGKILL)
    process.join()
    return process.exitcode, time.monotonic() - start


def content(folder: Path) -> dict[str, Any]:
    """name -> None of every folder below one, the bytes of every file; of records what is not measured."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        found[name] = path.read_bytes() if path.is_file() else None
        if name.endswith(records.SUFFIX):
            found[name] = {k: v for k, v in json.loads(path.read_bytes()).items() if k not in MEASURED}
    return found


def survives(
    tmp_path: Path, module: str, words: Sequence[str], again: Sequence[str], kills: int, since: float = 0.0
) -> None:
    """Kill a command, which writes to {}, at `kills` moments from a share of its time on; `again` then ends as an
    undisturbed run."""

    def to(folder: Path, these: Sequence[str]) -> list[str]:
        return [word.format(folder / "out") for word in these]

    code, seconds = run(module, to(tmp_path / "whole", words))
    truth = content(tmp_path / "whole")
    assert (code, "out" in truth) == (0, True)
    number = torn = 0
    for share in since + (1 - since) * (np.arange(kills) + np.random.default_rng(kills).random(kills)) / kills:
        code = 0
        while code == 0:  # it was done before its moment came: then a little earlier
            number += 1
            folder = tmp_path / str(number)
            code, took = run(module, to(folder, words), share * seconds)
            share, seconds = (share, seconds) if code else (0.9 * share, took)
        assert code == -signal.SIGKILL
        torn += any(name not in truth for name in content(folder))
        assert run(module, to(folder, again))[0] == 0
        assert content(folder) == truth, f"killed after {share * seconds:.2f} of {seconds:.2f} s"
    print(f"{kills} runs of {number} were killed, {torn} left a temporary behind; undisturbed {seconds:.2f} s")
    assert torn or kills < 20, "none came while something was written: the moments are wrong"


def kills(default: int) -> int:
    return int(os.environ.get("STORM_TEST_KILLS", default))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of two small slides, and an image that is decoded into a scratch file."""
    from tests.data_prep import warm

    return warm.write_corpus(tmp_path_factory.mktemp("small"), whole=True)


TILES = ("tile_px=56", "tile_mpp=1.0", "max_image_mpx=1")


# Two workers import the libraries first: moments in that tell nothing.
@pytest.mark.parametrize(("workers", "default", "since"), [("1", 6, 0.0), ("2", 2, 0.5)])
def test_build_survives_kills(small: Path, tmp_path: Path, workers: str, default: int, since: float) -> None:
    words = [str(small), "--store", "{}", "--scratch", "{}-scratch", *TILES, "--workers"]
    survives(tmp_path, "data_prep.build", [*words, workers], [*words, "1"], kills(default), since)


def test_pack_survives_kills(small: Path, tmp_path: Path) -> None:
    stores = tmp_path / "stores"
    scratch = ["--scratch", str(tmp_path / "scratch")]
    assert run("data_prep.build", [str(small), "--store", str(stores), "--workers", "1", *scratch, *TILES])[0] == 0
    words = ["--store", str(stores), "--out", "{}", *TILES]
    survives(tmp_path, "data_prep.pack", words, words, kills(8))
