"""Baselines that every result stands beside. In: colour features, features of an image encoder, depths, targets. Out:
predictions, in the target's unit. numpy and scikit-learn only: a baseline knows nothing of the model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.preprocessing import StandardScaler

SHUFFLES = (
    30  # all genes lean on the same few directions of colour: one shuffle's mean correlation has an sd of about .1
)
COMPONENTS = 128  # of image features
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
    if len(alphas) == 1:
        return np.repeat(alphas, y.shape[1])
    error = np.zeros((len(alphas), y.shape[1]))
    for held in np.unique(groups):
        train, test = groups != held, groups == held
        for i, alpha in enumerate(alphas):
            residual = y[test] - Ridge(alpha).fit(x[train], y[train]).predict(x[test]).reshape(-1, y.shape[1])
            error[i] += ((residual - residual.mean(0)) ** 2).sum(0)
    return np.array(alphas)[error.argmin(0)]


def ridge_predict(
    train_x: Floats,
    train_y: Floats,
    test_x: Floats,
    groups: npt.NDArray | None = None,
    alphas: tuple[float, ...] = ALPHAS,
    standardise: bool = True,
) -> Floats:
    """Ridge on standardised features with an intercept; one alpha per target by cross-validation in training.

    Args:
        train_x: [N, F] features; train_y: [N, K] targets.
        test_x: [M, F].
        groups: [N] donor of each training profile: alpha is chosen on held-out donors. Without it, or with one donor
            alone, on five folds of consecutive profiles.
        standardise: bring every feature to one scale; not for components, whose variances say how much they tell.

    Returns:
        [M, K] predictions.
    """
    if groups is None or len(np.unique(groups)) < 2:
        groups = np.arange(len(train_x)) * 5 // len(train_x)
    scaler = StandardScaler(with_std=standardise).fit(train_x)
    x = scaler.transform(train_x)
    alpha = _choose_alphas(x, train_y, np.asarray(groups), alphas)
    predicted = np.asarray(Ridge(alpha).fit(x, train_y).predict(scaler.transform(test_x)))
    return predicted.reshape(len(test_x), -1)


@dataclass(frozen=True)
class Inputs:
    """What the baselines see of N profiles of some sections."""

    colour: Floats  # [N, 15]
    around: Floats  # [N, 30] with the neighbours' mean
    log_depth: Floats  # [N] measured; of test profiles only the reference `true depth` may look at it
    section: npt.NDArray[np.int64]  # [N] number of the section
    fold: npt.NDArray[
        np.int64
    ]  # [N] what is held out to choose a ridge's alpha: the donor, or with one donor the section
    image: Floats | None = None  # [N, F] what the image encoder gives of a profile, footprint and window
    image_around: Floats | None = None  # [N, 2 F] with the neighbours' mean


def slide_mean(train: Inputs, y: Floats, test: Inputs, rng: np.random.Generator) -> list[Floats]:
    """The mean of training: constant, so its correlation counts as 0."""
    return [np.repeat(y.mean(0, keepdims=True), len(test.colour), axis=0)]


def _depth_line(train: Inputs, y: Floats, log_depth: Floats) -> Floats:
    """One line per gene in log depth, fitted on training profiles."""
    centre = train.log_depth.mean()
    x = train.log_depth - centre
    return np.asarray(y.mean(0) + np.outer(log_depth - centre, x @ (y - y.mean(0)) / max(float(x @ x), 1e-12)))


def true_depth(train: Inputs, y: Floats, test: Inputs, rng: np.random.Generator) -> list[Floats]:
    """One slope per gene on the *measured* log depth of the test profiles: no image, and no prediction either."""
    return [_depth_line(train, y, test.log_depth)]


def image_depth(train: Inputs, y: Floats, test: Inputs, rng: np.random.Generator) -> list[Floats]:
    """Colour -> predicted log depth -> one slope per gene, nothing else."""
    predicted = ridge_predict(train.colour, train.log_depth[:, None], test.colour, train.fold)
    return [_depth_line(train, y, predicted[:, 0])]


def knn_predict(train_x: Floats, y: Floats, test_x: Floats) -> Floats:
    """Mean of the 20 training profiles of most similar features."""
    return np.asarray(KNeighborsRegressor(min(20, len(y))).fit(train_x, y).predict(test_x))


def mlp_predict(train_x: Floats, y: Floats, test_x: Floats, rng: np.random.Generator) -> Floats:
    """Two layers of weights, 128 hidden units, all genes at once, stopped on a tenth of the training profiles."""
    scaler, unit = StandardScaler().fit(train_x), StandardScaler().fit(y)
    net = MLPRegressor(
        hidden_layer_sizes=(128,), alpha=1e-2, learning_rate_init=3e-3, early_stopping=True, max_iter=2000,
        random_state=int(rng.integers(2**31)),
    )  # fmt: skip
    net.fit(scaler.transform(train_x), unit.transform(y))
    return np.asarray(unit.inverse_transform(net.predict(scaler.transform(test_x)).reshape(len(test_x), -1)))


def colour_knn(train: Inputs, y: Floats, test: Inputs, rng: np.random.Generator) -> list[Floats]:
    """Mean of the 20 training profiles of most similar colour."""
    scaler = StandardScaler().fit(train.colour)
    return [knn_predict(scaler.transform(train.colour), y, scaler.transform(test.colour))]


def colour_mlp(train: Inputs, y: Floats, test: Inputs, rng: np.random.Generator) -> list[Floats]:
    """Two layers on colour."""
    return [mlp_predict(train.colour, y, test.colour, rng)]


def components(train_x: Floats | None, test_x: Floats | None) -> tuple[Floats, Floats]:
    """The first principal components of standardised features, both fitted in training."""
    assert train_x is not None and test_x is not None, "a method on image features was given none"
    scaler = StandardScaler().fit(train_x)
    pca = PCA(min(COMPONENTS, *train_x.shape), random_state=0).fit(scaler.transform(train_x))
    return np.asarray(pca.transform(scaler.transform(train_x))), np.asarray(pca.transform(scaler.transform(test_x)))


def image_ridge(train: Inputs, y: Floats, test: Inputs, rng: np.random.Generator) -> list[Floats]:
    """Ridge on the components of the image encoder's features."""
    x, asked = components(train.image, test.image)
    return [ridge_predict(x, y, asked, train.fold, standardise=False)]


