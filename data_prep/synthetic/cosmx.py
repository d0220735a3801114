"""The flat files of a CosMx export, as AtoMx and its forerunners write them.

In: a `CellSection`, and the vintage: `legacy` (places of the fields of view in px), `1.3.2` (px and mm, text ids beside
the numbers) or `mm` (mm alone, and no global px in the metadata). Out: exprMat, metadata, fov_positions, polygons, tx.
Global y points up, cell_ID starts again in every field of view, 0 is what lies in no cell. Bytes depend on the arrays
alone.
"""

import gzip
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.synthetic.cells import CellSection

PIXEL_UM = 0.12028
FOV_PX = 4256
ORIGIN_PX = np.array([151000.0, 18000.0])  # of the lower left field of view
CONTROLS = {
    "legacy": ["NegPrb01", "NegPrb2"], "1.3.2": ["Negative1", "SystemControl1", "FalseCode1"], "mm": ["Negative1"],
}  # fmt: skip


class _Places:
    """Where a section's points lie: field of view, local px (y down from its top), global px (y up)."""

    def __init__(self, section: CellSection) -> None:
        self.columns, self.rows = (int(n) for n in section.xy_um.max(axis=0) // (FOV_PX * PIXEL_UM) + 1)
        self.fov = self.fov_of(section.xy_um)
        order = np.argsort(self.fov, kind="stable")
        start = np.searchsorted(self.fov[order], self.fov)
        self.cell = np.empty(len(section), np.int64)
        self.cell[order] = np.arange(len(section)) - start[order] + 1

    def fov_of(self, xy_um: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """[n] numbers from 1, row by row from the top."""
        col, row = (xy_um / PIXEL_UM // FOV_PX).astype(np.int64).T
        return np.asarray(row * self.columns + col + 1, np.int64)

    def corner(self, fov: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """[n, 2] global px of a field's lower left corner."""
        row, col = np.divmod(fov - 1, self.columns)
        return ORIGIN_PX + np.column_stack([col, self.rows - 1 - row]) * FOV_PX

    def whole(self, xy_um: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        """[n, 2] global px."""
        px = xy_um.astype(np.float64) / PIXEL_UM
        return ORIGIN_PX + np.column_stack([px[:, 0], self.rows * FOV_PX - px[:, 1]])

    def both(
        self, xy_um: npt.NDArray[np.floating[Any]], fov: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(local, global) px; local ones are what is added to the field's corner."""
        whole = self.whole(xy_um)
        return whole - self.corner(fov), whole


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    lines = [",".join(f'"{name}"' for name in header)]
    lines += [",".join(f'"{v}"' if isinstance(v, str) else f"{v:.10g}" for v in row) for row in rows]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)


def write_cosmx(folder: Path, section: CellSection, vintage: str = "1.3.2", end: str = ".csv.gz") -> list[str]:
    """Write the flat files with the prefix `S1_` and return f<fov>_c<cell_ID> of the section's cells.

    Args:
        section: its controls are CONTROLS[vintage], its symbols the names of the targets.
        end: .csv or .csv.gz.
    """
    folder.mkdir(parents=True, exist_ok=True)
    at = _Places(section)
    new = vintage == "1.3.2"
    text = [f"c_1_{f}_{c}" for f, c in zip(at.fov.tolist(), at.cell.tolist(), strict=True)]
    _write_fovs(folder / f"S1_fov_positions_file{end}", at, vintage)
    local, whole = at.both(section.xy_um, at.fov)
    area = section.area_um2 / PIXEL_UM**2
    order = np.lexsort([at.cell, at.fov])
    header = ["fov", "Area", "CenterX_local_px", "CenterY_local_px", "Width", "Height", "cell_ID"]
    rows = [[at.fov[i], area[i], *local[i], 80, 90, at.cell[i]] for i in order]
    if vintage != "mm":
        header += ["CenterX_global_px", "CenterY_global_px"]
        rows = [[*row, *whole[i]] for row, i in zip(rows, order, strict=True)]
    if new:
        header += ["cell", "cell_id"]
        rows = [[*row, text[i], text[i]] for row, i in zip(rows, order, strict=True)]
    _write(folder / f"S1_metadata_file{end}", header, rows)
    counts = section.counts.toarray()
    # What lies in no cell comes first in each field of view.
    lines = [[fov, 0, *(counts[at.fov == fov].sum(axis=0) // 9)] for fov in np.unique(at.fov)]
    lines += [[at.fov[i], at.cell[i], *counts[i]] for i in order]
    lines.sort(key=lambda line: (line[0], line[1]))
    _write(folder / f"S1_exprMat_file{end}", ["fov", "cell_ID", *section.symbols, *section.controls], lines)
    _write_polygons(folder / f"S1-polygons{end}", section, at, text if new else None)
    _write_molecules(folder / f"S1_tx_file{end}", section, at)
    return [f"f{f}_c{c}" for f, c in zip(at.fov.tolist(), at.cell.tolist(), strict=True)]


def _write_fovs(path: Path, at: _Places, vintage: str) -> None:
    fovs = np.arange(1, at.columns * at.rows + 1)
    px = at.corner(fovs)
    mm = px * PIXEL_UM / 1000
    if vintage == "legacy":
        _write(path, ["fov", "x_global_px", "y_global_px"], ([f, *a] for f, a in zip(fovs, px, strict=True)))
    elif vintage == "1.3.2":
        names = ["FOV", "x_global_px", "y_global_px", "x_global_mm", "y_global_mm"]
        _write(path, names, ([f, *a, *b] for f, a, b in zip(fovs, px, mm, strict=True)))
    else:
        _write(path, ["Slide", "FOV", "X_mm", "Y_mm"], ([1, f, *b] for f, b in zip(fovs, mm, strict=True)))


def _write_polygons(path: Path, section: CellSection, at: _Places, text: list[str] | None) -> None:
    """Without the closing vertex, which this vendor leaves out."""
    owner = np.repeat(np.arange(len(section)), np.diff(section.polygon_indptr))
    closing = np.zeros(len(owner), bool)
    closing[section.polygon_indptr[1:] - 1] = True
    owner, xy = owner[~closing], section.polygon_um[~closing]
    local, whole = at.both(xy, at.fov[owner])
    header = ["fov", "cellID", *(["cell"] if text else []), "x_local_px", "y_local_px", "x_global_px", "y_global_px"]
    rows = ([at.fov[o], at.cell[o], *([text[o]] if text else []), *a, *b]
            for o, a, b in zip(owner.tolist(), local, whole, strict=True))  # fmt: skip
    _write(path, header, rows)


def _write_molecules(path: Path, section: CellSection, at: _Places) -> None:
    cell, column, xy = section.molecules(0)
    local, whole = at.both(xy, at.fov[cell])
    names = [*section.symbols, *section.controls]
    header = ["fov", "cell_ID", "x_global_px", "y_global_px", "x_local_px", "y_local_px", "z", "target", "CellComp"]
    rows = ([at.fov[c], at.cell[c], *w, *p, 3, names[k], "Nuclear"]
            for c, k, p, w in zip(cell.tolist(), column.tolist(), local, whole, strict=True))  # fmt: skip
    _write(path, header, rows)
