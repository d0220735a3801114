"""One thing of the corpus as text: a slide store, a folder of them, a shard set, a shard, or one sample of it.

    python -m data_prep.inspect PATH [--key KEY] [--tile ROW,COL | --overview] [--out FILE] [--tissue FILE]

In: a store, a folder of stores, a shard set or a tar. Out: what it is and holds, in plain text, `a .. b .. c` being the
smallest, the median and the largest; from a store also a tile or the picture of the whole slide (JPEG, to --out) and
its tissue (GeoJSON in level-0 px, to --tissue); from a set or a tar the sample of a key. Nothing is checked beyond what
is read: that is data_prep.verify.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep import progress, records
from data_prep.check_store import READ_ERRORS
from storm import files, genes, schema, shards, store
from storm.commands import guarded

_FIRST = 5  # profiles, genes and groups that are shown
_TAKES = f"give a store (<slide_id>{store.SUFFIX}), a folder of stores, a shard set, or a shard of it (.tar)"
_LONG = 90  # characters of a figure; what is longer is for programs


def _plain(value: object) -> str:
    """A value that somebody else wrote, on one line and without what a terminal would take for a command."""
    return schema.BREAKS.sub(" ", str(value))


def _rows(pairs: Sequence[tuple[str, object]]) -> list[str]:
    width = max(len(name) for name, _ in pairs)
    return [f"  {name.ljust(width)}  {_plain(_short(value))}" for name, value in pairs]


def _short(value: object) -> object:
    """A value whose fractions are rounded to what a person reads, also those in a list."""
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, list):
        return f"[{', '.join(str(_short(part)) for part in value)}]"
    return value


def _spread(values: npt.NDArray) -> str:
    """Smallest, median and largest of some numbers."""
    if not len(values):
        return "none"
    low, middle, high = np.quantile(values.astype(np.float64), [0, 0.5, 1])
    return " .. ".join(str(_short(float(value))) for value in (low, middle, high))


def _facts(facts: dict[str, Any], name: str = "") -> Iterator[tuple[str, object]]:
    """Figures of any depth, but for notes (shown on their own) and what is too long to read."""
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _facts(value, f"{name}{key}.")
        elif key != "notes" and len(str(value)) <= _LONG:
            yield f"{name}{key}", value


def _profiles(found: schema.Profiles, depth: npt.NDArray, number: npt.NDArray) -> list[str]:
    """The first profiles as a table. Depth and number of genes are theirs, [N]."""
    kinds = ("disc", "square", "polygon")
    rows = [
        [_plain(found.ids[i]), *(f"{v:.2f}" for v in found.xy_um[i]), f"{found.footprint_um[i]:.4g}",
         kinds[found.footprint_kind[i]], int(depth[i]), int(number[i])]
        for i in range(min(_FIRST, len(found)))
    ]  # fmt: skip
    return progress.table(["profile", "x um", "y um", "size um", "footprint", "counts", "genes"], rows).splitlines()


def _genes(table: genes.GeneTable | None, totals: npt.NDArray[np.int64]) -> str:
    """The genes with the most counts."""
    order = np.argsort(-totals, kind="stable")[:_FIRST]
    return ", ".join(
        f"{_plain(table.symbols[g] if table else f'gene {g}')} {totals[g]}" for g in order.tolist() if totals[g]
    )


def _platform(info: store.SlideInfo) -> str:
    """What measured a slide; in words where nothing did."""
    return "image alone" if info.platform == "unknown" and info.image else info.platform


def store_text(path: Path) -> list[str]:
    """A slide store."""
    opened = store.SlideStore(path)
    info, quality, record = opened.info, opened.quality(), records.read(path.parent, opened.info.slide_id)
    places, table = opened.places(), opened.genes()
    own = {f.name: getattr(info, f.name) for f in dataclasses.fields(info) if f.name not in ("facts", "alignment")}
    own["platform"] = _platform(info)
    lines = [f"{path.name}: slide store, {progress.size(path.stat().st_size)}", *_rows(list(own.items()))]
    lines += ["alignment (measurement -> level-0 px)", *(f"  {_short(row)}" for row in info.alignment)]
    lines += ["figures", *_rows(list(_facts(info.facts)))] if info.facts else []
    lines += ["notes", *(f"  {_plain(note)}" for note in info.facts.get("notes", []))]
    lines.append(f"tiles: {len(opened)}")
    if len(opened):
        rows, cols = opened.place.T
        sizes = opened.tile_bytes
        lines += _rows([
            ("rows", f"{rows.min()} .. {rows.max()}"), ("cols", f"{cols.min()} .. {cols.max()}"),
            ("JPEG bytes", _spread(sizes)),
            *((name, _spread(opened.tile_quality[:, i])) for i, name in enumerate(schema.TILE_QUALITY)),
        ])  # fmt: skip
    lines.append(f"profiles: {len(places)} of {len(table)} genes, {int(opened.indptr[-1])} counts")
    if len(places):
        lines += _rows([(name, _spread(values)) for name, values in quality.items() if name != "flags"])
        flags = [(flag, int((quality["flags"] >> bit & 1).sum())) for bit, flag in enumerate(schema.FLAGS)]
        lines += ["flagged", *_rows(flags), *_profiles(places, quality["depth"], quality["genes"])]
        lines.append(f"most counts: {_genes(table, opened.gene_totals())}")
    lines.append(f"record: {'none' if record is None else f'{record.state}, {record.seconds:g} s'}")
    return lines


def folder_text(folder: Path) -> list[str]:
    """A folder of slide stores."""
    rows: list[list[object]] = []
    for path in sorted(folder.glob(f"*{store.SUFFIX}")):
        size = progress.size(path.stat().st_size)
        try:
            info = store.SlideStore(path).info
        except READ_ERRORS:
            rows.append([path.name, "does not read", "", "", "", "", "", size])
            continue
        counts = [info.facts.get(name, 0) for name in ("tiles", "profiles")]
        notes = len(info.facts.get("notes", []))
        rows.append([info.slide_id, _platform(info), _plain(info.organ), info.split or "-", *counts, notes, size])
    header = ["slide", "platform", "organ", "split", "tiles", "profiles", "notes", "size"]
    failed = records.failures(folder)
    return [
        f"{folder.name}: folder of {len(rows)} slide stores, {len(failed)} failed",
        *progress.table(header, rows).splitlines(),
        *(f"{name}: FAILED: {_plain(reason)}" for name, reason in sorted(failed.items())),
    ]


def set_text(folder: Path) -> list[str]:
    """A shard set."""
    opened = shards.ShardSet(folder)
    manifest = opened.manifest
    keys = ("schema_version", "tile_px", "tile_mpp", "split_by", "seed", "organs", "platforms")
    rows = [
        [split, len(entry["shards"]), entry["groups"], entry["profiles"], entry["tiles"],
         progress.size(sum(shard["bytes"] for shard in entry["shards"]))]
        for split, entry in manifest["splits"].items()
    ]  # fmt: skip
    lines = [f"{folder.name}: shard set of {len(manifest['slides'])} slides", *_rows([(k, manifest[k]) for k in keys])]
    lines += _rows([("genes", len(opened.genes)), ("panels", len(manifest["panels"]))])
    if manifest["appended_to"]:
        lines.append(f"  appended to {', '.join(sha[:16] for sha in manifest['appended_to'])}")
    lines += progress.table(["split", "shards", "groups", "profiles", "tiles", "size"], rows).splitlines()
    for split in manifest["splits"]:
        index = opened.index(split)
        lines.append(f"groups of {split}: {_spread(index.profiles)} profiles, {_spread(index.tiles)} tiles, "
                     f"{_spread(index.size)} bytes")  # fmt: skip
        lines += [f"  {index.key(i)}" for i in range(min(len(index), _FIRST))]
    return lines


def _samples(tar: Path) -> Iterator[tuple[str, int, int]]:
    """(key, offset, size) of each sample of a tar, from its headers alone.

    Raises:
        ValueError: the tar is cut short or is none.
    """
    key, start, at, end = "", 0, 0, tar.stat().st_size
    with tar.open("rb") as handle:
        while at < end:
            handle.seek(at)
            header = handle.read(512)
            if header == bytes(512):
                break
            if at == 0 and header[257:262] != b"ustar":
                raise ValueError(f"{tar}: is no slide store and no shard; {_TAKES}")
            if len(header) < 512 or header[257:262] != b"ustar":
                raise ValueError(f"{tar}: is no tar at byte {at}; restore it or pack again")
            own = header[:100].rstrip(b"\0").decode(errors="replace").partition(".")[0]
            if key and own != key:
                yield key, start, at - start
            if own != key:
                key, start = own, at
            at += 512 + -(-int(header[124:136].rstrip(b"\0 "), 8) // 512) * 512
    if at > end:
        raise ValueError(f"{tar}: is cut short; restore it or pack again")
    if key:
        yield key, start, at - start


def tar_text(tar: Path) -> list[str]:
    """A shard."""
    found = list(_samples(tar))
    lines = [f"{tar.name}: shard of {len(found)} samples, {progress.size(tar.stat().st_size)}"]
    lines.append(f"  bytes of a sample: {_spread(np.array([size for _, _, size in found]))}")
    return lines + [f"  {_plain(key)}" for key, _, _ in found[:_FIRST]]


def _sample(path: Path, key: str) -> tuple[schema.Group, genes.GeneTable | None]:
    """A sample of a set or a tar, with the genes of the set.

    Raises:
        ValueError: it is not there.
    """
    if path.is_dir():
        opened = shards.ShardSet(path)
        for split in opened.manifest["splits"]:
            index = opened.index(split)
            if (i := index.find(key)) is not None:
                return opened.read(split, index, i), opened.genes
    else:
        table = path.parent.parent / shards.GENES
        for own, start, size in _samples(path):
            if own == key:
                with path.open("rb") as handle:
                    handle.seek(start)
                    group = shards.decode_span(handle.read(size), f"{path}: {key}")
                return group, genes.GeneTable.read(table) if table.is_file() else None
    raise ValueError(f"{path}: holds no sample {key!r}; look without --key for how they are called")


def sample_text(path: Path, key: str) -> list[str]:
    """One sample of a shard set or a shard."""
    group, table = _sample(path, key)
    meta, p = group.meta, group.profiles
    own = {f.name: getattr(meta, f.name) for f in dataclasses.fields(meta) if f.name != "regions"}
    lines = [f"{key}: sample of {len(meta.regions)} regions", *_rows(list(own.items()))]
    for number, region in enumerate(meta.regions):
        tiles = sorted((row, col) for g, row, col in group.tiles if g == number)
        x, y = region.origin_um
        lines.append(f"region {number}: {region.rows} x {region.cols} tiles from ({x:.1f}, {y:.1f}) um, "
                     f"{int((group.region == number).sum())} profiles, {len(tiles)} tiles")  # fmt: skip
    totals = np.bincount(p.gene, p.count, len(table) if table else 0).astype(np.int64)
    lines.append(f"profiles: {len(p)}, {len(p.gene)} counts; depth {_spread(p.depth)}")
    lines += _profiles(p, p.depth, np.diff(p.indptr))
    return [*lines, f"most counts: {_genes(table, totals)}"]


def picture(path: Path, tile: str) -> bytes:
    """The JPEG of a tile of a store by 'row,col', or where that is '' of the whole slide.

    Raises:
        ValueError: the store has no such tile, or no picture.
    """
    opened = store.SlideStore(path)
    if not tile:
        jpeg, _ = opened.overview()
        if not jpeg:
            raise ValueError(f"{path}: holds no picture of the slide: it has no image")
        return jpeg
    row, _, col = tile.partition(",")
    if not (row.strip().isdecimal() and col.strip().isdecimal()):
        raise ValueError(f"--tile {tile}: write ROW,COL, as 12,7")
    i = opened.tile_index.get((int(row), int(col)))
    if i is None:
        raise ValueError(f"{path}: has no tile at row {int(row)}, column {int(col)}; it is without tissue or outside")
    return opened.jpeg(i)


def text(path: Path, key: str = "") -> list[str]:
    """What a path holds, in lines of text.

    Raises:
        ValueError: it is nothing of the corpus, or damaged.
    """
    lines = _text(path, key)
    spread = any(line.count(" .. ") > 1 for line in lines)
    return [*lines, *(["a .. b .. c: the smallest, the median, the largest"] if spread else [])]


def _text(path: Path, key: str) -> list[str]:
    try:
        if key:
            return sample_text(path, key)
        if path.is_file():
            return store_text(path) if path.name.endswith(store.SUFFIX) else tar_text(path)
        if (path / shards.MANIFEST).is_file():
            return set_text(path)
        if any(path.glob(f"*{store.SUFFIX}")) or any(path.glob(f"*{records.SUFFIX}")):
            return folder_text(path)
    except (ValueError, OSError):
        raise
    except READ_ERRORS as error:
        raise ValueError(f"{path}: does not read ({type(error).__name__}: {_plain(error)}); restore it") from error
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; {_TAKES}")
    raise ValueError(f"{path}: is no slide store, no folder of them, no shard set and no shard; {_TAKES}")


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.inspect", description="One thing of the corpus as text.")
    parser.add_argument("path", type=Path, help="a slide store, a folder of them, a shard set or a shard")
    parser.add_argument("--key", default="", help="of a set or a shard: this sample")
    parser.add_argument("--tile", default="", metavar="ROW,COL", help="of a store: write this tile to --out")
    parser.add_argument("--overview", action="store_true", help="of a store: write the whole slide to --out")
    parser.add_argument("--out", type=Path, help="JPEG file to write")
    parser.add_argument("--tissue", type=Path, help="of a store: GeoJSON file to write, in level-0 px")
    args = parser.parse_args(words)
    return guarded(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if bool(args.tile or args.overview) != (args.out is not None) or (args.tile and args.overview):
        raise ValueError("--out FILE goes with either --tile ROW,COL or --overview")
    if args.out is None and args.tissue is None:
        print("\n".join(text(args.path, args.key)))
    if args.out is not None:
        files.write_bytes(args.out, picture(args.path, args.tile))
        print(f"{args.out}: written")
    if args.tissue is not None:
        outline = store.SlideStore(args.path).overview()[1]
        if not outline:
            raise ValueError(f"{args.path}: holds no tissue outline: it has no image")
        files.write_bytes(args.tissue, outline)
        print(f"{args.tissue}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
