"""Costs: work from headers, and a model that agrees with what was built."""

import gzip
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from data_prep import cost
from data_prep.cost import Work
from data_prep.records import Record
from storm.prep_config import PrepConfig
from tests.data_prep.vendors import write_st, write_visium


def test_sizes_of_measurements_by_their_headers(tmp_path: Path) -> None:
    outs = write_visium(tmp_path / "outs")
    matrix = outs / "filtered_feature_bc_matrix.h5"
    with h5py.File(matrix) as root:
        entries = len(root["matrix/data"])
    assert cost.measured([outs / "spatial" / "tissue_positions.csv", matrix]) == (64, entries)
    text = "%%MatrixMarket matrix coordinate integer general\n%\n10 7 3\n1 1 1\n2 2 1\n3 3 1\n"
    (tmp_path / "matrix.mtx").write_text(text)
    (tmp_path / "matrix.mtx.gz").write_bytes(gzip.compress(text.encode()))
    assert cost.measured([tmp_path / "matrix.mtx"]) == cost.measured([tmp_path / "matrix.mtx.gz"]) == (7, 3)
    (tmp_path / "matrix.mtx.gz").write_text(text)  # as the reader: by content, not by name
    assert cost.measured([tmp_path / "matrix.mtx.gz"]) == (7, 3)
    sparse = anndata.AnnData(csr_matrix(np.eye(4, 5, dtype=np.float32)))
    sparse.write_h5ad(tmp_path / "a.h5ad")
    anndata.AnnData(np.eye(4, 5, dtype=np.float32)).write_h5ad(tmp_path / "b.h5ad")
    assert cost.measured([tmp_path / "a.h5ad"]) == (4, 4)
    assert cost.measured([tmp_path / "b.h5ad"]) == (4, 20)
    assert cost.measured([]) == (0, 0)


@pytest.mark.parametrize("name", ["x.h5", "x.h5ad", "matrix.mtx", "matrix.mtx.gz"])
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"{name}: no .*matrix.*; restore "):
        cost.measured([tmp_path / name])


def test_mpp_that_small_files_tell(tmp_path: Path) -> None:
    outs = write_visium(tmp_path / "outs", mpp=0.7)
    assert cost.told_mpp([outs / "spatial" / "scalefactors_json.json"]) == pytest.approx(0.7)
    counts, spots = write_st(tmp_path / "st", mpp=0.6)
    assert cost.told_mpp([counts, spots]) == pytest.approx(0.6, rel=1e-3)
    (tmp_path / "odd.tsv").write_text("a\tb\n")
    assert cost.told_mpp([tmp_path / "odd.tsv", tmp_path / "absent_scalefactors_json.json"]) is None


def test_the_model_agrees_with_what_was_built() -> None:
    config = PrepConfig(tile_px=112, tile_mpp=1.0)
    first = cost.fitted([], config)
    assert (first.records, first.tissue, first.px) == (0, cost.TISSUE, 0.25)
    facts = {"tiles": 600.0, "grid": 800.0, "profiles": 1000.0, "counts": 2e6}
    seen = [Record("a", "built", seconds=30.0, bytes=9_000_000, cost=facts), Record("b", "failed", "x")]
    model = cost.fitted(seen, config)
    work = Work(grid=800, profiles=1000, counts=2e6)
    assert (model.records, model.tissue) == (1, 0.75)
    assert model.seconds(work) == pytest.approx(30)
    assert model.store_bytes(work) == pytest.approx(9_000_000)
    assert model.seconds(work.times(100), 100) == pytest.approx(3000)
    assert model.shard_files(work, config) == pytest.approx(model.shard_bytes(work) / 1e8)


def test_work_adds_up() -> None:
    assert Work(1, 2, 3, 4) + Work(1, 1, 1, 1) == Work(2, 3, 4, 5)


def test_room_of_a_folder_that_does_not_exist_is_that_of_the_nearest(tmp_path: Path) -> None:
    room = cost.room(tmp_path / "a" / "b")
    assert room.free_bytes > 0
