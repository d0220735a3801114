"""Losses as (sum, count): whoever averages adds both over micro-batches and ranks first, so that no split changes them.

In: the model's outputs and the batch (storm.schema.BATCH). Out: {term: (sum, count)}, scalar float32 tensors.

    expr     counts of hidden genes under the model's likelihood        per profile
    depth    slide-centred log depth of wholly hidden profiles          per profile
    image    stain statistics of hidden tiles                           per tile
    corr     1 - Pearson over the profiles of a group that hide a gene  per gene and group
    spatial  expr once more, where others of the section are visible    per profile
    align    InfoNCE between a window's image and its expression        per profile
    anchor   distance to the frozen feature of the tile                 per tile

A term whose outputs the model lacks (`absent`) has sum and count 0. Nothing here reads a tensor's value on the host.

Shapes: R regions, N profiles, C tiles, K loss genes, S tile statistics, P = R N; rows 0.. of [R, ...] sums hold groups.
"""

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from storm.config import MASK_MODES, LossConfig
from storm.presets import ModelConfig
from storm.schema import APART_UM, LOGNORM_SCALE

TERMS = ("expr", "depth", "image", "corr", "spatial", "align", "anchor")
Term = tuple[Tensor, Tensor]  # (sum, count)
Batch = dict[str, Tensor]

CORR_PROFILES, CORR_NONZERO = 64, 10  # hidden profiles of a group that a correlation needs, and those with counts
CORR_EPS = 1e-3  # on each variance: where a gene's composition varies by 3 %, its correlation counts 0.7 of it
ALIGN_NEGATIVES = 64  # an anchor with fewer is skipped
_IN_CONTEXT = MASK_MODES.index("in_context")


def wide(x: Tensor) -> Tensor:
    """x in float32 where it came in half precision."""
    return x.float() if x.dtype.itemsize < 4 else x


def absent(model: ModelConfig) -> set[str]:
    """The terms for which a model has no outputs."""
    lacks = {"anchor": not model.is_anchored, "align": not model.align_width}
    return {term for term, missing in lacks.items() if missing}


def weights(config: LossConfig, step: int, steps: int) -> dict[str, float]:
    """The weight of each term in the step after `step` steps, of a schedule of `steps`."""
    begins = {"corr": config.corr_from, "align": config.align_from}
    return {term: float(getattr(config, term)) * (step >= begins.get(term, 0) * steps) for term in TERMS}


def of_groups(x_RX: Tensor, group_R: Tensor) -> Tensor:
    """Sums [R, ...] over the regions of each group; row g is that of group g, rows that stand for no group are 0."""
    return torch.zeros_like(x_RX).index_add(0, group_R, x_RX)


# Likelihoods of counts


def poisson_nll(count: Tensor, log_mu: Tensor) -> Tensor:
    """-log Poisson(count; mean mu); shapes broadcast."""
    return log_mu.exp() - count * log_mu + torch.lgamma(count + 1)


def negative_binomial_nll(count: Tensor, log_mu: Tensor, log_r: Tensor) -> Tensor:
    """-log NB(count; mean mu, size r), variance mu + mu^2 / r; shapes broadcast, all finite."""
    r = log_r.exp()
    gap = log_mu - log_r
    chosen = torch.lgamma(count + 1) + torch.lgamma(r) - torch.lgamma(count + r)
    return chosen + r * F.softplus(gap) + count * F.softplus(-gap)


def zero_inflated_nll(count: Tensor, log_mu: Tensor, log_r: Tensor, zero_logit: Tensor) -> Tensor:
    """-log of a mixture: a zero with probability sigmoid(zero_logit), else a count of NB(mu, r)."""
    nll = negative_binomial_nll(count, log_mu, log_r)
    return F.softplus(zero_logit) + torch.where(count > 0, nll, -torch.logaddexp(zero_logit, -nll))


def lognorm(batch: Batch) -> Tensor:
    """[R, N, K] log1p(1e4 * count / L), L the observed depth over the target panel."""
    return torch.log1p(LOGNORM_SCALE * batch["target_count"] / batch["target_log_depth"].exp()[..., None])


def gene_nll(outputs: Batch, batch: Batch) -> Tensor:
    """[R, N, K] of every loss gene of every profile, under the likelihood that the outputs tell.

    The mean count of a gene is L * composition; L, the observed depth of the target panel, is an offset and no input.
    """
    if "lognorm" in outputs:
        return (wide(outputs["lognorm"]) - lognorm(batch)).square()
    count, log_mu = batch["target_count"], batch["target_log_depth"][..., None] + wide(outputs["log_composition"])
    if "log_dispersion" not in outputs:
        return poisson_nll(count, log_mu)
    log_r = wide(outputs["log_dispersion"])
    if "zero_logit" in outputs:
        return zero_inflated_nll(count, log_mu, log_r, wide(outputs["zero_logit"]))
    return negative_binomial_nll(count, log_mu, log_r)


