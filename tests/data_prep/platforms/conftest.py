"""Fixtures of the tests of readers: a section of single cells as a Xenium bundle, and one of Visium HD."""

import shutil
from pathlib import Path

import pytest

from data_prep.synthetic.cells import CellSection
from data_prep.synthetic.visium_hd import write_visium_hd
from data_prep.synthetic.xenium import write_xenium
from tests.data_prep.platforms.xenium_files import drawn_section


@pytest.fixture(scope="session")
def section() -> CellSection:
    """150 cells over 40 genes and 5 controls."""
    return drawn_section()


@pytest.fixture(scope="session")
def xenium_written(section: CellSection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its Xenium bundle, not to be changed."""
    folder = tmp_path_factory.mktemp("xenium") / "bundle"
    write_xenium(folder, section)
    return folder


@pytest.fixture
def bundle(xenium_written: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(xenium_written, tmp_path / "bundle")


@pytest.fixture(scope="session")
def hd_written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An outs folder of 20 x 20 bins of 8 um over 60 genes, 225 cells and an image of 0.5 um/px, not to be changed."""
    folder = tmp_path_factory.mktemp("hd") / "outs"
    write_visium_hd(folder, 20, mean_genes=12, gene_count=60, cells=True, image=True)
    return folder


@pytest.fixture
def hd_outs(hd_written: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(hd_written, tmp_path / "outs")
