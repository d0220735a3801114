"""The loss terms against values computed by hand, and their arithmetic as (sum, count)."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from storm import losses
from storm.config import MASK_MODES, LossConfig
from tests.model.batches import CONFIG, Batch, double, make_batch

ALIGNED = ("align_image", "align_expression")


def groups_batch(seed: int = 0) -> Batch:
    """Two groups of two regions, large enough for correlations and contrasts: some 160 profiles each on 3 x 3 mm."""
    batch = make_batch(regions=4, n=80, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    batch["region_group"] = torch.tensor([0, 0, 1, 1])
    batch["mode"] = torch.tensor([1, 1, 2, 2])
    batch["place_um"] = 3000 * torch.rand(4, 80, 2, generator=generator)
    batch["negatives"] = torch.full((4, 80), -1)
    part = batch["visible"] & (batch["input_log_genes"] > 0)
    for r, n in part.nonzero().tolist():
        own = part & (batch["region_group"] == batch["region_group"][r])[:, None]
        apart = (batch["place_um"][own] - batch["place_um"][r, n]).norm(dim=-1)
        batch["negatives"][r, n] = (apart >= 150).sum()
    return batch


def outputs_for(batch: Batch, seed: int = 0) -> dict[str, Tensor]:
    """Random outputs of the right shapes, of all heads."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"log_composition": "target_count", "log_dispersion": "target_count", "tile_stats": "tile_target"}
    shapes |= {"depth_mean": "depth_target", "depth_log_var": "depth_target"}
    found = {
        name: torch.randn(batch[like].shape, generator=generator, dtype=batch[like].dtype)
        for name, like in shapes.items()
    }
    for name in ALIGNED:
        vector = torch.randn(*batch["profile"].shape, 5, generator=generator, dtype=batch["xy_um"].dtype)
        found[name] = torch.nn.functional.normalize(vector, dim=-1)
    found["tile_anchor"] = torch.rand(len(batch["tiles"]), generator=generator, dtype=batch["xy_um"].dtype)
    return found | {"align_scale": torch.tensor(7.0, dtype=batch["xy_um"].dtype)}


@pytest.mark.parametrize(
    ("count", "mu", "r", "probability"),
    [
        (0, 1.0, 1.0, 0.5),  # geometric: 2 ** -(count + 1)
        (3, 1.0, 1.0, 0.0625),
        (2, 4.0, 2.0, 3 * (1 / 3) ** 2 * (2 / 3) ** 2),  # (x + 1) p^2 (1 - p)^2, p = r / (r + mu)
        (1, 3.0, 0.5, 0.5 * (1 / 7) ** 0.5 * (6 / 7)),
    ],
)
def test_negative_binomial_by_hand(count: int, mu: float, r: float, probability: float) -> None:
    log_mu, log_r = torch.tensor(mu).log(), torch.tensor(r).log()
    nll = losses.negative_binomial_nll(torch.tensor(float(count)), log_mu, log_r)
    assert float(nll) == pytest.approx(-math.log(probability), rel=1e-5)


def test_negative_binomial_over_its_whole_range() -> None:
    """Float32 against torch's distribution in float64: no counts to deep spots, r from e^-7 to e^7."""
    count = torch.tensor([0.0, 1.0, 7.0, 300.0, 3000.0])[:, None, None]
    log_mu, log_r = torch.linspace(-18, 10, 15)[:, None], torch.linspace(-7, 7, 9)
    found = losses.negative_binomial_nll(count, log_mu, log_r)
    logits = (log_mu - log_r).double()
    exact = -torch.distributions.NegativeBinomial(log_r.double().exp(), logits=logits).log_prob(count.double())
    torch.testing.assert_close(found.double(), exact, rtol=3e-4, atol=3e-3)


@pytest.mark.parametrize(("count", "mu", "probability"), [(0, 2.0, math.exp(-2)), (3, 2.0, 8 / 6 * math.exp(-2))])
def test_poisson_by_hand(count: int, mu: float, probability: float) -> None:
    nll = losses.poisson_nll(torch.tensor(float(count)), torch.tensor(mu).log())
    assert float(nll) == pytest.approx(-math.log(probability), rel=1e-5)


