"""One process group of one rank, for the tests that train in this process."""

import os
from collections.abc import Iterator

import pytest

from storm.train import engine


@pytest.fixture(scope="session")
def world() -> Iterator[engine.World]:
    """This process as the only rank. The environment is left as it was, for the tests that start jobs; LOCAL_RANK
    alone stays, which DeepSpeed asks for again and which makes no process a rank."""
    before = dict(os.environ)
    alone = engine.connect()
    after = dict(os.environ)
    os.environ.clear()
    os.environ.update(before | {"LOCAL_RANK": "0"})
    assert after["WORLD_SIZE"] == "1"
    yield alone
    engine.disconnect()
    os.environ.pop("LOCAL_RANK")
