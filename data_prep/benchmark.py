"""How fast and how small preparation is.

    python -m data_prep.benchmark images [--slide FILE ...]     the reading of slides
    python -m data_prep.benchmark packing --store STORE         packing and verifying (benchmark_packing.py)
    python -m data_prep.benchmark builds                        whole builds of large sections (benchmark_builds.py)

In: synthetic slides that it writes itself, and slides of the user's. Out: Markdown tables. All that is compared is
measured in one run, in turns, several times; medians are told, of ratios those within a turn, and rates are per second
of processor time, so that others on the machine disturb them little.

* plain: a loop over the grid as anyone would write it: OpenSlide's read_region, RGB, resize, JPEG.
* ours: the same tiles by Slide.read, in the order of a build.
* limit: each segment that the tiles touch is decoded once into the same memory, each tile encoded; nothing else.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import simplejpeg
import tifffile

from data_prep import benchmark_builds, benchmark_packing, build, one_slide, slides, tissue
from data_prep.slides import segments
from data_prep.slides.reference import ReferenceSlide
from data_prep.slides.tiff import TiffSlide
from data_prep.synthetic.render import Stain, render
from data_prep.synthetic.tissue import grow

_TILE_PX, _TILE_MPP, _QUALITY = 224, 0.5, 90
_SEGMENT_PX, _TEXTURE_PX = 256, 2048
_APERIO = "Aperio Image Library v11\r\n|AppMag = 20|MPP = {mpp}"


@dataclass(frozen=True)
class Case:
    """A slide, um per pixel of its level 0, and of the tiles."""

    name: str
    path: Path
    mpp: float
    tile_mpp: float = _TILE_MPP

    @property
    def ratio(self) -> float:
        """Level-0 px per px of a tile."""
        return self.tile_mpp / self.mpp


def _encoded(pixels: slides.Pixels) -> bytes | bytearray:
    return simplejpeg.encode_jpeg(pixels, _QUALITY, "RGB", "420", fastdct=False)  # as one_slide does


def _texture(size_px: int, mpp: float) -> slides.Pixels:
    """H&E of synthetic tissue without its white margin, [size, size, 3]."""
    rng = np.random.default_rng(0)
    picture = render(rng, grow(rng, 1.5 * size_px * mpp), Stain(1.0, 1.0, 0.0, 245.0, 0, 0), mpp)
    start = (len(picture) - size_px) // 2
    return np.ascontiguousarray(picture[start : start + size_px, start : start + size_px])


def _segments(texture: slides.Pixels, encode: Callable[[slides.Pixels], bytes]) -> list[list[bytes]]:
    """Encoded squares of a picture, by row and column."""
    side, n = _SEGMENT_PX, len(texture) // _SEGMENT_PX
    return [
        [encode(np.ascontiguousarray(texture[r * side : (r + 1) * side, c * side : (c + 1) * side])) for c in range(n)]
        for r in range(n)
    ]


def write_repeated(path: Path, rows: int, cols: int, encoded: list[list[bytes]], codec: int, mpp: float) -> Path:
    """A slide of `rows` x `cols` segments of one level, those that were encoded over and over."""

    def tiles() -> Iterator[bytes]:
        for row in range(rows):
            for col in range(cols):
                yield encoded[row % len(encoded)][col % len(encoded[0])]

    options = {"photometric": "ycbcr", "subsampling": (2, 2)} if codec == segments.JPEG else {"photometric": "rgb"}
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        writer.write(
            tiles(), shape=(rows * _SEGMENT_PX, cols * _SEGMENT_PX, 3), dtype=np.uint8, compression=codec,
            tile=(_SEGMENT_PX, _SEGMENT_PX), metadata=None, description=_APERIO.format(mpp=mpp), **options,
        )  # fmt: skip
    return path


def _jpeg(pixels: slides.Pixels) -> bytes:
    return bytes(simplejpeg.encode_jpeg(pixels, 80, "RGB", "420", fastdct=False))


def _jpeg2000(pixels: slides.Pixels) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(pixels, level=38, codecformat="j2k", mct=False))


def synthetic_cases(folder: Path) -> list[Case]:
    """JPEG read at twice and at once its pixel size; JPEG 2000 on a slide as wide as real ones."""
    texture = _texture(_TEXTURE_PX, 0.25)
    encoded = _segments(texture, _jpeg)
    half = cv2.resize(texture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    fine = write_repeated(folder / "fine.svs", 32, 32, encoded, segments.JPEG, 0.25)
    native = write_repeated(folder / "native.svs", 16, 32, _segments(half, _jpeg), segments.JPEG, 0.5)
    wide = write_repeated(folder / "wide.svs", 4, 160, _segments(half[:1024, :1024], _jpeg2000), 33005, 0.5)
    return [
        Case("JPEG, 8192 x 8192 px, 0.25 read at 0.5", fine, 0.25),
        Case("JPEG, 8192 x 4096 px, 0.5 read at 0.5", native, 0.5),
        Case("JPEG 2000 (33005), 40960 x 1024 px, 0.5 read at 0.5", wide, 0.5),
    ]


def _grid(case: Case, slide: slides.Slide) -> slides.Grid:
    return slides.Grid.over(slide, _TILE_PX * case.ratio)


def _places(grid: slides.Grid) -> list[tuple[int, int]]:
    return [(row, col) for row in range(grid.rows) for col in range(grid.cols)]


def _plain(case: Case) -> Callable[[], int]:
    """A loop as anyone would write it, over a slide that was just opened."""
    reference = ReferenceSlide(case.path)
    handle, grid = reference.handle(), _grid(case, reference)
    level = handle.get_best_level_for_downsample(case.ratio)
    downsample = handle.level_downsamples[level]

    def run() -> int:
        for row, col in _places(grid):
            x, y, w, h = grid.box(row, col)
            size = (round(w / downsample), round(h / downsample))
            pixels = np.asarray(handle.read_region((x, y), level, size).convert("RGB"))
            if size != (_TILE_PX, _TILE_PX):
                pixels = cv2.resize(pixels, (_TILE_PX, _TILE_PX), interpolation=cv2.INTER_AREA)
            _encoded(pixels)
        return grid.rows * grid.cols

    return run


def _ours(case: Case, most: int | None = None) -> Callable[[], int]:
    """The same tiles, or the first `most` rows of them, in the order of a build."""
    slide = slides.open_slide(case.path, 150)
    grid = _grid(case, slide)
    places = sorted([place for place in _places(grid) if place[0] < (most or grid.rows)], key=one_slide._block_order)

    def run() -> int:
        for row, col in places:
            _encoded(slide.read(*grid.box(row, col), _TILE_PX))
        return len(places)

    return run


def _limit(case: Case) -> Callable[[], int]:
    """Segments that the tiles touch, from memory, each into the same memory; as many tiles, of this slide."""
    slide = slides.open_slide(case.path, 150)
    if not isinstance(slide, TiffSlide):
        raise ValueError(f"{case.path}: is not read segment by segment; name a tiled TIFF or SVS")
    grid = _grid(case, slide)
    level, layout = _level(slide, case.ratio)
    data = [slide.bytes_of(level, i) for i in range(layout.offsets.shape[1])]
    tiles = [slide.read(*grid.box(row, col), _TILE_PX) for row, col in _places(grid)[:256]]
    memory = np.empty((*layout.segment_px, 3), np.uint8) if layout.takes_memory else None

    def run() -> int:
        for planes in data:
            segments.decoded(layout, planes, layout.segment_px[0], memory=memory)
        for i in range(grid.rows * grid.cols):
            _encoded(tiles[i % len(tiles)])
        return grid.rows * grid.cols

    return run


def _level(slide: TiffSlide, ratio: float) -> tuple[int, segments.Layout]:
    level = max(i for i, at in enumerate(slide.levels) if i == 0 or at.across <= 1.01 * ratio)
    return level, slide.layouts[level]


_WAYS: dict[str, Callable[[Case], Callable[[], int]]] = {"plain": _plain, "ours": _ours, "limit": _limit}


def speeds(case: Case, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median tiles per second of processor time, of each way, and how many times that of another way ours is.

    The opening of the slide is not in it.
    """
    turns: list[dict[str, float]] = []
    for _ in range(repeats):
        turns.append({})
        for name, way in _WAYS.items():
            run = way(case)
            start = time.process_time()
            tiles = run()
            turns[-1][name] = tiles / (time.process_time() - start)
    rates = {name: statistics.median(turn[name] for turn in turns) for name in _WAYS}
    ratios = {name: statistics.median(turn["ours"] / turn[name] for turn in turns) for name in ("plain", "limit")}
    return rates, ratios


