"""What decoding costs: groups per second of the stream beside other loaders over the same content.

In: groups of noise that compresses as tissue does. Out: tables in Markdown. Rates are per second of processor time of
one process, taken in turns so that a busy machine slows all alike; medians over the turns. All lies in the page cache.
"""

import importlib.util
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch

from storm import files, schema, shards
from storm.config import DataConfig, MaskConfig
from storm.data.batch import BatchSpec
from storm.data.corpus import open_corpus
from storm.data.stream import GroupStream
from storm.data.tile import decode_tiles
from storm.genes import GeneTable, pack_panel
from storm.markdown import table
from storm.npz import load_arrays

_GENES, _TILE_PX = 18_000, 224
Decoded = tuple[npt.NDArray[np.uint8], Any]
Content = tuple[int, int, int, int]

# Regions, tiles on a side, profiles per region, genes seen of each: what a Visium group is, and the smallest one.
CONTENTS: dict[str, Content] = {"regions": (2, 5, 36, 3000), "single tiles": (1, 1, 1, 1000)}
GROUPS = {"regions": 40, "single tiles": 1500}  # of a turn; a set holds four times as many


def make_group(content: Content, rng: np.random.Generator, tile_px: int = _TILE_PX) -> schema.Group:
    """A group of noise that compresses as tissue does: about 16 KB a tile."""
    regions, side, per_region, seen = content
    number = regions * per_region
    tile_um = tile_px * 0.5
    metas = tuple(schema.RegionMeta((1000.0 * g, 0.0), side, side) for g in range(regions))
    gene = np.concatenate([np.sort(rng.permutation(_GENES)[:seen]) for _ in range(number)]).astype(np.int32)
    profiles = schema.Profiles(
        [f"ACGT{i:012d}-1" for i in range(number)], rng.uniform(0, side * tile_um, (number, 2)),
        np.full(number, 55, np.float32), np.zeros(number, np.uint8), np.arange(number + 1, dtype=np.int64) * seen, gene,
        (rng.poisson(2, len(gene)) + 1).astype(np.int32),
    )  # fmt: skip
    places = itertools.product(range(regions), range(side), range(side))
    meta = schema.GroupMeta(
        "s", "s", "d", "t", "breast", "human", "visium", "spot", "p", -1.0, 0.5, tile_px, 0.5, metas
    )  # fmt: skip
    region = np.repeat(np.arange(regions), per_region).astype(np.int32)
    return schema.Group(meta, profiles, region, {place: _tile(rng, tile_px) for place in places})


