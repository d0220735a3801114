"""Features of a frozen encoder, cached beside a shard set: what a batch holds of its tiles in place of pixels.

In: a folder that storm.train.feature_cache wrote, per set and split,

    <shards>/features/<key>/<split>/profile.npy     float16 [V, P, 2, D] under each footprint, over the window around it
                                    valid.npy       float16 [V, P, 2] the share of each that could be read
                                    tile.npy        float16 [V, T, D] summary of each tile
                                    stain.npy       float32 [T, S] statistics of each tile as it is
                                    statistics.npy  float32 [2, D] mean and sd of the summaries; of split train alone
                                    features.json   what they were made of, and the sha256 of the split's index

V variants of every group: the first as it is, the others flipped, turned and stained by draws keyed by (seed, variant,
group). Rows of a group are consecutive, groups in the order of the index, profiles and tiles in their order in the
group. Out: the entries `schema.FEATURES` of a batch, each column standardised, some left out where a run asks for it
(a small set is soon known by heart; to leave out a random part of many columns is what helps). A profile's feature was
read from the whole map; so where its footprint or window touches a tile that a view hides, it is not shown: nothing of
a hidden tile reaches an input.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from storm import files, shards
from storm.data.view import View
from storm.index import Index
from storm.schema import TILE_STATS, Group

VERSION = 1  # of the layout, and of how maps are read
FOLDER, MARKER, AUTO = shards.FEATURES, "features.json", "auto"
_PICK, _VARY, _DROP = 3, 4, 6  # keep the generators of different purposes apart
_ANEW = "python launch/features.py with the config of the run makes it anew"

Floats = npt.NDArray[np.float32]


class Cached(NamedTuple):
    """What is cached of a group in one variant. n profiles, t tiles."""

    profile: Floats  # [n, 2, D] standardised
    valid: npt.NDArray[np.float16]  # [n, 2]
    tile: Floats  # [t, D] standardised
    stain: Floats  # [t, S]
    patch_um: float
    kept: tuple[Floats, Floats] = np.ones((), np.float32), np.ones((), np.float32)  # factors on profile and tile

    def dropped(self, share: float, rng: np.random.Generator) -> "Cached":
        """With a random share of the columns of each profile and tile left out, the others larger for it."""

        def factor(like: Floats) -> Floats:
            return (rng.random(like.shape, np.float32) >= share).astype(np.float32) / np.float32(1 - share)

        return self._replace(kept=(factor(self.profile), factor(self.tile)))


@dataclass(frozen=True)
class Recipe:
    """What the features of a set were made of."""

    encoder: str  # storm.model.encoders.fingerprint
    variants: int
    seed: int
    flips: bool
    stain_jitter: float
    patch_um: float
    width: int
    version: int = VERSION

    @property
    def key(self) -> str:
        """Names the folder."""
        return files.sha256_of(files.dump_json(vars(self)))[:16]

    def vary(self, view: View, number: int, variant: int) -> View:
        """The view of the set's group `number`, flipped, turned and stained as its variant was."""
        if not variant:
            return replace(view, flip=False, turns=0, stain=None)
        rng = _rng([self.seed, variant, number], _VARY)
        flip, turns = (bool(rng.integers(2)), int(rng.integers(4))) if self.flips else (False, 0)
        stain = np.exp(rng.normal(0, self.stain_jitter, 3)) if self.stain_jitter else None
        return replace(view, flip=flip, turns=turns, stain=stain)


def _rng(key: list[int], purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key, spawn_key=(purpose,))))


