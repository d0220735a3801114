"""10x matrices: both layouts of HDF5 and MEX give the same counts in any blocks; damage is named."""

import gzip
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep import platforms
from data_prep.platforms import CONTROL, GENE, OTHER, mex, tenx
from tests.data_prep.platforms.helpers import MTX, edit, mex_of
from tests.data_prep.vendors import write_visium


@pytest.fixture
def h5(tmp_path: Path) -> Path:
    """A matrix of 64 barcodes, five genes and an antibody."""
    return write_visium(tmp_path / "outs") / "filtered_feature_bc_matrix.h5"


def table(matrix: tenx.Matrix, rows: np.ndarray | None = None) -> np.ndarray:
    """[rows, features]; every block is checked on the way."""
    rows = np.arange(len(matrix.barcodes)) if rows is None else rows
    found, start = np.zeros((len(rows), len(matrix.names)), np.int64), 0
    for block in matrix.counts(rows):
        n = len(block.indptr) - 1
        assert block.gene.dtype == block.count.dtype == np.int32
        np.add.at(found, (start + np.repeat(np.arange(n), np.diff(block.indptr)), block.gene), block.count)
        start += n
    assert start == len(rows)
    return found


def truth(path: Path) -> np.ndarray:
    """The same by h5py and a loop."""
    with h5py.File(path) as root:
        group = root["matrix"]
        found = np.zeros(group["shape"][...][::-1], np.int64)
        for row, (a, b) in enumerate(zip(group["indptr"][:-1], group["indptr"][1:], strict=True)):
            found[row, group["indices"][a:b]] = group["data"][a:b]
    return found


@pytest.mark.parametrize("form", ["h5", "mex", "mex.gz", "unsorted mex"])
@pytest.mark.parametrize("block", [1, 13, 1 << 22])
@pytest.mark.parametrize("gap", [0, 20])
def test_any_rows_in_any_blocks(h5: Path, monkeypatch: pytest.MonkeyPatch, form: str, block: int, gap: int) -> None:
    expected = truth(h5)
    path = h5 if form == "h5" else mex_of(h5, zipped=form == "mex.gz")
    if form == "unsorted mex":
        *head, last = (path / "matrix.mtx").read_text().splitlines()
        (path / "matrix.mtx").write_text("\n".join([*head[:3], last, *head[3:]]))
    monkeypatch.setattr(platforms, "_BLOCK_ENTRIES", block)
    monkeypatch.setattr(tenx, "_GAP_ENTRIES", gap)
    monkeypatch.setattr(mex, "_LINES", 7)
    matrix = tenx.open_matrix(path)
    for rows in (np.arange(64), np.arange(0, 64, 3), np.array([2, 3, 4, 40, 63]), np.array([63]), np.zeros(0, int)):
        np.testing.assert_array_equal(table(matrix, rows), expected[rows])


def test_a_barcode_without_counts_is_a_row_of_zeros(h5: Path) -> None:
    edit(h5, "indptr", lambda a: np.concatenate([[0, 0], a[2:]]))
    assert table(tenx.open_matrix(h5))[0].sum() == 0


