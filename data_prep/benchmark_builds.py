"""How much memory and time large sections take to build; the part `builds` of data_prep.benchmark.

In: a share of the full sizes (1 = half a million bins, 300,000 cells). Out: a Markdown table. Each section is written
in its vendor's layout, and built by the command itself in a process of its own.
"""

import csv
import subprocess
import sys
import tempfile
from collections.abc import Callable
from math import ceil, sqrt
from pathlib import Path

import numpy as np

from data_prep import records
from data_prep.synthetic import cosmx, visium_hd, xenium
from data_prep.synthetic.cells import PITCH_UM, CellSection, draw_cells
from storm import genes

_BINS, _CELLS, _COSMX_CELLS = 501_264, 300_000, 200_000
_PANEL = 377  # genes of a usual Xenium panel
_MPP = 0.27  # of an H&E scanned at 40x
Row = dict[str, str]


def _cells(count: int, controls: list[str]) -> CellSection:
    table = genes.shipped("human")
    return draw_cells(count, list(table.ids[:_PANEL]), list(table.symbols[:_PANEL]), controls, 0, genes_per_cell=35)


def _bins(folder: Path, share: float) -> Row:
    visium_hd.write_visium_hd(folder, round(sqrt(share * _BINS)), image=True)
    return {"measurement": folder.name, "platform": "visium_hd", "image": f"{folder.name}/tissue_image.btf"}


def _segmented(folder: Path, share: float) -> Row:
    section = visium_hd.Section(round(sqrt(share * _CELLS) * 10 / 8))
    visium_hd.write_cells(folder, section, 200.0, 18_000)
    return {"measurement": folder.name, "platform": "visium_hd", "unit": "cell"}


def _turned_image(folder: Path, count: int) -> Row:
    """An H&E over all cells, turned by a quarter, and the alignment that tells so."""
    section = visium_hd.Section(ceil(sqrt(count) * PITCH_UM / 8), mpp=_MPP)
    visium_hd.write_image(folder / "he.tif", section)
    scale = _MPP / xenium.PIXEL_UM
    xenium.write_alignment(
        folder / "he.csv", np.array([[0, scale, 0], [-scale, 0, section.side_px * scale], [0, 0, 1.0]])
    )
    return {"image": f"{folder.name}/he.tif", "alignment": f"{folder.name}/he.csv"}


def _xenium(folder: Path, share: float) -> Row:
    count = round(share * _CELLS)
    xenium.write_xenium(folder, _cells(count, list(xenium.CONTROLS)), transcripts=False)
    return {"measurement": folder.name, "platform": "xenium", **_turned_image(folder, count)}


def _squares(folder: Path, share: float) -> Row:
    xenium.write_xenium(folder, _cells(round(share * _CELLS), list(xenium.CONTROLS)))
    return {"measurement": folder.name, "platform": "xenium", "unit": "square8um"}


def _cosmx(folder: Path, share: float) -> Row:
    cosmx.write_cosmx(folder, _cells(round(share * _COSMX_CELLS), cosmx.CONTROLS["1.3.2"]), end=".csv")
    return {"measurement": folder.name, "platform": "cosmx"}


SECTIONS: dict[str, Callable[[Path, float], Row]] = {
    "Visium HD, bins of 8 um x 18,000 genes, tiled image": _bins,
    "Visium HD, segmented cells with outlines, no image": _segmented,
    "Xenium, cells with polygons, image turned by a quarter": _xenium,
    "Xenium, squares of 8 um from transcripts, no image": _squares,
    "CosMx, cells with polygons, plain csv, no image": _cosmx,
}


def _built(folder: Path, row: Row) -> records.Record:
    """How the build of one row went. Raises ValueError: it failed."""
    whole = {"slide_id": "section", "donor": "d", "study": "s", "organ": "breast", "species": "human",
             "image": "", "unit": "", "alignment": "", **row}  # fmt: skip
    manifest, store_dir = folder / "manifest.csv", folder / "store"
    with manifest.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(whole))
        writer.writeheader()
        writer.writerow(whole)
    subprocess.run([sys.executable, "-m", "data_prep.build", str(manifest), "--store", str(store_dir)],
                   stdout=subprocess.DEVNULL, check=False)  # fmt: skip
    record = records.read(store_dir, "section")
    if record is None or record.state != "built":
        raise ValueError(f"{row}: {record.reason if record else 'no record'}")
    return record


def _line(name: str, write: Callable[[Path, float], Row], share: float) -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "section").mkdir()
        record = _built(folder, write(folder / "section", share))
    cost = record.cost
    return [name, f"{cost['profiles']:,.0f}", f"{cost['tiles']:,.0f}", f"{cost['counts'] / 1e6:.1f}",
            f"{record.peak_mb:,.0f}", f"{record.seconds:.0f}"]  # fmt: skip


def table(share: float) -> str:
    """The table. Raises ValueError where a section cannot be built."""
    rows = [["`data_prep.build`, one process", "profiles", "tiles", "M counts", "peak MB", "s"]]
    rows += [["---"] * 6, *(_line(name, write, share) for name, write in SECTIONS.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
