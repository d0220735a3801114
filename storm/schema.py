"""THE contract between preparation and training: what a profile, a region, a group and a batch are.

In: a `Group` (k regions of one slide with their tile JPEGs and profiles). Out: the members of one WebDataset sample
(name, bytes), and back. Torch-free; the unit of every length is in its name.

One sample of a shard, key = text before the first dot:

    <slide>_<group>.meta.json       GroupMeta: who, where, how measured, the regions' places
    <slide>_<group>.g0r1c2.jpg      tile at row 1, column 2 of region 0, bytes as in the slide store
    <slide>_<group>.profiles.npz    arrays only: region, xy_um, footprint_*, polygon_*, indptr, gene, count, ids
"""

import io
import json
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storm.files import dump_json
from storm.npz import load_arrays

SCHEMA_VERSION = 2

PLATFORMS = ("unknown", "st", "visium", "visium_hd", "xenium", "cosmx")  # index = platform id, 0 = not told
KINDS = ("spot", "bin", "cell")  # of a profile
SPLITS = ("train", "val", "test")
# Footprint kinds; footprint_um is the disc's diameter, the square's side, or that of a disc as large as the polygon.
DISC, SQUARE, POLYGON = 0, 1, 2
FOOTPRINT_SIDE = 8  # points along the side of a footprint's lattice; data.outline says why 8
# What is known of a tile's quality, per tile: shares of the tile that are tissue, inside the slide, pen, black and
# white, the mean saturation in 0..1, and the variance of the Laplacian (low = out of focus).
TILE_QUALITY = ("tissue", "inside", "pen", "black", "white", "saturation", "sharpness")
# What is known of a profile's quality: name -> dtype. in_tissue is the vendor's word (-1 = not told), tissue the share
# of tissue in the tile that holds its centre, flags the bits of FLAGS.
PROFILE_QUALITY = {
    "depth": "int32", "genes": "int32", "control": "int32", "in_tissue": "int8", "tissue": "float32", "flags": "uint16",
}  # fmt: skip
FLAGS = ("low_depth", "few_genes", "many_controls", "off_tissue", "not_in_tissue")  # bit i is FLAGS[i]; none drops any

BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # control and line-break characters: no name holds one
SLIDE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TILE_MEMBER = re.compile(r"g(\d+)r(\d+)c(\d+)\.jpg")

