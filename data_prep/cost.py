"""What a slide costs to build: time and bytes, from what its headers tell.

In: the headers of a slide and its measurement; the records of slides that are built already. Out: how much work a slide
is, and what that work takes here.
"""

import csv
import dataclasses
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py

from data_prep.platforms import mex
from data_prep.records import Record
from storm import files
from storm.prep_config import PrepConfig

# Seconds of one core of an AMD EPYC (2 vCPU), Python 3.11, files in the page cache, of data_prep.build in one process.
# Tiles: a JPEG-tiled pyramid at 0.25 um/px (548 tiles in 1.1 s; JPEG2000 and images in one piece take longer),
# CMU-1-Small-Region.svs and a synthetic Visium slide (0.34 s and 0.45 s for 77 tiles). Counts: Visium of mouse muscle,
# 982 spots with 1.6 M counts in 1.1 s. Records of the store at hand scale them: see `fitted`.
BASE_S = 0.2  # per slide: opening, the overview, writing the archive
TILE_S = 0.002  # per tile of 224 x 224 px: decode, resize, encode, quality
PROFILE_S = 1.0e-5
COUNT_S = 5.5e-7  # per count: read, map, sum, compress
READ_S = 1.2e-9  # per byte of input: its sha256
TILE_BYTES = 25_000  # of 224 x 224 px at quality 90: 27 kB on CMU-1, 17 kB on the pyramid
PROFILE_BYTES = 60
COUNT_BYTES = 1.6  # compressed, in the store
SHARD_COUNT_BYTES, SHARD_PROFILE_BYTES = 8.0, 80.0  # stored as they are, in shards
TISSUE = 0.5  # share of a slide's grid that becomes tiles
# Of tables of text, on her2st and CosMx flat files: counts per byte, plain and gzipped; counts per profile of legacy ST
# and of CosMx.
TABLE_COUNTS, GZIP_COUNTS = 0.1, 0.8
ST_PROFILE, COSMX_PROFILE = 3500, 200
FILES_PER_SLIDE = 2  # its store and its record
_TILE_PX = 224
SCALEFACTOR_SPOT_UM, PITCH_UM = 65.0, 200.0  # of Visium's scale factors, of legacy ST: for a first idea of the mpp


@dataclass(frozen=True)
class Work:
    """How much there is to do for some slides."""

    grid: float = 0  # tiles that cover the slide, tissue or not
    profiles: float = 0
    counts: float = 0  # that are not zero
    bytes_in: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def times(self, factor: float) -> "Work":
        """So many times the work."""
        return Work(*(value * factor for value in dataclasses.astuple(self)))


@dataclass(frozen=True)
class Model:
    """What work takes: the constants above, scaled to what was seen."""

    px: float = 1.0  # px of a tile against 224 x 224
    tissue: float = TISSUE
    time: float = 1.0
    space: float = 1.0
    records: int = 0  # how many slides it was fitted to

    def seconds(self, work: Work, slides: int = 1) -> float:
        """Of one core."""
        tiles = work.grid * self.tissue * self.px * TILE_S
        return self.time * (slides * BASE_S + tiles + work.profiles * PROFILE_S + work.counts * COUNT_S
                            + work.bytes_in * READ_S)  # fmt: skip

    def _tile_bytes(self, work: Work) -> float:
        return work.grid * self.tissue * self.px * TILE_BYTES

    def store_bytes(self, work: Work) -> float:
        """Of the stores."""
        return self.space * (self._tile_bytes(work) + work.profiles * PROFILE_BYTES + work.counts * COUNT_BYTES)

    def shard_bytes(self, work: Work) -> float:
        """Of the shards."""
        counts = work.profiles * SHARD_PROFILE_BYTES + work.counts * SHARD_COUNT_BYTES
        return self.space * self._tile_bytes(work) + counts

    def shard_files(self, work: Work, config: PrepConfig) -> float:
        """Shards, each of `shard_mb`."""
        return self.shard_bytes(work) / (config.shard_mb * 1e6)


def fitted(records: Sequence[Record], config: PrepConfig) -> Model:
    """The model that agrees, summed, with the slides that are built already; the constants where there are none."""
    model = Model(px=(config.tile_px / _TILE_PX) ** 2)
    seen = [record for record in records if record.state == "built" and record.cost and record.seconds > 0]
    if not seen:
        return model
    tiles, grid, profiles, counts = (
        sum(r.cost.get(k, 0) for r in seen) for k in ("tiles", "grid", "profiles", "counts")
    )
    model = dataclasses.replace(model, tissue=tiles / grid if grid else TISSUE, records=len(seen))
    work = Work(grid, profiles, counts, sum(sum(entry[1] for entry in r.inputs) for r in seen))
    return dataclasses.replace(
        model,
        time=sum(r.seconds for r in seen) / model.seconds(work, len(seen)),
        space=sum(r.bytes for r in seen) / max(1.0, model.store_bytes(work)),
    )


