"""How fast stores become shards, and how fast both are read again; the part `packing` of data_prep.benchmark.

In: a folder of slide stores. Out: a Markdown table, MB per second of processor time of one process, beside two others
measured in turns in the same run:

* copied: the packed shards read, hashed twice and written again, which nothing that packs can beat.
* webdataset: the same samples, as bytes in memory, through webdataset's own ShardWriter.
"""

import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_prep import pack, verify
from storm import shards
from storm.prep_config import PrepConfig
from storm.store import SlideStore, paths


def _config(folder: Path) -> PrepConfig:
    info = SlideStore(paths(folder)[0]).info
    return PrepConfig(tile_px=info.tile_px, tile_mpp=info.tile_mpp)


def _shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.tar"))


def _copied(source: Path, target: Path) -> None:
    target.mkdir()
    for number, path in enumerate(_shard_paths(source)):
        data = path.read_bytes()
        hashlib.sha256(data)
        (target / f"{number}.tar").write_bytes(data)
        hashlib.sha256(data)


def _samples(folder: Path) -> Iterator[dict[str, Any]]:
    opened = shards.ShardSet(folder)
    for split in opened.manifest["splits"]:
        index = opened.index(split)
        for i in range(len(index)):
            path = folder / split / shards.shard_name(int(index.shard[i]))
            with path.open("rb") as handle:
                handle.seek(int(index.offset[i]))
                span = handle.read(int(index.size[i]))
            yield {"__key__": index.key(i), **shards.members(span)}


def _webdataset(samples: list[dict[str, Any]], target: Path) -> None:
    import webdataset

    target.mkdir()
    with webdataset.ShardWriter(str(target / "%06d.tar"), maxsize=100e6, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _turn(store_dir: Path, config: PrepConfig, out: Path) -> dict[str, float]:
    """Seconds of each way, once, in turns."""
    found = {
        "pack": _seconds(partial(pack.pack, store_dir, out, config)),
        "copied": _seconds(partial(_copied, out, out.with_suffix(".copied"))),
        "verify stores": _seconds(partial(verify.verify_folder, store_dir)),
        "verify shards": _seconds(partial(verify.verify_shards, out)),
    }
    return found | {"webdataset": _seconds(partial(_webdataset, list(_samples(out)), out.with_suffix(".webdataset")))}


def table(store_dir: Path, repeats: int) -> str:
    """The table for the stores of a folder. Raises ValueError where they cannot be packed."""
    import webdataset  # noqa: F401  its import is no part of its speed

    config = _config(store_dir)
    with tempfile.TemporaryDirectory(dir=store_dir.parent) as name:
        turns = [_turn(store_dir, config, Path(name) / str(turn)) for turn in range(repeats)]
        packed = sum(path.stat().st_size for path in _shard_paths(Path(name) / "0"))
    stored = sum(path.stat().st_size for path in paths(store_dir))
    size = {what: stored if what == "verify stores" else packed for what in turns[0]}
    rates = [size[what] / 1e6 / statistics.median(turn[what] for turn in turns) for what in size]
    rows = [[f"MB/s, {packed / 1e6:.0f} MB packed", *size], ["---"] * (1 + len(size))]
    rows.append([store_dir.name, *(f"{rate:.0f}" for rate in rates)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
