"""Losses as (sum, count): whoever averages adds both over micro-batches and ranks first, so that no split changes them.

In: the model's outputs and the batch (storm.schema.BATCH). Out: {term: (sum, count)}, scalar float32 tensors.
Shapes: R regions, N profiles, C tiles, K loss genes, S tile statistics.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from storm.config import MASK_MODES

TERMS = ("expr", "depth", "image")
Term = tuple[Tensor, Tensor]  # (sum, count)


def wide(x: Tensor) -> Tensor:
    """x in float32 where it came in half precision."""
    return x.float() if x.dtype.itemsize < 4 else x


def negative_binomial_nll(count: Tensor, log_mu: Tensor, log_r: Tensor) -> Tensor:
    """-log NB(count; mean mu, size r), variance mu + mu^2 / r; shapes broadcast, all finite."""
    r = log_r.exp()
    gap = log_mu - log_r
    chosen = torch.lgamma(count + 1) + torch.lgamma(r) - torch.lgamma(count + r)
    return chosen + r * F.softplus(gap) + count * F.softplus(-gap)


def expr_per_profile(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean NLL [R, N] over the hidden measured genes of each profile, and which profiles [R, N] have any.

    The mean count of a gene is L * composition; L, the observed depth of the target panel, is an offset and no input.
    """
    log_mu_RNK = batch["target_log_depth"][..., None] + wide(outputs["log_composition"])
    nll_RNK = negative_binomial_nll(batch["target_count"], log_mu_RNK, wide(outputs["log_dispersion"]))
    mask_RNK = batch["target_mask"]
    genes_RN = mask_RNK.sum(-1)
    return torch.where(mask_RNK, nll_RNK, 0).sum(-1) / genes_RN.clamp_min(1), genes_RN > 0


def expr(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Term:
    """Negative binomial NLL of hidden measured genes: mean over a profile's genes, sum over profiles."""
    nll_RN, asked_RN = expr_per_profile(outputs, batch)
    return nll_RN.sum(), asked_RN.sum().float()


@torch.no_grad()
def expr_by_mode(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Term]:
    """`expr` of the regions of each mask mode, for the log."""
    nll_RN, asked_RN = expr_per_profile(outputs, batch)
    inside = {name: (batch["mode"] == i)[:, None] for i, name in enumerate(MASK_MODES)}
    return {name: ((nll_RN * rows).sum(), (asked_RN & rows).sum().float()) for name, rows in inside.items()}


def depth(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Term:
    """Gaussian NLL of the slide-centred log density of wholly hidden profiles."""
    log_var_RN, mask_RN = wide(outputs["depth_log_var"]), batch["depth_mask"]
    error_RN = batch["depth_target"] - wide(outputs["depth_mean"])
    nll_RN = 0.5 * (math.log(2 * math.pi) + log_var_RN + error_RN**2 * torch.exp(-log_var_RN))
    return torch.where(mask_RN, nll_RN, 0).sum(), mask_RN.sum().float()


def image(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Term:
    """Squared error of the stain statistics of hidden tiles, or of their features where the model regresses these: mean
    over statistics or columns, sum over tiles."""
    told, target = (
        ("tile_feature", "tile_feature_target") if "tile_feature" in outputs else ("tile_stats", "tile_target")
    )
    error_RC = (wide(outputs[told]) - batch[target]).square().mean(-1)
    return torch.where(batch["tile_hidden"], error_RC, 0).sum(), batch["tile_hidden"].sum().float()


def terms(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Term]:
    """All losses of a micro-batch."""
    return {"expr": expr(outputs, batch), "depth": depth(outputs, batch), "image": image(outputs, batch)}


def counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The counts of `terms`, known before the forward pass."""
    return {
        "expr": batch["target_mask"].any(-1).sum().float(),
        "depth": batch["depth_mask"].sum().float(),
        "image": batch["tile_hidden"].sum().float(),
    }
