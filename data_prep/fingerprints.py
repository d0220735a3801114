"""Slides that are the same section twice: fingerprints of the image and of the profiles, compared over a corpus.

In: a slide's overview and its counts as they pass. Out: `facts["fingerprints"]` of its store, and the pairs of slides
that share tissue.

Image: the signs of the low frequencies (cosine transform) of the light that the tissue takes, over a square around the
tissue whose side follows from the tissue's own extent. So it does not depend on file format, compression, resolution
or empty margins; a flip turns known signs and a transposition swaps them, so that all eight orientations follow from
one fingerprint.

Profiles: a 64-bit hash of each profile's counts by Ensembl id, of which the smallest are kept. They sample profiles by
content: the order of profiles does not matter, and slides that were filtered otherwise still share those of the
profiles that both have. Counts that were made anew from the reads (another pipeline, another pooling) share none; then
the image tells.
"""

import base64
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from data_prep.tissue import Mask, Overview, absorption
from storm.genes import GeneTable
from storm.schema import CountBlock
from storm.store import SlideInfo

SIDE = 24  # frequencies along each axis
_PX = 96  # of the square that they are taken from
_EXTENT = 4.0  # side of the square by the root mean square distance of tissue from its centre: a disc fits in
_MIN_TISSUE_PX = 400  # of an overview: less has no picture to tell apart
KEPT = 512  # hashes per slide
_MIN_GENES = 8  # a profile of fewer genes may equal another one by chance
_MIN_COMMON = 16  # sampled profiles of the smaller slide that a share must rest on
SAME_IMAGE = 0.75  # share of equal signs: copies of real slides have .80 or more, neighbouring sections .60 or less
SAME_PROFILES = 0.05  # share of the smaller slide's profiles

Hashes = npt.NDArray[np.uint64]
Signs = npt.NDArray[np.bool_]


def _mixed(values: Hashes) -> Hashes:
    """64 bits, each of which depends on each of the input's (the finaliser of MurmurHash3)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(factor)
    return values ^ (values >> np.uint64(33))


class ProfileSketch:
    """The smallest hashes of the profiles whose counts pass."""

    def __init__(self, table: GeneTable) -> None:
        digests = [hashlib.blake2b(gene.encode(), digest_size=8).digest() for gene in table.ids]
        self._gene = np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
        self._kept: Hashes = np.zeros(0, np.uint64)

    def watch(self, blocks: Iterable[CountBlock]) -> Iterator[CountBlock]:
        """The blocks themselves, seen on their way."""
        for block in blocks:
            self._add(block)
            yield block

    def _add(self, block: CountBlock) -> None:
        # A sum does not depend on the order of genes; it wraps around, and so do the differences of the running sum.
        entries = _mixed(self._gene[block.gene] + block.count.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(entries, dtype=np.uint64)])
        hashes = _mixed(np.diff(running[block.indptr]))[np.diff(block.indptr) >= _MIN_GENES]
        self._kept = np.union1d(self._kept, hashes)[:KEPT]

    def text(self) -> str:
        """The kept hashes, ascending, as text."""
        return base64.b64encode(self._kept.astype("<u8").tobytes()).decode()


def image_signs(overview: Overview, mask: Mask) -> str:
    """Fingerprint of the tissue's picture as text; empty where there is too little tissue."""
    rows, cols = np.nonzero(mask)
    if len(rows) < _MIN_TISSUE_PX:
        return ""
    taken = absorption(cv2.GaussianBlur(overview.rgb, (0, 0), 1.0), overview.glass).astype(np.float32)
    # Within the tissue, against its mean: the outline alone would make neighbouring sections alike.
    inside = np.where(mask, taken - taken[mask].mean(), np.float32(0)).astype(np.float32)
    side = _EXTENT * np.sqrt(cols.var() + rows.var())
    centre = np.array([cols.mean(), rows.mean()]) + 0.5
    # Most of the way by whole px, which are averaged; then a little blur, against what lies between the samples.
    step = max(1, int(side / _PX / 2))
    size = (-(-inside.shape[1] // step), -(-inside.shape[0] // step))
    framed = cv2.copyMakeBorder(
        inside, 0, size[1] * step - inside.shape[0], 0, size[0] * step - inside.shape[1], cv2.BORDER_CONSTANT, value=0
    )
    coarse = cv2.resize(framed, size, interpolation=cv2.INTER_AREA)
    scale = _PX / side * step
    if scale < 1:
        coarse = cv2.GaussianBlur(coarse, (0, 0), 0.5 / scale)
    offset = _PX / 2 - scale * centre / step + 0.5 * (scale - 1)  # the middle of px 0 lies at 0, not at 0.5
    place = np.array([[scale, 0, offset[0]], [0, scale, offset[1]]])
    square = cv2.warpAffine(coarse, place, (_PX, _PX), flags=cv2.INTER_LINEAR)
    signs = cv2.dct(square)[:SIDE, :SIDE] > 0
    return base64.b64encode(np.packbits(signs).tobytes()).decode()


def of_slide(overview: Overview | None, mask: Mask | None, sketch: ProfileSketch | None) -> dict[str, str]:
    """What a store keeps of a slide."""
    image = image_signs(overview, mask) if overview is not None and mask is not None else ""
    return {"image": image, "profiles": sketch.text() if sketch else ""}


@dataclass(frozen=True)
class Pair:
    """Two slides that share tissue."""

    first: SlideInfo
    second: SlideInfo
    image: float  # share of equal signs in the best orientation, 0..1; 0 where it is no sign of a copy
    profiles: float  # estimated share of the smaller slide's profiles that both have; 0 where none are

    @property
    def one_section(self) -> bool:
        """Whether the manifest says so itself: rows that share a section may share image and profiles."""
        return _person(self.first) == _person(self.second) and self.first.section == self.second.section

    @property
    def one_donor(self) -> bool:
        """Whether both are said to be of one donor."""
        return _person(self.first) == _person(self.second)

    def text(self) -> str:
        """One line for a report."""
        shared = [f"the same picture of tissue ({self.image:.0%} alike)"] if self.image else []
        shared += [f"about {self.profiles:.0%} of the profiles"] if self.profiles else []
        whose = "" if self.one_donor else ", of different donors by the manifest"
        return f"{self.first.slide_id} and {self.second.slide_id} share {' and '.join(shared)}{whose}"


def _person(info: SlideInfo) -> tuple[str, str]:
    return info.study, info.donor


def _hashes(info: SlideInfo) -> Hashes:
    text = info.facts.get("fingerprints", {}).get("profiles", "")
    return np.frombuffer(base64.b64decode(text), "<u8").astype(np.uint64)


def _signs(info: SlideInfo) -> Signs | None:
    text = info.facts.get("fingerprints", {}).get("image", "")
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))
    return bits.astype(bool).reshape(SIDE, SIDE) if len(bits) == SIDE**2 else None