# The batch: a dict of tensors that data/batch.py makes and the model and the losses read; name -> (dtype, shape).
# B groups, R regions of all groups, C tiles per region (padded), T tiles packed, N profiles per region (padded),
# K loss genes, Z visible (profile, gene) entries, S tile statistics, F points along a footprint, px tile side.
BATCH = {
    "tiles": ("uint8", "T px px 3"),  # packed pixels of the encoded tiles; one dummy where a batch has none
    "tile_weight": ("float32", "T"),  # 1, or 0 for the dummy
    "tile_at": ("int64", "R rows cols"),  # packed index of the encoded tile at a grid place, -1 = not encoded
    "tile_slot": ("int64", "T"),  # region * C + c: place of a packed tile among its region's tiles, -1 = dummy
    "tile_present": ("bool", "R C"),  # a tile exists here (encoded or hidden)
    "tile_hidden": ("bool", "R C"),  # a query of the image loss: present, and not encoded
    "tile_pos_um": ("float32", "R C 2"),  # centre for the position code, centred per region
    "tile_target": ("float32", "R C S"),  # standardised stain statistics
    "region_group": ("int64", "R"),  # group of each region within the micro-batch
    "platform": ("int64", "R"),  # index in PLATFORMS, 0 where dropped
    "organ": ("int64", "R"),  # index in the model's organ list, 0 = unknown or dropped
    "mode": ("int64", "R"),  # index in config.MASK_MODES
    "profile": ("bool", "R N"),  # a profile exists here
    "visible": ("bool", "R N"),  # some of its genes are visible: it is context
    "query": ("bool", "R N"),  # some of its measured genes are hidden: it is asked
    "wholly_hidden": ("bool", "R N"),  # all of its genes are hidden
    "xy_um": ("float32", "R N 2"),  # centre in the region's frame (origin top-left, x right, y down), for sampling
    "pos_um": ("float32", "R N 2"),  # centre for the position code, centred per region, may be rotated and scaled
    "footprint_um": ("float32", "R N"),  # side of the square of each profile's lattice of points (data.outline)
    "footprint_points": ("bool", "R N F F"),  # which points of the lattice (row, column) lie in the footprint
    "log_area": ("float32", "R N"),  # log um2 of the footprint; 0 where there is no profile
    "footprint_input": ("float32", "R N"),  # log size fed to the model, jittered in training
    "input_gene": ("int64", "Z"),  # vocabulary index of a visible measured gene with count > 0
    "input_value": ("float32", "Z"),  # v = log1p(count * scale / visible depth)
    "input_offsets": ("int64", "R*N"),  # start of each profile's entries (embedding_bag offsets)
    # What the shown genes of each group (B of them) are expected to be, of groups that show any.
    "shown_gene": ("int64", "Y"),  # vocabulary index of a visible measured gene
    "shown_value": ("float32", "Y"),  # v of the expected share: log1p(1e4 * share)
    "shown_offsets": ("int64", "B+1"),  # start of each group's entries, and the end
    "input_log_depth": ("float32", "R N"),  # log1p(visible depth), visible genes only; 0 where none
    "input_log_genes": ("float32", "R N"),  # log1p(number of visible non-zero genes)
    "genes": ("int64", "K"),  # vocabulary indices of the loss genes
    "gene_weight": ("float32", "R K"),  # importance weight in Z(h, S); 0 where not in the region's target panel
    "target_count": ("float32", "R N K"),  # full counts
    "target_mask": ("bool", "R N K"),  # hidden and measured: enters the loss
    "target_log_depth": ("float32", "R N"),  # log L, L = counts over the region's whole target panel
    "depth_target": ("float32", "R N"),  # slide-centred log(L / footprint area)
    "depth_mask": ("bool", "R N"),  # wholly hidden, L > 0
    # for the contrast of image and expression
    "place_um": ("float32", "R N 2"),  # centre in the slide's frame, from the origin of its group's first region
    "negatives": ("int64", "R N"),  # profiles of its group with a part in it, APART_UM or more away; -1 = has no part
    # As long as the largest context of a region (encoded tiles and visible profiles): read for its length alone, which
    # is known without waiting for a device.
    "context_slots": ("int64", "M"),
}
# Beside these, for the expression encoder `tokens`: Q tokens packed, those of a profile side by side, of V profiles
# that have any (one dummy token where none has), the longest first.
TOKENS = {
    "token_gene": ("int64", "Q"),  # vocabulary index
    "token_value": ("float32", "Q 3"),  # v, log1p(count), percentile of the count's rank in its profile; 0 for a zero
    "token_offsets": ("int64", "V+1"),  # start of each profile's tokens, and the end
    "token_profile": ("int64", "V"),  # region * N + n, -1 = dummy
    "token_slots": ("int64", "L"),  # as long as the longest profile's tokens; read for its length alone
}
# And for gene descriptors:
GENE_KEPT = {"gene_kept": ("bool", "G")}  # the genes whose own embedding takes part in this step

# In place of "tiles" where features of a frozen encoder are cached; D image width.
FEATURES = {
    "profile_feature": ("float32", "R N 2 D"),  # under the footprint and over the window, standardised; 0: not valid
    "profile_valid": ("float32", "R N 2"),  # share of each that could be read; 0 where it touches a hidden tile
    "tile_feature": ("float32", "T D"),  # standardised summaries of the encoded tiles; a dummy of zeros where none is
    "tile_feature_target": ("float32", "R C D"),  # standardised feature of hidden tiles; 0 elsewhere
}

