"""A Visium HD section of any size in the vendor's exact layout, written block by block: nothing is ever dense.

In: the side of a square of bins, genes per bin, a seed. Out: `binned_outputs/square_<N>um` of Space Ranger 3, on
request `segmented_outputs` of Space Ranger 4 and a tiled H&E of the section. Half a million bins take a minute.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile

from storm import genes

_BLOCK = 4096  # bins whose counts are drawn at a time
_CHUNK = 80_000  # entries of a chunk of the matrix, as Space Ranger's
_MARGIN_UM = 120.0  # glass around the bins
_TURN = 0.0065  # radians: a section never lies straight
_CELL_UM = 10.0  # distance between cells
_TILE_PX = 256


@dataclass(frozen=True)
class Section:
    """Where the bins of a section lie."""

    bins_side: int
    bin_um: int = 8
    mpp: float = 0.5
    border: int = 1  # rings of bins around the filtered ones that are not in tissue

    @property
    def side_px(self) -> int:
        """Side of the image."""
        return int(np.ceil(((self.bins_side + 2 * self.border) * self.bin_um + 2 * _MARGIN_UM) / self.mpp))

    def xy_px(self, um: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """[N, 2] px of places in um from the first bin's corner: turned a little and, as on real slides, mirrored."""
        half = (self.bins_side + 2 * self.border) * self.bin_um / 2
        cos, sin = np.cos(_TURN), np.sin(_TURN)
        turned = (um - half) @ np.array([[cos, -sin], [-sin, -cos]])
        return turned / self.mpp + self.side_px / 2


def _draw(
    rng: np.random.Generator, reach: npt.NDArray[np.float64], mean_genes: float, rows: int
) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
    """(entries of each of `rows` profiles, gene, count) with genes rising within a profile.

    Args:
        reach: [G] running sum of the genes' shares.
    """
    depth = rng.poisson(1.2 * mean_genes * rng.gamma(4.0, 0.25, rows))
    owner = np.repeat(np.arange(rows), depth)
    gene = np.searchsorted(reach, rng.random(len(owner)), side="right").clip(0, len(reach) - 1)
    key, count = np.unique(owner * len(reach) + gene, return_counts=True)
    return np.bincount(key // len(reach), minlength=rows), key % len(reach), count


def _write_matrix(
    path: Path, barcodes: npt.NDArray[np.bytes_], gene_count: int, mean_genes: float, rng: np.random.Generator
) -> int:
    """The 10x HDF5 matrix, version 3, appended block by block; returns the summed counts."""
    table = genes.shipped("human")
    reach = np.cumsum(rng.dirichlet(np.full(gene_count, 0.3)))
    ids, symbols = table.ids[:gene_count], table.symbols[:gene_count]
    total, lengths = 0, [np.zeros(1, np.int64)]
    with h5py.File(path, "w") as file:
        file.attrs.update({"filetype": "matrix", "version": 2, "software_version": "spaceranger-3.1.1",
                           "chemistry_description": "Visium HD v1 - Slide"})  # fmt: skip
        group = file.create_group("matrix")
        options = {"shape": (0,), "maxshape": (None,), "chunks": (_CHUNK,), "compression": "gzip",
                   "compression_opts": 1, "track_times": False}  # fmt: skip
        data = group.create_dataset("data", dtype="i4", **options)
        indices = group.create_dataset("indices", dtype="i8", **options)
        for start in range(0, len(barcodes), _BLOCK):
            length, gene, count = _draw(rng, reach, mean_genes, min(_BLOCK, len(barcodes) - start))
            for dataset, values in ((data, count), (indices, gene)):
                dataset.resize((len(dataset) + len(values),))
                dataset[len(dataset) - len(values) :] = values
            lengths.append(length)
            total += int(count.sum())
        arrays = {
            "barcodes": barcodes, "indptr": np.cumsum(np.concatenate(lengths)),
            "shape": np.array([gene_count, len(barcodes)], np.int32), "features/id": np.array(ids, "S"),
            "features/name": np.array(symbols, "S"), "features/_all_tag_keys": np.array(["genome"], "S"),
            "features/feature_type": np.full(gene_count, b"Gene Expression"),
            "features/genome": np.full(gene_count, b"GRCh38"),
        }  # fmt: skip
        for name, value in arrays.items():
            group.create_dataset(name, data=value, track_times=False)
    return total


def _write_scale(folder: Path, mpp: float, bin_um: int | None) -> None:
    """scalefactors_json.json; that of cells knows no bin."""
    own = {"spot_diameter_fullres": bin_um / mpp, "bin_size_um": float(bin_um)} if bin_um else {}
    scale = {**own, "microns_per_pixel": mpp, "regist_target_img_scalef": 0.25, "tissue_lowres_scalef": 0.025,
             "fiducial_diameter_fullres": 330.0 / mpp, "tissue_hires_scalef": 0.25}  # fmt: skip
    (folder / "scalefactors_json.json").write_text(json.dumps(scale, indent=4))


def write_bins(folder: Path, section: Section, mean_genes: float, gene_count: int, seed: int = 0) -> int:
    """`square_<N>um` in `folder`/binned_outputs; returns the summed counts. Bins of the border are not in tissue."""
    name = f"square_{section.bin_um:03d}um"
    place = folder / "binned_outputs" / name
    (place / "spatial").mkdir(parents=True)
    side = section.bins_side + 2 * section.border
    row, col = (axis.reshape(-1) for axis in np.indices((side, side), dtype=np.int32))
    inside = (np.minimum(row, col) >= section.border) & (np.maximum(row, col) < side - section.border)
    text = [np.char.zfill(axis.astype("S5"), 5) for axis in (row, col)]
    words = np.char.add(np.char.add(f"s_{section.bin_um:03d}um_".encode(), text[0]), np.char.add(b"_", text[1]))
    words = np.char.add(words, b"-1")
    xy = section.xy_px((np.column_stack([col, row]) + 0.5) * section.bin_um)
    table = pa.table({
        "barcode": pa.array(words, pa.binary()).cast(pa.string()), "in_tissue": inside.astype(np.int32),
        "array_row": row, "array_col": col, "pxl_row_in_fullres": xy[:, 1], "pxl_col_in_fullres": xy[:, 0],
    })  # fmt: skip
    pq.write_table(table, place / "spatial" / "tissue_positions.parquet")
    _write_scale(place / "spatial", section.mpp, section.bin_um)
    rng = np.random.default_rng([seed, section.bin_um])
    return _write_matrix(place / "filtered_feature_bc_matrix.h5", words[inside], gene_count, mean_genes, rng)


def write_cells(folder: Path, section: Section, mean_genes: float, gene_count: int, seed: int = 0) -> int:
    """`segmented_outputs` with a twelve-sided cell every 10 um, of numbers with gaps; returns the summed counts."""
    place = folder / "segmented_outputs"
    (place / "spatial").mkdir(parents=True)
    rng = np.random.default_rng([seed, 0])
    steps = np.arange(_CELL_UM, section.bins_side * section.bin_um, _CELL_UM)
    centre = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2) + rng.normal(0, 0.5, (len(steps) ** 2, 2))
    ids = np.arange(1, 2 * len(centre), 2)
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    with (place / "cell_segmentations.geojson").open("w") as handle:
        handle.write('{"type": "FeatureCollection", "features": [')
        for i, (cell, at) in enumerate(zip(ids.tolist(), centre, strict=True)):
            radius = rng.uniform(3.5, 4.5, 12)
            ring = section.xy_px(at + radius[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])).round(2)
            feature = {
                "type": "Feature", "properties": {"cell_id": cell},
                "geometry": {"type": "Polygon", "coordinates": [[*ring.tolist(), ring[0].tolist()]]},
            }  # fmt: skip
            handle.write(", " * bool(i) + json.dumps(feature))
        handle.write("]}")
    _write_scale(place / "spatial", section.mpp, None)
    words = np.char.add(np.char.add(b"cellid_", np.char.zfill(ids.astype("S9"), 9)), b"-1")
    return _write_matrix(place / "filtered_feature_cell_matrix.h5", words, gene_count, mean_genes, rng)