def _loop(way: str, case: Case, repeats: int, barrier: Barrier, sender: Connection) -> None:
    cv2.setNumThreads(1)
    runs = [_WAYS[way](case) for _ in range(repeats)]
    barrier.wait()
    start, busy = time.perf_counter(), time.process_time()
    for run in runs:
        run()
    sender.send((time.perf_counter() - start, time.process_time() - busy))


def _at_once(way: str, case: Case, workers: int) -> tuple[float, float]:
    """Seconds by the clock and of processor time, of the slowest of some processes."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers)
    pipes = [context.Pipe(duplex=False) for _ in range(workers)]
    running = [context.Process(target=_loop, args=(way, case, 3, barrier, sender)) for _, sender in pipes]
    for process in running:
        process.start()
    told = [receiver.recv() for receiver, _ in pipes]
    for process in running:
        process.join()
    return max(wall for wall, _ in told), max(busy for _, busy in told)


def scaling(case: Case, repeats: int) -> dict[str, tuple[float, float]]:
    """How many times the tiles per second of one process two of them give: by the clock, and by processor time.

    Of ours, and of the limit, which shares nothing: what that misses, the machine does not give. By the clock the
    quickest repeats count: two processes on two cores feel everyone else on the machine. By processor time only what
    they take from each other is seen: memory, caches.
    """
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(repeats):
        for way in ("ours", "limit"):
            for workers in (1, 2):
                seconds.setdefault((way, workers), []).append(_at_once(way, case, workers))
    best = {name: [min(one) for one in zip(*found, strict=True)] for name, found in seconds.items()}
    return {
        way: (2 * best[way, 1][0] / best[way, 2][0], 2 * best[way, 1][1] / best[way, 2][1]) for way in ("ours", "limit")
    }


def _walk(case: Case, blocks: int) -> None:
    cv2.setNumThreads(1)
    slide = slides.open_slide(case.path, 150)
    grid = _grid(case, slide)
    tissue.read_overview(slide, grid)
    _ours(case, 8 * blocks)()


def _measured(case: Case, blocks: int, sender: Connection) -> None:
    start = time.perf_counter()
    _walk(case, blocks)
    sender.send((build.peak_mb() * 1e6, time.perf_counter() - start))


def peak_memory(case: Case, blocks: int = 3) -> tuple[float, float]:
    """Peak resident memory, GB, and seconds, of a process that reads the overview and rows of blocks of tiles."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(case, blocks, sender))
    process.start()
    peak_bytes, seconds = receiver.recv()
    process.join()
    return peak_bytes / 1e9, seconds


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def images(given: Sequence[Path], repeats: int, sizes_k: Sequence[int]) -> None:
    """Print the tables. Raises ValueError: a slide that cannot be read, or tells no mpp."""
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = [case for path in given for case in _given(path)] + synthetic_cases(folder)
        rows = []
        for case in cases:
            rates, ratios = speeds(case, repeats)
            told = [f"{rates[way]:.0f}" for way in _WAYS]
            rows.append([case.name, *told, *(f"{ratio:.2f}" for ratio in ratios.values())])
        head = ["tiles of 224 px", "plain /s", "ours /s", "limit /s", "ours / plain", "ours / limit"]
        print(_table(head, rows), flush=True)
        found = scaling(cases[-3], repeats)
        head = [f"two processes, times one (load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)", *found]
        rows = [[by, *(f"{of[i]:.2f}" for of in found.values())] for i, by in enumerate(["clock", "processor time"])]
        print(_table(head, rows), flush=True)
        encoded = _segments(_texture(_TEXTURE_PX, 0.25), _jpeg)
        rows = []
        for k in sizes_k:
            n = k * 1000 // _SEGMENT_PX
            case = Case(f"{k} k", write_repeated(folder / f"{k}.svs", n, n, encoded, segments.JPEG, 0.25), 0.25)
            peak_gb, seconds = peak_memory(case)
            rows.append([f"{n * _SEGMENT_PX} px", f"{peak_gb:.2f}", f"{seconds:.0f}"])
            case.path.unlink()
        print(_table(["square slide, one level: overview and 3 rows of blocks", "peak GB", "s"], rows))


