"""Slides and measurements -> slide stores.

    python -m data_prep.build MANIFEST --store DIR [--root DIR] [--config FILE] [--workers N] [key=value ...]

In: a manifest. Out: `DIR/<slide_id>.zarr.zip` for every slide, and `DIR/failures.json` while some fail. A rerun builds
only what is missing or whose files, row or config changed. Exit code 0, 1 where slides failed, 2 for wrong usage.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import numpy as np
import simplejpeg

import storm
from data_prep import manifest, platforms, quality, slides
from data_prep.manifest import IMAGE_ONLY, ManifestRow
from data_prep.profiles import no_profiles, place, profiles_of
from storm import files, genes, regions, schema, store
from storm.commands import guarded
from storm.config import PrepConfig, load

FAILURES = "failures.json"
# What a store depends on; the other keys of PrepConfig are pack's, or only refuse (max_tiles, max_px_per_byte).
_CONFIG_KEYS = (
    "tile_px", "tile_mpp", "jpeg_quality", "min_tissue", "min_mapped", "max_image_mpx", "max_upsampling",
    "max_failed_tiles", "lattice_residual_px0", "lattice_anisotropy", "st_residual_um", "st_anisotropy", "mpp_warn",
    "mpp_refuse",
)  # fmt: skip
# What a damaged or wrong input raises; anything else is a fault of ours, and is told as such.
INPUT_ERRORS = (ValueError, OSError, EOFError, zlib.error)


def fingerprint(row: ManifestRow, config: PrepConfig) -> str:
    """A hash of all that a slide's store is made from: the row, the config, the content of every file, the code.

    Raises:
        ValueError, OSError: a file is missing.
    """
    paths = slides.files_of(row.image)
    if row.platform != IMAGE_ONLY and row.measurement:
        paths += platforms.reader(row.platform).inputs(row.measurement, row.spots)
    paths += [row.alignment] if row.alignment else []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; correct the manifest")
    if config.aliases:
        genes.read_aliases(Path(config.aliases))
        paths.append(Path(config.aliases))
    facts = {
        "row": {k: v for k, v in dataclasses.asdict(row).items() if not isinstance(v, Path)},
        "config": {key: getattr(config, key) for key in _CONFIG_KEYS},
        "files": [[files.sha256_file(path), path.stat().st_size] for path in paths],
        "code": [storm.__version__, schema.SCHEMA_VERSION, genes.shipped(row.species).hash],
    }
    return files.sha256_of(files.dump_json(facts))


def is_current(path: Path, mark: str) -> bool:
    """Whether a complete store lies at `path` that was made from the things that `mark` names."""
    if not path.is_file():
        return False
    try:
        return bool(store.SlideStore(path).info.facts.get("fingerprint") == mark)
    except ValueError:
        return False  # damaged, or of an older schema: built anew


def _kept_places(
    tissue: np.ndarray, grid: slides.Grid, profiles: schema.Profiles, tile_um: float, config: PrepConfig
) -> list[tuple[int, int]]:
    """(row, col), neighbours near each other, of the tiles that a profile reads or that hold tissue."""
    read = regions.tiles_read(profiles.xy_um, profiles.footprint_um, tile_um)
    wanted = {(int(r), int(c)) for r, c in read if 0 <= r < grid.rows and 0 <= c < grid.cols}
    # A tile that did not decode in the overview is asked for once more, so that its loss is counted.
    wanted |= {(int(r), int(c)) for r, c in np.argwhere(~(tissue < config.min_tissue))}
    return sorted(wanted, key=lambda place: store.morton(*place))


def _tiles(
    slide: slides.Slide, grid: slides.Grid, places: list[tuple[int, int]], tissue: np.ndarray, config: PrepConfig,
    facts: dict[str, Any],
) -> Iterator[store.Tile]:  # fmt: skip
    """The encoded tiles; `facts` is completed at the end.

    Raises:
        ValueError: more than `max_failed_tiles` do not decode.
    """
    summary = quality.Summary()
    failed: dict[tuple[int, int], str] = {}
    for row, col in places:
        try:
            pixels = slide.read(*grid.box(row, col), config.tile_px)
        except slides.DecodeError as error:
            failed[row, col] = str(error)
            continue
        share = float(tissue[row, col])
        if np.isnan(share):  # the overview did not decode here, the tile itself does
            share = float(quality.tissue_mask(pixels).mean())
        summary.add(pixels, share)
        # Chroma at half resolution, as slide scanners store it themselves.
        jpeg = simplejpeg.encode_jpeg(pixels, config.jpeg_quality, "RGB", "420", fastdct=False)
        yield store.Tile(row, col, jpeg, share)
    if len(failed) > config.max_failed_tiles * len(places):
        raise ValueError(
            f"{len(failed)} of {len(places)} tiles do not decode (max_failed_tiles {config.max_failed_tiles}): "
            f"{next(iter(failed.values()))}; restore the slide"
        )
    facts.update(summary.facts() | {"tiles": len(places) - len(failed), "failed_tiles": [list(p) for p in failed]})
    if failed:
        facts["notes"].append(f"{len(failed)} tiles do not decode and are left out")
    if not summary.tissue:
        facts["notes"].append("no tile holds tissue or is read by a profile")


def build_slide(row: ManifestRow, store_dir: Path, config: PrepConfig, mark: str = "") -> Path:
    """Build one slide's store and return its path; `mark` is its fingerprint, for the next run.

    Raises:
        ValueError (or another of INPUT_ERRORS): naming file, fact and cure; nothing is left behind.
    """
    slide = slides.open_slide(row.image, config.max_image_mpx)
    measured = None
    if row.platform != IMAGE_ONLY:
        if row.measurement is None:
            raise ValueError(f"slide {row.slide_id}: platform {row.platform} needs a measurement; give its path")
        measured = platforms.reader(row.platform).read(row.measurement, row.spots)
    placed = place(row, slide, measured, config)
    mpp = placed.mpp.value
    if mpp > 1.01 * config.tile_mpp * config.max_upsampling:  # 1.0004 um/px is 1 um/px
        raise ValueError(f"{row.image}: {mpp:.2f} um per pixel is too coarse for tiles of {config.tile_mpp} um per px; "
                         "give the full-resolution image, or raise max_upsampling")  # fmt: skip
    if measured:
        profiles, table, facts = profiles_of(row, slide, measured, placed, config)
    else:
        profiles, table, facts = no_profiles(), genes.GeneTable((), ()), {"notes": []}
    tile_um = config.tile_px * config.tile_mpp
    grid = slides.Grid.over(slide, tile_um / mpp)
    grid.check(slide, row.image, config.max_tiles, config.max_px_per_byte)
    tissue = quality.tissue_map(slide, grid)
    facts = {"slide": slide.facts, **placed.facts, **facts, "fingerprint": mark,
             "notes": [*placed.facts["notes"], *facts["notes"]]}  # fmt: skip
    info = store.SlideInfo(
        slide_id=row.slide_id, section=row.section or row.slide_id, donor=row.donor, study=row.study, organ=row.organ,
        species=row.species, platform="unknown" if row.platform == IMAGE_ONLY else row.platform, split=row.split,
        mpp=mpp, mpp_source=placed.mpp.source, width_px0=slide.width_px0, height_px0=slide.height_px0,
        tile_px=config.tile_px, tile_mpp=config.tile_mpp, alignment=placed.matrix.tolist(),
        alignment_source=placed.matrix_source, residual_px0=placed.residual_px0, license=row.license,
        use_terms=row.use_terms, facts=facts,
    )  # fmt: skip
    places = _kept_places(tissue, grid, profiles, tile_um, config)
    return store.write(store_dir, info, _tiles(slide, grid, places, tissue, config, info.facts), profiles, table)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a slide went: its store was built, was current already, or failed for a reason."""

    slide_id: str
    state: str  # built, current or failed
    reason: str = ""
    seconds: float = 0.0