# The terms


def expr_per_profile(outputs: Batch, batch: Batch) -> Tensor:
    """Mean NLL [R, N] over the hidden measured genes of each profile; 0 where it has none."""
    mask_RNK = batch["target_mask"]
    nll_RNK = torch.where(mask_RNK, gene_nll(outputs, batch), 0)
    return nll_RNK.sum(-1) / mask_RNK.sum(-1).clamp_min(1)


def asked(batch: Batch) -> Tensor:
    """[R, N] profiles with a hidden measured gene."""
    return batch["target_mask"].any(-1)


def asked_in_context(batch: Batch) -> Tensor:
    """[R, N] wholly hidden profiles in a mode that shows other profiles."""
    return asked(batch) & batch["wholly_hidden"] & (batch["mode"] == _IN_CONTEXT)[:, None]


def over(loss: Tensor, rows: Tensor) -> Term:
    """Sum and count of `loss` over the places that `rows` marks; whatever stands elsewhere has no gradient."""
    return torch.where(rows, loss, 0).sum(), rows.sum().float()


def expr(outputs: Batch, batch: Batch) -> Term:
    """NLL of hidden measured genes: mean over a profile's genes, sum over profiles."""
    return over(expr_per_profile(outputs, batch), asked(batch))


def spatial(outputs: Batch, batch: Batch) -> Term:
    """`expr` of the wholly hidden profiles that have visible profiles as context."""
    return over(expr_per_profile(outputs, batch), asked_in_context(batch))


@torch.no_grad()
def expr_by_mode(outputs: Batch, batch: Batch) -> dict[str, Term]:
    """`expr` of the regions of each mask mode, for the log."""
    nll_RN, asked_RN = expr_per_profile(outputs, batch), asked(batch)
    return {name: over(nll_RN, asked_RN & (batch["mode"] == i)[:, None]) for i, name in enumerate(MASK_MODES)}


def depth(outputs: Batch, batch: Batch) -> Term:
    """Gaussian NLL of the slide-centred log density of wholly hidden profiles."""
    log_var_RN = wide(outputs["depth_log_var"])
    error_RN = batch["depth_target"] - wide(outputs["depth_mean"])
    nll_RN = 0.5 * (math.log(2 * math.pi) + log_var_RN + error_RN**2 * torch.exp(-log_var_RN))
    return over(nll_RN, batch["depth_mask"])


def image(outputs: Batch, batch: Batch) -> Term:
    """Squared error of the stain statistics of hidden tiles, or of their features where the model regresses these: mean
    over statistics or columns, sum over tiles."""
    told, target = (
        ("tile_feature", "tile_feature_target") if "tile_feature" in outputs else ("tile_stats", "tile_target")
    )
    return over((wide(outputs[told]) - batch[target]).square().mean(-1), batch["tile_hidden"])


