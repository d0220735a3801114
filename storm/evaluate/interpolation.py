"""Interpolation of expression over a section: inverse distance and ordinary kriging.

In: places of known profiles, places that are asked. Out: weights [M, n], sparse; a prediction is weights @ values, so
one set of weights serves all genes. Only the NEAREST known profiles of a place have weight (kriging with a moving
neighbourhood); with fewer known profiles it is kriging over the section.

Powers, ranges and nuggets are chosen per gene on training sections, whose profiles are hidden in the same way.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse, spatial

from storm.evaluate.statistics import pearson

Floats = npt.NDArray[np.float64]
Weigh = Callable[[Floats, Floats], sparse.csr_array]

NEAREST = 32
POWERS = (0.5, 1.0, 2.0, 3.0)
RANGES_UM = (100.0, 200.0, 400.0, 800.0)
NUGGETS = (0.2, 0.5, 0.8, 0.95)  # share of the variance that neighbours do not share
_CHUNK = 512  # systems solved at once
_LEAST_UM = 1.0  # nearer than that is the same place


@dataclass(frozen=True)
class Case:
    """A section with known and asked places: values of both, [n, K] and [M, K]."""

    places_um: Floats  # [n, 2]
    asked_um: Floats  # [M, 2]
    known: Floats
    truth: Floats


def _nearest(places_um: Floats, asked_um: Floats) -> tuple[Floats, npt.NDArray[np.int64]]:
    """(distance, row) [M, k] of the known places around each asked one."""
    k = min(NEAREST, len(places_um))
    distance, row = spatial.KDTree(places_um).query(asked_um, k=k)
    return distance.reshape(len(asked_um), k), row.reshape(len(asked_um), k)


def _matrix(weight: Floats, row: npt.NDArray[np.int64], n: int) -> sparse.csr_array:
    m, k = weight.shape
    return sparse.csr_array((weight.ravel(), row.ravel(), np.arange(m + 1) * k), shape=(m, n))


def inverse_distance(power: float) -> Weigh:
    """Weights that fall with distance to `power` and sum to 1."""

    def weigh(places_um: Floats, asked_um: Floats) -> sparse.csr_array:
        distance, row = _nearest(places_um, asked_um)
        weight = np.maximum(distance, _LEAST_UM) ** -power
        return _matrix(weight / weight.sum(1, keepdims=True), row, len(places_um))

    return weigh


def kriging(range_um: float, nugget: float) -> Weigh:
    """Ordinary kriging with an exponential covariance: the mean is unknown, the weights sum to 1."""

    def weigh(places_um: Floats, asked_um: Floats) -> sparse.csr_array:
        distance, row = _nearest(places_um, asked_um)
        weight = np.empty_like(distance)
        for start in range(0, len(weight), _CHUNK):
            part = slice(start, start + _CHUNK)
            near = places_um[row[part]]
            apart = np.linalg.norm(near[:, :, None] - near[:, None], axis=-1)
            known = (1 - nugget) * np.exp(-apart / range_um) + nugget * np.eye(near.shape[1])
            asked = (1 - nugget) * np.exp(-distance[part] / range_um)
            solved = np.linalg.solve(known, np.stack([asked, np.ones_like(asked)], axis=-1))
            total = solved.sum(1, keepdims=True)
            weight[part] = solved[..., 0] + solved[..., 1] * (1 - total[..., 0]) / total[..., 1]
        return _matrix(weight, row, len(places_um))

    return weigh


INVERSE_DISTANCE = tuple(inverse_distance(power) for power in POWERS)
KRIGING = tuple(kriging(range_um, nugget) for range_um in RANGES_UM for nugget in NUGGETS)


def choose(options: tuple[Weigh, ...], train: list[Case]) -> npt.NDArray[np.int64]:
    """[K] the option of highest mean Pearson over the training sections, per gene."""
    found = np.zeros((len(options), train[0].known.shape[1]))
    for case in train:
        for i, weigh in enumerate(options):
            found[i] += pearson(weigh(case.places_um, case.asked_um) @ case.known, case.truth)
    return found.argmax(0)


def interpolate(options: tuple[Weigh, ...], chosen: npt.NDArray[np.int64], case: Case) -> Floats:
    """[M, K] each gene by its own option."""
    found = np.empty((len(case.asked_um), len(chosen)))
    for i in np.unique(chosen):
        own = chosen == i
        found[:, own] = options[i](case.places_um, case.asked_um) @ case.known[:, own]
    return found
