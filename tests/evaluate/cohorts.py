"""Cohorts of made-up sections on a lattice: counts from a field that is known."""

import numpy as np
from scipy import sparse

from storm.evaluate.expression import Cohort
from storm.evaluate.sections import Section, with_neighbours


def lattice(side: int, pitch_um: float = 100.0) -> np.ndarray:
    steps = np.arange(side) * pitch_um
    return np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)


def section(
    name: str, donor: str, log_rate: np.ndarray, rng: np.random.Generator, depth: float = 2000, side: int | None = None
) -> Section:
    """A section whose composition is exp(log_rate) [N, K], and whose colours are noise."""
    n = len(log_rate)
    xy_um = lattice(side or round(n**0.5))
    share = np.exp(log_rate)
    counts = rng.poisson(depth * share / share.sum(1, keepdims=True)).astype(float)
    colour = rng.normal(size=(n, 15))
    return Section(
        name, ("study", donor), np.arange(n), [f"p{i}" for i in range(n)], xy_um, sparse.csr_array(counts),
        counts.sum(1).astype(np.int64), colour, with_neighbours(colour, xy_um),
    )  # fmt: skip


def cohort(train: list[Section], test: list[Section]) -> Cohort:
    return Cohort(train, test, {}, [f"g{i}" for i in range(train[0].counts.shape[1])], "donor", "")
