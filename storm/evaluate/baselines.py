"""Baselines that every result stands beside. In: patches, depths, counts. Out: predictions in the target's unit.

numpy and scikit-learn only: a baseline knows nothing of the model.
"""

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

ALPHAS = tuple(10.0**k for k in range(-1, 6))
Floats = npt.NDArray[np.float64]


def colour_features(patches: npt.NDArray[np.uint8]) -> Floats:
    """Colour of patches uint8 [N, h, w, 3] as [N, 15]: per channel mean, sd and the percentiles 10, 50 and 90.

    The patch is meant to span 112 um about the profile's centre. No texture or arrangement enters.
    """
    if patches.dtype != np.uint8 or patches.ndim != 4 or patches.shape[3] != 3:
        raise ValueError(f"patches are {patches.dtype} {patches.shape}; give RGB as uint8 [N, h, w, 3]")
    counts = np.stack([_histogram(patch) for patch in patches]) if len(patches) else np.zeros((0, 3, 256))
    share = counts / max(1, patches.shape[1] * patches.shape[2])
    levels = np.arange(256.0)
    mean = share @ levels
    sd = np.sqrt(np.maximum(share @ levels**2 - mean**2, 0))
    cumulative = np.cumsum(share, axis=2) + 1e-9
    return np.concatenate([mean, sd, *((cumulative >= q).argmax(2) for q in (0.1, 0.5, 0.9))], axis=1)


def _histogram(patch: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Pixels [3, 256] per channel and level."""
    return np.bincount((patch.reshape(-1, 3) + np.array([0, 256, 512])).ravel(), minlength=768).reshape(3, 256)


def _choose_alphas(x: Floats, y: Floats, groups: npt.NDArray, alphas: tuple[float, ...]) -> Floats:
    """The alpha [K] of least squared error on held-out groups, per target, each group's own level taken out."""
    error = np.zeros((len(alphas), y.shape[1]))
    for held in np.unique(groups):
        train, test = groups != held, groups == held
        for i, alpha in enumerate(alphas):
            residual = y[test] - Ridge(alpha).fit(x[train], y[train]).predict(x[test])
            error[i] += ((residual - residual.mean(0)) ** 2).sum(0)
    return np.array(alphas)[error.argmin(0)]


def ridge_predict(
    train_x: Floats, train_y: Floats, test_x: Floats, groups: npt.NDArray | None = None, alphas: tuple[float, ...] = ALPHAS
) -> Floats:
    """Ridge on standardised features with an intercept; one alpha per target by cross-validation on the training profiles.

    Args:
        train_x: [N, F] features; train_y: [N, K] targets.
        test_x: [M, F].
        groups: [N] donor of each training profile: alpha is chosen on held-out donors. Without it, or with one donor
            alone, on five folds of consecutive profiles.

    Returns:
        [M, K] predictions.
    """
    if groups is None or len(np.unique(groups)) < 2:
        groups = np.arange(len(train_x)) * 5 // len(train_x)
    scaler = StandardScaler().fit(train_x)
    x = scaler.transform(train_x)
    alpha = _choose_alphas(x, train_y, np.asarray(groups), alphas)
    return np.asarray(Ridge(alpha).fit(x, train_y).predict(scaler.transform(test_x)))
