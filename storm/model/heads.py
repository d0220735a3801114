"""What is read from a profile's or a tile's vector: composition and noise of its counts, depth, stain statistics.

In: vectors of the spatial level, gene rows. Out: log composition and what else the likelihood of counts needs, mean and
log variance of log depth, tile statistics; and, at inference, the expected log1p of a count.
Shapes: R regions, N profiles, C tiles, K genes, E gene width, D space width, Q told platforms.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storm.model.layers import Constant, ZeroLinear
from storm.presets import ModelConfig
from storm.schema import LOGNORM_SCALE, PLATFORMS, TILE_STATS

START_DISPERSION = 5.0  # NB size r of every gene at the start
START_ZERO_LOGIT = -4.0  # 2 % of zeros beside those of the NB
POISSON_SIZE = 1e8  # of an NB that is a Poisson to float32
REFERENCE_AREA_UM2 = math.pi / 4 * 55**2  # a Visium spot


def soft_clamp(x: Tensor, bound: float) -> Tensor:
    """x where it is small, within +-bound everywhere, with a gradient everywhere."""
    return bound * torch.tanh(x / bound)


def told_platform(platform_R: Tensor, n: int) -> Tensor:
    """[R, N, Q] one-hot of each region's platform; zeros where it is 0, not told: what all biases are relative to."""
    ids_Q = torch.arange(1, len(PLATFORMS), device=platform_R.device)  # F.one_hot reads the largest id on the host
    return (platform_R[:, None, None] == ids_Q).long().expand(-1, n, -1)


def log_partition(score_RNK: Tensor, weight_RK: Tensor) -> Tensor:
    """log Z [R, N], Z = sum over genes of weight * exp(score).

    A gene of weight 0 has no part in Z nor a gradient from it. A region whose weights are all 0 (none of the sampled
    genes is on its panel, so it has no loss) gets a finite Z of equal weights.
    """
    log_weight_RK = weight_RK.log()  # -inf outside the panel
    empty_R1 = (weight_RK == 0).all(dim=1, keepdim=True)
    return torch.logsumexp(score_RNK + log_weight_RK.masked_fill(empty_R1, 0)[:, None], dim=-1)


