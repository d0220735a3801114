"""Shard sets made by hand for the tests of the stream: a few small groups of several slides, studies and platforms."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storm import files, schema
from storm.config import DataConfig, MaskConfig
from storm.data.corpus import Corpus, open_corpus
from storm.data.stream import GroupStream
from storm.genes import GeneTable, pack_panel
from storm.shards import GENES, MANIFEST, ShardWriter, join_split, read_sidecar
from tests.data import samples

GROUPS, BATCH, SEED = 7, 4, 3
MASK = MaskConfig(loss_genes=20)


def slide(number: int, **changes: Any) -> dict[str, Any]:
    """A slide's entry in the manifest: two studies, three donors, two platforms."""
    return {
        "split": "train", "panel": "p", "platform": ("visium", "xenium")[number % 2], "organ": "breast",
        "species": "human", "study": f"t{number % 2}", "donor": f"d{number % 3}", "section": f"s{number}",
        "license": "CC0", "use_terms": "", "profiles": 0, "store_sha256": "0" * 64,
    } | changes  # fmt: skip


def write(
    folder: Path, groups: Sequence[tuple[str, int]], per_shard: int = 4, genes: int = samples.GENES, **changes: Any
) -> Path:
    """A shard set of groups (slide, number); `changes` are of its manifest."""
    numbers = range(-(-len(groups) // per_shard))
    (folder / "scratch").mkdir(parents=True)
    for shard in numbers:
        writer = ShardWriter(folder / "scratch", shard)
        for i, (name, number) in list(enumerate(groups))[shard * per_shard : (shard + 1) * per_shard]:
            made = samples.group(i, regions=1, side=2, panel="p" if i % 2 else "all", slide=name)
            writer.add(f"{name}_{number:05d}", made)
        writer.close(folder / "train")
    (folder / "scratch").rmdir()
    entry = join_split(folder / "train", [found for n in numbers if (found := read_sidecar(folder / "train", n))])
    ids = tuple(f"ENSG{i:011d}" for i in range(genes))
    table = GeneTable(ids, ids, samples.SHARE)
    files.write_bytes(folder / GENES, table.to_tsv())
    names = sorted({name for name, _ in groups})
    manifest = {
        "schema_version": schema.SCHEMA_VERSION, "genes_sha256": files.sha256_file(folder / GENES),
        "panels": {name: {"mask": pack_panel(mask)} for name, mask in samples.spec().panels.items()},
        "gene_hash": table.hash, "split_by": "donor", "tile_px": samples.TILE_PX, "tile_mpp": 1.0,
        "organs": ["breast"], "platforms": ["visium", "xenium"], "splits": {"train": entry},
        "prep": {"spots_side": 2}, "reference": {
            "footprint_kind": schema.DISC, "footprint_um": 55.0, "panel": pack_panel(samples.spec().panels["all"]),
            "platform": "visium", "slide_log_density": 0.0,
        },
        "slides": {name: slide(i) for i, name in enumerate(names)},
        "licenses": {f"t{i}": {"license": "CC0", "use_terms": "", "slides": 1, "profiles": 1} for i in range(2)},
    }  # fmt: skip
    files.write_json(folder / MANIFEST, manifest | changes)
    return folder


def config(shards: Path | str | list[str], **changes: Any) -> DataConfig:
    """Four groups a batch, loaded in this process."""
    named = shards if isinstance(shards, list) else str(shards)
    return DataConfig(**{"shards": named, "global_batch_size": BATCH, "workers": 0} | changes)


def stream(shards: Path | Corpus, rank: int = 0, world: int = 1, seed: int = SEED, **changes: Any) -> GroupStream:
    """The stream over a shard set or an open corpus."""
    data = config(shards if isinstance(shards, Path) else shards.folder, **changes)
    corpus = open_corpus(data) if isinstance(shards, Path) else shards
    return GroupStream(corpus, samples.spec(), MASK, data, seed, rank, world)
