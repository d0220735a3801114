"""The optimizer's parameter groups, and the learning rate as a pure function of the step."""

import math
from typing import Any

from torch import nn

from storm.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of what trains: matrices, which decay, and norms, biases and embeddings, which do not."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            still = parameter.ndim < 2 or isinstance(module, nn.Embedding)
            (rest if still else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def learning_rate(step: int, optim: OptimConfig) -> float:
    """The rate of the step that comes after `step` steps: linear warm-up, then cosine to `final_lr_share` of it."""
    warmup = max(1, round(optim.warmup_share * optim.steps))
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, optim.steps - warmup)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return optim.lr * (optim.final_lr_share + (1 - optim.final_lr_share) * cosine)
