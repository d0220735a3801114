"""A slide store of coloured noise and the checkpoint of an untrained model, written through the real layouts.

For tests of everything above the training: quick, and with values that differ from profile to profile.
"""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from safetensors.torch import save_file

from storm import files, genes, schema, store
from storm.model.storm import Storm
from storm.presets import ModelConfig

MODEL = ModelConfig(
    tile_px=32, tile_mpp=3.5, patch_px=16, image_width=32, image_depth=1, gene_width=16, fusion_width=32,
    space_width=32, space_depth=1, head_width=16, organs=("breast",),
)  # fmt: skip
GENES = genes.GeneTable(
    tuple(f"ENSG{i:011d}" for i in range(40)),
    (*(f"GENE{i}" for i in range(39)), "GENE38"),  # two genes share their symbol
    np.full(40, 1 / 40),
)
PLANTED = "planted_donor_7"
HOME = "/".join(["", "home", "somebody"])


def write_store(folder: Path, slide_id: str = "slide1", side: int = 12, measured: bool = True, seed: int = 0) -> Path:
    """A slide of `side` x `side` tiles of noise with spots at a pitch of 100 um, and one gene no model knows."""
    rng = np.random.default_rng(seed)
    info = store.SlideInfo(
        slide_id, slide_id, PLANTED, "study1", "breast", "human", "visium" if measured else "unknown",
        "spot", "test", 0.875, "manifest", side * 128, side * 128, MODEL.tile_px, MODEL.tile_mpp, np.eye(3).tolist(),
        "given", None, license="CC0-1.0",
    )  # fmt: skip
    tiles = [
        store.Tile(row, col, simplejpeg.encode_jpeg(rng.integers(60 + 10 * row, 255, (32, 32, 3), np.uint8)), [1.0] * 7)
        for row, col in sorted(((r, c) for r in range(side) for c in range(side)), key=lambda p: store.morton(*p))
        if (row, col) != (1, 1)
    ]
    steps = np.arange(150.0, side * 112 - 100, 100)
    xy_um = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2) if measured else np.zeros((0, 2))
    n = len(xy_um)
    counts = rng.poisson(2.0, (n, 30))
    profile, gene = np.nonzero(counts)
    profiles = schema.Profiles(
        [f"spot{i}-1" for i in range(n)], xy_um, np.full(n, 55, np.float32), np.zeros(n, np.uint8),
        np.concatenate([[0], np.cumsum(np.bincount(profile, minlength=n))]).astype(np.int64),
        gene.astype(np.int32), counts[profile, gene].astype(np.int32),
    )  # fmt: skip
    order = rng.permutation(29)  # the store's own order of genes is not the model's
    table = genes.GeneTable(
        (*(GENES.ids[i] for i in order), "ENSG99999999999"), (*(GENES.symbols[i] for i in order), "NOVEL")
    )
    return store.write(folder, info, tiles, profiles, table)


def weights(config: ModelConfig = MODEL, n_genes: int = 40, seed: int = 1) -> dict[str, torch.Tensor]:
    """Weights in which nothing is zero, so that every part of the input moves every output."""
    generator = torch.Generator().manual_seed(seed)
    state = Storm(config, n_genes).state_dict()
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in state.items()
    }


def reference(panel_genes: int = 32, split_by: str = "donor") -> dict[str, object]:
    """reference.json of a run on one study; the last genes of the vocabulary are outside the reference panel."""
    counted = {"slides": 2, "profiles": 200}
    return {
        "slide_log_density": -1.5, "platform": "visium", "panel": genes.pack_panel(np.arange(40) < panel_genes),
        "footprint_um": 55.0, "footprint_kind": schema.DISC, "spots_side": 5, "gene_hash": GENES.hash,
        "split_by": split_by, "shards_hash": hashlib.sha256(b"shards").hexdigest(), "seed": 0,
        "licenses": {"study1": {"license": "CC0-1.0", "use_terms": "", **counted}},
        "slides": {PLANTED: {"split": "train"}}, "studies": {"study1": counted}, "organs": {"breast": counted},
        "platforms": {"visium": counted},
    }  # fmt: skip


def shards_checkpoint(shards: Path, run: Path) -> Path:
    """The checkpoint of an untrained model for the genes, tiles and reference of a shard set."""
    manifest = files.read_json(shards / "manifest.json")
    table = genes.GeneTable.read(shards / "genes.tsv")
    config = dataclasses.replace(MODEL, tile_px=manifest["tile_px"], tile_mpp=manifest["tile_mpp"])
    counted = {"slides": 1, "profiles": 1}
    own = manifest["reference"] | {
        "spots_side": manifest["prep"]["spots_side"], "gene_hash": table.hash, "split_by": manifest["split_by"],
        "shards_hash": files.sha256_file(shards / "manifest.json"), "seed": 0, "licenses": manifest["licenses"],
        "studies": {"s": counted}, "organs": {"o": counted}, "platforms": dict.fromkeys(manifest["platforms"], counted),
    }  # fmt: skip
    return _write(run / "checkpoints" / "step_0000020", config, table, own, 20)


def write_checkpoint(
    run: Path, step: int = 20, complete: bool = True, split_by: str = "donor", config: ModelConfig = MODEL
) -> Path:
    """A checkpoint of `run` as training leaves it, without the engine's own files."""
    folder = run / "checkpoints" / f"step_{step:07d}"
    return _write(folder, config, GENES, reference(split_by=split_by), step, complete)


def _write(
    folder: Path, config: ModelConfig, table: genes.GeneTable, own: dict[str, object], step: int, complete: bool = True
) -> Path:
    folder.mkdir(parents=True)
    save_file(weights(config, len(table)), folder / "model.safetensors")
    files.write_json(folder / "model.json", {"model": dataclasses.asdict(config), "n_genes": len(table)})
    files.write_bytes(folder / "genes.tsv", table.to_tsv())
    files.write_json(folder / "reference.json", own)
    files.write_bytes(folder / "config.yaml", f"run_dir: {HOME}/runs\n".encode())
    if complete:
        seal(folder, step)
    return folder


def seal(folder: Path, step: int = 20) -> None:
    """Write the marker of a checkpoint."""
    sums = {path.name: files.sha256_file(path) for path in folder.iterdir()}
    marker = {"files": sums, "step": step, "code_version": "0123abc", "storm_version": "0.1.0"}
    files.write_json(folder / "COMPLETE", marker)