def measured(paths: Sequence[Path]) -> tuple[float, float]:
    """(profiles, non-zero counts) of a measurement's files by their headers; of tables of text by their size.

    Raises:
        ValueError: a file is not what its name says.
    """
    for path in paths:
        if path.suffix in (".h5", ".h5ad"):
            return _h5_size(path)
        if path.name.endswith((".mtx", ".mtx.gz")):
            _, barcodes, entries = mex.sizes(path)
            return float(barcodes), float(entries)
    largest = max(paths, key=lambda path: path.stat().st_size, default=None)
    if largest is None:
        return 0.0, 0.0
    counts = largest.stat().st_size * (GZIP_COUNTS if largest.suffix == ".gz" else TABLE_COUNTS)
    return counts / (COSMX_PROFILE if "exprMat" in largest.name else ST_PROFILE), counts


def _h5_size(path: Path) -> tuple[float, float]:
    try:
        with h5py.File(path, "r") as root:
            if "X" in root:  # AnnData
                matrix = root["X"]
                if isinstance(matrix, h5py.Dataset):
                    return float(matrix.shape[0]), float(matrix.size)
                return float(len(matrix["indptr"]) - 1), float(len(matrix["data"]))
            group = root["matrix"] if "matrix" in root else next(iter(root.values()))
            return float(len(group["barcodes"])), float(len(group["data"]))
    except (OSError, KeyError, TypeError, AttributeError, StopIteration, RuntimeError) as error:
        raise ValueError(f"{path}: no readable matrix ({error or 'it is empty'}); restore the file") from error


def told_mpp(paths: Sequence[Path]) -> float | None:
    """um per px as a measurement's small files tell it, roughly; None where they do not."""
    for path in paths:
        try:
            if path.name.endswith("scalefactors_json.json"):
                scale = files.read_json(path)
                return float(scale.get("microns_per_pixel") or SCALEFACTOR_SPOT_UM / scale["spot_diameter_fullres"])
            if path.suffix == ".tsv":
                with path.open(encoding="utf-8") as handle:
                    rows = list(csv.DictReader(handle, delimiter="\t"))
                x, pixel_x = ([float(row[name]) for row in rows] for name in ("x", "pixel_x"))
                return PITCH_UM * (max(x) - min(x)) / (max(pixel_x) - min(pixel_x))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
            continue  # build says what is wrong with it
    return None


@dataclass(frozen=True)
class Room:
    """What may still be written where a folder lies; None where the system does not tell."""

    free_bytes: int
    free_files: int | None
    quota_bytes: int | None = None  # left until the user's limit
    quota_files: int | None = None


def room(folder: Path) -> Room:
    """The room at a folder, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.absolute().parent
    found = os.statvfs(folder)
    inodes = found.f_favail if found.f_files else None  # some file systems make them as they need them
    return Room(found.f_bavail * found.f_frsize, inodes, *_quota(folder))


def _device(folder: Path) -> str:
    """What is mounted where a folder lies, by name; blank where the system does not tell."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    mounts = {Path(parts[1].replace("\\040", " ")): parts[0] for line in lines if len(parts := line.split()) > 1}
    real = folder.resolve()
    return next((mounts[place] for place in (real, *real.parents) if place in mounts), "")


def _quota(folder: Path) -> tuple[int | None, int | None]:
    """(bytes, files) that the user may still write, by the command `quota` where there is one."""
    if not shutil.which("quota"):
        return None, None
    try:
        done = subprocess.run(["quota", "-w", "-p"], capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    # Filesystem blocks quota limit grace files quota limit grace; blocks are of 1 kB, * marks what is over its quota
    for line in done.stdout.splitlines():
        name, *words = line.split() or [""]
        if name != _device(folder) or len(words) < 8:
            continue
        try:
            used, soft, hard, _, files_used, files_soft, files_hard = (int(w.rstrip("*")) for w in words[:7])
        except ValueError:
            return None, None  # a command of another make
        left = (hard or soft) - used if hard or soft else None
        files_left = (files_hard or files_soft) - files_used if files_hard or files_soft else None
        return (None if left is None else 1024 * max(0, left)), (None if files_left is None else max(0, files_left))
    return None, None