@pytest.mark.parametrize(
    ("count", "zero", "probability"),
    [
        (0, 0.25, 0.25 + 0.75 * 0.5),  # of NB(mu 1, r 1) a zero has probability 1 / 2, a 3 has 1 / 16
        (3, 0.25, 0.75 * 0.0625),
        (0, 1e-6, 0.5),
        (3, 1e-6, 0.0625),
    ],
)
def test_zero_inflation_by_hand(count: int, zero: float, probability: float) -> None:
    one, logit = torch.zeros(()), torch.tensor(math.log(zero / (1 - zero)))
    nll = losses.zero_inflated_nll(torch.tensor(float(count)), one, one, logit)
    assert float(nll) == pytest.approx(-math.log(probability), rel=1e-4)


def test_the_outputs_tell_the_likelihood() -> None:
    """Of a count of 3 at depth 4: mu is 1, lognorm log 7501."""
    batch = {"target_count": torch.tensor([[[3.0]]]), "target_log_depth": torch.tensor([[math.log(4)]])}
    given = {"log_composition": torch.tensor([[[math.log(0.25)]]])}
    noise = {"log_dispersion": torch.zeros(1, 1, 1)}
    zero = {"zero_logit": torch.zeros(1, 1, 1)}  # one half
    lognorm = {"lognorm": torch.tensor([[[math.log(7501) + 3]]])}
    expected = {"poisson": 1 + math.log(6), "nb": math.log(16), "zinb": math.log(32), "lognorm": 9}
    for name, more in {"poisson": {}, "nb": noise, "zinb": noise | zero, "lognorm": lognorm}.items():
        assert float(losses.gene_nll(given | more, batch)) == pytest.approx(expected[name], rel=1e-5), name


def test_negative_binomial_gradient() -> None:
    log_mu = torch.tensor([-3.0, 0.5, 4.0], dtype=torch.float64, requires_grad=True)
    log_r = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    count = torch.tensor([0.0, 2.0, 60.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m, r: losses.negative_binomial_nll(count, m, r), (log_mu, log_r))


def test_expr_by_hand() -> None:
    """Two profiles: one with two hidden genes of three, one with none. mu = L * composition; r = 1."""
    batch = {
        "target_count": torch.tensor([[[0.0, 3.0, 99.0], [1.0, 1.0, 1.0]]]),
        "target_mask": torch.tensor([[[True, True, False], [False, False, False]]]),
        "target_log_depth": torch.tensor([[math.log(4), 0.0]]),
    }
    composition = torch.tensor([0.25, 0.75, 0.5]).log().expand(1, 2, 3)
    total, count = losses.expr({"log_composition": composition, "log_dispersion": torch.zeros(1, 2, 3)}, batch)
    first = -math.log(1 / 2)  # mu 1, r 1, count 0
    second = -math.log((1 / 4) * (3 / 4) ** 3)  # mu 3, r 1, count 3
    assert float(total) == pytest.approx((first + second) / 2, rel=1e-5)
    assert float(count) == 1


def test_depth_by_hand() -> None:
    batch = {"depth_target": torch.tensor([[1.0, 5.0]]), "depth_mask": torch.tensor([[True, False]])}
    outputs = {"depth_mean": torch.tensor([[3.0, 0.0]]), "depth_log_var": torch.tensor([[math.log(2), 0.0]])}
    total, count = losses.depth(outputs, batch)
    assert float(total) == pytest.approx(0.5 * (math.log(2 * math.pi) + math.log(2) + 4 / 2))
    assert float(count) == 1


def test_image_by_hand() -> None:
    batch = {"tile_target": torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]), "tile_hidden": torch.tensor([[True, False]])}
    total, count = losses.image({"tile_stats": torch.tensor([[[2.0, 5.0], [7.0, 7.0]]])}, batch)
    assert (float(total), float(count)) == ((1 + 9) / 2, 1)


