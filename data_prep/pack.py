"""Slide stores -> shards.

    python -m data_prep.pack --store DIR --out DIR [--config FILE] [key=value ...]

In: a folder of slide stores. Out: a shard set (storm/shards.py tells its layout): groups of many slides mixed, each
exactly once; the vocabulary with the genes' shares on training donors; the manifest, written last. A rerun with the
same stores and config does nothing; a rebuild writes the same bytes. Memory holds one slide and one shard at a time.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep import records, vocabulary
from data_prep import splits as split_rule
from storm import files, genes, regions, schema, shards, store
from storm.commands import guarded
from storm.config import PrepConfig, load

_BYTES_PER_COUNT = 8  # gene and count, int32 each
_SCRATCH = ".groups"


@dataclass(frozen=True)
class Source:
    """One slide on its way into shards."""

    path: Path
    info: store.SlideInfo
    sha256: str
    split: str


@dataclass(frozen=True)
class Placed:
    """Where a group's bytes wait in the scratch folder."""

    key: str
    path: Path
    offset: int
    size: int


def _mapped(profiles: schema.Profiles, table: genes.GeneTable, vocabulary_: genes.GeneTable) -> schema.Profiles:
    """The profiles with genes as indices of the vocabulary; both lists are sorted by id, so order is kept."""
    index = np.array([vocabulary_.index[g] for g in table.ids], dtype=np.int32)
    return schema.Profiles(
        profiles.ids, profiles.xy_um, profiles.footprint_um, profiles.footprint_kind, profiles.indptr,
        index[profiles.gene] if len(index) else profiles.gene, profiles.count,
    )  # fmt: skip


def _cap(profiles: schema.Profiles, config: PrepConfig) -> int:
    """Profiles per region and sample: `max_profiles`, or fewer where counts alone would pass `max_group_mb`."""
    each = _BYTES_PER_COUNT * max(1.0, len(profiles.gene) / max(1, len(profiles)))
    return max(1, min(config.max_profiles, int(config.max_group_mb * 1e6 / each)))


def plan_groups(
    opened: store.SlideStore, profiles: schema.Profiles, config: PrepConfig
) -> list[list[tuple[regions.Region, list[tuple[int, int]]]]]:
    """The groups of one slide: for each its regions, each with the (row, col) of the tiles that its profiles read."""
    info = opened.info
    extent = regions.extent_for(info.platform, config.spots_side, info.tile_um)
    present = set(opened.tile_index)
    found = []
    for region in regions.cut(profiles.xy_um, info.tile_um, extent, _cap(profiles, config)):
        rows = region.profiles
        read = regions.tiles_read(profiles.xy_um[rows], profiles.footprint_um[rows], info.tile_um)
        found.append((region, regions.region_tiles(region, read, present)))
    entries = np.diff(profiles.indptr)
    sizes = [len(region.profiles) for region, _ in found]
    bytes_each = [
        sum(opened.tile_bytes(opened.tile_index[p]) for p in tiles) + _BYTES_PER_COUNT * int(entries[r.profiles].sum())
        for r, tiles in found
    ]
    rng = np.random.default_rng([config.seed, regions.slide_key(info.slide_id)])
    numbers = regions.group(sizes, bytes_each, rng, config.min_profiles, int(config.max_group_mb * 1e6))
    return [[found[i] for i in members] for members in numbers]


def slide_groups(
    opened: store.SlideStore, vocabulary_: genes.GeneTable, panel: str, config: PrepConfig
) -> Iterator[schema.Group]:
    """The groups of one slide, each profile in exactly one."""
    info, profiles = opened.info, opened.profiles()
    density = opened.log_density()
    mapped = _mapped(profiles, opened.genes(), vocabulary_)
    for members in plan_groups(opened, profiles, config):
        meta = schema.GroupMeta(
            slide=info.slide_id, section=info.section, donor=info.donor, study=info.study, organ=info.organ,
            species=info.species, platform=info.platform, kind=info.kind, panel=panel,
            slide_log_density=density, mpp=info.mpp, tile_px=info.tile_px, tile_mpp=info.tile_mpp,
            regions=tuple(schema.RegionMeta(r.origin_um(info.tile_um), r.extent, r.extent) for r, _ in members),
        )  # fmt: skip
        rows = np.concatenate([region.profiles for region, _ in members])
        number = np.repeat(np.arange(len(members), dtype=np.int32), [len(r.profiles) for r, _ in members])
        tiles = {
            (g, row - region.row, col - region.col): opened.jpeg(opened.tile_index[row, col])
            for g, (region, places) in enumerate(members)
            for row, col in places
        }
        yield schema.Group(meta, mapped.take(rows), number, tiles)


def _to_scratch(source: Source, groups: Iterator[schema.Group], folder: Path) -> list[Placed]:
    """Write a slide's groups end to end into one file."""
    path = folder / source.info.slide_id
    placed = []
    with path.open("wb") as handle:
        for number, group in enumerate(groups):
            key = f"{source.info.slide_id}_{number:05d}"
            span = shards.group_bytes(key, group)
            placed.append(Placed(key, path, handle.tell(), len(span)))
            handle.write(span)
    return placed


