"""Fixtures of the model's tests: a small batch, and a small model none of whose branches is zero."""

import pytest
import torch

from storm.model.storm import Storm
from tests.model.batches import CONFIG, N_GENES, Batch, awake, make_batch


@pytest.fixture
def batch() -> Batch:
    return make_batch()


@pytest.fixture
def model() -> Storm:
    return awake(Storm(CONFIG, N_GENES))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a generator of its own, as weights of timm, is the same in every run."""
    torch.manual_seed(0)
