"""The cache of a frozen encoder: made once from a shard set, and found again by the runs that name it.

In: the config of a run. Out: storm.data.features' folders beside the shards, one per split, each complete or absent.
Encoder and footprint reader run once per group and variant, on this machine's device, in float32.
"""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from storm import files
from storm.config import MaskConfig, RunConfig
from storm.data import features, stain
from storm.data.batch import BatchSpec, collate
from storm.data.corpus import Corpus
from storm.data.features import AUTO, FOLDER, MARKER, FeatureSet, FeatureStore, Recipe
from storm.data.remote import is_url
from storm.data.tile import decode_tiles
from storm.data.view import plain_view
from storm.model.encoders import fingerprint
from storm.model.storm import Storm
from storm.schema import Group
from storm.shards import ShardSet

NEEDS_PIXELS = ("recut", "crop", "pool_cells", "polygon_jitter")  # of MaskConfig: they change what is read of a map
_TOLD_EVERY_S = 30.0
_LARGEST = float(np.finfo(np.float16).max)
_TILES = 16  # encoded at a time; more would only take memory


def make(config: RunConfig, model: Storm, spec: BatchSpec, variants: int, splits: Sequence[str]) -> list[Path]:
    """Write the features of some splits of the config's shard sets; those that are complete and of these shards stay.

    Args:
        model: with the weights of its encoder.
        spec: of the shards.
        variants: of each group; the first is the group as it is.

    Returns:
        The folder of each set.

    Raises:
        ValueError: the encoder trains, or a set is remote.
    """
    if model.config.encoder_train != "frozen":
        raise ValueError(
            "model.encoder_train must be frozen: features of an encoder that trains are those of yesterday"
        )
    if variants < 1:
        raise ValueError(f"--variants {variants}: at least 1, the group as it is")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = fingerprint(model.morphology, model.config)
    recipe = Recipe(
        encoder, variants, config.seed, config.mask.flips, config.mask.stain_jitter, model.config.patch_um,
        model.config.image_width,
    )  # fmt: skip
    found = []
    for one in _local_sets(config):
        folder = one.folder / FOLDER / recipe.key
        for split in splits:
            if not _is_complete(folder, split, one, recipe):
                _make_split(folder / split, one, split, recipe, _Maker(model.eval().to(device), spec, recipe, device))
            print(f"{folder / split}: complete", flush=True)
        found.append(folder)
    return found


def _is_complete(folder: Path, split: str, one: ShardSet, recipe: Recipe) -> bool:
    """Whether a split is there; what is there but will not do is told."""
    path = folder / split / MARKER
    if not path.is_file():
        return False
    try:
        told = features.marker(path)
        features.arrays(path.parent, recipe, one.index(split))
        if split == "train":
            features.statistics(folder, recipe.width)
    except ValueError as error:
        print(f"made anew: {error}", flush=True)
        return False
    if told != (recipe, one.manifest["splits"][split]["index_sha256"]):
        print(f"made anew: {path}: features of other shards than these", flush=True)
        return False
    return True


def _local_sets(config: RunConfig) -> list[ShardSet]:
    names = [config.data.shards] if isinstance(config.data.shards, str) else config.data.shards
    if remote := [name for name in names if is_url(name)]:
        raise ValueError(f"{remote[0]}: features lie beside shards of a local disk; copy the set there")
    return [ShardSet(Path(name)) for name in names]


