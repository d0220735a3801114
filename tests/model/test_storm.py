"""The whole model: shapes, what an answer may depend on, gradients, seeds."""

import pytest
import torch

from storm import losses
from storm.model.storm import Storm
from tests.model.batches import Batch, make_batch


def test_shapes(model: Storm, batch: Batch) -> None:
    out = model(batch)
    assert {name: tuple(x.shape) for name, x in out.items()} == {
        "log_composition": (2, 6, 12),
        "log_dispersion": (2, 6, 12),
        "depth_mean": (2, 6),
        "depth_log_var": (2, 6),
        "tile_stats": (2, 4, 6),
        "embedding": (2, 6, 32),
    }
    assert all(torch.isfinite(x).all() for x in out.values())


def backward(model: Storm, batch: Batch) -> dict[str, torch.Tensor | None]:
    """Gradient of every parameter from the sum of all loss terms."""
    model.zero_grad(set_to_none=True)
    torch.stack([total for total, _ in losses.terms(model(batch), batch).values()]).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("hidden_tiles", [0, 1])
def test_every_parameter_has_a_finite_gradient(model: Storm, images: bool, hidden_tiles: int) -> None:
    grads = backward(model, make_batch(images=images, hidden_tiles=hidden_tiles))
    assert all(g is not None and torch.isfinite(g).all() for g in grads.values())
    moved = {name for name, g in grads.items() if g is not None and g.any()}
    image_rooms = ("morphology.", "tile.", "fusion.footprint.", "fusion.window.")
    assert all(name.startswith(image_rooms) != images for name in moved if name.startswith(image_rooms)) or images
    assert images == any(name.startswith("morphology.") for name in moved)