def _mixed(placed: list[Placed], seed: int, split: str) -> Iterator[tuple[str, schema.Group]]:
    """The groups of a split in a seeded order over all its slides."""
    rng = np.random.default_rng([seed, schema.SPLITS.index(split)])
    for i in rng.permutation(len(placed)).tolist():
        item = placed[i]
        with item.path.open("rb") as handle:
            handle.seek(item.offset)
            yield item.key, shards.decode_span(handle.read(item.size), item.key)


def _write(sources: Sequence[Source], folder: Path, config: PrepConfig) -> dict[str, Any]:
    """Write everything but the manifest into `folder`, and return the manifest."""
    found = vocabulary.collect([(s.path, s.split) for s in sources])
    files.write_bytes(folder / shards.GENES, found.table.to_tsv())
    scratch = folder / _SCRATCH
    scratch.mkdir()
    placed: dict[str, list[Placed]] = {}
    for source in sources:
        opened = store.SlideStore(source.path)
        groups = slide_groups(opened, found.table, found.panel_of[source.info.slide_id], config)
        placed.setdefault(source.split, []).extend(_to_scratch(source, groups, scratch))
    entries = {
        split: shards.write_split(folder / split, _mixed(placed[split], config.seed, split), int(config.shard_mb * 1e6))
        for split in schema.SPLITS
        if split in placed
    }
    for split, entry in entries.items():
        assert entry["profiles"] == sum(s.info.facts["profiles"] for s in sources if s.split == split)
    for path in scratch.iterdir():
        path.unlink()
    scratch.rmdir()
    return {
        "schema_version": schema.SCHEMA_VERSION, "tile_px": sources[0].info.tile_px,
        "tile_mpp": sources[0].info.tile_mpp, "genes_sha256": files.sha256_file(folder / shards.GENES),
        "gene_hash": found.table.hash, "split_by": config.split_by, "seed": config.seed, "prep": _prep(config),
        "panels": {name: {"mask": genes.pack_panel(mask), "genes": int(mask.sum())}
                   for name, mask in sorted(found.panels.items())},
        "slides": {s.info.slide_id: _slide_entry(s, found.panel_of[s.info.slide_id]) for s in sources},
        "organs": sorted({s.info.organ for s in sources}), "platforms": sorted({s.info.platform for s in sources}),
        "reference": _reference(sources, found), "licenses": _licenses(sources), "splits": entries,
    }  # fmt: skip


def _prep(config: PrepConfig) -> dict[str, Any]:
    """The resolved config for the manifest, which may be shared: the aliases' sha256 stands for their path."""
    values = config.model_dump()
    if config.aliases:
        genes.read_aliases(Path(config.aliases))
        values["aliases"] = files.sha256_file(Path(config.aliases))
    return values


def _slide_entry(source: Source, panel: str) -> dict[str, str]:
    info = source.info
    return {
        "split": source.split, "panel": panel, "platform": info.platform, "organ": info.organ, "study": info.study,
        "license": info.license, "use_terms": info.use_terms, "store_sha256": source.sha256,
    }  # fmt: skip


def _most(values: Sequence[Any]) -> Any:
    """The most frequent value, the smallest of several."""
    return min(set(values), key=lambda v: (-values.count(v), v))


def _reference(sources: Sequence[Source], found: vocabulary.Vocabulary) -> dict[str, Any]:
    """What an exported model assumes where a slide tells nothing: from the training slides."""
    density, sizes, kinds = [], [], []
    platforms: list[str] = []
    panel: npt.NDArray[np.bool_] = np.zeros(len(found.table), bool)
    for source in (s for s in sources if s.split == "train"):
        profiles = store.SlideStore(source.path).profiles()
        density.append(store.SlideStore(source.path).log_density())
        sizes.append(profiles.footprint_um)
        kinds += [schema.SQUARE if k == schema.SQUARE else schema.DISC for k in np.unique(profiles.footprint_kind)]
        platforms.append(source.info.platform)
        panel |= found.panels[found.panel_of[source.info.slide_id]]
    return {
        "slide_log_density": float(np.mean(density)), "platform": _most(platforms), "panel": genes.pack_panel(panel),
        "footprint_um": float(np.median(np.concatenate(sizes))), "footprint_kind": _most(kinds),
    }  # fmt: skip


def _licenses(sources: Sequence[Source]) -> dict[str, dict[str, Any]]:
    """Per study: its terms and its counts, for data and model cards."""
    studies: dict[str, dict[str, Any]] = {}
    for study in sorted({s.info.study for s in sources}):
        infos = [s.info for s in sources if s.info.study == study]
        studies[study] = {
            "license": "; ".join(sorted({i.license for i in infos if i.license})),
            "use_terms": "; ".join(sorted({i.use_terms for i in infos if i.use_terms})),
            "slides": len(infos),
            "profiles": sum(int(i.facts["profiles"]) for i in infos),
        }
    return studies