def _tile(rng: np.random.Generator, px: int) -> bytes:
    coarse = torch.from_numpy(rng.uniform(90, 240, (1, 3, px // 6 + 1, px // 6 + 1)))
    smooth = torch.nn.functional.interpolate(coarse, (px, px), mode="bicubic")[0].permute(1, 2, 0).numpy()
    pixels = np.clip(smooth + rng.normal(0, 3, (px, px, 1)), 0, 255).astype(np.uint8)
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=90))


def make_shards(folder: Path, content: Content, groups: int, per_shard: int, tile_px: int = _TILE_PX) -> Path:
    """A shard set of such groups, of ten slides in turn; few are different, the others are the same bytes again."""
    made = [make_group(content, np.random.default_rng(i), tile_px) for i in range(min(groups, 20))]
    (folder / "scratch").mkdir(parents=True)
    numbers = range(-(-groups // per_shard))
    for number in numbers:
        writer = shards.ShardWriter(folder / "scratch", number)
        for i in range(number * per_shard, min(groups, (number + 1) * per_shard)):
            writer.add(f"s{i % 10}_{i:05d}", made[i % len(made)])
        writer.close(folder / "train")
    (folder / "scratch").rmdir()
    sidecars = [found for n in numbers if (found := shards.read_sidecar(folder / "train", n))]
    _finish(folder, shards.join_split(folder / "train", sidecars), tile_px)
    return folder


def _finish(folder: Path, entry: dict[str, Any], tile_px: int) -> None:
    """Genes and manifest of a set with one panel of all genes."""
    ids = tuple(f"ENSG{i:011d}" for i in range(_GENES))
    genes = GeneTable(ids, ids, np.full(_GENES, 1 / _GENES))
    files.write_bytes(folder / shards.GENES, genes.to_tsv())
    kind = {"organ": "breast", "platform": "visium", "split": "train"}
    slides = {
        name: {"study": f"t{i % 5}", "donor": f"d{i}", "section": name} | kind for i, name in enumerate(entry["slides"])
    }
    panel = pack_panel(np.ones(_GENES, dtype=bool))
    files.write_json(folder / shards.MANIFEST, {
        "schema_version": schema.SCHEMA_VERSION, "genes_sha256": files.sha256_file(folder / shards.GENES),
        "gene_hash": genes.hash, "panels": {"p": {"mask": panel}}, "slides": slides, "organs": ["breast"],
        "tile_px": tile_px, "tile_mpp": 0.5, "split_by": "donor", "splits": {"train": entry},
        "licenses": {}, "prep": {"spots_side": 6}, "reference": {
            "footprint_kind": schema.DISC, "footprint_um": 55.0, "panel": panel, "platform": "visium",
            "slide_log_density": 0.0,
        },
    })  # fmt: skip


def open_stream(folder: Path, batch: int = 8, verify: bool = True) -> GroupStream:
    """The stream over such a set, loaded in this process."""
    data = DataConfig(
        shards=str(folder), global_batch_size=batch, micro_batch_size=batch, workers=0, stage_dir="", verify=verify
    )
    corpus = open_corpus(data)
    share = np.full(len(corpus.genes), 1 / len(corpus.genes))
    spec = BatchSpec(int(corpus.manifest["tile_px"]), len(share), corpus.panels, ("breast",), share)
    return GroupStream(corpus, spec, MaskConfig(), data, 0)


def _from_memory(stream: GroupStream) -> Iterator[Decoded]:
    """What any loader must do: JPEG and profiles, of bytes that lie in memory."""
    groups, px = stream.corpus.groups, stream.loader.spec.tile_px
    held = groups.packed(range(min(len(groups), 20)))
    for span in itertools.cycle(held):
        group = shards.decode_span(span, "memory")
        yield decode_tiles(group, px), group.profiles


def _from_stream(stream: GroupStream) -> Iterator[Decoded]:
    """The stream in its order: read, verified, decoded."""
    px = stream.loader.spec.tile_px
    for item in itertools.count():
        for group in stream.corpus.groups.read([place.group for place in stream.work(item).places]):
            yield decode_tiles(group, px), group.profiles


def _from_webdataset(folder: Path, arrays: Callable[[bytes], Any]) -> Iterator[Decoded]:
    """The library over the same tars, one after another, with the same JPEG decoder."""
    import webdataset

    tars = sorted(str(path) for path in (folder / "train").glob("*.tar"))
    while True:
        for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False):
            yield _decoded(sample, arrays)


def _decoded(sample: dict[str, Any], arrays: Callable[[bytes], Any]) -> Decoded:
    json.loads(sample["meta.json"])
    jpegs = [value for name, value in sample.items() if name.endswith(".jpg")]
    pixels = np.stack([simplejpeg.decode_jpeg(jpeg, "RGB") for jpeg in jpegs])
    return pixels, arrays(sample["profiles.npz"])


def _by_numpy(data: bytes) -> Any:
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def _chunks(folder: Path, scratch: Path) -> Path:
    """litdata's own chunks of the same groups, each as the bytes of its span."""
    from litdata.streaming.writer import BinaryWriter  # type: ignore[import-not-found]

    groups = open_corpus(DataConfig(shards=str(folder), stage_dir="")).groups
    scratch.mkdir()
    writer = BinaryWriter(str(scratch), chunk_bytes="64MB")
    for i in range(len(groups)):
        writer[i] = {"span": groups.packed([i])[0]}
    writer.done()
    writer.merge(1)
    return scratch


def _from_litdata(chunks: Path, decode: Callable[[bytes], Decoded]) -> Iterator[Decoded]:
    """The library over its chunks, with the same JPEG decoder."""
    import litdata  # type: ignore[import-not-found]

    while True:
        for sample in litdata.StreamingDataset(str(chunks), shuffle=True):
            yield decode(sample["span"])


def _by_storm(span: bytes) -> Decoded:
    group = shards.decode_span(span, "litdata")
    return decode_tiles(group, _TILE_PX), group.profiles


def contenders(folder: Path, scratch: Path) -> dict[str, Iterator[Decoded]]:
    """Name -> endless decoded groups."""
    stream = open_stream(folder)
    found = {
        "pure decode from memory": _from_memory(stream), "storm": _from_stream(stream),
        "storm, data.verify=false": _from_stream(open_stream(folder, verify=False)),
        "webdataset": _from_webdataset(folder, _by_numpy),
        "webdataset, storm's arrays": _from_webdataset(folder, lambda data: load_arrays(data, "webdataset")),
    }  # fmt: skip
    if importlib.util.find_spec("litdata"):
        chunks = _chunks(folder, scratch)
        found["litdata"] = _from_litdata(chunks, lambda span: _decoded(shards.members(span), _by_numpy))
        found["litdata, storm's arrays"] = _from_litdata(chunks, _by_storm)
    return found


def rates(found: dict[str, Iterator[Decoded]], turns: int, groups: int) -> dict[str, float]:
    """Name -> median groups per second of processor time, over turns of so many groups each, after one to warm up."""
    seen: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(turns + 1):
        for name, source in found.items():
            began = time.process_time()
            for _ in itertools.islice(source, groups):
                pass
            if turn:
                seen[name].append(groups / (time.process_time() - began))
    return {name: statistics.median(values) for name, values in seen.items()}


def rate_tables(turns: int, scratch: Path, groups: dict[str, int]) -> str:
    """Groups per second of each loader, and how many times those of the others storm's are."""
    parts: list[str] = []
    for name, content in CONTENTS.items():
        total = groups[name]
        folder = make_shards(scratch / name.replace(" ", "_"), content, total * 4, total)
        found = rates(contenders(folder, scratch / f"litdata_{len(parts)}"), turns, total)
        rows = [[who, f"{rate:.1f}", f"{found['storm'] / rate:.2f}"] for who, rate in found.items()]
        regions, side, per_region, seen = content
        tiles = f"{regions} x {side} x {side} tiles of {_TILE_PX} px"
        title = f"{name}: {tiles}, {regions * per_region} profiles of {seen} genes"
        parts.append(f"### {title}\n\n" + table(["loader", "groups/s of a core", "storm / it"], rows))
    return "\n\n".join(parts)
