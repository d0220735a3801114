"""Fixtures of the tests on SLURM: one cluster for all of them, and a corpus that its jobs prepare."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running SLURM; where it is not installed: skip, or fail where CI is set."""
    absent = missing()
    if absent:
        reason = f"SLURM: {', '.join(absent)} not installed (slurmctld slurmd slurm-client munge)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    # The sockets' paths are limited to 107 bytes, which pytest's own folders may pass.
    root = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
    running = Cluster(root)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(root, ignore_errors=True)