LOGNORM_SCALE = 1e4  # lognorm is log1p of counts that are brought to this sum
APART_UM = 150.0  # nearer profiles are too much alike to be told apart
# What the image loss regresses, per tile: means and spreads of the two stains, shares of nuclear and of tissue pixels.
TILE_STATS = ("hematoxylin_mean", "hematoxylin_sd", "eosin_mean", "eosin_sd", "nuclear_share", "tissue_share")


@dataclass(frozen=True)
class RegionMeta:
    """One region: `rows` x `cols` tiles whose top-left corner lies at `origin_um` (x, y) of the slide frame."""

    origin_um: tuple[float, float]
    rows: int
    cols: int


@dataclass(frozen=True)
class GroupMeta:
    """What every profile of a group shares. `panel` names a bit-mask in the shard manifest."""

    slide: str
    section: str
    donor: str
    study: str
    organ: str
    species: str
    platform: str
    kind: str  # spot, bin or cell
    panel: str
    slide_log_density: float  # mean over the slide's profiles of log(depth / footprint area in um2), depth > 0
    mpp: float  # of level 0
    tile_px: int
    tile_mpp: float
    regions: tuple[RegionMeta, ...]
    schema_version: int = SCHEMA_VERSION

    @property
    def tile_um(self) -> float:
        """Side of a tile in um."""
        return self.tile_px * self.tile_mpp


class CountBlock(NamedTuple):
    """Counts of consecutive profiles as CSR."""

    indptr: npt.NDArray[np.int64]  # [n + 1], from 0
    gene: npt.NDArray[np.int32]  # [nnz], ascending within a profile
    count: npt.NDArray[np.int32]  # type: ignore[assignment]  # [nnz], > 0; hides tuple.count, which nobody calls


