"""The twin: one process, torch's AdamW, and nothing of storm.train but the schedule and the parameter groups."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from storm import losses
from storm.config import RunConfig
from storm.data.batch import spec_of
from storm.data.corpus import open_corpus
from storm.data.stream import GroupStream
from storm.model.storm import Storm
from storm.train.optim import learning_rate, parameter_groups
from storm.train.trainer import fit_model


@dataclass(frozen=True)
class Twin:
    """What a run came to."""

    losses: list[float]  # of each step
    starts: dict[str, Tensor]  # the first weights
    ends: dict[str, Tensor]  # the last
    dark: np.ndarray  # [step, place in the global batch] which groups came without a tile


def apart(weights: dict[str, Tensor], twin: Twin) -> float:
    """Distance of weights from the twin's last ones, as a share of the way from its first to its last."""
    assert weights.keys() == twin.ends.keys()
    gaps, ways = (
        sum(float((twin.ends[name] - other[name]).double().norm() ** 2) for name in twin.ends)
        for other in (weights, twin.starts)
    )
    return (gaps / ways) ** 0.5


def train(config: RunConfig) -> Twin:
    """A run from its start to its end."""
    data = config.data
    shards = open_corpus(data)
    sizes, share = fit_model(config.model, shards), shards.genes.share
    assert share is not None and data.micro_batch_size == 1
    spec = spec_of(sizes, shards.panels, share)
    stream = GroupStream(shards, spec, config.mask, data, config.seed)
    model = Storm(sizes, len(share), config.seed)
    model.set_gene_bias(torch.from_numpy(np.log(share)).float())
    starts = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    betas = config.optim.betas[0], config.optim.betas[1]
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optim.weight_decay), betas=betas)
    curve, dark = [], []
    for step in range(config.optim.steps):
        batches = [stream[item] for item in range(step * data.global_batch_size, (step + 1) * data.global_batch_size)]
        total, weights = torch.zeros(()), losses.weights(config.loss, step, config.optim.steps)
        for batch in batches:
            found = losses.terms(model(batch), batch)
            for term, (value, _) in found.items():
                count = sum(float(losses.counts(other, losses.absent(sizes))[term]) for other in batches)
                total = total + weights[term] * value / max(1.0, count)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.optim)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(total.detach()))
        dark.append([not batch["tile_weight"].any() for batch in batches])
    return Twin(curve, starts, {name: tensor.detach() for name, tensor in model.named_parameters()}, np.array(dark))