class Decoder(nn.Module):
    """Asks a profile's vector h for genes: l_g = <A h, e_g> + b_g + platform bias, log composition = l_g - log Z.

    It starts at the mean composition (A = 0, b = log share). A constant in a platform's biases cancels in Z: only their
    zero-mean part acts. Tables that the likelihood does not use do not exist: each parameter has a gradient.
    """

    def __init__(self, config: ModelConfig, n_genes: int) -> None:
        super().__init__()
        told = len(PLATFORMS) - 1
        self.ask = ZeroLinear(config.space_width, config.gene_width, bias=False)
        self.gene_bias = Constant(n_genes, 1)
        self.platform_bias = Constant(n_genes, told)
        self.likelihood = config.likelihood
        if self.likelihood in ("nb", "zinb"):
            self.gene_dispersion = Constant(n_genes, 1, start=math.log(START_DISPERSION))
            self.dispersion = ZeroLinear(told + 1, 1, bias=False)  # per platform, and the exponent of the area
        if self.likelihood == "zinb":
            self.gene_zero = Constant(n_genes, 1, start=START_ZERO_LOGIT)

    def forward(self, h_RND: Tensor, rows_KE: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`log_composition` of `batch["genes"]` with rows e_g, and what their likelihood needs, each [R, N, K].

        nb: `log_dispersion`, log of the size r; zinb: also `zero_logit`; lognorm: `lognorm`; poisson: no more.
        """
        score_RNK = self._score(h_RND, rows_KE, self._bias(batch))
        log_composition = score_RNK - log_partition(score_RNK, batch["gene_weight"])[..., None]
        found = {"log_composition": log_composition}
        if self.likelihood in ("nb", "zinb"):
            found["log_dispersion"] = self._log_dispersion(batch)
        if self.likelihood == "zinb":
            found["zero_logit"] = self.gene_zero(batch["genes"])[:, 0].expand_as(log_composition)
        if self.likelihood == "lognorm":
            found["lognorm"] = torch.log1p(LOGNORM_SCALE * log_composition.exp())
        return found

    def unseen(self, h_RND: Tensor, rows_UE: Tensor, rows_KE: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`log_composition` and, where the likelihood has it, `log_dispersion`, [R, N, U], of genes outside the
        vocabulary, whose rows their descriptors alone have made.

        What else a table holds of a gene is its mean over `batch["genes"]`, of rows `rows_KE`. Z is theirs too: an
        unseen gene is told as a share of what they sum to.
        """
        bias_RK = self._bias(batch)
        log_z_RN = log_partition(self._score(h_RND, rows_KE, bias_RK), batch["gene_weight"])
        score_RNU = self._score(h_RND, rows_UE, bias_RK.mean(1, keepdim=True))
        found = {"log_composition": score_RNU - log_z_RN[..., None]}
        if self.likelihood in ("nb", "zinb"):
            found["log_dispersion"] = self._log_dispersion(batch).mean(-1, keepdim=True).expand_as(score_RNU)
        return found

    def _bias(self, batch: dict[str, Tensor]) -> Tensor:
        """[R, K], of each gene and of it on the region's platform."""
        platform_bias_KP = F.pad(self.platform_bias(batch["genes"]), (1, 0))  # none for platform 0
        return self.gene_bias(batch["genes"]).T + platform_bias_KP.T[batch["platform"]]

    def _score(self, h_RND: Tensor, rows_KE: Tensor, bias_RK: Tensor) -> Tensor:
        return (self.ask(h_RND) @ rows_KE.T).to(bias_RK.dtype) + bias_RK[:, None]

    def _log_dispersion(self, batch: dict[str, Tensor]) -> Tensor:
        """log r = a_g + b_platform + c log area."""
        log_area_RN = batch["log_area"] - math.log(REFERENCE_AREA_UM2)
        platform_RNQ = told_platform(batch["platform"], log_area_RN.shape[1])
        shift_RN1 = self.dispersion(torch.cat([platform_RNQ, log_area_RN[..., None]], dim=-1))
        return soft_clamp(self.gene_dispersion(batch["genes"]).T + shift_RN1, 7.0)  # e^7: as good as Poisson


class DepthHead(nn.Module):
    """Mean and log variance of a profile's slide-centred log density of counts.

    The panel's size is no input: it is one per slide and leaves with the slide's mean.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.space_width
        self.hidden = nn.Linear(width + len(PLATFORMS) - 1, width)
        self.out = ZeroLinear(width, 2)

    def forward(self, h_RND: Tensor, platform_R: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log variance), each [R, N]."""
        platform_RNQ = told_platform(platform_R, h_RND.shape[1])
        mean, log_var = self.out(F.silu(self.hidden(torch.cat([h_RND, platform_RNQ], dim=-1)))).unbind(-1)
        return mean, soft_clamp(log_var, 6.0)


class TileHead(ZeroLinear):
    """Standardised stain statistics [R, C, S] of tiles from their vectors [R, C, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.space_width, len(TILE_STATS))


@torch.no_grad()
def expected_log1p(mu: Tensor, r: Tensor, scale: Tensor | float) -> Tensor:
    """E[log1p(scale * count)] of negative binomial counts of mean `mu` and size `r` (infinite: Poisson); shapes
    broadcast.

    Exact up to quadrature (relative error below 1e-4): log(1 + y) is the integral of (1 - exp(-y t)) exp(-t) / t over
    t > 0, and the expectation of exp(-s count) is (1 + mu / r * (1 - exp(-s)))^-r. The trapezoid rule in log t is
    fast, because the integrand is analytic around the real axis.
    """
    scale = torch.as_tensor(scale, dtype=mu.dtype, device=mu.device)
    total = mu.new_zeros(torch.broadcast_shapes(mu.shape, r.shape, scale.shape))
    r = r.clamp_max(POISSON_SIZE)
    step, ratio, power = 0.75, mu / r, -r
    for i in range(-30, 5):
        t = math.exp(i * step)
        gap = (ratio * -torch.expm1(-t * scale)).log1p_().mul_(power).expm1_()  # in place: the arrays are large
        total.sub_(gap, alpha=step * math.exp(-t))
    return total