@dataclass
class Profiles:
    """N measured units as arrays: places in the slide's micron frame, footprints, and counts as CSR.

    `gene` indexes the gene list that travels with the container (the store's own, or the shard set's). The vertices of
    profile i's polygon are `polygon_um[polygon_indptr[i]:polygon_indptr[i + 1]]`, relative to its centre; none where
    its footprint is a disc or a square.
    """

    ids: list[str]
    xy_um: npt.NDArray[np.float64]  # [N, 2]
    footprint_um: npt.NDArray[np.float32]  # [N]
    footprint_kind: npt.NDArray[np.uint8]  # [N]
    indptr: npt.NDArray[np.int64]  # [N + 1]
    gene: npt.NDArray[np.int32]  # [nnz], ascending within a profile
    count: npt.NDArray[np.int32]  # [nnz], > 0
    polygon_indptr: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # [N + 1]
    polygon_um: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 2), np.float32))  # [V, 2]
    pooled_um2: npt.NDArray[np.float64] | None = None  # [N] of the cells or bins that were pooled; never stored

    def __post_init__(self) -> None:
        """Without polygons every profile has none."""
        if not len(self.polygon_indptr):
            self.polygon_indptr = np.zeros(len(self.ids) + 1, np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def depth(self) -> npt.NDArray[np.int64]:
        """[N] summed counts of each profile."""
        running = np.concatenate([[0], np.cumsum(self.count, dtype=np.int64)])
        return running[self.indptr[1:]] - running[self.indptr[:-1]]

    @property
    def area_um2(self) -> npt.NDArray[np.float64]:
        """[N] footprint areas."""
        side = self.footprint_um.astype(np.float64)
        return np.where(self.footprint_kind == SQUARE, 1.0, np.pi / 4) * side**2

    @property
    def counted_um2(self) -> npt.NDArray[np.float64]:
        """[N] areas whose molecules were counted: of the footprint, or of the cells or bins that were pooled to it."""
        return self.area_um2 if self.pooled_um2 is None else self.pooled_um2

    def take(self, rows: npt.NDArray[np.int64]) -> "Profiles":
        """The profiles at `rows`, in that order."""
        indptr, entries = spans(self.indptr, rows)
        return self.places(rows, CountBlock(indptr, self.gene[entries], self.count[entries]))

    def places(self, rows: npt.NDArray[np.int64], counts: CountBlock) -> "Profiles":
        """The profiles at `rows` with these counts in place of their own."""
        polygon_indptr, vertices = spans(self.polygon_indptr, rows)
        return Profiles(
            [self.ids[r] for r in rows], self.xy_um[rows], self.footprint_um[rows], self.footprint_kind[rows],
            *counts, polygon_indptr, self.polygon_um[vertices],
            None if self.pooled_um2 is None else self.pooled_um2[rows],
        )  # fmt: skip


def spans(
    indptr: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(indptr, entry numbers) of the chosen rows of a CSR matrix."""
    lengths = indptr[rows + 1] - indptr[rows]
    chosen = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return chosen, np.repeat(indptr[rows] - chosen[:-1], lengths) + np.arange(chosen[-1])


def slide_log_density(depth: npt.NDArray[np.integer], area_um2: npt.NDArray[np.float64]) -> float:
    """Mean log(depth / area in um2) over the profiles with counts; 0 where a slide has none."""
    some = depth > 0
    return float(np.mean(np.log(depth[some] / area_um2[some]))) if some.any() else 0.0


TileData = bytes | npt.NDArray[np.uint8]  # a JPEG (or a view of it), or the pixels of a tile that was cut again


@dataclass
class Group:
    """One sample: k regions of one slide. `tiles[(g, row, col)]` are JPEGs or pixels; `region` is g of each profile."""

    meta: GroupMeta
    profiles: Profiles
    region: npt.NDArray[np.int32]  # [N]
    tiles: Mapping[tuple[int, int, int], TileData] = field(default_factory=dict)


def check_slide_id(slide_id: str) -> str:
    """The id itself. Raises ValueError where it would break the keys of a shard (a dot ends a key)."""
    if not SLIDE_ID.fullmatch(slide_id):
        raise ValueError(f"slide_id {slide_id!r}: use 1 to 64 of the characters A-Z a-z 0-9 _ - (no dot, no space)")
    return slide_id


# Of a zip: the head of a member and its sizes, its entry in the list at the end, the end.
_MEMBER, _SIZES = struct.Struct("<4s5H3I2H"), struct.Struct("<2H2Q")
_ENTRY, _END = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s4H2IH")
_VERSION, _DAY, _MODE = 45, 33, 0o600 << 16  # zip64 is known; 1980-01-01; of Unix
_MOST_BYTES = 1 << 31  # beyond it the list at the end has another form


def _npy(array: npt.NDArray) -> tuple[bytes, memoryview]:
    """Header and data of an npy file."""
    head, described = io.BytesIO(), np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(head, described)
    data = np.ascontiguousarray(array.T if described["fortran_order"] else array)
    return head.getvalue(), data.reshape(-1).view(np.uint8).data


def save_arrays(arrays: dict[str, npt.NDArray]) -> bytes:
    """Arrays as the bytes of a stored (not deflated) npz; equal arrays give equal bytes.

    Its members are the bytes of np.savez, by hand because that takes three times as long, and because the headers that
    Python writes differ between its releases.

    Raises:
        ValueError: 2 GB or more.
    """
    if sum(array.nbytes for array in arrays.values()) >= _MOST_BYTES:
        raise ValueError(f"arrays {', '.join(arrays)}: 2 GB or more in one npz; store fewer at once")
    parts, entries, at = list[bytes | memoryview](), list[bytes](), 0
    for name, array in arrays.items():
        file, (head, data) = f"{name}.npy".encode("ascii"), _npy(array)
        size = len(head) + len(data)
        told = (_VERSION, 0, 0, 0, _DAY, zlib.crc32(data, zlib.crc32(head)))  # no flags, stored, midnight
        lead = _MEMBER.pack(b"PK\3\4", *told, 0xFFFFFFFF, 0xFFFFFFFF, len(file), _SIZES.size)
        parts += [lead, file, _SIZES.pack(1, 16, size, size), head, data]
        entry = _ENTRY.pack(b"PK\1\2", 3 << 8 | _VERSION, *told, size, size, len(file), 0, 0, 0, 0, _MODE, at)
        entries += [entry, file]
        at += len(lead) + len(file) + _SIZES.size + size
    end = _END.pack(b"PK\5\6", 0, 0, len(arrays), len(arrays), sum(map(len, entries)), at, 0)
    return b"".join([*parts, *entries, end])


def check_names(names: list[str], source: str) -> None:
    """Raises ValueError where a name holds a control or line-break character: tables of names would fall apart."""
    if BREAKS.search("".join(names)):
        bad = next(name for name in names if BREAKS.search(name))
        raise ValueError(f"{source}: the name {bad!r} holds a control or line-break character; remove it")


def pack_text(items: list[str]) -> npt.NDArray[np.uint8]:
    """Strings as one uint8 array (zarr v3 has no settled form for them).

    Raises:
        ValueError: one holds a control or line-break character.
    """
    check_names(items, "names to store")
    return np.frombuffer("\n".join(items).encode(), dtype=np.uint8)


def unpack_text(data: npt.NDArray[np.uint8]) -> list[str]:
    """The strings of `pack_text`; an empty array is no string."""
    return data.tobytes().decode().split("\n") if data.size else []


def encode(group: Group) -> list[tuple[str, bytes]]:
    """The members (name after the key, bytes) of a group's sample, in their order in the tar."""
    p = group.profiles
    arrays: dict[str, npt.NDArray] = {
        "region": group.region.astype(np.int32), "xy_um": p.xy_um, "footprint_um": p.footprint_um,
        "footprint_kind": p.footprint_kind, "indptr": p.indptr, "gene": p.gene, "count": p.count,
        "polygon_indptr": p.polygon_indptr, "polygon_um": p.polygon_um, "ids": pack_text(p.ids),
    }  # fmt: skip
    assert not any(isinstance(data, np.ndarray) for data in group.tiles.values()), "a group that was cut again"
    tiles = [(f"g{g}r{r}c{c}.jpg", bytes(group.tiles[g, r, c])) for g, r, c in sorted(group.tiles)]
    meta = dump_json({**vars(group.meta), "regions": [vars(region) for region in group.meta.regions]})
    return [("meta.json", meta), *tiles, ("profiles.npz", save_arrays(arrays))]


def decode(members: Mapping[str, bytes | memoryview], source: str) -> Group:
    """The group of a sample's members. `source` names it in errors (file and key).

    Raises:
        ValueError: a member is missing or of another schema version.
    """
    missing = {"meta.json", "profiles.npz"} - members.keys()
    if missing:
        raise ValueError(f"{source}: members {sorted(missing)} are missing; rebuild the shard with data_prep.pack")
    meta = _decode_meta(bytes(members["meta.json"]), source)
    arrays = load_arrays(members["profiles.npz"], source)
    profiles = Profiles(
        unpack_text(arrays["ids"]), arrays["xy_um"], arrays["footprint_um"], arrays["footprint_kind"],
        arrays["indptr"], arrays["gene"], arrays["count"], arrays["polygon_indptr"], arrays["polygon_um"],
    )  # fmt: skip
    region = arrays["region"]
    tiles = {
        (int(m[1]), int(m[2]), int(m[3])): data for name, data in members.items() if (m := _TILE_MEMBER.fullmatch(name))
    }
    return Group(meta, profiles, region, tiles)


def _decode_meta(data: bytes, source: str) -> GroupMeta:
    values = json.loads(data)
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{source}: schema version {version}, this code reads {SCHEMA_VERSION}; rebuild it with data_prep.pack"
        )
    regions = tuple(RegionMeta((r["origin_um"][0], r["origin_um"][1]), r["rows"], r["cols"]) for r in values["regions"])
    return GroupMeta(**{**values, "regions": regions})
