"""What a model expects of footprints, as arrays and in the units of its users.

In: composition, depth and noise, as `storm.inference.predict` puts them together. Out: expected counts and their logs.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from storm.model.heads import expected_log1p
from storm.schema import LOGNORM_SCALE

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

_CHUNK = 256  # footprints at a time


@dataclass(frozen=True)
class Prediction:
    """What the model expects of N footprints, for K genes of its vocabulary.

    mu = exp(log_depth) * composition * (1 - zeros). `log_depth` is the log of the total over the whole reference panel;
    its level is a constant of the training data (absolute depth is not identified from H&E), its contrasts are
    predicted.
    """

    genes: Rows  # [K] vocabulary indices; from the vocabulary's length on, the unseen genes in the order of the call
    composition: Floats  # [N, K] share of each gene among the reference panel
    log_depth: Floats  # [N]
    depth_log_var: Floats  # [N] of the slide-centred log depth
    dispersion: Floats  # [N, K] size r: variance = mu + mu^2 / r; infinite: Poisson; NaN: the model learned no noise
    zeros: Floats  # [K] share of zeros beside those; above 0 for likelihood zinb alone

    @cached_property
    def mu(self) -> Floats:
        """[N, K] expected counts."""
        return np.exp(self.log_depth)[:, None] * self.composition * (1 - self.zeros)

    def lognorm(self) -> Floats:
        """[N, K] expected log1p(count / depth * 1e4) at the predicted depth."""
        if np.isnan(self.dispersion).any():  # likelihood lognorm: what it was trained to tell
            return np.log1p(np.float32(LOGNORM_SCALE) * self.composition)
        return self._expected(np.exp(np.float32(np.log(LOGNORM_SCALE)) - self.log_depth))

    def raw(self) -> Floats:
        """[N, K] expected log1p(count); without a noise model log1p of the expected count."""
        if np.isnan(self.dispersion).any():
            return np.log1p(self.mu)
        return self._expected(np.ones_like(self.log_depth))

    def _expected(self, scale: Floats) -> Floats:
        expected = np.empty_like(self.composition)
        for start in range(0, len(expected), _CHUNK):  # the quadrature holds several arrays of this shape
            part = slice(start, start + _CHUNK)
            mu = np.exp(self.log_depth[part, None]) * self.composition[part]
            given = (torch.from_numpy(a) for a in (mu, self.dispersion[part], scale[part, None]))
            expected[part] = expected_log1p(*given).numpy()
        return expected * (1 - self.zeros)