def marker(path: Path) -> tuple[Recipe, str]:
    """What the marker of a split tells: the recipe, and the sha256 of the index of its shards.

    Raises:
        ValueError: it is missing, or no marker.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no features of split {path.parent.name!r}; python launch/features.py makes them, "
                         f"with the config of the run and --split {path.parent.name}")  # fmt: skip
    told = files.read_json(path)
    try:
        recipe, digest = Recipe(**told["recipe"]), str(told["index_sha256"])
    except (KeyError, TypeError):
        raise ValueError(f"{path}: is no marker of features; {_ANEW}") from None
    if recipe.version != VERSION:
        raise ValueError(f"{path}: is of version {recipe.version} of the cache, this code writes {VERSION}; {_ANEW}")
    return recipe, digest


def layout(recipe: Recipe, index: Index) -> dict[str, tuple[tuple[int, ...], npt.DTypeLike]]:
    """Name -> shape and type of each array of a split."""
    v, profiles, tiles = recipe.variants, int(index.profiles.sum()), int(index.tiles.sum())
    return {
        "profile": ((v, profiles, 2, recipe.width), np.float16), "valid": ((v, profiles, 2), np.float16),
        "tile": ((v, tiles, recipe.width), np.float16), "stain": ((tiles, len(TILE_STATS)), np.float32),
    }  # fmt: skip


def _load(path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray:
    """An array, mapped. Raises ValueError where it is missing, damaged, or of another shape."""
    try:
        found: npt.NDArray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: is missing or damaged ({error}); {_ANEW}") from None
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(f"{path}: holds {found.dtype} {found.shape}, not {np.dtype(dtype)} {shape}; {_ANEW}")
    return found


def arrays(folder: Path, recipe: Recipe, index: Index) -> dict[str, npt.NDArray]:
    """The arrays of a split, mapped. Raises ValueError where one is missing, damaged, or of another shape."""
    return {name: _load(folder / f"{name}.npy", *of) for name, of in layout(recipe, index).items()}


def statistics(folder: Path, width: int) -> Floats:
    """[2, D] mean and sd of the summaries of split train of a set. Raises ValueError where they are none."""
    path = folder / "train" / "statistics.npy"
    found = np.array(_load(path, (2, width), np.float32))
    if not np.isfinite(found).all() or (found[1] <= 0).any():
        raise ValueError(f"{path}: holds what is no mean and sd; {_ANEW}")
    return found


class FeatureSet:
    """The features of one split of one set, mapped. Pickled to loader processes: each maps them itself."""

    def __init__(self, folder: Path, split: str, index: Index, index_sha256: str) -> None:
        """Open one.

        Raises:
            ValueError: incomplete, damaged, or of other shards than these.
        """
        self.folder, self._index = folder / split, index
        self.recipe, of = marker(self.folder / MARKER)
        if of != index_sha256:
            raise ValueError(f"{self.folder / MARKER}: features of other shards than these (index); {_ANEW}")
        self._profiles, self._tiles = (np.concatenate([[0], np.cumsum(n)]) for n in (index.profiles, index.tiles))
        self.statistics = statistics(folder, self.recipe.width)
        self._maps = arrays(self.folder, self.recipe, index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def read(self, i: int, variant: int) -> Cached:
        """What is cached of group i of the split."""
        if not self._maps:
            self._maps = arrays(self.folder, self.recipe, self._index)
        profiles, tiles = (slice(int(ends[i]), int(ends[i + 1])) for ends in (self._profiles, self._tiles))
        maps, (mean, sd) = self._maps, self.statistics
        return Cached(
            (maps["profile"][variant, profiles] - mean) / sd, maps["valid"][variant, profiles],
            (maps["tile"][variant, tiles] - mean) / sd, maps["stain"][tiles], self.recipe.patch_um,
        )  # fmt: skip


class FeatureStore:
    """The features of a corpus: of each part of its groups."""

    def __init__(self, sets: Sequence[FeatureSet], groups: Sequence[int]) -> None:
        """`groups` of each set's split. Raises ValueError where two sets were made otherwise."""
        self.sets, self._ends = list(sets), np.cumsum(groups)
        self.recipe = sets[0].recipe
        for one in sets:
            if one.recipe != self.recipe:
                raise ValueError(f"{one.folder}: its features were made otherwise than those of {sets[0].folder} "
                                 f"({one.recipe} for {self.recipe}); make both with one config")  # fmt: skip

    def pick(self, seed: int, epoch: int, index: int) -> int:
        """The variant in which a place of an epoch is shown."""
        return int(_rng([seed, epoch, index], _PICK).integers(self.recipe.variants))

    @staticmethod
    def drop_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
        """The generator of the columns that a place of an epoch leaves out."""
        return _rng([seed, epoch, index], _DROP)

    def show(self, view: View, number: int, variant: int) -> tuple[View, Cached]:
        """The view of a group of the corpus in a variant, and what is cached of it."""
        part = int(np.searchsorted(self._ends, number, side="right"))
        i = number - (int(self._ends[part - 1]) if part else 0)
        return self.recipe.vary(view, i, variant), self.sets[part].read(i, variant)