def corr_pairs(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What `corr` correlates: profiles and genes [R, N, K], their number [R, K] of each group and gene, and which
    groups and genes [R, K] have enough of them."""
    mask_RNK, group_R = batch["target_mask"], batch["region_group"]
    n_RK = of_groups(mask_RNK.sum(1), group_R)
    nonzero_RK = of_groups((mask_RNK & (batch["target_count"] > 0)).sum(1), group_R)
    return mask_RNK, n_RK, (n_RK >= CORR_PROFILES) & (nonzero_RK >= CORR_NONZERO)


def corr(outputs: Batch, batch: Batch) -> Term:
    """1 - Pearson between log composition and lognorm over the profiles of a group that hide a gene: sum over groups
    and genes.

    Composition, not the mean count: depth is no part of it. Where a profile shows other genes its depth is known, and
    would pay: lognorm is regressed on log depth there. No gradient flows through the denominator: each profile is
    pulled towards its gene's contrast, with a force that `CORR_EPS` bounds, and how far it goes is for expr to say.
    """
    mask_RNK, n_RK, pair_RK = corr_pairs(batch)
    group_R, n_RK = batch["region_group"], n_RK.clamp_min(1)

    def mean(x_RNK: Tensor) -> Tensor:
        return of_groups(torch.where(mask_RNK, x_RNK, 0).sum(1), group_R) / n_RK

    known_RN = batch["target_log_depth"].masked_fill(batch["wholly_hidden"], 0)
    x_RNK, y_RNK, d_RNK = (
        x - mean(x)[group_R][:, None]
        for x in (wide(outputs["log_composition"]), lognorm(batch).detach(), known_RN[..., None].expand_as(mask_RNK))
    )
    slope_RK = mean(y_RNK * d_RNK) / mean(d_RNK**2).clamp_min(1e-9)
    y_RNK = y_RNK - slope_RK[group_R][:, None] * d_RNK
    spread_RK = ((mean(x_RNK.detach() ** 2) + CORR_EPS) * (mean(y_RNK**2) + CORR_EPS)).sqrt()
    return over(1 - mean(x_RNK * y_RNK) / spread_RK, pair_RK)


def align_anchors(batch: Batch, align_over: str) -> Tensor:
    """[R, N] profiles that have enough negatives."""
    negatives_RN, group_R = batch["negatives"], batch["region_group"]
    if align_over == "batch":
        part_R = (negatives_RN >= 0).sum(1)
        others_R = part_R.sum() - of_groups(part_R, group_R)[group_R]
        negatives_RN = torch.where(negatives_RN >= 0, negatives_RN + others_R[:, None], -1)
    return negatives_RN >= ALIGN_NEGATIVES


def align_pairs(batch: Batch, align_over: str) -> Tensor:
    """[P, P] whose expression each image is told from, and the other way round; its own, on the diagonal, included.

    Both have a part in the contrast. Profiles of a group that are nearer than APART_UM are no negatives of each other.
    """
    group_P = batch["region_group"][:, None].expand_as(batch["negatives"]).flatten()
    part_P, place_P2 = (batch["negatives"] >= 0).flatten(), batch["place_um"].flatten(0, 1)
    apart_PP = (place_P2[:, None] - place_P2[None]).square().sum(-1) >= APART_UM**2
    same_PP = group_P[:, None] == group_P[None]
    told_PP = same_PP & apart_PP if align_over == "group" else ~same_PP | apart_PP
    told_PP = told_PP & part_P[:, None] & part_P[None]
    return told_PP | torch.eye(len(group_P), dtype=torch.bool, device=group_P.device)


def align(outputs: Batch, batch: Batch, align_over: str = "group") -> Term:
    """InfoNCE (arXiv 1807.03748) from image to expression and back, their mean: sum over anchors. A few [P, P] arrays.

    Args:
        outputs: unit vectors `align_image` and `align_expression` [R, N, A], `align_scale` on their product.
        batch: who has a part, and where.
        align_over: `group`: negatives are of the same group; `batch`: of the whole micro-batch.
    """
    image_PA, expression_PA = (wide(outputs[f"align_{name}"]).flatten(0, 1) for name in ("image", "expression"))
    logit_PP = outputs["align_scale"] * image_PA @ expression_PA.T
    told_PP = logit_PP.masked_fill(~align_pairs(batch, align_over), -math.inf)
    nll_P = (told_PP.logsumexp(0) + told_PP.logsumexp(1)) / 2 - logit_PP.diagonal()
    return over(nll_P, align_anchors(batch, align_over).flatten())


def anchor(outputs: Batch, batch: Batch) -> Term:
    """1 - cosine to the frozen feature: sum over encoded tiles."""
    return over(1 - wide(outputs["tile_anchor"]), batch["tile_weight"] > 0)


def terms(outputs: Batch, batch: Batch, align_over: str = "group") -> dict[str, Term]:
    """All losses of a micro-batch, in the order of TERMS."""
    nll_RN, zero = expr_per_profile(outputs, batch), batch["tile_weight"].new_zeros(())
    nothing = zero, zero.float()
    return {
        "expr": over(nll_RN, asked(batch)),
        "depth": depth(outputs, batch),
        "image": image(outputs, batch),
        "corr": corr(outputs, batch),
        "spatial": over(nll_RN, asked_in_context(batch)),
        "align": align(outputs, batch, align_over) if "align_image" in outputs else nothing,
        "anchor": anchor(outputs, batch) if "tile_anchor" in outputs else nothing,
    }


def counts(batch: Batch, lacks: Collection[str] = (), align_over: str = "group") -> dict[str, Tensor]:
    """The counts of `terms`, known before the forward pass. `lacks`: the terms that are `absent` in the model."""
    rows = {
        "expr": asked(batch),
        "depth": batch["depth_mask"],
        "image": batch["tile_hidden"],
        "corr": corr_pairs(batch)[2],
        "spatial": asked_in_context(batch),
        "align": align_anchors(batch, align_over),
        "anchor": batch["tile_weight"] > 0,
    }
    return {term: rows[term].sum().float() * (term not in lacks) for term in TERMS}