def test_a_matrix_is_read_forward_and_each_entry_once(h5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "_BLOCK_ENTRIES", 30)
    asked: list[tuple[int, int]] = []
    matrix = tenx.open_matrix(h5)
    with matrix.opened() as span:

        def told(start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
            asked.append((start, end))
            return span(start, end)

        for part in platforms.row_blocks(matrix.indptr, np.arange(64)):
            matrix._block(told, part)
    assert len(asked) > 5
    assert [start for start, _ in asked] == [0, *(end for _, end in asked[:-1])]
    assert asked[-1][1] == matrix.indptr[-1]


def test_the_layout_before_cell_ranger_3(h5: Path) -> None:
    expected = truth(h5)
    with h5py.File(h5, "a") as root:
        root.move("matrix", "GRCh38")
        group = root["GRCh38"]
        group["genes"], group["gene_names"] = group["features/id"][...], group["features/name"][...]
        del group["features"]
    matrix = tenx.open_matrix(h5)
    assert set(matrix.types) == {"Gene Expression"}
    np.testing.assert_array_equal(table(matrix), expected)
    with h5py.File(h5, "a") as root:
        root.copy("GRCh38", "mm10")
    with pytest.raises(ValueError, match=r"\.h5: holds 2 genomes; give the matrix of one species"):
        tenx.open_matrix(h5)


def test_features_are_told_apart(h5: Path) -> None:
    kinds = [b"Gene Expression", b"Negative Control Probe", b"Antibody Capture", b"Custom", b"Unassigned Codeword",
             b"Gene Expression"]  # fmt: skip
    edit(h5, "features/feature_type", lambda a: np.array(kinds))
    matrix = tenx.open_matrix(h5)
    assert matrix.kinds.tolist() == [GENE, CONTROL, OTHER, OTHER, CONTROL, GENE]
    assert matrix.notes() == [
        "4 features that are no gene expression are left out (1 Antibody Capture, 1 Custom, 1 Negative Control Probe, "
        "1 Unassigned Codeword)"
    ]


def test_facts_of_the_file_are_plain_short_text(h5: Path) -> None:
    with h5py.File(h5, "a") as root:
        root.attrs["software_version"] = np.array([b"spaceranger-2.1.0\n"])
        root.attrs["chemistry_description"] = "V" * 200
        root.attrs["library_ids"] = np.array([b"patient Smith"])
    assert tenx.open_matrix(h5).facts == {"software": "spaceranger-2.1.0", "chemistry": "V" * 64}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("indices", lambda a: np.where(np.arange(len(a)) == 3, 6, a), "an index lies outside 0 to 5"),
        ("indices", lambda a: a - 1, "an index lies outside 0 to 5"),
        ("indices", lambda a: a[:-1], "indices for .* counts"),
        ("indices", lambda a: a * 1.0, "indices is no list of numbers"),
        ("data", lambda a: a[:-1], "indices for .* counts"),
        ("data", None, "data is no list of numbers"),
        ("data", lambda a: a * 0.5, "which is no count; give the raw counts, not normalised"),
        ("data", lambda a: a * -1, "holds -[1-9], which is no count"),
        ("data", lambda a: np.where(np.arange(len(a)) == 9, np.nan, a), "holds nan, which is no count"),
        ("data", lambda a: np.where(np.arange(len(a)) == 9, np.inf, a), "holds inf, which is no count"),
        ("data", lambda a: np.where(np.arange(len(a)) == 9, 2**40, a), "holds 1099511627776, which is no count"),
        ("indptr", lambda a: a[:-1], "indptr has 64 numbers for 64 barcodes"),
        ("indptr", lambda a: a + 1, "indptr does not rise from 0"),
        ("indptr", lambda a: np.where(np.arange(len(a)) == 5, 10**9, a), "indptr does not rise from 0"),
        ("indptr", lambda a: a * 1.0, "indptr is no list of numbers"),
        ("features/name", lambda a: a[:-1], "6 ids, 5 names and 6 types"),
        ("features/id", lambda a: np.array([b"\xff\xfe"] * 6), "no readable 10x matrix"),
        ("features", None, "no readable 10x matrix"),
        ("barcodes", None, "barcodes is no list of names"),
        ("barcodes", lambda a: np.arange(64), "barcodes is no list of names"),
    ],
)
def test_an_unsound_h5_matrix_is_named(h5: Path, name: str, change, message: str) -> None:
    edit(h5, name, change)
    with pytest.raises(ValueError, match=rf"filtered_feature_bc_matrix\.h5: .*{message}"):
        table(tenx.open_matrix(h5))


def test_a_cut_or_foreign_h5_is_named(h5: Path, tmp_path: Path) -> None:
    whole = h5.read_bytes()
    for size in (0, 100, len(whole) // 2):
        h5.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"bc_matrix\.h5: no readable 10x matrix .*; restore it from the outs"):
            tenx.open_matrix(h5)
    with h5py.File(tmp_path / "other.h5", "w") as root:
        root["X"] = np.zeros(3)
        root.create_group("obs")
    with pytest.raises(ValueError, match=r"other\.h5: is HDF5, but holds no 10x matrix; give the filtered"):
        tenx.open_matrix(tmp_path / "other.h5")