def _attempt(row: ManifestRow, store_dir: Path, config: PrepConfig) -> Outcome:
    start = time.perf_counter()
    try:
        mark = fingerprint(row, config)
        if is_current(store_dir / f"{row.slide_id}{store.SUFFIX}", mark):
            return Outcome(row.slide_id, "current")
        build_slide(row, store_dir, config, mark)
    except INPUT_ERRORS as error:
        return Outcome(row.slide_id, "failed", str(error) or type(error).__name__)
    except Exception as error:  # noqa: BLE001  one slide must not stop the others, whatever it meets
        traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(
            row.slide_id, "failed", f"internal fault: {type(error).__name__}: {error} "
            f"({Path(place.filename).name}:{place.lineno}); look for damage in the slide's files, and report it",
        )  # fmt: skip
    return Outcome(row.slide_id, "built", seconds=time.perf_counter() - start)


def _child(row: ManifestRow, store_dir: Path, config: PrepConfig, answer: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends its children
    answer.send(_attempt(row, store_dir, config))


def _answer(row: ManifestRow, process: Any, receiver: Connection) -> Outcome:
    """What a process that ended has sent, or how it died."""
    process.join()
    with contextlib.suppress(EOFError):  # it died before it could send
        outcome: Outcome = receiver.recv()
        return outcome
    reason = f"its process ended with code {process.exitcode} (see above; -9 is often a lack of memory); run again"
    return Outcome(row.slide_id, "failed", reason)


def outcomes(rows: Sequence[ManifestRow], store_dir: Path, config: PrepConfig, workers: int) -> Iterator[Outcome]:
    """Build slides, each in a process of its own (one worker: in this one), and tell of each as it ends."""
    if workers == 1:
        yield from (_attempt(row, store_dir, config) for row in rows)
        return
    context = multiprocessing.get_context("spawn")  # OpenSlide's handles and threads do not survive a fork
    waiting = list(rows)
    running: dict[int, tuple[ManifestRow, Any, Connection]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            receiver, sender = context.Pipe(duplex=False)
            row = waiting.pop(0)
            process = context.Process(target=_child, args=(row, store_dir, config, sender), daemon=True)
            process.start()
            sender.close()
            running[process.sentinel] = (row, process, receiver)
        for sentinel in wait(list(running)):
            yield _answer(*running.pop(cast(int, sentinel)))


def _without_folders(text: str, row: ManifestRow, store_dir: Path, config: PrepConfig) -> str:
    """An error's text for a file that may be shared: the folders of this machine are cut off its paths."""
    aliases = Path(config.aliases) if config.aliases else None
    for path in (row.image, row.measurement, row.spots, row.alignment, aliases, store_dir / FAILURES, store_dir):
        if path and path.parent != Path():
            text = text.replace(f"{path.parent}{os.sep}", "")
    return text


def _write_failures(done: Sequence[Outcome], rows: Sequence[ManifestRow], store_dir: Path, config: PrepConfig) -> None:
    """Keep `failures.json`: the slides of this manifest that failed, and those of others whose store is out of date."""
    path, by_id = store_dir / FAILURES, {row.slide_id: row for row in rows}
    failed = {} if not path.is_file() else {
        name: reason for name, reason in files.read_json(path).items()
        if name not in by_id and (store_dir / f"{name}{store.SUFFIX}").is_file()
    }  # fmt: skip
    for outcome in done:
        if outcome.state == "failed":
            reason = _without_folders(outcome.reason, by_id[outcome.slide_id], store_dir, config)
            failed[outcome.slide_id] = reason
    if failed:
        files.write_json(path, failed)
    else:
        path.unlink(missing_ok=True)


def _line(outcome: Outcome, store_dir: Path) -> str:
    if outcome.state == "failed":
        return f"{outcome.slide_id}: FAILED: {outcome.reason}"
    opened = store.SlideStore(store_dir / f"{outcome.slide_id}{store.SUFFIX}")
    info, facts = opened.info, opened.info.facts
    parts = [f"{len(opened)} tiles", f"mpp {info.mpp:.4f} ({info.mpp_source})"]
    if "profiles" in facts:
        parts += [f"{facts['profiles']} profiles", f"{facts['genes']} genes", f"mapped {facts['mapped_share']:.1%}"]
    if info.residual_px0 is not None:
        parts.append(f"lattice residual {info.residual_px0:.2f} px")
    if outcome.state == "built":
        parts.append(f"{outcome.seconds:.1f} s")
    notes = "".join(f"\n    {note}" for note in facts["notes"])
    return f"{outcome.slide_id}: {outcome.state}: {', '.join(parts)}{notes}"


def build(rows: Sequence[ManifestRow], store_dir: Path, config: PrepConfig, workers: int) -> list[Outcome]:
    """Build every slide that is not current, print a line for each, and keep `failures.json`."""
    store_dir.mkdir(parents=True, exist_ok=True)
    done = []
    for outcome in outcomes(rows, store_dir, config, workers):
        print(_line(outcome, store_dir), flush=True)
        done.append(outcome)
    _write_failures(done, rows, store_dir, config)
    others = {p.name.removesuffix(store.SUFFIX) for p in store_dir.glob(f"*{store.SUFFIX}")}
    others -= {row.slide_id for row in rows}
    if others:
        print(f"{len(others)} stores in {store_dir} are not in this manifest and stay: {', '.join(sorted(others)[:5])}")
    return done


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.build", description="Slides -> slide stores.")
    parser.add_argument("manifest", type=Path, help="csv with a row per slide")
    parser.add_argument("--store", type=Path, required=True, help="folder of the slide stores")
    parser.add_argument("--root", type=Path, help="folder that relative paths start from (default: the manifest's)")
    parser.add_argument("--config", type=Path, help="YAML of what differs from PrepConfig's defaults")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="slides at a time")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="over the config; the keys are those of PrepConfig in storm/config.py",
    )
    args = parser.parse_intermixed_args(words)
    return guarded(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    config = load(PrepConfig, args.config, args.overrides)
    rows = manifest.read(args.manifest, args.root, config.split_by)
    done = build(rows, args.store, config, max(1, min(args.workers, len(rows))))
    count = {state: sum(o.state == state for o in done) for state in ("built", "current", "failed")}
    print(f"{args.store}: {count['built']} built, {count['current']} current, {count['failed']} failed")
    return 1 if count["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
