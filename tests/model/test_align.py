"""The vectors that align image and expression: of unit length, and of nothing but window and content."""

import pytest
import torch
from torch import nn

from storm.model.align import Align
from storm.model.storm import Storm
from tests.model.batches import CONFIG, Batch, choose_profiles, make_batch

NAMES = ("align_image", "align_expression")


def test_unit_vectors_of_both_projections() -> None:
    torch.manual_seed(0)
    module = Align(CONFIG)
    window, content = torch.randn(2, 6, 16), torch.randn(2, 6, 32)
    found = module(window, content)
    for name, part in (("align_image", module.image(window)), ("align_expression", module.expression(content))):
        torch.testing.assert_close(found[name], part / part.norm(dim=-1, keepdim=True))
    assert float(found["align_scale"].detach()) == pytest.approx(10)


@pytest.mark.parametrize(("weight", "scale"), [(-1e3, 1.0), (1e3, 100.0)])
def test_the_scale_is_bounded(weight: float, scale: float) -> None:
    module = Align(CONFIG)
    nn.init.constant_(module.log_scale.weight, weight)
    found = module(torch.randn(1, 1, 16), torch.randn(1, 1, 32))["align_scale"]
    assert float(found.detach()) == pytest.approx(scale, rel=1e-4)


def test_a_profile_without_a_window_has_no_vector_and_no_nan_gradient() -> None:
    module, window = Align(CONFIG), torch.zeros(1, 1, 16, requires_grad=True)
    found = module(window, torch.randn(1, 1, 32))
    (0 * found["align_image"].sum()).backward()
    assert not found["align_image"].any() and window.grad is not None and not window.grad.any()


def changed(model: Storm, batch: Batch, **entries: torch.Tensor) -> dict[str, bool]:
    """Whether the vectors move with these entries of the batch."""
    before, after = model(batch), model(batch | entries)
    return {name: not torch.equal(before[name], after[name]) for name in NAMES}


def test_what_the_vectors_are_made_of(model: Storm) -> None:
    """The image of a window; which genes are seen, and how much of each. No place, size, depth, platform or organ."""
    batch = make_batch()
    none = dict.fromkeys(NAMES, False)
    for name in ("footprint_um", "footprint_input", "input_log_depth", "input_log_genes", "pos_um"):
        assert changed(model, batch, **{name: batch[name] + 0.3}) == none, name
    for name in ("platform", "organ"):
        assert changed(model, batch, **{name: (batch[name] + 1) % 3}) == none, name
    image_alone = {"align_image": True, "align_expression": False}
    assert changed(model, batch, tiles=255 - batch["tiles"]) == image_alone
    assert changed(model, batch, xy_um=batch["xy_um"] + 3) == image_alone  # another window
    counts_alone = {"align_image": False, "align_expression": True}
    assert changed(model, batch, input_value=batch["input_value"].flip(0)) == counts_alone


def test_they_do_not_depend_on_the_other_profiles(model: Storm) -> None:
    batch = make_batch()
    whole, alone = model(batch), model(choose_profiles(batch, [2]))
    for name in NAMES:
        torch.testing.assert_close(alone[name][:, 0], whole[name][:, 2])
