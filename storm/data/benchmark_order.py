"""What an order is worth and what it costs: how well it mixes slides, and a resume with 120 million profiles.

In: nothing. Out: tables in Markdown.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storm import files, shards
from storm.data.benchmark import make_shards, open_stream
from storm.data.order import Order
from storm.data.stream import Loader, Work, batches
from storm.index import INDEX
from storm.markdown import table

Ints = npt.NDArray[np.int64]

_POOL_SHARDS, _POOL_SLIDES = 40, 20  # pack mixes the groups of a pool: 4 GB of slides in shards of 100 MB
_BUFFER = 1000
_PER_PROFILE = 64  # profiles of a group, about
_RANKS, _LOADERS = 8, 8
_MB = 1e6


def slide_share(slides: Ints, batch: int) -> float:
    """Mean over the batches of a row of groups (told by their slides) of the largest share that one slide has."""
    whole = slides[: len(slides) // batch * batch].reshape(-1, batch)
    return float(np.mean([np.bincount(one).max() / batch for one in whole]))


def unevenness(slides: Ints) -> float:
    """How far slides are from spread evenly over an epoch: 0 is evenly, 1 is all at one moment.

    The mean over groups of the Kolmogorov-Smirnov distance between their slide's places and the uniform distribution.
    """
    total = 0.0
    for slide in np.unique(slides):
        places = (np.flatnonzero(slides == slide) + 0.5) / len(slides)
        steps = np.arange(len(places) + 1) / len(places)
        total += len(places) * max(np.abs(steps[1:] - places).max(), np.abs(places - steps[:-1]).max())
    return total / len(slides)


def _buffered(row: Sequence[int], rng: np.random.Generator) -> Iterator[int]:
    """A row through a shuffle buffer, as loaders that read one after another mix."""
    held = list(row[:_BUFFER])
    for one in row[_BUFFER:]:
        at = int(rng.integers(len(held)))
        yield held[at]
        held[at] = one
    yield from rng.permutation(held).tolist()


def shuffle_table(pools: int = 5, per_shard: int = 100, batch: int = 64) -> str:
    """Orders over a corpus as pack writes it."""
    rng, number = np.random.default_rng(0), pools * _POOL_SHARDS
    mixed = [
        rng.permutation(np.arange(_POOL_SHARDS * per_shard) % _POOL_SLIDES) + _POOL_SLIDES * p for p in range(pools)
    ]
    slide, groups = np.concatenate(mixed), np.full(number, per_shard)
    orders = {
        "full permutation": Order(groups, 0, batch).epoch(0),
        **{f"windows of {w} shards": Order(groups, 0, batch, w).epoch(0) for w in (32, 8)},
        f"shards permuted, a buffer of {_BUFFER}": np.array(
            list(_buffered(Order(groups, 0, batch, 1).epoch(0).tolist(), rng))
        ),
        "as written": np.arange(len(slide)),
    }
    rows = [[name, f"{slide_share(slide[o], batch):.3f}", f"{unevenness(slide[o]):.3f}"] for name, o in orders.items()]
    title = f"### Shuffles: {len(slide):,} groups of {pools * _POOL_SLIDES} slides, {number} shards, batches of {batch}"
    return f"{title}\n\n" + table(["order", "largest share of a slide in a batch", "unevenness of a slide"], rows)


def make_index(folder: Path, groups: int, per_shard: int = 100) -> Path:
    """A shard set of so many groups in which every shard is the same tar again, so that millions need no room."""
    make_shards(folder, (1, 1, 4, 20), per_shard, per_shard, tile_px=32)
    manifest = files.read_json(folder / shards.MANIFEST)
    entry, number = manifest["splits"]["train"], groups // per_shard
    rows = np.tile(np.load(folder / "train" / INDEX), number)
    rows["shard"] = np.repeat(np.arange(number), per_shard)
    with (folder / "train" / INDEX).open("wb") as handle:
        np.lib.format.write_array(handle, rows, allow_pickle=False)
    for shard in range(1, number):
        os.link(folder / "train" / shards.shard_name(0), folder / "train" / shards.shard_name(shard))
    entry["shards"] = [entry["shards"][0] | {"name": shards.shard_name(i)} for i in range(number)]
    entry |= {"groups": len(rows), "index_sha256": files.sha256_file(folder / "train" / INDEX)}
    files.write_json(folder / shards.MANIFEST, manifest)
    os.sync()  # a mapped page that waits to be written would count as a process's own
    return folder


def private_bytes() -> int:
    """Memory of this process that it shares with none: its heap, and not the pages of a mapped file."""
    told = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in told if line.startswith("Private_Dirty"))


def _resume(folder: str, batch: int) -> tuple[float, int, Loader, Work]:
    """(seconds to the first batch at 90 % of an epoch, what index and order take of a rank, what a loader is sent)."""
    before, began = private_bytes(), time.perf_counter()
    stream = open_stream(Path(folder), batch)
    step = stream.step_at(stream.position(int(0.9 * stream.order.size) // batch))
    work, paused = stream.work(step), time.perf_counter()
    own, resumed = private_bytes() - before, time.perf_counter()
    next(batches(stream, step, step + 1, workers=0))
    return time.perf_counter() - resumed + paused - began, own, stream.loader, work


def _found(loader: Loader, work: Work, before: int) -> int:
    """What the index takes of a loader process that has looked its groups up."""
    for place in work.places:
        loader.groups.source(place.group)
    return private_bytes() - before


def _alone(target, *of):  # type: ignore[no-untyped-def]
    """The answer of a function in a fresh process that has the same modules."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        before = pool.apply(private_bytes)
        return pool.apply(target, (*of, before) if target is _found else of)


def scale_table(groups: Sequence[int], batch: int = 64) -> str:
    """First batch after a resume, and memory of the index on a node, for so many groups."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in groups:
            folder = make_index(Path(scratch) / str(number), number)
            took, rank, loader, work = _alone(_resume, str(folder), batch)
            each = _alone(_found, loader, work)
            mapped = (folder / "train" / INDEX).stat().st_size
            total = mapped + _RANKS * rank + _RANKS * _LOADERS * each
            rows.append([f"{number:,}", f"{number * _PER_PROFILE / 1e6:.1f} M", f"{took:.2f}", f"{mapped / _MB:.0f}",
                         f"{rank / _MB:.0f}", f"{each / _MB:.0f}", f"{total / _MB:.0f}"])  # fmt: skip
    title = f"### A resume at 90 % of an epoch, batches of {batch}; {_RANKS} ranks x {_LOADERS} loaders"
    columns = ["groups", "profiles", "first batch, s", "index, mapped once, MB", "a rank's own, MB",
               "a loader's own, MB", "node, MB"]  # fmt: skip
    return f"{title}\n\n" + table(columns, rows)