def hidden_batch(composition: list[list[float]], lognorm: list[list[float]], groups: list[int]) -> tuple[Batch, Batch]:
    """(outputs, batch) of one gene: a row per region, all profiles wholly hidden, at a depth where lognorm is `y`."""
    y = torch.tensor(lognorm)
    batch = {
        "region_group": torch.tensor(groups), "target_count": y.expm1()[..., None],
        "target_mask": torch.ones(*y.shape, 1, dtype=torch.bool), "wholly_hidden": torch.ones_like(y, dtype=torch.bool),
        "target_log_depth": torch.full_like(y, math.log(1e4)),
    }  # fmt: skip
    return {"log_composition": torch.tensor(composition)[..., None]}, batch


def test_corr_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of two regions; a profile that is not asked and another group have no part."""
    monkeypatch.setattr(losses, "CORR_PROFILES", 4)
    monkeypatch.setattr(losses, "CORR_NONZERO", 3)
    monkeypatch.setattr(losses, "CORR_EPS", 0.0)
    x, y = [[0.0, 1.0, 9.0], [2.0, 3.0, 9.0], [5.0, 1.0, 2.0]], [[1.0, 0.0, 9.0], [3.0, 2.0, 0.5], [1.0, 2.0, 3.0]]
    outputs, batch = hidden_batch(x, y, [0, 0, 1])
    batch["target_mask"][0, 2] = False
    batch["target_mask"][1, 2] = False
    total, count = losses.corr(outputs, batch)
    # x 0 1 2 3, y 1 0 3 2: covariance 3 / 4, both variances 5 / 4
    assert float(total) == pytest.approx(1 - 3 / 5) and float(count) == 1
    batch["target_count"][0, 0] = 0  # y 0 0 3 2: two with counts are not enough
    assert [float(value) for value in losses.corr(outputs, batch)] == [0, 0]


def test_corr_ignores_what_is_common_to_a_group_and_its_depth() -> None:
    batch = double(groups_batch())
    batch["wholly_hidden"] = batch["profile"]
    outputs = outputs_for(batch)
    total, count = losses.corr(outputs, batch)
    shifted = outputs["log_composition"] + torch.tensor([3.0, 3.0, -2.0, -2.0])[:, None, None]
    torch.testing.assert_close(losses.corr(outputs | {"log_composition": shifted}, batch)[0], total)
    scale = 1 + torch.rand(batch["target_log_depth"].shape).double()
    deeper = batch | {"target_count": batch["target_count"] * scale[..., None]}
    deeper["target_log_depth"] = batch["target_log_depth"] + scale.log()
    torch.testing.assert_close(losses.corr(outputs, deeper)[0], total)
    assert int(count) == 2 * 11  # the first loss gene is on no panel
    # Each region shifted by its own: no longer what a group has in common.
    apart = outputs["log_composition"] + torch.arange(4.0)[:, None, None]
    assert not torch.allclose(losses.corr(outputs | {"log_composition": apart}, batch)[0], total)


def test_corr_is_numpys_and_its_gradient_leaves_the_denominator_out() -> None:
    batch = double(groups_batch())
    outputs = {name: x.requires_grad_() for name, x in outputs_for(batch).items()}
    total, _ = losses.corr(outputs, batch)
    total.backward()
    x, y, grad = outputs["log_composition"].detach(), losses.lognorm(batch), outputs["log_composition"].grad
    depth = torch.where(batch["wholly_hidden"], 0, batch["target_log_depth"])
    assert grad is not None and (batch["target_mask"] & ~batch["wholly_hidden"][..., None]).any()
    expected = 0.0
    for group in range(2):
        rows = slice(2 * group, 2 * group + 2)
        for k in range(1, 12):
            mask = batch["target_mask"][rows, :, k]
            a, b, d = (z[mask].numpy() for z in (x[rows, :, k], y[rows, :, k], depth[rows]))
            a, b, d = a - a.mean(), b - b.mean(), d - d.mean()
            b = b - d * (b * d).mean() / (d**2).mean()
            spread = math.sqrt(((a**2).mean() + losses.CORR_EPS) * ((b**2).mean() + losses.CORR_EPS))
            expected += 1 - (a * b).mean() / spread
            assert (a * b).mean() / spread == pytest.approx(np.corrcoef(a, b)[0, 1], abs=2e-3)
            np.testing.assert_allclose(grad[rows, :, k][mask].numpy(), -b / len(b) / spread, rtol=1e-9)
    assert float(total.detach()) == pytest.approx(expected)
    assert not grad[~batch["target_mask"]].any()


def test_corr_pays_nothing_for_a_depth_that_is_known() -> None:
    """Hidden genes of profiles that show others: what follows from depth alone is no contrast of a gene."""
    batch = double(groups_batch())
    depth = torch.rand(batch["target_log_depth"].shape).double()
    batch |= {"target_log_depth": depth, "target_count": (3 * depth).exp()[..., None].expand_as(batch["target_count"])}
    outputs = {"log_composition": depth[..., None].expand_as(batch["target_count"])}
    for hidden, least, most in ((batch["profile"], 0.0, 0.2), (torch.zeros_like(batch["profile"]), 0.7, 1.3)):
        total, count = losses.corr(outputs, batch | {"wholly_hidden": hidden})
        assert least <= float(total / count) <= most


def test_a_composition_that_does_not_vary_has_a_bounded_gradient() -> None:
    batch = double(groups_batch())
    outputs = outputs_for(batch)
    outputs["log_composition"] = torch.zeros_like(outputs["log_composition"]).requires_grad_()
    total, count = losses.corr(outputs, batch)
    (total / count).backward()
    grad = outputs["log_composition"].grad
    assert float((total / count).detach()) == pytest.approx(1)
    assert grad is not None and grad.isfinite().all() and float(grad.norm(dim=(0, 1)).max()) < 1 / losses.CORR_EPS**0.5


def test_spatial_by_hand() -> None:
    """Of three regions one is in context; there one of three profiles is wholly hidden and has counts."""
    batch = {
        "target_count": torch.zeros(3, 3, 1), "target_log_depth": torch.zeros(3, 3),
        "target_mask": torch.tensor([[[True], [True], [False]]]).expand(3, 3, 1).clone(),
        "wholly_hidden": torch.tensor([[True, False, True]]).expand(3, 3).clone(),
        "mode": torch.tensor([MASK_MODES.index(name) for name in ("image_only", "in_context", "gene_level")]),
    }  # fmt: skip
    outputs = {"log_composition": torch.zeros(3, 3, 1), "log_dispersion": torch.zeros(3, 3, 1)}
    outputs["log_composition"][1, 0] = math.log(3)
    total, count = losses.spatial(outputs, batch)
    assert float(total) == pytest.approx(math.log(4)) and float(count) == 1  # count 0, mu 3, r 1: probability 1 / 4
    assert float(losses.expr(outputs, batch)[1]) == 6


def contrast_batch(place_um: list[float], negatives: list[int], regions: list[int]) -> Batch:
    """One profile per region, on a line."""
    place = torch.tensor(place_um)[:, None, None] * torch.tensor([1.0, 0.0])
    return {"region_group": torch.tensor(regions), "place_um": place, "negatives": torch.tensor(negatives)[:, None]}


def test_align_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 and 1 are neighbours, 2 is far from both, 3 has no part, 4 is of another group."""
    monkeypatch.setattr(losses, "ALIGN_NEGATIVES", 1)
    batch = contrast_batch([0.0, 100.0, 300.0, 900.0, 0.0], [1, 1, 2, -1, 0], [0, 0, 0, 0, 1])
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])[:, None]
    expression = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])[:, None]
    outputs = {"align_image": image, "align_expression": expression, "align_scale": torch.tensor(2.0)}
    total, count = losses.align(outputs, batch)
    e2 = math.exp(2)
    zero = (math.log(e2 + 1) - 2) * 2  # against 2 alone: own 2, other 0, both ways
    one = math.log(1 + 1) + math.log(1 + e2)  # its own product is 0; with the expression of 2 0, with its image 2
    two = (math.log(e2 + 1 + e2) - 2) + (math.log(e2 + 1 + 1) - 2)  # its image meets expressions 0 and 1; back, images
    assert float(total) == pytest.approx((zero + one + two) / 2) and float(count) == 3
    # Over the micro-batch 4 is a negative of all with a part, and an anchor itself.
    whole, anchors = losses.align(outputs, batch, "batch")
    assert int(anchors) == 4 and float(whole) > float(total)


