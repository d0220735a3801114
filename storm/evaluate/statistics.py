"""Pearson within a slide, and intervals from a bootstrap of spatial blocks, or of donors.

In: predictions and measurements [N, K] of the sections of a test set, and where the profiles lie. Out: one figure per
gene, their mean, and its interval. A block is resampled as a whole, because neighbouring profiles are no independent
draws; two ways of training are compared over donors, and over the seeds they were trained with.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
BLOCK_UM = 1000.0
REPLICATES = 1000
_TINY = 1e-12  # of the variance of unit-scaled values: below it a column counts as constant


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def json(self) -> dict[str, float]:
        """Plain values."""
        return {"value": self.value, "low": self.low, "high": self.high}


def blocks(xy_um: Floats, side_um: float = BLOCK_UM, least: int = 8) -> npt.NDArray[np.int64]:
    """[N] number of the square in which each profile lies; squares without profiles are not counted.

    The side is halved, up to twice, where a section is so small that fewer than `least` squares would hold profiles.
    """
    for side in (side_um, side_um / 2, side_um / 4):
        place = np.floor((xy_um - xy_um.min(0)) / side).astype(np.int64)
        number = np.unique(place, axis=0, return_inverse=True)[1].reshape(-1)
        if number.max() + 1 >= least:
            break
    return number


def _scaled(values: Floats) -> Floats:
    """Columns of mean 0 and sd 1, so that sums of squares stay exact; a constant column becomes 0."""
    centred = values - values.mean(0)
    spread = centred.std(0)
    constant = spread <= 1e-12 * np.maximum(np.abs(values).max(0), 1e-300)
    return np.where(constant, 0.0, centred / np.where(constant, 1.0, spread))


def _moments(predicted: Floats, measured: Floats, block: npt.NDArray[np.int64]) -> Floats:
    """[6, blocks, K] sums of 1, x, y, x2, y2, xy in each block."""
    x, y = _scaled(predicted), _scaled(measured)
    member = np.zeros((int(block.max()) + 1, len(block)))
    member[block, np.arange(len(block))] = 1
    return np.stack([member @ term for term in (np.ones_like(x), x, y, x * x, y * y, x * y)])


def _pearson_of(sums: Floats) -> Floats:
    """Pearson from sums [6, ..., K]; 0 where one side is constant."""
    n, x, y, xx, yy, xy = sums
    n = np.maximum(n, 1)
    spread = np.maximum(xx / n - (x / n) ** 2, 0) * np.maximum(yy / n - (y / n) ** 2, 0)
    return np.where(spread > _TINY, (xy / n - x * y / n**2) / np.sqrt(np.maximum(spread, _TINY)), 0.0)


def pearson(predicted: Floats, measured: Floats) -> Floats:
    """[K] correlation of each column over the profiles of one section; a constant column on either side counts as 0."""
    return _pearson_of(_moments(predicted, measured, np.zeros(len(measured), np.int64)).sum(1))


def bootstrap(
    predicted: Floats, measured: Floats, block: npt.NDArray[np.int64], seed: int, replicates: int = REPLICATES
) -> Floats:
    """[replicates, K] correlations of one section with its blocks drawn with replacement.

    The draws depend on (seed, profiles' blocks) alone, so two methods on one section can be compared pair by pair.
    """
    sums = _moments(predicted, measured, block)
    weight = block_weights(block, seed, replicates)
    return _pearson_of(np.einsum("rb,sbk->srk", weight, sums, optimize=True))


def block_weights(block: npt.NDArray[np.int64], seed: int, replicates: int = REPLICATES) -> Floats:
    """[replicates, blocks] how often each block is drawn; the same for any two methods on one section.

    Where profiles lie in blocks is part of the key: sections of as many blocks must not be drawn alike, or the interval
    of their mean would be too wide or too narrow.
    """
    number = int(block.max()) + 1
    rng = np.random.default_rng([seed, number, zlib.crc32(np.ascontiguousarray(block, "<i8").tobytes())])
    return rng.multinomial(number, np.full(number, 1 / number), size=replicates).astype(np.float64)


def block_means(values: Floats, block: npt.NDArray[np.int64], seed: int, replicates: int = REPLICATES) -> Floats:
    """[replicates] means of `values` [N] of one section with its blocks drawn with replacement."""
    weight = block_weights(block, seed, replicates)
    return np.asarray(weight @ np.bincount(block, values) / (weight @ np.bincount(block)))


def donor_bootstrap(first: Floats, second: Floats, seed: int, replicates: int = REPLICATES) -> list[Interval]:
    """Per class, the mean difference first - second of two arms and its 95 % interval.

    Args:
        first, second: [seeds, donors, classes] scores. The donors are the same in both arms and are drawn together;
            each arm's trainings (its seeds, whose number may differ) are drawn on their own.

    Raises:
        ValueError: fewer than two donors, or donors or classes that do not fit.
    """
    if first.shape[1:] != second.shape[1:] or first.ndim != 3 or first.shape[1] < 2:
        raise ValueError(
            f"scores {first.shape} and {second.shape}: give [seeds, donors, classes] of the same two or more donors"
        )
    rng = np.random.default_rng([seed, 7])
    donors = rng.integers(0, first.shape[1], (replicates, first.shape[1]))
    drawn = []
    for arm in (first, second):
        runs = rng.integers(0, len(arm), (replicates, len(arm)))
        mean_RDC = arm[runs].mean(1)
        drawn.append(np.take_along_axis(mean_RDC, donors[..., None], axis=1).mean(1))
    value = first.mean((0, 1)) - second.mean((0, 1))
    return [interval(v, d) for v, d in zip(value, (drawn[0] - drawn[1]).T, strict=True)]


def over_donors(each: Floats, donor: npt.NDArray[np.int64], seed: int) -> Floats:
    """[replicates] of a mean over rows: donors drawn with replacement, and of each row one of its own replicates.

    Args:
        each: [rows, replicates] of each row, of a bootstrap of its blocks.
        donor: [rows] number of the donor; its rows are drawn together. With one donor alone only blocks vary.
    """
    rng = np.random.default_rng([seed, 11])
    own = rng.permuted(each, axis=1)  # rows of as many blocks were drawn alike, and must not go together
    number = int(donor.max()) + 1
    weight = rng.multinomial(number, np.full(number, 1 / number), size=each.shape[1])[:, donor]
    return np.asarray((weight * own.T).sum(1) / weight.sum(1))


def interval(value: float, replicates: Floats) -> Interval:
    """A figure with the 2.5 and 97.5 percentiles of its replicates [R]."""
    low, high = np.percentile(replicates, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))


def told(entry: dict[str, float] | None, sign: str = "") -> str:
    """An interval's plain values as text, or a dash where there is none."""
    if entry is None:
        return "-"
    return f"{entry['value']:{sign}.3f} [{entry['low']:{sign}.3f}, {entry['high']:{sign}.3f}]"
