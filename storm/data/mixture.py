"""How often each slide's groups come per epoch: weights, a tempering, floors and caps, as expected multiplicities.

In: of each slide its groups, corpus, study, donor, section and platform; the config. Out: the expected multiplicity of
each slide's groups, of which `order.Multiplicity` makes whole numbers.

A slide's share begins as that of its study among the studies, times that of its donor in the study, times that of its
section in the donor, each as groups ** power; times the weight of its corpus. Floors and caps then move shares as
little as they must, in turns, until all hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storm.config import MixtureConfig
from storm.data.order import UNIT, Multiplicity

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

_ROUNDS, _CLOSE = 2000, 1e-6


@dataclass(frozen=True)
class Slides:
    """What the mixture knows of each of S slides; all arrays are of length S."""

    groups: npt.NDArray[np.int64]
    corpus: Labels
    study: Sequence[str]
    donor: Sequence[str]  # with its study: two studies may call a donor the same
    section: Sequence[str]
    platform: Sequence[str]


def expected(slides: Slides, config: MixtureConfig) -> Floats:
    """[S] how often a group of each slide comes per epoch; times the groups, they sum to the number of groups.

    Raises:
        ValueError: the weights do not fit the corpora, or floors and caps cannot hold together.
    """
    weights = np.array(config.corpora or [1.0] * (int(slides.corpus.max()) + 1))
    if len(weights) <= slides.corpus.max() or (weights < 0).any() or not weights[slides.corpus].any():
        raise ValueError(
            f"data.mixture.corpora={config.corpora}: give a weight >= 0 for each shard set of data.shards, one above 0"
        )
    share = _tempered(slides, config.power) * weights[slides.corpus]
    share = _bounded(share / share.sum(), slides, config)
    return share * slides.groups.sum() / np.maximum(slides.groups, 1)


def _tempered(slides: Slides, power: float) -> Floats:
    """[S] shares of study, donor in study and section in donor, each as groups ** power."""
    share = np.ones(len(slides.groups))
    parent = np.zeros(len(share), dtype=np.int64)
    for names in (slides.study, slides.donor, slides.section):
        own = _numbers(names)
        weight = _sums(own, slides.groups) ** power
        parent_of = np.zeros(len(weight), dtype=np.int64)
        parent_of[own] = parent
        share *= (weight / _sums(parent_of, weight)[parent_of])[own]
        parent = own
    return share * slides.groups / _sums(parent, slides.groups)[parent]


def _numbers(names: Sequence[str]) -> Labels:
    return np.unique(np.array(names), return_inverse=True)[1].reshape(-1)


def _sums(label: Labels, values: npt.NDArray) -> Floats:
    return np.bincount(label, values.astype(np.float64)).astype(np.float64, copy=False)


def _bounded(share: Floats, slides: Slides, config: MixtureConfig) -> Floats:
    """[S] the shares with every floor and cap. Raises ValueError where they cannot all hold."""
    study, donor, platform = (_numbers(n) for n in (slides.study, slides.donor, slides.platform))
    most = config.repeat_most * slides.groups / slides.groups.sum()
    for _ in range(_ROUNDS):
        before = share
        share = _fit(share, platform, np.maximum(_sums(platform, share), config.platform_least))
        share = _fit(share, donor, np.minimum(_sums(donor, share), config.donor_most))
        share = _fit(share, study, np.minimum(_sums(study, share), config.study_most))
        share = np.minimum(share, most)
        share = share / share.sum()
        if np.abs(share - before).max() < _CLOSE / len(share):
            break
    held = {
        "study_most": _sums(study, share).max() <= config.study_most + _CLOSE,
        "donor_most": _sums(donor, share).max() <= config.donor_most + _CLOSE,
        "platform_least": _sums(platform, share).min() >= config.platform_least - _CLOSE,
        "repeat_most": bool((share <= most + _CLOSE / len(share)).all()),
    }
    broken = [f"{name}={getattr(config, name)}" for name, holds in held.items() if not holds]
    if broken:
        raise ValueError(
            f"data.mixture: {', '.join(broken)} cannot hold with {len(set(slides.study))} studies, "
            f"{len(set(slides.donor))} donors, {len(set(slides.platform))} platforms and the other keys; loosen it"
        )
    return share


def _fit(share: Floats, label: Labels, wanted: Floats) -> Floats:
    """Shares scaled so that each label has what it should, and the labels that were not moved make room."""
    have = _sums(label, share)
    moved = ~np.isclose(have, wanted, rtol=0, atol=1e-15)
    factor = np.divide(wanted, have, out=np.ones_like(have), where=have > 0)
    rest = have[~moved].sum()
    if moved.any() and rest > 0:
        factor[~moved] = max(0.0, 1 - wanted[moved].sum()) / rest
    return share * factor[label]


def is_plain(config: MixtureConfig) -> bool:
    """Whether each group comes exactly once per epoch."""
    return config == MixtureConfig(repeat_most=config.repeat_most)


def multiplicity(slides: Slides, slide_of: npt.NDArray[np.int32], config: MixtureConfig) -> Multiplicity:
    """The multiplicity of each group.

    Args:
        slide_of: [n] the slide of each group.
    """
    times = expected(slides, config)
    rank = np.zeros(len(times), dtype=np.int64)
    rank[np.lexsort((_numbers(slides.section), _numbers(slides.donor), _numbers(slides.study)))] = np.arange(len(times))
    line = np.argsort(rank[slide_of], kind="stable").astype(np.int32)
    units = np.floor(times * UNIT).astype(np.int64)[slide_of[line]]
    return Multiplicity(line, _exact(units, len(line) * UNIT))


def _exact(units: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
    """Units that were rounded down, with what is missing to the total spread evenly over those that are not 0."""
    some = np.flatnonzero(units)
    missing = total - int(units.sum())
    share, rest = divmod(missing, len(some))
    units[some] += share
    units[some[:rest]] += 1
    return units
