"""Writers of small slides and vendor files with chosen content, for the tests of preparation."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import numpy.typing as npt
import tifffile

SYMBOLS = ("TP53", "EGFR", "ERBB2", "MKI67", "CD3E")
MPP = 1.0


def tissue(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Smooth pink texture on white, with glass to the right of the middle."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.random((height, width, 3), dtype=np.float32), (0, 0), 4)
    pixels = np.array([200, 120, 170]) + 400 * (noise - 0.5)
    pixels[:, width // 2 :] = 245
    return pixels.clip(0, 255).astype(np.uint8)


def write_tiff(
    path: Path, pixels: npt.NDArray[np.uint8], mpp: float | None = MPP, levels: int = 2, **kwargs: Any
) -> Path:
    """A tiled pyramid that OpenSlide reads as generic TIFF."""
    resolution = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"} if mpp else {}
    options: dict[str, Any] = {"tile": (64, 64), "photometric": "rgb", "metadata": None} | resolution
    with tifffile.TiffWriter(path) as writer:
        writer.write(pixels, **options, **kwargs)
        for level in range(1, levels):
            small = cv2.resize(pixels, None, fx=0.5**level, fy=0.5**level, interpolation=cv2.INTER_AREA)
            writer.write(small, subfiletype=1, **options)
    return path


def write_visium(outs: Path, mpp: float = MPP, header: bool = True, side: int = 8, genes: Sequence[str] = SYMBOLS,
                 suffix: str = "-1") -> Path:  # fmt: skip
    """An outs folder whose spots lie on the hexagonal lattice, from (60, 80) um on."""
    (outs / "spatial").mkdir(parents=True)
    rng = np.random.default_rng(1)
    rows = [(r, c) for r in range(side) for c in range(r % 2, 2 * side, 2)]
    names = ["".join("ACGT"[i // 4**k % 4] for k in range(16)) for i in range(len(rows))]
    head = ["barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres"] if header else []
    lines = [
        f"{n}-1,1,{r},{c},{(80 + r * 50 * 3**0.5) / mpp:.3f},{(60 + c * 50) / mpp:.3f}"
        for n, (r, c) in zip(names, rows, strict=True)
    ]
    (outs / "spatial" / "tissue_positions.csv").write_text("\n".join([*head, *lines]) + "\n")
    scale = {"spot_diameter_fullres": 65 / mpp, "tissue_hires_scalef": 0.1}
    (outs / "spatial" / "scalefactors_json.json").write_text(json.dumps(scale))
    counts = rng.poisson(2.0, (len(rows), len(genes) + 1))
    row, column = np.nonzero(counts)
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "w") as root:
        group = root.create_group("matrix")
        group["barcodes"] = [f"{n}{suffix}".encode() for n in names]
        group["data"], group["indices"] = counts[row, column], column
        group["indptr"] = np.searchsorted(row, np.arange(len(rows) + 1))
        group["shape"] = counts.T.shape
        group["features/id"] = group["features/name"] = [g.encode() for g in [*genes, "CD3-antibody"]]
        group["features/feature_type"] = [b"Gene Expression"] * len(genes) + [b"Antibody Capture"]
    return outs


def write_st(
    folder: Path, mpp: float = MPP, side: int = 4, genes: Sequence[str] = SYMBOLS, jitter_um: float = 0.0
) -> tuple[Path, Path]:
    """Counts (gzipped tsv) and spot file of a `side` x `side` ST section; the last spot is not selected."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(2)
    places = [(x, y) for x in range(1, side + 1) for y in range(1, side + 1)]
    px = (np.array(places) * 200.0 - 80 + jitter_um * rng.standard_normal((len(places), 2))) / mpp
    lines = ["x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected"]
    lines += [
        f"{x}\t{y}\t{x}.02\t{y}.01\t{a:.2f}\t{b:.2f}\t{int(i < len(places) - 1)}"
        for i, ((x, y), (a, b)) in enumerate(zip(places, px, strict=True))
    ]
    (folder / "spots.tsv").write_text("\n".join(lines) + "\n")
    counts = rng.poisson(3.0, (len(places), len(genes)))
    table = ["\t".join(["", *genes])]
    table += ["\t".join([f"{x}x{y}", *map(str, row)]) for (x, y), row in zip(places, counts, strict=True)]
    (folder / "counts.tsv.gz").write_bytes(gzip.compress("\n".join(table).encode(), mtime=0))
    return folder / "counts.tsv.gz", folder / "spots.tsv"


HEADER = ("slide_id", "image", "measurement", "platform", "donor", "study", "organ", "species")


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A manifest in which every row has the required columns, filled where a row leaves them out."""
    default = {"measurement": "", "donor": "d1", "study": "s1", "organ": "skin", "species": "human"}
    columns = [*HEADER, *sorted({key for row in rows for key in row} - set(HEADER))]
    lines = [",".join(columns)] + [",".join(str((default | row).get(c, "")) for c in columns) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path
