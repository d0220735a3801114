"""Fixtures that many tests share: the real data's folder, one small synthetic corpus per session; and what `tests/run`
gives to its two workers: a file as a whole, so that its fixtures are made once, and the longest first."""

import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine must not fail an example
hypothesis.settings.load_profile("untimed")

# Before numpy or torch start their threads: the tests run many small operations, some of them on two ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")

PREP_TINY = Path(__file__).resolve().parent.parent / "configs" / "prep_tiny.yaml"
REAL_FOLDERS = (
    "cosmx_dbkero", "dlpfc_151673", "her2st", "moleculeexperiment_xenium", "msti_human_outs", "multiqc_xenium",
    "paste_bc", "scanpy_visium", "scmuscle_visium", "segger_xenium", "seurat_visium_hd", "spatialexperiment_2sections",
    "stutility_mob", "wsi",
)  # fmt: skip

# Groups of tests that one worker takes as a whole; elsewhere a file is one.
SLURM, RANKS = "slurm", "ranks"  # one cluster, which a second would make a busy node; runs that two files look at
RANKS_FILES = ("test_ranks.py", "test_kills.py")
FIRST = (
    RANKS, SLURM, "test_trainer.py", "test_steps.py", "test_host_reads.py", "test_given_encoder.py", "test_watch.py",
    "test_durability.py", "test_synthetic.py", "test_validate.py", "test_golden.py", "test_expression.py",
    "test_report.py",
)  # fmt: skip


def group_of(nodeid: str) -> str:
    """The group of a test: `slurm`, `ranks`, or its file."""
    path = Path(nodeid.split("::")[0])
    if path.parent.name == SLURM:
        return SLURM
    return RANKS if path.name in RANKS_FILES else str(path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deals groups to workers, in the order in which they were collected, whatever `--dist` says.

    xdist's own groups are written into the names of tests, where newer versions of pytest do not read them.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In a worker: the long groups first, for two workers to end together."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        rank = {name: number for number, name in enumerate(FIRST)}
        items.sort(key=lambda item: rank.get(Path(group_of(item.nodeid)).name, len(FIRST)))


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
