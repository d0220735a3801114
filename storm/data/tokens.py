"""The tokens of the expression encoder `tokens`: which genes of a profile are shown as such, and with which values.

In: the visible entries of a group's profiles. Out: the arrays of `schema.TOKENS`.

Chosen are the genes with counts of highest rank deviation (percentile of the count's rank among the profile's visible
counts, less that of the gene's expected share among the same genes) and some of the measured genes without a count,
those of high expected share before others. In training both are drawn: a race of exponentials, which is the same as
adding Gumbel noise, lets any gene appear. Without a seed each racer takes its expected time: nothing is random.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Arrays = dict[str, npt.NDArray]

_TEMPERATURE = 0.25  # of the draw: a deviation of 1, the largest, is worth a factor of e^4
_ROWS = 64  # profiles whose zeros are drawn at a time


class TokenSpec(NamedTuple):
    """How many tokens a profile has, at most."""

    genes: int  # with counts
    zeros: int  # measured, without


class Chosen(NamedTuple):
    """Tokens, profile after profile: whose, which gene, and (v, log1p(count), percentile of the rank) of each."""

    row: Ints  # [Q]
    gene: Ints  # [Q]
    value: Floats  # [Q, 3]


def percentile(row: Ints, value: npt.NDArray) -> Floats:
    """[Z] where each value stands among those of its row, in (0, 1); equal values share the mean of their places."""
    order = np.lexsort((value, row))
    rows, values = row[order], value[order]
    new = np.ones(len(order), bool)
    new[1:] = (rows[1:] != rows[:-1]) | (values[1:] != values[:-1])
    first = np.flatnonzero(new)
    length = np.diff(np.append(first, len(order)))
    place = np.repeat(first + (length - 1) / 2, length) - np.searchsorted(rows, rows)
    found = np.empty(len(order))
    found[order] = (place + 0.5) / np.bincount(row)[rows]
    return found


def choose(
    row: Ints, gene: Ints, count: Ints, visible: Mask, measured: Mask, share: Floats, sum_to: float, spec: TokenSpec,
    seed: int | None,
) -> Chosen:  # fmt: skip
    """The tokens of one group.

    Args:
        row, gene, count: [Z] each, the visible entries by profile.
        visible: [n] the profiles that show their expression.
        measured: [G] the genes that they show, with or without counts.
        share: [G] expected share of the counts.
        sum_to: what the measured genes of a profile are scaled to sum up to before log1p.
        seed: of the draw; None = no draw.
    """
    rng = None if seed is None else np.random.Generator(np.random.Philox(seed))
    rank = percentile(row, count)
    time = np.exp((percentile(row, share[gene]) - rank) / _TEMPERATURE)
    time = time if rng is None else time * rng.standard_exponential(len(row))
    order = np.lexsort((time, row))
    place = np.arange(len(row)) - np.searchsorted(row[order], row[order])
    kept = np.sort(order[place < spec.genes])
    depth = np.bincount(row, count, minlength=len(visible))
    level = np.log1p(count * sum_to / depth[row])
    value = np.stack([level, np.log1p(count), rank], axis=-1)[kept]
    zero_row, zero_gene = _zeros(row, gene, visible, measured, share, spec.zeros, rng)
    rows = np.concatenate([row[kept], zero_row])
    by_profile = np.argsort(rows, kind="stable")
    genes, values = np.concatenate([gene[kept], zero_gene]), np.concatenate([value, np.zeros((len(zero_row), 3))])
    return Chosen(rows[by_profile], genes[by_profile], values[by_profile])


def _zeros(
    row: Ints, gene: Ints, visible: Mask, measured: Mask, share: Floats, number: int, rng: np.random.Generator | None
) -> tuple[Ints, Ints]:
    """(row, gene) of up to `number` measured genes without a count of each visible profile."""
    genes = np.flatnonzero(measured)
    column = np.full(len(measured), -1)
    column[genes] = np.arange(len(genes))
    slow = (1 / np.maximum(share[genes], 1e-12)).astype(np.float32)
    shown, found = np.flatnonzero(visible), [np.zeros((2, 0), np.int64)]
    number = min(number, len(genes))
    for start in range(0, len(shown) if number else 0, _ROWS):
        some = shown[start : start + _ROWS]
        shape = len(some), len(genes)
        time = np.tile(slow, (len(some), 1)) if rng is None else slow * rng.standard_exponential(shape, np.float32)
        low, high = np.searchsorted(row, [some[0], some[-1] + 1])
        time[np.searchsorted(some, row[low:high]), column[gene[low:high]]] = np.inf
        chosen = np.sort(np.argpartition(time, number - 1, axis=1)[:, :number], axis=1)
        i, j = np.nonzero(np.isfinite(np.take_along_axis(time, chosen, axis=1)))
        found.append(np.stack([some[i], genes[chosen[i, j]]]))
    rows, columns = np.concatenate(found, axis=1)
    return rows, columns


def pack(found: list[Chosen]) -> Arrays:
    """The entries of `schema.TOKENS`; `row` is the profile's place in the batch. One dummy token where there is none.

    Profiles of equal length lie side by side, which spares the CPU padding.
    """
    row, gene, value = (np.concatenate(parts) for parts in zip(*found, strict=True))
    if not len(row):
        row, gene, value = np.array([-1]), np.array([0]), np.zeros((1, 3))
    profile, inverse, length = np.unique(row, return_inverse=True, return_counts=True)
    by_length = np.argsort(-length, kind="stable")
    order = np.lexsort((row, -length[inverse]))
    return {
        "token_gene": gene[order].astype(np.int64), "token_value": value[order].astype(np.float32),
        "token_offsets": np.concatenate([[0], np.cumsum(length[by_length])]).astype(np.int64),
        "token_profile": profile[by_length].astype(np.int64), "token_slots": np.arange(length.max()),
    }  # fmt: skip
