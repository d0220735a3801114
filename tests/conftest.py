"""Fixtures that many tests share: the real data's folder, and one small synthetic corpus per session."""

import os
from pathlib import Path

import pytest

# Before numpy or torch start their threads: the tests run many small operations, some of them on two ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")

PREP_TINY = Path(__file__).resolve().parent.parent / "configs" / "prep_tiny.yaml"
REAL_FOLDERS = (
    "cosmx_dbkero", "dlpfc_151673", "her2st", "moleculeexperiment_xenium", "msti_human_outs", "multiqc_xenium",
    "paste_bc", "scanpy_visium", "scmuscle_visium", "segger_xenium", "seurat_visium_hd", "spatialexperiment_2sections",
    "stutility_mob", "wsi",
)  # fmt: skip


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real slides and measurements; without it: skip, or fail where STORM_REQUIRE_DATA=1."""
    root = os.environ.get("STORM_TEST_DATA", "")
    missing = [name for name in REAL_FOLDERS if not (Path(root) / name).is_dir()] if root else []
    if root and not missing:
        return Path(root).resolve()
    reason = f"{root} lacks {', '.join(missing)}" if root else "STORM_TEST_DATA is unset"
    if os.environ.get("STORM_REQUIRE_DATA") == "1":
        pytest.fail(f"real data: {reason}")
    pytest.skip(f"real data: {reason}")


@pytest.fixture(scope="session")
def synthetic_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `tiny` synthetic corpus, written once per session: manifest.csv, slides, vendor files and truth."""
    from data_prep.synthetic import write_corpus

    folder = tmp_path_factory.mktemp("tissue")
    write_corpus(folder, size="tiny", seed=0, workers=1)
    return folder


@pytest.fixture(scope="session")
def tiny_store(synthetic_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slide stores of `synthetic_tiny` by configs/prep_tiny.yaml."""
    from data_prep import build

    folder = tmp_path_factory.mktemp("stores") / "stores"
    words = [str(synthetic_tiny / "manifest.csv"), "--store", str(folder), "--config", str(PREP_TINY), "--workers", "1"]
    assert build.main(words) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shard set of `tiny_store`: splits train and test."""
    from data_prep import pack

    folder = tmp_path_factory.mktemp("shards") / "shards"
    assert pack.main(["--store", str(tiny_store), "--out", str(folder), "--config", str(PREP_TINY)]) == 0
    return folder
