"""The whole model: shapes, what an answer may depend on, gradients, seeds."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from storm import losses
from storm.model.storm import Storm
from storm.presets import EXPRESSIONS, LIKELIHOODS
from tests.model.batches import (
    CONFIG,
    N_GENES,
    Batch,
    awake,
    choose_profiles,
    completed,
    double,
    make_batch,
    pad_tiles,
)

PROFILE_OUTPUTS = ("log_composition", "log_dispersion", "depth_mean", "depth_log_var", "embedding", "align_image")


def backward(model: Storm, batch: Batch) -> dict[str, Tensor]:
    """Gradient of every parameter from the sum of all loss terms; none may be missing."""
    model.zero_grad(set_to_none=True)
    torch.stack([total for total, _ in losses.terms(model(batch), batch).values()]).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None] == []
    return {name: grad for name, grad in grads.items() if grad is not None}


def test_shapes(model: Storm, batch: Batch) -> None:
    out = model(batch)
    assert {name: tuple(x.shape) for name, x in out.items()} == {
        "log_composition": (2, 6, 12),
        "log_dispersion": (2, 6, 12),
        "depth_mean": (2, 6),
        "depth_log_var": (2, 6),
        "tile_stats": (2, 4, 6),
        "embedding": (2, 6, 32),
        "align_image": (2, 6, 8),
        "align_expression": (2, 6, 8),
        "align_scale": (),
    }
    assert all(torch.isfinite(x).all() for x in out.values())


def test_targets_are_no_input(model: Storm, batch: Batch) -> None:
    """The model runs without them, bit for bit."""
    unread = {"target_count", "target_mask", "target_log_depth", "depth_target", "depth_mask", "tile_target"}
    unread |= {"place_um", "negatives"}
    unread |= {"query", "wholly_hidden", "profile", "mode"}
    blind = model({name: x for name, x in batch.items() if name not in unread})
    assert all(torch.equal(x, blind[name]) for name, x in model(batch).items())


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("visible", [0, 5])
def test_a_footprint_asked_alone_among_36_and_among_1225(visible: int, expression: str) -> None:
    config = dataclasses.replace(CONFIG, expression=expression)
    model = awake(Storm(config, N_GENES))
    whole = make_batch(regions=1, n=1226 + visible, config=config)
    whole["visible"] = torch.arange(1226 + visible)[None] < visible
    whole = completed(whole)
    context = list(range(visible))
    asked = [700, 12, 1000]
    everything = model(choose_profiles(whole, list(range(1225 + visible))))
    for profile in asked:
        others = [i for i in range(visible, 60) if i != profile][:35]
        for chosen in ([*context, profile], [*context, *others, profile]):
            alone = model(choose_profiles(whole, chosen))
            for name in PROFILE_OUTPUTS:
                torch.testing.assert_close(alone[name][0, -1], everything[name][0, profile], rtol=1e-5, atol=1e-5)


def test_visible_profiles_and_tiles_inform_a_query(model: Storm, batch: Batch) -> None:
    before = model(batch)["embedding"]
    batch["input_value"][0] += 1  # of the first profile, region 0
    changed = (model(batch)["embedding"] != before).any(-1)
    assert changed[0].all() and not changed[1].any()
    before = model(batch)["embedding"]
    batch["tiles"][-1] = 255 - batch["tiles"][-1]  # of region 1
    changed = (model(batch)["embedding"] != before).any(-1)
    assert changed[1].all() and not changed[0].any()


def test_a_hidden_tile_is_asked_and_informs_nobody(model: Storm, batch: Batch) -> None:
    before = model(batch)
    with torch.no_grad():
        model.hidden_tile.weight.add_(1.0)
    after = model(batch)
    assert all(torch.equal(before[name], after[name]) for name in PROFILE_OUTPUTS)
    assert torch.equal((before["tile_stats"] != after["tile_stats"]).any(-1), batch["tile_hidden"])


def test_padding_changes_nothing(model: Storm, batch: Batch) -> None:
    plain, padded = model(batch), model(pad_tiles(choose_profiles(batch, [0, 1, 2, 3, 4, 5, -1, -1, -1]), 3))
    for name, x in plain.items():
        found = padded[name][:, : x.shape[1]] if x.ndim else padded[name]
        torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


def test_regions_do_not_mix(model: Storm) -> None:
    """Two regions in one batch give what each gives in its own."""
    batch = make_batch(regions=1)
    twice = model(two_of(batch))
    for name, x in model(batch).items():
        if x.ndim:
            torch.testing.assert_close(twice[name], torch.cat([x, x]), rtol=1e-5, atol=1e-5)


def two_of(batch: Batch) -> Batch:
    """A batch that holds its one region twice."""
    once = {"genes", "context_slots"}
    out = {name: x if name in once else torch.cat([x, x]) for name, x in batch.items()}
    out["tile_at"][1][batch["tile_at"][0] >= 0] += len(batch["tiles"])
    out["tile_slot"][len(batch["tiles"]) :] += batch["tile_present"].shape[1]
    out["input_offsets"][len(batch["input_offsets"]) :] += len(batch["input_gene"])
    return out


@pytest.mark.parametrize("likelihood", [name for name in LIKELIHOODS if name != "nb"])
def test_every_likelihood_gives_every_parameter_a_gradient_but_no_unmeasured_gene(
    batch: Batch, likelihood: str
) -> None:
    model = awake(Storm(dataclasses.replace(CONFIG, likelihood=likelihood), N_GENES))
    unmeasured_genes_have_no_gradient(model, batch)


SWITCHES = [
    {},
    {"expression": "tokens", "expression_width": 16, "position": "distance_bias", "descriptor_width": 3},
    {"position": "none", "space_depth": 0},
]


def switched(switches: dict[str, Any]) -> Storm:
    """A model with these switches, awake."""
    model = Storm(dataclasses.replace(CONFIG, **switches), N_GENES)
    if model.config.descriptor_width:
        generator = torch.Generator().manual_seed(2)
        table = torch.randn(N_GENES, model.config.descriptor_width, generator=generator)
        model.set_descriptors(table, table.mean(0), table.std(0))
    return awake(model)


def blind(batch: Batch) -> Batch:
    """The batch without a visible profile."""
    batch = batch | {"visible": torch.zeros_like(batch["visible"]), "input_gene": torch.arange(0)}
    batch |= {name: torch.zeros_like(batch[name]) for name in ("input_offsets", "input_log_depth", "input_log_genes")}
    return completed(batch | {"input_value": torch.zeros(0)})


@pytest.mark.parametrize("hidden_tiles", [0, 1])
@pytest.mark.parametrize("expressed", [True, False])
@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("switches", SWITCHES)
def test_every_parameter_has_a_gradient(
    switches: dict[str, Any], images: bool, expressed: bool, hidden_tiles: int
) -> None:
    """Whatever is absent, image, expression or both: the dummies run, and their gradient is exactly zero."""
    model = switched(switches)
    batch = make_batch(images=images, hidden_tiles=hidden_tiles, config=model.config)
    grads = backward(model, batch if expressed else blind(batch))
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    image = {name for name in grads if name.startswith(("morphology.", "fusion.footprint."))}
    image |= {"tile.weight"} if model.config.space_depth else set()
    assert image and all(grads[name].any() == images for name in image)
    expression = {"expression.project.weight", "expression.blocks.norm.weight"} & grads.keys()
    assert expression and all(grads[name].any() == expressed for name in expression)


@pytest.mark.parametrize("switches", SWITCHES)
def test_what_is_absent_is_not_read(switches: dict[str, Any]) -> None:
    """Without any visible profile, what the encoder says of expression moves nothing; without a tile, no pixel does."""
    model = switched(switches)
    batch = blind(make_batch(config=model.config))
    before = model(batch)["embedding"]
    with torch.no_grad():
        model.expression.project.bias.add_(1.0)
    assert torch.equal(model(batch)["embedding"], before)
    dark = make_batch(images=False, config=model.config)
    before = model(dark)["embedding"]
    dark["tiles"] = 255 - dark["tiles"]
    assert torch.equal(model(dark)["embedding"], before)


def test_an_unmeasured_gene_has_exactly_no_gradient(model: Storm, batch: Batch) -> None:
    unmeasured_genes_have_no_gradient(model, batch)
    unmeasured_genes_have_no_gradient(model, make_batch(n=160))  # where corr has a part as well
    assert losses.counts(make_batch(n=160))["corr"] > 0 == losses.counts(batch)["corr"]


def unmeasured_genes_have_no_gradient(model: Storm, batch: Batch) -> None:
    grads = backward(model, batch)
    asked = torch.zeros(N_GENES, dtype=torch.bool)
    asked[batch["genes"][(batch["gene_weight"] > 0).any(0)]] = True
    tables = {name for name, grad in grads.items() if name.startswith("decoder.") and len(grad) == N_GENES}
    assert {"decoder.gene_bias.weight", "decoder.platform_bias.weight"} <= tables
    for name in tables:
        assert not grads[name][~asked].any() and grads[name][asked].any()
    asked[torch.cat([batch["input_gene"], batch["shown_gene"]])] = True
    assert not asked.all() and not grads["genes.weight"][~asked].any()


@pytest.mark.parametrize("switches", SWITCHES)
def test_gradient_equals_finite_differences(switches: dict[str, Any]) -> None:
    """One directional derivative through all three levels, in float64."""
    model = switched(switches).double()
    batch = double(make_batch(config=model.config))
    grads = backward(model, batch)
    generator = torch.Generator().manual_seed(3)
    step = {name: torch.randn(grad.shape, generator=generator).double() for name, grad in grads.items()}

    def loss(scale: float) -> float:
        moved = {name: p + scale * step[name] for name, p in model.named_parameters()}
        out = torch.func.functional_call(model, moved, (batch,))
        return sum(float(total.detach()) for total, _ in losses.terms(out, batch).values())

    slope = sum(float((grads[name] * step[name]).sum()) for name in grads)
    assert (loss(3e-6) - loss(-3e-6)) / 6e-6 == pytest.approx(slope, rel=1e-6)


def test_bfloat16_autocast(model: Storm, batch: Batch) -> None:
    exact = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(batch)
        grads = backward(model, batch)
    assert out["log_composition"].dtype == torch.float32
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert (out["log_composition"] - exact["log_composition"]).abs().max() < 0.2


def test_equal_seeds_equal_weights() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = Storm(CONFIG, N_GENES, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left as it was
    torch.manual_seed(6)
    again = Storm(CONFIG, N_GENES, seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = Storm(CONFIG, N_GENES, seed=2).state_dict()
    assert not torch.equal(first["genes.weight"], other["genes.weight"])
    deeper = Storm(dataclasses.replace(CONFIG, space_depth=3), N_GENES, seed=1).state_dict()
    assert all(torch.equal(first[name], deeper[name]) for name in first)


def test_a_new_model_already_carries_image_and_expression_to_the_profile(batch: Batch) -> None:
    """Its blocks are the identity: without a way around them the first steps would learn from no tissue."""
    model = Storm(CONFIG, N_GENES)
    before = model(batch)["embedding"]
    batch["tiles"][0] = 255 - batch["tiles"][0]
    assert (model(batch)["embedding"][0] != before[0]).any()
    before = model(batch)["embedding"]
    batch["input_value"][0] += 1
    assert (model(batch)["embedding"][0, 0] != before[0, 0]).any()


def test_the_start_is_the_expected_composition(batch: Batch) -> None:
    model, share = Storm(CONFIG, N_GENES), torch.rand(N_GENES)
    model.set_gene_bias(share.log())
    panel = share[batch["genes"]] / (share[batch["genes"]] * batch["gene_weight"][0]).sum()
    composition = model(batch)["log_composition"].exp()
    torch.testing.assert_close(composition, panel.expand_as(composition))


def test_no_tensor_has_two_names(model: Storm) -> None:
    tensors = list(model.state_dict(keep_vars=True).values())
    assert len({id(x) for x in tensors}) == len({x.data_ptr() for x in tensors}) == len(tensors)


def test_a_small_model_learns_what_the_tissue_shows() -> None:
    """Two kinds of tiles, two compositions: from H&E alone the model beats the mean composition within 40 steps."""
    batch = make_batch(regions=2, hidden_tiles=0, n=8)
    batch["visible"][:] = False
    batch["tiles"] = (
        torch.tensor([60, 200], dtype=torch.uint8).repeat_interleave(4)[:, None, None, None].expand(-1, 32, 32, 3)
    )
    batch["target_count"] = torch.where(torch.arange(12) % 2 == torch.arange(2)[:, None, None], 9.0, 1.0).expand(
        2, 8, 12
    )
    batch["target_mask"] = (batch["gene_weight"] > 0)[:, None] & batch["profile"][..., None]
    model = Storm(CONFIG, N_GENES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(40):
        total, count = losses.expr(model(batch), batch)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        history.append(float((total / count).detach()))
    assert history[-1] < history[0] - 0.3


def regression(informative: bool) -> tuple[float, float]:
    """Correlation over profiles of what is predicted and true of a gene kept from training, and of the known ones.

    The truth: log share of gene g in tissue t is a_t . d_g, seen in the tiles' brightness. The descriptor holds d_g, or
    noise.
    """
    config = dataclasses.replace(CONFIG, descriptor_width=2)
    generator = torch.Generator().manual_seed(0)
    truth_G2 = torch.randn(110, 2, generator=generator)
    batch = make_batch(regions=4, hidden_tiles=0, n=8, k=60, config=config)
    known, held = batch["genes"], torch.arange(70, 110)  # of the latter, nothing was counted
    batch = blind(batch)
    bright = torch.tensor([40, 100, 160, 220], dtype=torch.uint8)
    batch["tiles"] = bright.repeat_interleave(4)[:, None, None, None].expand(-1, 32, 32, 3)
    tissue_R2 = torch.tensor([[1.5, 0.0], [0.0, 1.5], [-1.5, 0.0], [0.0, -1.5]])
    log_share_RG = tissue_R2 @ truth_G2.T
    batch |= {"platform": torch.zeros(4).long(), "organ": torch.zeros(4).long()}
    batch["gene_weight"] = torch.ones(4, len(known))
    share_RK = log_share_RG[:, known].softmax(-1)
    batch["target_count"] = (100 * share_RK).round()[:, None].expand(-1, 8, -1)
    batch["target_mask"] = batch["profile"][..., None].expand(-1, -1, len(known))
    model = Storm(config, 110)
    noise_G2 = torch.randn(110, 2, generator=generator)
    table_G2 = truth_G2 if informative else noise_G2
    model.set_descriptors(table_G2, torch.zeros(2), torch.ones(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        batch["gene_kept"] = torch.rand(110, generator=generator) >= 0.3
        total, count = losses.expr(model(batch), batch)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    batch["gene_kept"] = torch.ones(110, dtype=torch.bool)
    out = {name: x.detach() for name, x in model(batch).items()}
    asked = model.unseen(out["embedding"], batch, table_G2[held])["log_composition"]
    found = [asked[:, 0], out["log_composition"][:, 0]]
    true = [log_share_RG[:, held], log_share_RG[:, known]]
    unseen, seen = (
        float(torch.corrcoef(torch.stack([(x - x.mean(0)).flatten(), (y - y.mean(0)).flatten()]))[0, 1])
        for x, y in zip(found, true, strict=True)
    )
    return unseen, seen


def test_a_gene_kept_from_training_is_predicted_by_its_descriptor_and_not_by_noise() -> None:
    unseen, seen = regression(informative=True)
    assert unseen > 0.8 and seen > 0.8
    unseen, seen = regression(informative=False)
    assert abs(unseen) < 0.3 and seen > 0.7
