"""Fixtures of the model's tests: a small batch, and a small model none of whose branches is zero."""

import pytest

from storm.model.storm import Storm
from tests.model.batches import CONFIG, N_GENES, Batch, awake, make_batch


@pytest.fixture
def batch() -> Batch:
    return make_batch()


@pytest.fixture
def model() -> Storm:
    return awake(Storm(CONFIG, N_GENES))
