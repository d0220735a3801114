"""Clusters of one section's profiles against its domains: backends, agreement, boundaries, one majority vote.

In: features [N, F], labels [N], neighbours [N, N]. Out: clusters [N], figures.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import sparse, spatial
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def neighbours(xy_um: Floats, radius: float) -> sparse.csr_array:
    """[N, N] profiles within `radius` times the usual distance to the nearest one, and itself; rows sum to 1."""
    tree = spatial.KDTree(xy_um)
    pitch_um = float(np.median(tree.query(xy_um, k=2)[0][:, 1]))
    pairs = tree.query_pairs(radius * pitch_um, output_type="ndarray")
    every = np.arange(len(xy_um))
    row, col = (np.concatenate([pairs[:, i], pairs[:, 1 - i], every]) for i in (0, 1))
    joined = sparse.csr_array((np.ones(len(row)), (row, col)), shape=(len(every), len(every)))
    return sparse.csr_array(sparse.diags_array(1 / joined.sum(1)) @ joined)


def contingency(label: Ints, cluster: Ints, block: Ints) -> Floats:
    """[blocks, k, c] profiles of each block by label and cluster."""
    shape = int(block.max()) + 1, int(label.max()) + 1, int(cluster.max()) + 1
    found = np.zeros(shape)
    np.add.at(found, (block, label, cluster), 1)
    return found


def adjusted_rand(counts: Floats) -> Floats:
    """ARI of contingency tables [..., k, c]; 1 where labels and clusters are one each."""

    def pairs(n: Floats) -> Floats:
        return n * (n - 1) / 2

    both = pairs(counts).sum((-2, -1))
    rows, cols = pairs(counts.sum(-1)).sum(-1), pairs(counts.sum(-2)).sum(-1)
    expected = rows * cols / np.maximum(pairs(counts.sum((-2, -1))), 1e-12)
    room = (rows + cols) / 2 - expected
    return np.where(np.abs(room) > 1e-12, (both - expected) / np.where(np.abs(room) > 1e-12, room, 1), 1.0)


def boundary_f1(near: sparse.csr_array, label: Ints, cluster: Ints) -> float:
    """F1 of the profiles that have a neighbour of another cluster, against those with one of another label."""
    pairs = sparse.coo_array(near)

    def edge(of: Ints) -> npt.NDArray[np.bool_]:
        found = np.zeros(len(of), bool)
        found[pairs.row[of[pairs.row] != of[pairs.col]]] = True
        return found

    truth, guess = edge(label), edge(cluster)
    return float(2 * (truth & guess).sum() / max(1, truth.sum() + guess.sum()))


def vote(near: sparse.csr_array, cluster: Ints) -> Ints:
    """Each profile takes the most common cluster of its neighbours and itself; its own in a tie."""
    member = np.eye(int(cluster.max()) + 1)[cluster]
    return np.asarray((near @ member + 1e-6 * member).argmax(1))


def k_means(x: Floats, k: int, seed: int) -> Ints:
    """Clusters 0..k-1 from one start."""
    return np.asarray(KMeans(k, n_init=1, random_state=seed).fit_predict(x), dtype=np.int64)


def mixture(x: Floats, k: int, seed: int) -> Ints:
    """Clusters 0..k-1 of a Gaussian mixture with full covariances, from one start."""
    scaled = x / x.std()  # the ridge on the covariances is then the same for every method
    return np.asarray(
        GaussianMixture(k, reg_covar=1e-3, max_iter=200, random_state=seed).fit_predict(scaled), dtype=np.int64
    )


BACKENDS: dict[str, Callable[[Floats, int, int], Ints]] = {"GMM": mixture, "k-means": k_means}