class _Maker:
    """Runs the model's first level over groups."""

    def __init__(self, model: Storm, spec: BatchSpec, recipe: Recipe, device: torch.device) -> None:
        self.model, self.spec, self.recipe, self.device = model, spec, recipe, device

    @torch.inference_mode()
    def features(self, group: Group, number: int, variant: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(profile [n, 2, D], valid [n, 2], tile [t, D]) of a group in a variant, in its own order."""
        view = self.recipe.vary(plain_view(group, use_counts=False), number, variant)
        found = collate([group], [view], self.spec, np.zeros(0, np.int64))
        batch = {name: tensor.to(self.device) for name, tensor in found.items()}
        chunks = zip(batch["tiles"].split(_TILES), batch["tile_weight"].split(_TILES), strict=True)
        maps, summaries = zip(*(self.model.morphology(*chunk) for chunk in chunks), strict=True)
        map_TPD, summary_TD = torch.cat(maps), torch.cat(summaries)
        feature_RN2D, valid_RN2 = self.model.footprint(map_TPD, batch)
        placed = np.argsort(group.region, kind="stable")  # as collate lays profiles out
        profile, valid = (np.empty((len(placed), *a.shape[2:]), np.float32) for a in (feature_RN2D, valid_RN2))
        profile[placed] = feature_RN2D[batch["profile"]].cpu().numpy()
        valid[placed] = valid_RN2[batch["profile"]].cpu().numpy()
        return profile, valid, summary_TD[: len(group.tiles)].cpu().numpy()


def _make_split(target: Path, one: ShardSet, split: str, recipe: Recipe, maker: _Maker) -> None:
    index = one.index(split)
    profiles, tiles = (np.concatenate([[0], np.cumsum(n)]) for n in (index.profiles, index.tiles))
    told = time.monotonic()
    with files.replacing_folder(target) as folder:
        maps: dict[str, Any] = {
            name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
            for name, (shape, dtype) in features.layout(recipe, index).items()
        }
        moments = np.zeros((2, recipe.width))
        for i in range(len(index)):
            group = one.read(split, index, i)
            p, t = (slice(int(ends[i]), int(ends[i + 1])) for ends in (profiles, tiles))
            pixels = decode_tiles(group, maker.spec.tile_px)
            maps["stain"][t] = np.stack([stain.tile_statistics(tile) for tile in pixels]) if len(pixels) else 0
            for variant in range(recipe.variants):
                profile, valid, tile = maker.features(group, i, variant)
                if not all((np.abs(a) <= _LARGEST).all() for a in (profile, tile)):  # a NaN is none either
                    raise ValueError(f"{target}: the encoder's features of group {i} go beyond half precision; see to "
                                     "encoder.weights, model.pixel_mean and model.pixel_sd")  # fmt: skip
                maps["profile"][variant, p], maps["valid"][variant, p], maps["tile"][variant, t] = profile, valid, tile
                moments += tile.sum(0, dtype=np.float64), np.square(tile, dtype=np.float64).sum(0)
            if time.monotonic() - told > _TOLD_EVERY_S:
                told = time.monotonic()
                print(f"{target}: {i + 1} of {len(index)} groups", flush=True)
        for array in maps.values():
            array.flush()
        if split == "train":
            mean, square = moments / max(1, recipe.variants * int(tiles[-1]))
            spread = np.sqrt(np.maximum(square - mean**2, 1e-6))
            np.save(folder / "statistics.npy", np.stack([mean, spread]).astype(np.float32))
        entry = one.manifest["splits"][split]
        files.write_json(folder / MARKER, {"recipe": vars(recipe), "index_sha256": entry["index_sha256"]})


def find(corpus: Corpus, config: RunConfig, own: str) -> FeatureStore:
    """The features that a run names, of the corpus's split; `own` is the fingerprint of its encoder.

    Raises:
        ValueError: there are none, several, or they are of another encoder, of other shards, or varied otherwise.
    """
    named = config.data.features
    if named != AUTO and len(corpus.sets) > 1:
        raise ValueError(
            f"data.features={named}: of several shard sets each has its own features; set data.features=auto"
        )
    found = []
    for one in corpus.sets:
        folders = [Path(named)] if named != AUTO else _beside(one, own, config.mask)
        if len(folders) != 1:
            fact = f"hold {len(folders)} caches of this encoder ({', '.join(f.name for f in folders)}); name one as " \
                "data.features=FOLDER" if folders else "hold no features of this encoder, varied as the run is; " \
                "python launch/features.py with the run's config makes them"  # fmt: skip
            raise ValueError(f"{one.folder / FOLDER}: {fact}")
        entry = one.manifest["splits"][corpus.split]
        opened = FeatureSet(folders[0], corpus.split, one.index(corpus.split), entry["index_sha256"])
        _check(opened, own, config.mask)
        found.append(opened)
    return FeatureStore(found, [len(one.index(corpus.split)) for one in corpus.sets])


def _beside(one: ShardSet, encoder: str, mask: MaskConfig) -> list[Path]:
    """The caches beside a shard set that were made of this encoder and varied as the run is."""
    told = {}
    for path in (one.folder / FOLDER).glob(f"*/train/{MARKER}"):
        with contextlib.suppress(ValueError):  # of a damaged one launch/features.py tells, and makes it anew
            told[path.parent.parent] = vars(features.marker(path)[0])
    asked = {"encoder": encoder, "flips": mask.flips, "stain_jitter": mask.stain_jitter}
    return sorted(folder for folder, recipe in told.items() if asked.items() <= recipe.items())


def _check(opened: FeatureSet, encoder: str, mask: MaskConfig) -> None:
    recipe, cure = opened.recipe, "python launch/features.py with the run's config makes its own"
    if recipe.encoder != encoder:
        raise ValueError(f"{opened.folder}: features of another encoder (weights, options, pixels or geometry); {cure}")
    for key in ("flips", "stain_jitter"):
        if getattr(recipe, key) != getattr(mask, key):
            raise ValueError(f"{opened.folder}: made with mask.{key}={getattr(recipe, key)}, the run has "
                             f"{getattr(mask, key)}; set it so, or {cure}")  # fmt: skip


def without_pixels(mask: MaskConfig) -> tuple[MaskConfig, list[str]]:
    """The mask config with off what cached features cannot follow, and its keys."""
    off = [key for key in NEEDS_PIXELS if getattr(mask, key)]
    return mask.model_copy(update=dict.fromkeys(off, 0.0)), off