def _sources(store_dir: Path, config: PrepConfig) -> tuple[list[Source], list[str]]:
    """The slides to pack with their splits, and the ids of those without profiles.

    Raises:
        ValueError: no store, a donor in two splits, tiles of several sizes, or no slide to train on.
    """
    failed = records.failures(store_dir)
    if failed:
        print(f"{len(failed)} slides failed to build and are left out: {', '.join(sorted(failed)[:5])}")
    paths = [p for p in store.paths(store_dir) if p.name.removesuffix(store.SUFFIX) not in failed]
    infos = {path: store.SlideStore(path).info for path in paths}
    with_profiles = {p: i for p, i in infos.items() if i.facts.get("profiles")}
    imaged = [i.slide_id for p, i in infos.items() if p not in with_profiles]
    for path, info in with_profiles.items():
        if (info.tile_px, info.tile_mpp) != (config.tile_px, config.tile_mpp):
            raise ValueError(
                f"{path}: tiles of {info.tile_px} px at {info.tile_mpp} um, the config says {config.tile_px} px at "
                f"{config.tile_mpp} um; give pack the config of build, or build again"
            )
    chosen = split_rule.assign(list(with_profiles.values()), config)
    if "train" not in chosen.values():
        raise ValueError(f"{store_dir}: no slide with profiles is in split train; correct the column split and build")
    return [Source(p, i, files.sha256_file(p), chosen[i.slide_id]) for p, i in with_profiles.items()], imaged


def is_current(out: Path, sources: Sequence[Source], config: PrepConfig) -> bool:
    """Whether `out` holds the whole shard set of these stores and this config, every file as it was packed."""
    if not (out / shards.MANIFEST).is_file():
        return False
    same = {s.info.slide_id: (s.sha256, s.split) for s in sources}
    try:
        manifest = shards.ShardSet(out).manifest
        packed = {name: (entry["store_sha256"], entry["split"]) for name, entry in manifest["slides"].items()}
        return manifest["prep"] == _prep(config) and same == packed and not shards.verify(out)
    except (ValueError, KeyError):
        return False  # damaged, or of an older schema: packed anew


def _check_out(out: Path) -> None:
    """Raises ValueError where `out` holds anything that is no shard set: packing replaces the whole folder."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; name a new folder")
    strange = (
        {p.name for p in out.iterdir()} - {shards.MANIFEST, shards.GENES, *schema.SPLITS} if out.is_dir() else set()
    )
    if strange:
        raise ValueError(f"{out}: holds {sorted(strange)[0]!r}, which is no part of a shard set; name a new folder")


def pack(store_dir: Path, out: Path, config: PrepConfig) -> dict[str, Any]:
    """Pack all stores of a folder and return the shard manifest.

    Raises:
        ValueError: naming file, fact and cure; an older shard set at `out` is then left as it was.
    """
    _check_out(out)
    sources, imaged = _sources(store_dir, config)
    if imaged:
        print(f"{len(imaged)} slides have no profiles and are not packed: {', '.join(imaged[:5])}")
    if is_current(out, sources, config):
        print(f"{out}: current, nothing to do")
    else:
        with files.replacing_folder(out) as folder:
            manifest = _write(sources, folder, config)
            files.write_json(folder / shards.MANIFEST, manifest)
    manifest = files.read_json(out / shards.MANIFEST)
    print(_table(manifest, sources))
    return dict(manifest)


def _table(manifest: dict[str, Any], sources: Sequence[Source]) -> str:
    lines = ["split   slides  donors  groups  profiles  shards      MB"]
    for split, entry in manifest["splits"].items():
        infos = [s.info for s in sources if s.split == split]
        donors = len({(i.study, i.donor) for i in infos})
        size = sum(shard["bytes"] for shard in entry["shards"]) / 1e6
        lines.append(f"{split:<6}{len(infos):>8}{donors:>8}{entry['groups']:>8}{entry['profiles']:>10}"
                     f"{len(entry['shards']):>8}{size:>8.1f}")  # fmt: skip
    if manifest["split_by"] == "section":
        lines.append("SPLIT BY SECTION: a donor's sections may be in several splits; results say nothing on new donors")
    if "test" not in manifest["splits"]:
        lines.append(
            "NO TEST SPLIT: nothing to evaluate on; name test donors in the manifest's column split before training"
        )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.pack", description="Slide stores -> shards.")
    parser.add_argument("--store", type=Path, required=True, help="folder of the slide stores")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shard set; replaced as a whole")
    parser.add_argument("--config", type=Path, help="YAML of what differs from PrepConfig's defaults")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="over the config; the keys are those of PrepConfig in storm/config.py",
    )
    args = parser.parse_intermixed_args(words)
    return guarded(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    pack(args.store, args.out, load(PrepConfig, args.config, args.overrides))
    return 0


if __name__ == "__main__":
    sys.exit(main())