def entries(
    groups: Sequence[Group], views: Sequence[View], cached: Sequence[Cached], out: dict[str, npt.NDArray],
    places: Sequence[tuple[npt.NDArray, npt.NDArray]],
) -> None:  # fmt: skip
    """Write the entries `schema.FEATURES` into a batch, and `tile_target` of its hidden tiles.

    Args:
        out: the batch, with its entries of tiles; as they came, so come the tiles here: by group, by place.
        places: (region, slot) of each group's profiles in [R, N].
    """
    width = cached[0].profile.shape[-1]
    regions, n = out["profile"].shape
    out["profile_feature"] = np.zeros((regions, n, 2, width), np.float32)
    out["profile_valid"] = np.zeros((regions, n, 2), np.float32)
    out["tile_feature"] = np.zeros((len(out["tile_weight"]), width), np.float32)
    out["tile_feature_target"] = np.zeros((*out["tile_hidden"].shape, width), np.float32)
    first = packed = 0
    for group, view, one, at in zip(groups, views, cached, places, strict=True):
        shown = ~touched(group, view, one.patch_um)
        out["profile_valid"][at] = one.valid * shown
        out["profile_feature"][at] = np.where((out["profile_valid"][at] > 0)[..., None], one.profile * one.kept[0], 0)
        used, tile = np.zeros(len(group.meta.regions), np.int64), one.tile * one.kept[1]
        for row, place in enumerate(sorted(group.tiles)):
            slot = first + place[0], used[place[0]]
            used[place[0]] += 1
            if place in view.hidden_tiles:
                out["tile_target"][slot] = one.stain[row]
                out["tile_feature_target"][slot] = one.tile[row]
            else:
                out["tile_feature"][packed] = tile[row]
                packed += 1
        first += len(group.meta.regions)


def touched(group: Group, view: View, patch_um: float) -> npt.NDArray[np.bool_]:
    """[n, 2] profiles whose footprint, or whose window, reads a patch of a hidden tile.

    A point is read between the centres of patches up to one patch away, the nearest of which lies half a patch inside
    its tile: so a square is read as far as half a patch around it.
    """
    profiles, tile_um = group.profiles, group.meta.tile_um
    half = np.stack([reach_um(group), np.full(len(profiles), tile_um / 2)], axis=1) + patch_um / 2
    found = np.zeros((len(profiles), 2), bool)
    for region, meta in enumerate(group.meta.regions):
        hidden = np.zeros((meta.rows, meta.cols), np.int64)
        for _, row, col in (place for place in view.hidden_tiles if place[0] == region):
            hidden[row, col] = 1
        if not hidden.any():
            continue
        before = np.pad(hidden.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # hidden tiles above and to the left
        mine = np.flatnonzero(group.region == region)
        local = (profiles.xy_um[mine] - np.array(meta.origin_um))[:, None, :]
        low, high = (np.floor((local + sign * half[mine][..., None]) / tile_um).astype(np.int64) for sign in (-1, 1))
        sides = np.array([meta.cols, meta.rows])
        (x0, y0), (x1, y1) = (np.moveaxis(np.clip(a, 0, sides), -1, 0) for a in (low, high + 1))
        found[mine] = before[y1, x1] - before[y0, x1] - before[y1, x0] + before[y0, x0] > 0
    return found


def reach_um(group: Group) -> npt.NDArray[np.float64]:
    """[n] how far a footprint reaches from its centre along x or y."""
    profiles = group.profiles
    reach = profiles.footprint_um.astype(np.float64) / 2
    owner = np.repeat(np.arange(len(profiles)), np.diff(profiles.polygon_indptr))
    np.maximum.at(reach, owner, np.abs(profiles.polygon_um.astype(np.float64)).max(axis=1, initial=0))
    return reach
