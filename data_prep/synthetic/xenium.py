"""The bundle of a Xenium run, as the instrument writes it.

In: a `CellSection`. Out: experiment.xenium, cells (parquet and csv.gz), cell_feature_matrix.h5, cell_boundaries and
transcripts as parquet, and the alignment of an H&E image. Bytes depend on the arrays alone.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from data_prep.synthetic.cells import CellSection

PIXEL_UM = 0.2125
CONTROLS = {
    "NegControlProbe_00042": "Negative Control Probe", "NegControlCodeword_0500": "Negative Control Codeword",
    "UnassignedCodeword_0006": "Unassigned Codeword", "DeprecatedCodeword_0123": "Deprecated Codeword",
    "Intergenic_Region_1": "Genomic Control",
}  # fmt: skip
_CATEGORIES = {
    "Negative Control Probe": "negative_control_probe", "Negative Control Codeword": "negative_control_codeword",
    "Unassigned Codeword": "unassigned_codeword", "Deprecated Codeword": "deprecated_codeword",
    "Genomic Control": "genomic_control_probe",
}  # fmt: skip
_COUNTED = (  # columns of the table of cells, and the type of feature that each counts
    ("control_probe_counts", "Negative Control Probe"), ("genomic_control_counts", "Genomic Control"),
    ("control_codeword_counts", "Negative Control Codeword"), ("unassigned_codeword_counts", "Unassigned Codeword"),
    ("deprecated_codeword_counts", "Deprecated Codeword"),
)  # fmt: skip
_ROW_GROUP = 1 << 18


def cell_ids(count: int) -> list[str]:
    """The instrument's names since version 1.3: a number as eight letters a to p, and the number of the section."""
    return ["".join(chr(97 + (k >> 4 * b & 15)) for b in range(7, -1, -1)) + "-1" for k in range(count)]


def write_xenium(folder: Path, section: CellSection, transcripts: bool = True, seed: int = 0) -> list[str]:
    """Write the bundle of version 3 and return the ids of its cells. `controls` of the section are keys of CONTROLS."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = cell_ids(len(section))
    _write_experiment(folder / "experiment.xenium", section)
    _write_cells(folder, section, ids)
    _write_matrix(folder / "cell_feature_matrix.h5", section, ids)
    owner = np.repeat(np.arange(len(section)), np.diff(section.polygon_indptr))
    boundaries = {
        "cell_id": pa.array(ids).take(pa.array(owner)), "vertex_x": section.polygon_um[:, 0],
        "vertex_y": section.polygon_um[:, 1], "label_id": (owner + 1).astype(np.int32),
    }  # fmt: skip
    _write_parquet(folder / "cell_boundaries.parquet", boundaries)
    if transcripts:
        _write_transcripts(folder / "transcripts.parquet", section, ids, seed)
    return ids


def write_alignment(path: Path, matrix: npt.NDArray[np.float64]) -> None:
    """Xenium Explorer's csv: `matrix` [3, 3] maps H&E px to morphology px."""
    path.write_text("\n".join(",".join(repr(float(v)) for v in row) for row in matrix) + "\n")


def _write_parquet(path: Path, columns: dict[str, object]) -> None:
    pa.parquet.write_table(pa.table(columns), path, row_group_size=_ROW_GROUP)


def _write_experiment(path: Path, section: CellSection) -> None:
    told = {
        "major_version": 5, "minor_version": 2, "patch_version": 0, "run_name": "synthetic run of a user",
        "region_name": "region of a user", "preservation_method": "ffpe", "num_cells": len(section),
        "panel_name": "Synthetic panel", "panel_organism": "Human", "pixel_size": PIXEL_UM,
        "panel_num_targets_predesigned": len(section.gene_ids), "instrument_sn": "XETG00000",
        "analysis_sw_version": "xenium-3.0.0.15", "z_step_size": 3.0,
        "images": {"morphology_filepath": "morphology.ome.tif"},
    }  # fmt: skip
    path.write_text(json.dumps(told, indent=4))