def align_of_one(outputs: Batch, batch: Batch, here: tuple[int, int], align_over: str) -> float | None:
    """The term of one anchor, pair by pair; None where it has too few negatives."""
    image, expression = outputs["align_image"], outputs["align_expression"]
    there, (r, n) = [here], here
    for q, m in (batch["negatives"] >= 0).nonzero().tolist():
        same = bool(batch["region_group"][q] == batch["region_group"][r])
        near = same and float((batch["place_um"][q, m] - batch["place_um"][r, n]).norm()) < 150
        if (same or align_over == "batch") and not near:
            there.append((q, m))
    if batch["negatives"][here] < 0 or len(there) - 1 < 64:
        return None
    to, back = (
        torch.stack([outputs["align_scale"] * (a[here] @ b[place]) for place in there]).log_softmax(0)[0]
        for a, b in ((image, expression), (expression, image))
    )
    return -float(to + back) / 2


@pytest.mark.parametrize("align_over", ["group", "batch"])
def test_align_equals_its_plain_twin(align_over: str) -> None:
    batch = double(groups_batch())
    outputs = outputs_for(batch)
    everywhere = [(r, n) for r in range(4) for n in range(80)]
    plain = [align_of_one(outputs, batch, here, align_over) for here in everywhere]
    total, count = losses.align(outputs, batch, align_over)
    found = [value for value in plain if value is not None]
    assert int(count) == len(found) > 100
    assert float(total) == pytest.approx(sum(found))


