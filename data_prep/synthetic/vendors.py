"""The files a vendor would deliver: a pyramidal TIFF, Space Ranger's `outs/`, and the tables of legacy ST.

In: arrays. Out: files whose bytes depend on the arrays alone (no times, no host names).
"""

import functools
import gzip
import json
from pathlib import Path

import cv2
import h5py
import numpy as np
import numpy.typing as npt
import tifffile
from scipy import sparse

ROWS, COLUMNS = 78, 128  # of a 6.5 mm Visium capture area
ANTIBODIES = ("CD3-protein", "IgG1-control")


def write_slide(path: Path, rgb: npt.NDArray[np.uint8], mpp: float) -> None:
    """A tiled pyramid of JPEG pages, halved until it is under 512 px; the resolution tags carry mpp."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as tiff:
        level = 0
        while level == 0 or max(rgb.shape) >= 512:
            rgb = rgb if level == 0 else cv2.resize(rgb, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
            tiff.write(
                rgb, tile=(256, 256), photometric="rgb", compression="jpeg", compressionargs={"level": 88},
                subfiletype=1 if level else 0, resolution=(1e4 / mpp / 2**level,) * 2, resolutionunit="CENTIMETER",
                metadata=None, description=None, software=False,
            )  # fmt: skip
            level += 1


@functools.cache
def barcodes() -> npt.NDArray[np.str_]:
    """Barcode of each place [ROWS, COLUMNS] of the array; the same on every slide, as with the real ones."""
    letters = np.random.default_rng(10).integers(0, 4, (3 * ROWS * COLUMNS, 16))
    words = np.array(["".join("ACGT"[i] for i in word) + "-1" for word in letters])
    words = words[np.sort(np.unique(words, return_index=True)[1])]
    return words[: ROWS * COLUMNS].reshape(ROWS, COLUMNS)


def _write_matrix(
    path: Path, counts: npt.NDArray[np.int32], words: npt.NDArray, ids: npt.NDArray, names: npt.NDArray
) -> None:
    """The 10x HDF5 matrix, version 3: features x barcodes by column, antibodies after the genes."""
    extra = np.stack([counts.sum(1) // 50 + 3, counts.sum(1) // 300 + 1], 1).astype(np.int32)
    matrix = sparse.csc_matrix(np.hstack([counts, extra]).T)
    kinds = ["Gene Expression"] * len(ids) + ["Antibody Capture"] * len(ANTIBODIES)
    features = {
        "id": [*ids, *ANTIBODIES], "name": [*names, *ANTIBODIES], "feature_type": kinds,
        "genome": ["GRCh38"] * len(ids) + [""] * len(ANTIBODIES), "_all_tag_keys": ["genome"],
    }  # fmt: skip
    with h5py.File(path, "w", track_order=False) as file:
        file.attrs.update({"filetype": "matrix", "version": 2, "chemistry_description": "Visium V1 Slide"})
        group = file.create_group("matrix")
        arrays = {"barcodes": words.astype("S"), "data": matrix.data, "indices": matrix.indices.astype(np.int64),
                  "indptr": matrix.indptr.astype(np.int64), "shape": np.array(matrix.shape, np.int32)}  # fmt: skip
        arrays |= {f"features/{key}": np.array(value, "S") for key, value in features.items()}
        for name, value in arrays.items():
            options = {"compression": "gzip", "compression_opts": 4} if value.size > 8 else {}
            group.create_dataset(name, data=value, track_times=False, **options)


def _write_images(folder: Path, rgb: npt.NDArray[np.uint8], mpp: float) -> None:
    """tissue_hires_image.png (at most 2000 px), tissue_lowres_image.png (600 px) and scalefactors_json.json."""
    side = max(rgb.shape)
    factors = {"spot_diameter_fullres": 65.0 / mpp, "fiducial_diameter_fullres": 105.0 / mpp}
    for name, longest in (("hires", min(2000, side // 2)), ("lowres", min(600, side // 4))):
        small = cv2.resize(rgb, None, fx=longest / side, fy=longest / side, interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / f"tissue_{name}_image.png"), cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        factors[f"tissue_{name}_scalef"] = longest / side
    (folder / "scalefactors_json.json").write_text(json.dumps(factors))


def write_visium(
    outs: Path, rgb: npt.NDArray[np.uint8], mpp: float, array: npt.NDArray[np.int64], xy_px0: npt.NDArray[np.int64],
    in_tissue: npt.NDArray[np.bool_], counts: npt.NDArray[np.int32], ids: npt.NDArray, symbols: npt.NDArray,
) -> npt.NDArray[np.str_]:  # fmt: skip
    """Space Ranger 2 `outs/`.

    Args:
        array: [S, 2] array_row, array_col of all spots.
        xy_px0: [S, 2] their centres in level 0 px, x first.
        in_tissue: [S]; `counts` [N, G] has one row per spot in the tissue, in this order.

    Returns:
        Barcodes [N] of the rows of `counts`.
    """
    (outs / "spatial").mkdir(parents=True, exist_ok=True)
    words = barcodes()[array[:, 0], array[:, 1]]
    lines = ["barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres"]
    for word, inside, (row, col), (x, y) in zip(words, in_tissue, array, xy_px0, strict=True):
        lines.append(f"{word},{int(inside)},{row},{col},{y},{x}")
    (outs / "spatial" / "tissue_positions.csv").write_text("\n".join(lines) + "\n")
    order = np.argsort(words[in_tissue])
    _write_matrix(outs / "filtered_feature_bc_matrix.h5", counts[order], words[in_tissue][order], ids, symbols)
    _write_images(outs / "spatial", rgb, mpp)
    return words[in_tissue]


def write_st(
    folder: Path, name: str, place: npt.NDArray[np.int64], new: npt.NDArray[np.float64],
    xy_px0: npt.NDArray[np.float64], counts: npt.NDArray[np.int32], symbols: npt.NDArray,
) -> npt.NDArray[np.str_]:  # fmt: skip
    """Legacy ST: `<name>.tsv.gz` (XxY rows, symbols) and `<name>_selection.tsv`; the last selected spot has no counts.

    Args:
        place: [N + 1, 2] x, y on the array; `new` the same with the measured decimals; `xy_px0` in level 0 px.
        counts: [N, G].

    Returns:
        The names [N] of the rows of `counts`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["\t".join(["x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected"])]
    for (x, y), (new_x, new_y), (px, py) in zip(place, new, xy_px0, strict=True):
        rows.append(f"{x}\t{y}\t{new_x:.3f}\t{new_y:.3f}\t{px:.2f}\t{py:.2f}\t1")
    (folder / f"{name}_selection.tsv").write_text("\n".join(rows) + "\n")
    names = np.array([f"{x}x{y}" for x, y in place[:-1]])
    table = ["\t".join(["", *symbols])]
    table += ["\t".join([n, *map(str, c)]) for n, c in zip(names, counts.tolist(), strict=True)]
    (folder / f"{name}.tsv.gz").write_bytes(gzip.compress(("\n".join(table) + "\n").encode(), 6, mtime=0))
    return names