def _write_cells(folder: Path, section: CellSection, ids: list[str]) -> None:
    genes, _ = section.totals
    kinds = np.array([CONTROLS[name] for name in section.controls])
    controls = section.counts[:, len(section.gene_ids) :]
    table: dict[str, Any] = {
        "cell_id": ids, "x_centroid": section.xy_um[:, 0], "y_centroid": section.xy_um[:, 1],
        "transcript_counts": genes,
    }  # fmt: skip
    for column, kind in _COUNTED:
        table[column] = np.asarray(controls[:, np.flatnonzero(kinds == kind)].sum(axis=1)).ravel().astype(np.int64)
    area = section.area_um2
    table |= {
        "total_counts": sum((table[column] for column, _ in _COUNTED), genes), "cell_area": area,
        "nucleus_area": area / 3, "nucleus_count": np.ones(len(ids), np.int64),
        "segmentation_method": ["Segmented by boundary stain (ATP1A1+CD45+E-Cadherin)"] * len(ids),
    }  # fmt: skip
    _write_parquet(folder / "cells.parquet", table)
    text = pd.DataFrame(table).to_csv(index=False)
    (folder / "cells.csv.gz").write_bytes(gzip.compress(text.encode(), 6, mtime=0))


def _write_matrix(path: Path, section: CellSection, ids: list[str]) -> None:
    kinds = ["Gene Expression"] * len(section.gene_ids) + [CONTROLS[name] for name in section.controls]
    counts = section.counts
    features = {
        "id": [*section.gene_ids, *section.controls], "name": [*section.symbols, *section.controls],
        "feature_type": kinds, "genome": ["Unknown"] * len(kinds), "_all_tag_keys": ["genome"],
    }  # fmt: skip
    arrays = {
        "barcodes": np.array(ids, "S"), "data": counts.data, "indices": counts.indices.astype(np.int64),
        "indptr": counts.indptr.astype(np.int64), "shape": np.array(counts.shape[::-1], np.int32),
    } | {f"features/{key}": np.array(value, "S") for key, value in features.items()}  # fmt: skip
    with h5py.File(path, "w") as file:
        file.attrs.update({"filetype": "matrix", "version": 2, "software_version": "xenium-3.0.0.15"})
        group = file.create_group("matrix")
        for name, value in arrays.items():
            options = {"compression": "gzip", "compression_opts": 4} if value.size > 8 else {}
            group.create_dataset(name, data=value, track_times=False, **options)


def _write_transcripts(path: Path, section: CellSection, ids: list[str], seed: int) -> None:
    """Every counted molecule with qv 40, and for each tenth of them one more of qv 10 that does not count."""
    cell, column, xy = section.molecules(seed)
    weak = np.arange(0, len(cell), 10)
    rows = np.concatenate([np.arange(len(cell)), weak])
    order = np.argsort(xy[rows, 1] // 200, kind="stable")  # the instrument writes field by field
    is_weak, rows = (order >= len(cell)), rows[order]
    first = pa.array(np.zeros(len(rows), np.int64))
    names = pa.array([*section.symbols, *section.controls])
    kinds = [*["predesigned_gene"] * len(section.symbols), *(_CATEGORIES[CONTROLS[c]] for c in section.controls)]
    table = {
        "transcript_id": np.arange(len(rows), dtype=np.uint64), "cell_id": pa.array(ids).take(pa.array(cell[rows])),
        "overlaps_nucleus": np.zeros(len(rows), np.uint8), "feature_name": names.take(pa.array(column[rows])),
        "x_location": xy[rows, 0].astype(np.float32), "y_location": xy[rows, 1].astype(np.float32),
        "z_location": np.full(len(rows), 12, np.float32),
        "qv": np.where(is_weak, 10, 40).astype(np.float32), "fov_name": pa.array(["A1"]).take(first),
        "nucleus_distance": np.zeros(len(rows), np.float32), "codeword_index": column[rows].astype(np.int32),
        "codeword_category": pa.array(kinds).take(pa.array(column[rows])),
        "is_gene": column[rows] < len(section.symbols),
    }  # fmt: skip
    _write_parquet(path, table)