def _stained(section: Section, seed: int) -> Iterator[npt.NDArray[np.uint8]]:
    """The tiles of an H&E, row by row: pink stroma, redder glands, violet dots on the bins, glass around them."""
    rng = np.random.default_rng([seed, 1])
    side = section.side_px
    margin = _MARGIN_UM / section.mpp
    for top in range(0, side, _TILE_PX):
        for left in range(0, side, _TILE_PX):
            y, x = np.ogrid[top : top + _TILE_PX, left : left + _TILE_PX]
            on = (np.minimum(x, y) > margin) & (np.maximum(x, y) < side - margin)
            um = x * section.mpp, y * section.mpp
            glands = (np.sin(um[0] * 0.11) * np.sin(um[1] * 0.13) > 0) & on
            dots = (np.sin(um[0] * 0.8) * np.sin(um[1] * 0.7) > 0.6) & on
            tile = np.full((_TILE_PX, _TILE_PX, 3), 243, np.int16)
            tile[on], tile[glands], tile[dots] = (222, 150, 190), (190, 90, 150), (110, 70, 150)
            yield (tile + rng.integers(-8, 9, (_TILE_PX, _TILE_PX, 1))).clip(0, 255).astype(np.uint8)


def write_image(path: Path, section: Section, seed: int = 0) -> None:
    """The section's H&E as a tiled JPEG TIFF of one level; its resolution tags carry mpp."""
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            _stained(section, seed), shape=(section.side_px, section.side_px, 3), dtype=np.uint8,
            tile=(_TILE_PX, _TILE_PX), photometric="rgb", compression="jpeg", compressionargs={"level": 85},
            resolution=(1e4 / section.mpp,) * 2, resolutionunit="CENTIMETER", metadata=None, description=None,
            software=False,
        )  # fmt: skip


def write_visium_hd(
    folder: Path, bins_side: int, mean_genes: float = 150.0, seed: int = 0, gene_count: int = 18_000, bin_um: int = 8,
    mpp: float = 0.5, cells: bool = False, image: bool = False,
) -> Section:  # fmt: skip
    """A whole `outs` folder: bins of one size, and on request cells and `tissue_image.btf`."""
    section = Section(bins_side, bin_um, mpp)
    write_bins(folder, section, mean_genes, gene_count, seed)
    if cells:
        write_cells(folder, section, mean_genes, gene_count, seed)
    if image:
        write_image(folder / "tissue_image.btf", section, seed)
    return section