def test_a_damaged_chunk_of_counts_is_named(h5: Path) -> None:
    with h5py.File(h5, "a") as root:
        data = root["matrix/data"][...]
        del root["matrix/data"]
        chunked = root["matrix"].create_dataset("data", data=data, chunks=(64,), compression="gzip")
        place = chunked.id.get_chunk_info(1)
    content = bytearray(h5.read_bytes())
    content[place.byte_offset : place.byte_offset + place.size] = bytes(place.size)
    h5.write_bytes(content)
    matrix = tenx.open_matrix(h5)  # where the counts start is sound
    with pytest.raises(ValueError, match=r"bc_matrix\.h5: no readable 10x matrix"):
        table(matrix)


def test_gzip_is_told_by_content_not_by_name(h5: Path) -> None:
    expected = truth(h5)
    folder = mex_of(h5, zipped=False)
    (folder / "matrix.mtx").rename(folder / "matrix.mtx.gz")  # plain text named .gz
    (folder / "barcodes.tsv").write_bytes(gzip.compress((folder / "barcodes.tsv").read_bytes()))
    (folder / "features.tsv").write_bytes((folder / "features.tsv").read_bytes().replace(b"\n", b"\r\n"))
    matrix = tenx.open_matrix(folder)
    assert matrix.types[-1] == "Antibody Capture"
    np.testing.assert_array_equal(table(matrix), expected)


def test_mex_of_cell_ranger_2_and_prefixed_names(h5: Path) -> None:
    folder = mex_of(h5, zipped=False)
    rows = [line.split("\t")[:2] for line in (folder / "features.tsv").read_text().splitlines()]
    (folder / "features.tsv").unlink()
    (folder / "s1_genes.tsv").write_text("\n".join("\t".join(row) for row in rows))
    matrix = tenx.open_matrix(folder)
    assert set(matrix.types) == {"Gene Expression"}
    assert matrix.symbols[0] == "TP53"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("matrix.mtx", MTX + "6 64 2\n1 1 1\n", r"matrix\.mtx: no readable matrix \(it tells 2 entries and holds 1\)"),
        ("matrix.mtx", MTX + "6 64 1\n7 1 1\n", r"entry 1 is of feature 7 and barcode 1\)"),
        ("matrix.mtx", MTX + "6 64 1\n1 65 1\n", r"entry 1 is of feature 1 and barcode 65\)"),
        ("matrix.mtx", MTX + "6 64 1\n0 1 1\n", "entry 1 is of feature 0"),
        ("matrix.mtx", MTX + "6 64 1\none 1 1\n", "no readable matrix"),
        ("matrix.mtx", MTX + "6 64 1\n1 1\n", "holds nan, which is no count"),
        ("matrix.mtx", MTX + "6 64 1\n1 1 -3\n", "holds -3.0, which is no count"),
        ("matrix.mtx", MTX.replace("integer", "real") + "6 64 1\n1 1 2.5\n", "holds 2.5, which is no count"),
        ("matrix.mtx", MTX.replace("integer", "pattern") + "6 64 1\n1 1\n", "first line is not %%MatrixMarket"),
        ("matrix.mtx", MTX.replace("general", "symmetric") + "6 64 1\n1 1 1\n", "it is symmetric, not general"),
        ("matrix.mtx", MTX + "6 64\n", "the line of its sizes has not three numbers"),
        ("matrix.mtx", "", "first line is not %%MatrixMarket"),
        ("matrix.mtx", MTX + "64 6 0\n", r"is 64 x 6, but there are 6 features and 64 barcodes; give files of one run"),
        ("matrix.mtx", None, "has no matrix"),
        ("barcodes.tsv", None, "has no barcodes"),
        ("barcodes.tsv", "A-1\n", "is 6 x 64, but there are 6 features and 1 barcodes"),
        ("features.tsv", "\udcff", r"features\.tsv: not readable as text"),
    ],
)
def test_mex_with_faults(h5: Path, name: str, content: str | None, message: str) -> None:
    folder = mex_of(h5, zipped=False)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        table(tenx.open_matrix(folder))


def test_mex_that_breaks_off_in_its_gzip(h5: Path) -> None:
    folder = mex_of(h5)
    path = folder / "matrix.mtx.gz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"matrix\.mtx\.gz: no readable matrix"):
        tenx.open_matrix(folder)