def _orientations(signs: Signs) -> Signs:
    """[8, SIDE**2] the fingerprints of all flips and 90-degree turns of a picture."""
    odd = np.arange(SIDE) % 2 == 1
    flat, across, down = np.zeros((1, 1), bool), odd[None], odd[:, None]
    flips = (flat, across, down, across ^ down)
    return np.array([(start ^ flip).ravel() for start in (signs, signs.T) for flip in flips])


def _image_pairs(infos: Sequence[SlideInfo]) -> dict[tuple[int, int], float]:
    known = [(i, signs) for i, info in enumerate(infos) if (signs := _signs(info)) is not None]
    if len(known) < 2:
        return {}
    # As +1 and -1, so that a product counts equal signs less unequal ones. The constant is always 0 or noise.
    table = np.array([signs.ravel() for _, signs in known], np.float32) * 2 - 1
    table[:, 0] = 0
    found = {}
    for place, (i, signs) in enumerate(known[:-1]):
        turned = _orientations(signs).astype(np.float32) * 2 - 1
        alike = (turned @ table[place + 1 :].T).max(axis=0) / (SIDE**2 - 1) / 2 + 0.5
        for later in np.flatnonzero(alike >= SAME_IMAGE).tolist():
            found[i, known[place + 1 + later][0]] = round(float(alike[later]), 4)
    return found


def shared_profiles(a: Hashes, b: Hashes) -> float:
    """Estimated share of the smaller set of profiles that is in both, from the smallest hashes of each."""
    if not len(a) or not len(b):
        return 0.0
    # A full sketch knows all hashes up to its last one; one that is not full knows them all.
    limit = min(int(x[-1]) if len(x) == KEPT else 2**64 - 1 for x in (a, b))
    a, b = (x[x <= np.uint64(limit)] for x in (a, b))
    fewer = min(len(a), len(b))
    return len(np.intersect1d(a, b)) / fewer if fewer >= _MIN_COMMON else 0.0


def _profile_pairs(infos: Sequence[SlideInfo]) -> dict[tuple[int, int], float]:
    """Only slides that have a hash in common are compared."""
    hashes = [_hashes(info) for info in infos]
    holders: dict[int, list[int]] = defaultdict(list)
    for i, own in enumerate(hashes):
        for value in own.tolist():
            holders[value].append(i)
    meeting = {(i, j) for found in holders.values() for k, j in enumerate(found) for i in found[:k]}
    shares = {(i, j): round(shared_profiles(hashes[i], hashes[j]), 4) for i, j in sorted(meeting)}
    return {pair: share for pair, share in shares.items() if share >= SAME_PROFILES}


def duplicates(infos: Iterable[SlideInfo]) -> list[Pair]:
    """Every pair of slides that share their picture or their profiles, whatever the manifest says of them."""
    known = list(infos)
    image, profiles = _image_pairs(known), _profile_pairs(known)
    return [
        Pair(known[i], known[j], image.get((i, j), 0.0), profiles.get((i, j), 0.0))
        for i, j in sorted({*image, *profiles})
    ]


def across_splits(infos: Iterable[SlideInfo], split_of: Mapping[str, str]) -> list[str]:
    """A fault for each pair of slides that share tissue and lie in different splits (slide_id -> split)."""
    return [
        f"{pair.text()}, but {pair.first.slide_id} is in {split_of[pair.first.slide_id]} and {pair.second.slide_id} in "
        f"{split_of[pair.second.slide_id]}; leave one out, or give both one donor and one split"
        for pair in duplicates(info for info in infos if info.slide_id in split_of)
        if split_of[pair.first.slide_id] != split_of[pair.second.slide_id]
    ]


def notes(infos: Iterable[SlideInfo]) -> list[dict[str, Any]]:
    """The pairs that the manifest does not tell of itself, for a report: the grave ones, of two donors, first."""
    found = [pair for pair in duplicates(infos) if not pair.one_section]
    return [
        {"slides": [pair.first.slide_id, pair.second.slide_id], "image": pair.image, "profiles": pair.profiles,
         "grave": not pair.one_donor, "text": pair.text()}
        for pair in sorted(found, key=lambda pair: pair.one_donor)
    ]  # fmt: skip
