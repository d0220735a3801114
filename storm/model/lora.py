"""LoRA (arXiv 2106.09685): a Linear that stays, and beside it a product of two thin ones that trains.

In: a transformer whose Linear layers go by the names of timm. Out: the same module, its parameters frozen, adapters in
its attention and MLP layers. They start at zero, so the adapted model starts as the one that was loaded.
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from storm.model.layers import ZeroLinear

ADAPTED = ("qkv", "q", "k", "v", "kv", "proj", "fc1", "fc2", "fc1_g", "fc1_x")  # last part of a layer's name


class LoraLinear(nn.Linear):
    """y = W x + b + B A x. W and b keep their names, so that weights load as into the plain layer."""

    def __init__(self, plain: nn.Linear, rank: int) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.lora_a = nn.Linear(plain.in_features, rank, bias=False)
        self.lora_b = ZeroLinear(rank, plain.out_features, bias=False)
        self.adapted = True

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, with the adapter's unless it is off."""
        y = super().forward(x)
        return y + self.lora_b(self.lora_a(x)) if self.adapted else y


def adapt(model: nn.Module, rank: int, source: str) -> None:
    """Freeze `model` and put adapters into it. `source` names it in errors.

    Raises:
        ValueError: it has no such layer.
    """
    model.requires_grad_(False)
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and name in ADAPTED
    ]
    if not found:
        raise ValueError(f"{source}: has no Linear layer named {', '.join(ADAPTED)}: LoRA is for transformers; set "
                         "model.encoder_train to frozen or full")  # fmt: skip
    for parent, name, child in found:
        setattr(parent, name, LoraLinear(child, rank))


@contextlib.contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """In here the adapters are off."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.adapted = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapted = True