def agree(found: tenx.Whole, other) -> None:
    """Equal to a scipy matrix by barcode; within one the order is free (that of Vis5A falls)."""
    other.sort_indices()
    np.testing.assert_array_equal(found.indptr, other.indptr)
    order = np.lexsort((found.column, np.repeat(np.arange(len(found.barcodes)), np.diff(found.indptr))))
    np.testing.assert_array_equal(found.column[order], other.indices)
    np.testing.assert_array_equal(found.count[order], other.data)


REAL_H5 = [
    "scmuscle_visium/visium_data/Vis5A_2dpi/Vis5A_filtered_feature_bc_matrix.h5",
    "scanpy_visium/tests/_data/visium_data/1.0.0/filtered_feature_bc_matrix.h5",
    "scanpy_visium/tests/_data/visium_data/2.1.0/raw_probe_bc_matrix.h5",
    "seurat_visium_hd/tests/testdata/visium_hd/binned_outputs/square_016um/filtered_feature_bc_matrix.h5",
]


@pytest.mark.parametrize("name", REAL_H5)
def test_real_h5_equals_scanpy(real_data: Path, name: str) -> None:
    import scanpy

    other = scanpy.read_10x_h5(real_data / name, gex_only=False)
    found = tenx.whole(tenx.open_matrix(real_data / name))
    assert found.barcodes == list(other.obs_names)
    if "probe" not in name:  # there our columns are the probes' genes
        assert found.names == list(other.var["gene_ids"])
        assert found.symbols == list(other.var_names)
    agree(found, other.X.tocsr())


def test_real_probes_are_told_by_their_gene_and_their_filter(real_data: Path) -> None:
    path = real_data / "scanpy_visium/tests/_data/visium_data/2.1.0/raw_probe_bc_matrix.h5"
    matrix = tenx.open_matrix(path)
    with h5py.File(path) as root:
        used = root["matrix/features/filtered_probes"][...]
        ids = [name.decode().split("|")[0] for name in root["matrix/features/id"][...]]
    assert (matrix.kinds == GENE).tolist() == used.tolist()
    assert matrix.notes() == ["318 features that are no gene expression are left out (318 Filtered Probe)"]
    kept = [name for name, keep in zip(matrix.names, used, strict=True) if keep]
    assert kept == [name for name, keep in zip(ids, used, strict=True) if keep]
    assert len(set(kept)) < len(kept)  # several probes of one gene: summed by profiles.py


MEX = ["msti_human_outs/outs/filtered_feature_bc_matrix",
       "spatialexperiment_2sections/inst/extdata/10xVisium/section1/outs/raw_feature_bc_matrix",
       "spatialexperiment_2sections/inst/extdata/10xVisium/section2/outs/raw_feature_bc_matrix"]  # fmt: skip


@pytest.mark.parametrize("name", MEX)
def test_real_mex_equals_scipy_and_pandas(real_data: Path, name: str) -> None:
    import pandas as pd
    from scipy.io import mmread

    folder = real_data / name
    paths = {kind: next(folder.glob(f"{kind}*")) for kind in ("matrix", "features", "barcodes")}
    features = pd.read_csv(paths["features"], sep="\t", header=None)
    found = tenx.whole(tenx.open_matrix(folder))
    assert found.names == features[0].tolist()
    assert found.symbols == features[1].tolist()
    assert found.barcodes == pd.read_csv(paths["barcodes"], header=None)[0].tolist()
    agree(found, mmread(paths["matrix"]).tocsc())


def test_a_text_that_grows_beyond_memory_is_refused(h5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mex_of(h5)
    matrix, zeros = folder / "matrix.mtx.gz", bytes(20 << 20)
    good = matrix.read_bytes()
    for bomb in (zeros, MTX.encode() + zeros, MTX.encode() + b"%" + zeros):
        matrix.write_bytes(gzip.compress(bomb))
        with pytest.raises(ValueError, match=r"matrix\.mtx\.gz: no readable matrix") as caught:
            tenx.open_matrix(folder)
        assert len(str(caught.value)) < 1000
    matrix.write_bytes(good)
    monkeypatch.setattr(mex, "_TEXT_BYTES", 10)
    with pytest.raises(ValueError, match=r"features\.tsv\.gz: not readable as text \(more than 0 MiB\)"):
        tenx.open_matrix(folder)
