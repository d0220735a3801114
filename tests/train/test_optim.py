"""Parameter groups and schedule."""

import itertools

import pytest
from torch import nn

from storm.config import OptimConfig
from storm.model.storm import Storm
from storm.presets import ModelConfig
from storm.train.optim import learning_rate, parameter_groups


def test_only_matrices_decay() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(3, 2), "norm": nn.LayerNorm(2), "table": nn.Embedding(4, 3)})
    decay, rest = parameter_groups(model, 0.05)
    assert [p is model["linear"].weight for p in decay["params"]] == [True] and decay["weight_decay"] == 0.05
    assert len(rest["params"]) == 4 and rest["weight_decay"] == 0


def test_every_parameter_of_the_model_is_in_one_group() -> None:
    model = Storm(ModelConfig(), 10)
    listed = [id(p) for group in parameter_groups(model, 0.05) for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())


def test_schedule() -> None:
    optim = OptimConfig(steps=100, lr=1.0, warmup_share=0.1, final_lr_share=0.01)
    rates = [learning_rate(step, optim) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx((1 + 0.01) / 2) and rates[100] == pytest.approx(0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(0, OptimConfig(steps=1, warmup_share=0.0)) == OptimConfig().lr