def test_anchor_by_hand() -> None:
    batch = {"tile_weight": torch.tensor([1.0, 1.0, 0.0])}
    total, count = losses.anchor({"tile_anchor": torch.tensor([0.75, -1.0, 0.3])}, batch)
    assert (float(total), float(count)) == (0.25 + 2, 2)


@pytest.mark.parametrize("align_over", ["group", "batch"])
@pytest.mark.parametrize("images", [True, False])
def test_counts_are_those_of_the_terms(images: bool, align_over: str) -> None:
    batch = groups_batch() if images else make_batch(regions=3, images=False)
    outputs = outputs_for(batch)
    expected = {name: count for name, (_, count) in losses.terms(outputs, batch, align_over).items()}
    assert losses.counts(batch, (), align_over) == expected and list(expected) == list(losses.TERMS)
    assert all(count > 0 for name, count in expected.items() if images or name in {"depth", "expr"})
    poor = {name: x for name, x in outputs.items() if not name.startswith(("align", "tile_anchor"))}
    expected = {name: count for name, (_, count) in losses.terms(poor, batch, align_over).items()}
    assert losses.counts(batch, {"align", "anchor"}, align_over) == expected
    assert expected["align"] == 0 and expected["anchor"] == 0


def test_what_a_model_lacks() -> None:
    assert losses.absent(CONFIG) == {"anchor"}
    assert losses.absent(dataclasses.replace(CONFIG, align_width=0)) == {"align", "anchor"}
    given = dataclasses.replace(CONFIG, encoder="timm/vit_tiny_patch16_224", encoder_sha256="0")
    assert losses.absent(given) == set()
    assert losses.absent(dataclasses.replace(given, encoder_train="frozen")) == {"anchor"}


