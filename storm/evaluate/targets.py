"""Targets and gene rules of H&E -> expression (protocol 2): what is predicted, and for which genes.

In: sparse counts [N, K]. Out: targets [N, K], and the columns of the genes that a rule names. Rules are given
training profiles alone.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from storm.schema import LOGNORM_SCALE

Floats = npt.NDArray[np.float64]
Columns = npt.NDArray[np.int64]

TARGETS = ("lognorm", "raw", "residual")
COLUMNS = (("lognorm", "var"), ("raw", "var"), ("residual", "var"), ("lognorm", "binned"))  # always printed


def lognorm(counts: sparse.csr_array, depth: npt.NDArray) -> Floats:
    """log1p(counts / depth * 1e4) [N, K]; `depth` [N] counts all measured genes, not only these."""
    return np.asarray(np.log1p(counts.toarray() * (LOGNORM_SCALE / np.maximum(depth, 1))[:, None]), dtype=np.float64)


def residualised(values: Floats, log_depth: Floats) -> Floats:
    """What is left of each column of `values` [N, K] after a line in `log_depth` [N], fitted within this section."""
    depth = log_depth - log_depth.mean()
    centred = values - values.mean(0)
    spread = float(depth @ depth)
    return centred - np.outer(depth, depth @ centred / spread) if spread > 0 else centred


def target(name: str, counts: sparse.csr_array, depth: npt.NDArray) -> Floats:
    """One of TARGETS for one section: counts [N, K], total depth [N] -> [N, K]."""
    if name == "raw":
        return np.asarray(np.log1p(counts.toarray()), dtype=np.float64)
    values = lognorm(counts, depth)
    return residualised(values, np.log(np.maximum(depth, 1))) if name == "residual" else values


@dataclass(frozen=True)
class Moments:
    """Per gene over the training profiles, of lognorm: mean and variance, each [K]."""

    mean: Floats
    variance: Floats


def moments(counts: list[sparse.csr_array], depths: list[npt.NDArray]) -> Moments:
    """Moments over several sections; nothing is made dense."""
    total = sum(c.shape[0] for c in counts)
    first, second = (np.zeros(counts[0].shape[1]) for _ in range(2))
    for c, depth in zip(counts, depths, strict=True):
        values = (sparse.diags_array(LOGNORM_SCALE / np.maximum(depth, 1)) @ c).log1p()
        first += values.sum(0)
        second += values.power(2).sum(0)
    mean = first / total
    return Moments(mean, np.maximum(second / total - mean**2, 0))


def top_variance(of: Moments, genes: int = 250, among: int = 1000) -> Columns:
    """Rule `var`: the columns of highest variance among those of highest mean; ascending."""
    candidates = np.argsort(-of.mean, kind="stable")[:among]
    return np.sort(candidates[np.argsort(-of.variance[candidates], kind="stable")[:genes]])


def top_binned(of: Moments, genes: int = 250, bins: int = 20) -> Columns:
    """Rule `binned`: the columns of highest log dispersion (variance / mean), as z-score within bins of like mean.

    The bins hold equal numbers of the genes that were seen at all. Many of those chosen were seen in few profiles, so
    that a score under this rule is low for every method. Ascending.
    """
    candidates = np.flatnonzero(of.mean > 0)
    candidates = candidates[np.argsort(of.mean[candidates], kind="stable")]
    score = np.full(len(of.mean), -np.inf)
    for members in np.array_split(candidates, bins):
        dispersion = np.log(of.variance[members] / of.mean[members])
        if len(members) > 1 and dispersion.std() > 0:
            score[members] = (dispersion - dispersion.mean()) / dispersion.std()
    chosen = np.argsort(-score, kind="stable")[:genes]
    return np.sort(chosen[np.isfinite(score[chosen])])


RULES = {"var": top_variance, "binned": top_binned}
