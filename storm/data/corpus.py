"""The corpus: one or several shard sets, in folders or behind URLs, as one row of groups.

In: `data.shards` and a split. Out: genes, panels and a manifest as of one set, and groups by their number. Sets that
were packed together or appended later hold other slides of the same genes; what they cannot share is refused.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from storm import files, schema
from storm.config import DataConfig
from storm.data import places
from storm.data.mixture import Slides
from storm.data.remote import Cache, RemoteTars, Server, check_url, is_url, mirror
from storm.data.stage import Shard, Staged, Stager, stage_folder
from storm.genes import GeneTable
from storm.index import Index, Span
from storm.shards import MANIFEST, ShardSet, Tars, decode_span

WINDOW_SHARDS = 32  # of a corpus that is not on a local disk
_GB = 1e9


class Reader(Protocol):
    """Where the bytes of a split's groups come from."""

    def read(self, spans: Sequence[Span]) -> list[bytes]: ...

    def path(self, number: int) -> str: ...


@dataclass
class Part:
    """A split of one shard set."""

    index: Index
    reader: Reader


class Groups:
    """The groups of several parts, numbered through. Pickled to loader processes: it holds no open file."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self._ends = list(itertools.accumulate(len(part.index) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def _at(self, number: int) -> tuple[Part, int]:
        part = bisect.bisect_right(self._ends, number)
        return self.parts[part], number - (self._ends[part - 1] if part else 0)

    def key(self, number: int) -> str:
        """The key of a group in its shards."""
        part, i = self._at(number)
        return part.index.key(i)

    def source(self, number: int) -> str:
        """Shard and key of a group, to name it in an error."""
        part, i = self._at(number)
        return f"{part.reader.path(int(part.index.shard[i]))}: group {part.index.key(i)}"

    def column(self, name: str) -> npt.NDArray[np.int64]:
        """[n] what the index tells of each group: size, profiles, tiles."""
        return np.concatenate([getattr(part.index, name) for part in self.parts])

    def read(self, numbers: Sequence[int]) -> list[schema.Group]:
        """Groups. Raises DamagedError as `packed`, ValueError where they do not decode."""
        return [self._decoded(number, data) for number, data in zip(numbers, self.packed(numbers), strict=True)]

    def _decoded(self, number: int, data: bytes) -> schema.Group:
        try:
            return decode_span(data, "")
        except ValueError:
            return decode_span(data, self.source(number))  # again, to name it: names take time

    def packed(self, numbers: Sequence[int]) -> list[bytes]:
        """The bytes of groups, verified; those of one part are asked for together.

        Raises:
            DamagedError: a group is not there, or not as it was packed.
        """
        spans: dict[int, bytes] = {}
        for part in self.parts:
            mine = [(number, i) for number in numbers for found, i in [self._at(number)] if found is part]
            if mine:
                spans |= zip([n for n, _ in mine], part.reader.read([part.index.span(i) for _, i in mine]), strict=True)
        return [spans[number] for number in numbers]


class Corpus:
    """Shard sets, open for reading as one. `names` name each in errors, `name` all; `folder` has the first manifest."""

    def __init__(self, sets: Sequence[ShardSet], names: Sequence[str], split: str, readers: Sequence[Reader]) -> None:
        """Join sets.

        Raises:
            ValueError: a set lacks the split, or two of them cannot be one corpus; it names them and the cure.
        """
        check_sets(sets, names)
        self.sets, self.split, self.folder = list(sets), split, sets[0].folder
        self.names, self.name = list(names), ", ".join(names)
        self.genes: GeneTable = sets[0].genes
        self.panels: dict[str, npt.NDArray[np.bool_]] = {k: v for one in sets for k, v in one.panels.items()}
        self.manifest = joined([one.manifest for one in sets])
        self.groups = Groups([Part(s.index(split), reader) for s, reader in zip(sets, readers, strict=True)])
        self.stager: Stager | None = None
        if not len(self.groups):
            raise ValueError(f"{self.name}: split {split!r} holds no group; pack with slides in that split")

    def stage(self, folder: Path, limit_gb: float) -> None:
        """Read from copies in `folder`, which a stager makes while the stream goes on."""
        shards: list[Shard] = []
        for opened, part in zip(self.sets, self.groups.parts, strict=True):
            told = opened.manifest["splits"][self.split]["shards"]
            source = part.reader
            assert isinstance(source, Tars | RemoteTars)
            shards += [Shard(source, i, entry["sha256"], entry["bytes"]) for i, entry in enumerate(told)]
            part.reader = Staged(source, folder, [entry["sha256"] for entry in told])
        self.stager = Stager(folder, shards, limit_gb)

    @property
    def hash(self) -> str:
        """By which an export knows the shard sets of its training."""
        return sets_hash([one.folder for one in self.sets])

    @property
    def groups_hash(self) -> str:
        """Names the groups and their order: the sha256 of each index, which was verified when it was opened."""
        return " ".join(one.manifest["splits"][self.split]["index_sha256"] for one in self.sets)

    @property
    def shard_groups(self) -> npt.NDArray[np.int64]:
        """[S] groups of each shard, in the order of the groups."""
        entries = [one.manifest["splits"][self.split]["shards"] for one in self.sets]
        return np.array([shard["groups"] for shards in entries for shard in shards], np.int64)

    def profiles_of_slides(self) -> dict[str, int]:
        """Slide id -> its profiles in the split."""
        found: dict[str, int] = {}
        for part in self.groups.parts:
            sums = np.bincount(part.index.slide, part.index.profiles, len(part.index.slides))
            found |= dict(zip(part.index.slides, sums.astype(int).tolist(), strict=True))
        return dict(sorted(found.items()))

    def slides(self) -> tuple[Slides, npt.NDArray[np.int32]]:
        """(what a mixture knows of S slides, [n] the slide of each group)."""
        indices = [part.index for part in self.groups.parts]
        first = np.cumsum([0] + [len(index.slides) for index in indices])
        told = [self.manifest["slides"][slide] for index in indices for slide in index.slides]
        study = [entry["study"] for entry in told]
        donor = [f"{entry['study']}\n{entry['donor']}" for entry in told]
        section = [f"{d}\n{entry['section']}" for d, entry in zip(donor, told, strict=True)]
        of = np.concatenate([index.slide + np.int32(start) for index, start in zip(indices, first, strict=False)])
        corpus = np.repeat(np.arange(len(indices)), [len(index.slides) for index in indices])
        groups = np.bincount(of, minlength=len(told))
        return Slides(groups, corpus, study, donor, section, [entry["platform"] for entry in told]), of


def sets_hash(folders: Sequence[Path]) -> str:
    """sha256 of the manifest of a shard set; of several, of theirs in their order."""
    found = [files.sha256_file(folder / MANIFEST) for folder in folders]
    return found[0] if len(found) == 1 else files.sha256_of("\n".join(found).encode())


def check_sets(sets: Sequence[ShardSet], names: Sequence[str]) -> None:
    """Raises ValueError where sets cannot be one corpus."""
    first, slides = sets[0], dict[str, str]()
    split_of: dict[tuple[str, str], str] = {}
    for opened, name in zip(sets, names, strict=True):
        if opened.genes.hash != first.genes.hash:
            raise ValueError(f"{name}: has other genes than {names[0]}; pack it anew with --append {names[0]}")
        for key in ("tile_px", "tile_mpp", "split_by"):
            if opened.manifest.get(key) != first.manifest.get(key):
                raise ValueError(f"{name}: {key} is {opened.manifest.get(key)}, that of {names[0]} is "
                                 f"{first.manifest.get(key)}; pack both with one config")  # fmt: skip
        for slide, entry in opened.manifest.get("slides", {}).items():
            if slide in slides:
                raise ValueError(f"{name}: slide {slide} is in {slides[slide]} too; pack it anew with --append, which "
                                 "leaves out what a set holds")  # fmt: skip
            slides[slide] = name
            donor, split = (entry["study"], entry["donor"]), entry["split"]
            if first.manifest.get("split_by") == "donor" and split_of.setdefault(donor, split) != split:
                raise ValueError(f"{name}: a donor of study {donor[0]} is in split {split}, and in {split_of[donor]} "
                                 "of another set; pack it anew with --append, which keeps donors in place")  # fmt: skip


def joined(manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of several sets: that of the first, with the slides, panels, organs and licences of all."""
    if len(manifests) == 1:
        return manifests[0]
    licenses: dict[str, dict[str, Any]] = {}
    for study, entry in (item for manifest in manifests for item in manifest["licenses"].items()):
        own = licenses.setdefault(study, {"license": "", "use_terms": "", "slides": 0, "profiles": 0})
        own |= {key: own[key] + entry[key] for key in ("slides", "profiles")}
        own |= {key: "; ".join(filter(None, dict.fromkeys([own[key], entry[key]]))) for key in ("license", "use_terms")}
    return manifests[0] | {
        "slides": {slide: entry for manifest in manifests for slide, entry in manifest["slides"].items()},
        "panels": {name: entry for manifest in manifests for name, entry in manifest["panels"].items()},
        "licenses": licenses,
        **{key: sorted({name for m in manifests for name in m[key]}) for key in ("organs", "platforms")},
    }


