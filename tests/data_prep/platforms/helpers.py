"""What the tests of readers share: a measurement's counts as a table, its lattice, and 10x files with chosen faults."""

import gzip
from pathlib import Path

import h5py
import numpy as np
from scipy.sparse import csr_matrix

from data_prep import align
from data_prep.platforms import Measurement, tenx

MTX = "%%MatrixMarket matrix coordinate integer general\n"


def dense(found: Measurement, rows: np.ndarray | None = None) -> np.ndarray:
    """[rows, columns] counts."""
    rows = np.arange(len(found.ids)) if rows is None else rows
    table = np.zeros((len(rows), len(found.names)), np.int64)
    start = 0
    for block in found.counts(rows):
        n = len(block.indptr) - 1
        np.add.at(table, (start + np.repeat(np.arange(n), np.diff(block.indptr)), block.gene), block.count)
        start += n
    assert start == len(rows)
    return table


def sparse(found: Measurement) -> csr_matrix:
    """The same as a sparse matrix of the same shape."""
    blocks = list(found.counts(np.arange(len(found.ids))))
    length = np.concatenate([np.diff(block.indptr) for block in blocks])
    gene, count = (np.concatenate(parts) for parts in zip(*((b.gene, b.count) for b in blocks), strict=True))
    shape = len(found.ids), len(found.names)
    return csr_matrix((count, gene, np.concatenate([[0], np.cumsum(length)])), shape=shape)


def truth(path: Path) -> np.ndarray:
    """[barcodes, features] by h5py alone."""
    with h5py.File(path) as root:
        group = root["matrix"]
        features, barcodes = group["shape"][...]
        row = np.repeat(np.arange(barcodes), np.diff(group["indptr"][...]))
        found = np.zeros((barcodes, features), np.int64)
        found[row, group["indices"][...]] = group["data"][...]
    return found


def fit(found: Measurement) -> align.LatticeFit:
    """The lattice in the measurement's own space."""
    assert found.lattice_um is not None
    assert found.lattice_xy is not None
    return align.fit_lattice(found.lattice_um, found.lattice_xy)


def mex_of(path: Path, zipped: bool = True, folder: Path | None = None) -> Path:
    """An HDF5 matrix as the MEX folder of the same name; the HDF5 file is removed."""
    found = tenx.whole(tenx.open_matrix(path))
    folder = folder or path.with_suffix("")
    folder.mkdir()
    rows = np.repeat(np.arange(len(found.barcodes)), np.diff(found.indptr))
    entries = "".join(f"{c + 1} {r + 1} {n}\n" for r, c, n in zip(rows, found.column, found.count, strict=True))
    size = f"{len(found.names)} {len(found.barcodes)} {len(found.count)}\n"
    texts = {
        "matrix.mtx": f'{MTX}%metadata_json: {{"format_version": 2}}\n{size}{entries}',
        "features.tsv": "\n".join("\t".join(f) for f in zip(found.names, found.symbols, found.types, strict=True)),
        "barcodes.tsv": "\n".join(found.barcodes),
    }
    for name, text in texts.items():
        data = text.encode()
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(data) if zipped else data)
    path.unlink()
    return folder


def edit(path: Path, name: str, change) -> None:
    """An array of the matrix changed; `change` None makes a group of it."""
    with h5py.File(path, "a") as root:
        before = None if change is None else root["matrix"][name][...]
        del root["matrix"][name]
        if change is None:
            root["matrix"].create_group(name)
        else:
            root["matrix"][name] = change(before)