def _given(path: Path) -> list[Case]:
    """A slide read at the tiles' pixel size, and at its own."""
    slide = slides.open_slide(path, 150)
    mpp = slide.embedded_mpp
    if not mpp:
        raise ValueError(f"{path}: tells no pixel size; name another slide")
    size = f"{path.name}, {slide.width_px0} x {slide.height_px0} px, {mpp:.3g} read at"
    return [Case(f"{size} {_TILE_MPP}", path, mpp), Case(f"{size} its own", path, mpp, mpp)]


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.benchmark", description=__doc__.split("\n\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("images", help="tiles per second against OpenSlide and against the limit; memory")
    part.add_argument("--slide", type=Path, nargs="+", default=[], help="slides to read beside the synthetic ones")
    part.add_argument("--repeats", type=int, default=5)
    part.add_argument("--sizes", type=int, nargs="*", default=[4, 20, 60], help="sides of slides for memory, 1000 px")
    part = parts.add_parser("packing", help="MB per second of packing and verifying, beside webdataset and a copy")
    part.add_argument("--store", type=Path, required=True, help="folder of slide stores")
    part.add_argument("--repeats", type=int, default=3)
    part = parts.add_parser("builds", help="memory and time of building hundreds of thousands of profiles")
    part.add_argument("--share", type=float, default=1.0, help="of the full sizes")
    args = parser.parse_args(argv)
    try:
        if args.part == "packing":
            print(benchmark_packing.table(args.store, args.repeats))
        elif args.part == "builds":
            print(benchmark_builds.table(args.share))
        else:
            images(args.slide, args.repeats, args.sizes)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