def set_names(data: DataConfig) -> list[str]:
    """The folders and URLs of `data.shards`. Raises ValueError where there is none."""
    names = [data.shards] if isinstance(data.shards, str) else data.shards
    if not names:
        raise ValueError("data.shards=[]: name at least one shard set")
    return [name.removeprefix("file://") for name in names]


def open_corpus(data: DataConfig, split: str | None = None) -> Corpus:
    """The corpus of a config.

    Args:
        split: in place of `data.split`.

    Raises:
        ValueError: a set does not open, or two cannot be one corpus; RemoteError: a server does not answer.
    """
    split = split or data.split
    names = set_names(data)
    sets: list[ShardSet] = []
    readers: list[Tars | RemoteTars] = []
    for name in names:
        if is_url(name):
            server = Server(check_url(name), data.remote_timeout_s, data.remote_retries)
            cache = places.cache_folder(data.cache_dir)
            sets.append(ShardSet(mirror(server, split, cache)))
            readers.append(RemoteTars(server, split, Cache(cache / "groups", data.cache_gb * _GB)))
        else:
            sets.append(ShardSet(Path(name)))
            readers.append(Tars(Path(name) / split, verify=data.verify))
    corpus = Corpus(sets, names, split, readers)
    folder = stage_folder(data, far(data))
    if folder:
        corpus.stage(folder, data.stage_gb)
    return corpus


def window_shards(data: DataConfig) -> int:
    """Shards that are mixed, 0 for all: as the config says, or by where the shards lie.

    By where they lie, not by where they are copied to: every node must come to the same answer.
    """
    if not isinstance(data.window_shards, str):
        return data.window_shards
    return WINDOW_SHARDS if far(data) else 0


def far(data: DataConfig) -> bool:
    """Whether some of the shards lie behind a URL or on a parallel or network file system."""
    return any(is_url(name) or places.is_shared(Path(name)) for name in set_names(data))