def image_neighbour_ridge(train: Inputs, y: Floats, test: Inputs, rng: np.random.Generator) -> list[Floats]:
    """Ridge on the components of the image encoder's features and of their mean over the neighbours."""
    x, asked = components(train.image_around, test.image_around)
    return [ridge_predict(x, y, asked, train.fold, standardise=False)]


def image_knn(train: Inputs, y: Floats, test: Inputs, rng: np.random.Generator) -> list[Floats]:
    """Mean of the 20 training profiles of most similar features."""
    x, asked = components(train.image, test.image)
    return [knn_predict(x, y, asked)]


def image_mlp(train: Inputs, y: Floats, test: Inputs, rng: np.random.Generator) -> list[Floats]:
    """Two layers on the components of the image encoder's features."""
    x, asked = components(train.image, test.image)
    return [mlp_predict(x, y, asked, rng)]


def colour_ridge(train: Inputs, y: Floats, test: Inputs, rng: np.random.Generator) -> list[Floats]:
    """Ridge on the colour of a profile's own patch."""
    return [ridge_predict(train.colour, y, test.colour, train.fold)]


def neighbour_ridge(train: Inputs, y: Floats, test: Inputs, rng: np.random.Generator) -> list[Floats]:
    """Ridge on the colour of the own patch and its mean over the neighbours."""
    return [ridge_predict(train.around, y, test.around, train.fold)]


def shuffled_ridge(train: Inputs, y: Floats, test: Inputs, rng: np.random.Generator) -> list[Floats]:
    """Colour ridge (alpha 100) with the training patches shuffled within their sections: one prediction per shuffle."""
    found = []
    for _ in range(SHUFFLES):
        order = np.arange(len(y))
        for number in np.unique(train.section):
            members = np.flatnonzero(train.section == number)
            order[members] = rng.permutation(members)
        found.append(ridge_predict(train.colour[order], y, test.colour, train.fold, (100.0,)))
    return found


@dataclass(frozen=True)
class Method:
    """A baseline: its name in tables, and its role: `baseline` (to be beaten), `reference` (no rival) or `control`."""

    name: str
    role: str
    predict: Callable[[Inputs, Floats, Inputs, np.random.Generator], list[Floats]]
    of_image: bool = False  # reads Inputs.image


METHODS = (
    Method("slide mean", "baseline", slide_mean),
    Method("predicted depth only (from colour)", "baseline", image_depth),
    Method("colour kNN", "baseline", colour_knn),
    Method("colour MLP, 2 layers", "baseline", colour_mlp),
    Method("colour ridge", "baseline", colour_ridge),
    Method("colour ridge + neighbours", "baseline", neighbour_ridge),
    Method("kNN on image features", "baseline", image_knn, of_image=True),
    Method("MLP on image features, 2 layers", "baseline", image_mlp, of_image=True),
    Method("ridge on image features", "baseline", image_ridge, of_image=True),
    Method("ridge on image features + neighbours", "baseline", image_neighbour_ridge, of_image=True),
    Method("true depth (measured, no image)", "reference", true_depth),
    Method("colour ridge, patches shuffled", "control", shuffled_ridge),
)
