"""Targets and gene rules of H&E -> expression (protocol 2): what is predicted, and for which genes.

In: counts [N, G] of the measured genes. Out: targets [N, K], and the columns of the genes that a rule names.
Rules look at training sections alone.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Columns = npt.NDArray[np.int64]

TARGETS = ("lognorm", "raw", "residual")
COLUMNS = (("lognorm", "var"), ("raw", "var"), ("residual", "var"), ("lognorm", "binned"))  # always printed
SCALE = 1e4


def lognorm(counts: npt.NDArray, depth: npt.NDArray) -> Floats:
    """log1p(counts / depth * 1e4) [N, K]; `depth` [N] counts all measured genes, not only these; 0 where depth is 0."""
    return np.asarray(np.log1p(counts * (SCALE / np.maximum(depth, 1))[:, None]), dtype=np.float64)


def residualised(values: Floats, log_depth: Floats) -> Floats:
    """What is left of each column of `values` [N, K] after a line in `log_depth` [N], fitted within this section."""
    depth = log_depth - log_depth.mean()
    centred = values - values.mean(0)
    spread = float(depth @ depth)
    return centred - np.outer(depth, depth @ centred / spread) if spread > 0 else centred


def target(name: str, counts: npt.NDArray, depth: npt.NDArray) -> Floats:
    """One of TARGETS for one section: counts [N, K], total depth [N] -> [N, K]."""
    if name == "raw":
        return np.log1p(counts.astype(np.float64))
    values = lognorm(counts, depth)
    return residualised(values, np.log(np.maximum(depth, 1))) if name == "residual" else values


def top_variance(values: Floats, genes: int = 250, among: int = 1000) -> Columns:
    """Rule `var`: the columns of highest variance among those of highest mean; ascending."""
    candidates = np.argsort(-values.mean(0), kind="stable")[:among]
    return np.sort(candidates[np.argsort(-values[:, candidates].var(0), kind="stable")[:genes]])


def top_binned(values: Floats, genes: int = 250, bins: int = 20) -> Columns:
    """Rule `binned`: the columns of highest dispersion (variance / mean), as z-score within bins of equal numbers of
    genes of like mean; genes never seen are left out; ascending."""
    mean, variance = values.mean(0), values.var(0)
    seen = np.flatnonzero(mean > 0)
    seen = seen[np.argsort(mean[seen], kind="stable")]
    score = np.full(len(mean), -np.inf)
    for members in np.array_split(seen, bins):
        dispersion = np.log(variance[members] / mean[members] + 1e-12)
        if len(members) and dispersion.std() > 0:
            score[members] = (dispersion - dispersion.mean()) / dispersion.std()
    chosen = np.argsort(-score, kind="stable")[:genes]
    return np.sort(chosen[np.isfinite(score[chosen])])


RULES = {"var": top_variance, "binned": top_binned}