def test_weights_are_a_function_of_the_step() -> None:
    config = LossConfig(corr_from=0.25, align_from=0.5, align=0.07)
    found = [losses.weights(config, step, 8) for step in range(9)]
    assert [w["corr"] for w in found] == [0.0] * 2 + [0.1] * 7
    assert [w["align"] for w in found] == [0.0] * 4 + [0.07] * 5
    rest = {"expr": 1.0, "depth": 0.1, "image": 0.2, "spatial": 0.5, "anchor": 0.1}
    assert all({name: w[name] for name in rest} == rest for w in found)
    assert losses.weights(LossConfig(corr=0, corr_from=0), 0, 8)["corr"] == 0


def regions_of(batch: Batch, values: Batch, part: slice) -> Batch:
    """What belongs to some regions of a batch, of its own entries or of outputs for it."""
    slots = batch["tile_present"].shape[1]
    tiles = (batch["tile_slot"] >= part.start * slots) & (batch["tile_slot"] < part.stop * slots)
    rows = {name: x[part] for name, x in values.items() if x.ndim and len(x) == len(batch["tile_present"])}
    packed = ("tiles", "tile_weight", "tile_slot", "tile_anchor")
    return values | rows | {name: values[name][tiles] for name in packed if name in values}


def test_terms_of_parts_add_up() -> None:
    """Of groups: a group is never divided."""
    batch = double(groups_batch())
    outputs = outputs_for(batch)
    whole = losses.terms(outputs, batch)
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        rows = regions_of(batch, batch, part)
        rows["region_group"] = rows["region_group"] - rows["region_group"][0]
        halves.append(losses.terms(regions_of(batch, outputs, part), rows))
    for name, (total, count) in whole.items():
        torch.testing.assert_close(sum(half[name][0] for half in halves), total)
        assert sum(half[name][1] for half in halves) == count > 0


def test_modes_partition_the_expression_term() -> None:
    batch = make_batch(regions=4)
    batch["mode"] = torch.tensor([0, 2, 2, 3])
    outputs = outputs_for(batch)
    modes, (total, count) = losses.expr_by_mode(outputs, batch), losses.expr(outputs, batch)
    assert list(modes) == list(MASK_MODES)
    torch.testing.assert_close(torch.stack([s for s, _ in modes.values()]).sum(), total)
    assert sum(int(c) for _, c in modes.values()) == int(count) and int(modes[MASK_MODES[1]][1]) == 0


def test_what_is_masked_has_no_part_and_no_gradient() -> None:
    batch = groups_batch()
    outputs = {name: x.requires_grad_() for name, x in outputs_for(batch).items()}
    before = losses.terms(outputs, batch)
    torch.stack([s for s, _ in before.values()]).sum().backward()
    masks = {"log_composition": "target_mask", "log_dispersion": "target_mask", "depth_mean": "depth_mask"}
    for name, mask in (masks | {"depth_log_var": "depth_mask", "tile_stats": "tile_hidden"}).items():
        grad = outputs[name].grad
        assert grad is not None and not grad[~batch[mask]].any() and grad[batch[mask]].any()
    batch["target_count"][~batch["target_mask"]] += 5
    batch["depth_target"][~batch["depth_mask"]] += 5
    batch["tile_target"][~batch["tile_hidden"]] += 5
    part = batch["negatives"] >= 0
    for name in ALIGNED:
        grad = outputs[name].grad
        assert grad is not None and not grad[~part].any() and grad[part].any()
    for name, (total, _) in losses.terms(outputs, batch).items():
        assert torch.equal(total, before[name][0])


def test_sums_are_float32_under_bfloat16_outputs() -> None:
    batch = groups_batch()
    outputs = {name: x.bfloat16() for name, x in outputs_for(batch).items()}
    assert {total.dtype for total, _ in losses.terms(outputs, batch).values()} == {torch.float32}
    assert {x.dtype for x in losses.counts(batch).values()} == {torch.float32}
