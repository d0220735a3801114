"""The gene table and both expression encoders against their formulas, one profile after the other, in float64."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from storm.data import tokens
from storm.model.expression import BagEncoder, GeneEmbedding, TokenEncoder, expression_encoder
from storm.model.layers import initialise, rotation
from storm.presets import EXPRESSIONS
from tests.model.batches import CONFIG, N_GENES, Batch, completed, double, make_batch
from tests.model.test_layers import plain_block, rms

COLUMNS = 5
TOKENS = dataclasses.replace(CONFIG, expression="tokens", expression_width=16)


def described() -> GeneEmbedding:
    """A table with descriptors, in float64."""
    torch.manual_seed(1)
    genes = GeneEmbedding(N_GENES, 16, COLUMNS).double()
    genes.descriptor.normal_()
    return genes


def token_encoder() -> TokenEncoder:
    torch.manual_seed(0)
    encoder = TokenEncoder(TOKENS).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return encoder


def size_of(encoder: BagEncoder | TokenEncoder, batch: Batch, i: int) -> Tensor:
    size = torch.stack([batch["input_log_depth"].flatten()[i], batch["input_log_genes"].flatten()[i]])
    found: Tensor = encoder.size(size / 8)
    return found


def plain_bag(genes: GeneEmbedding, encoder: BagEncoder, batch: Batch) -> Tensor:
    """[R N, F], one profile and one gene after the other."""
    found = []
    starts = [*batch["input_offsets"].tolist(), len(batch["input_gene"])]
    for i, (start, end) in enumerate(pairwise(starts)):
        total = torch.zeros(16).double()
        for gene, value in zip(batch["input_gene"][start:end], batch["input_value"][start:end], strict=True):
            total += value * genes.weight[gene]
        group = int(batch["region_group"][i // batch["visible"].shape[1]])
        own = slice(*batch["shown_offsets"][group : group + 2].tolist())
        for gene, value in zip(batch["shown_gene"][own], batch["shown_value"][own], strict=True):
            total -= value * genes.weight[gene] * (end > start)
        total *= (16 / (own.stop - own.start)) ** 0.5
        found.append(encoder.project(total))
    return torch.stack(found)


def test_bag_equals_its_formula() -> None:
    torch.manual_seed(0)
    genes, encoder, batch = GeneEmbedding(N_GENES, 16).double(), BagEncoder(CONFIG).double(), double(make_batch())
    out, content = (x.flatten(0, 1) for x in encoder(genes, batch))
    expected = plain_bag(genes, encoder, batch)
    torch.testing.assert_close(content, expected)
    torch.testing.assert_close(out, expected + torch.stack([size_of(encoder, batch, i) for i in range(len(out))]))


def test_which_genes_are_shown_is_no_content() -> None:
    """A profile of the expected counts has one and the same content whatever it shows."""
    encoder, genes = BagEncoder(CONFIG), GeneEmbedding(N_GENES, 16)
    batch = make_batch(regions=1, n=1)
    for shown in (torch.arange(20), torch.arange(5, 9), torch.tensor([3])):
        value = torch.rand(len(shown))
        batch |= {"input_gene": shown, "input_value": value, "shown_gene": shown, "shown_value": value}
        batch["shown_offsets"] = torch.tensor([0, len(shown)])
        torch.testing.assert_close(encoder(genes, batch)[1][0, 0], encoder.project.bias)


def test_content_starts_as_large_as_the_features_of_an_image_come() -> None:
    """Coordinates of unit size, on a table and weights as they are drawn, for values that vary by 1."""
    encoder, genes = BagEncoder(dataclasses.replace(CONFIG, gene_width=64)), GeneEmbedding(N_GENES, 64)
    for module in (encoder, genes):
        initialise(module, 0)
    batch = make_batch(regions=1, n=200)
    counts = torch.arange(0, 20 * 200, 20)
    batch |= {
        "input_gene": torch.arange(20).repeat(200),
        "input_value": 1.5 + torch.randn(20 * 200),
        "input_offsets": counts,
    }
    batch |= {
        "shown_gene": torch.arange(20),
        "shown_value": torch.full((20,), 1.5),
        "shown_offsets": torch.tensor([0, 20]),
    }
    assert 0.8 < float(encoder(genes, batch)[1].std()) < 1.25


def test_tokens_equal_their_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.model.test_layers.WIDTH", TOKENS.expression_width)
    monkeypatch.setattr("tests.model.test_layers.HEAD", TOKENS.head_width)
    genes, encoder, batch = GeneEmbedding(N_GENES, 16).double(), token_encoder(), double(make_batch(config=TOKENS))
    out, content = (x.flatten(0, 1) for x in encoder(genes, batch))
    expected = plain_bag(genes, encoder, batch).clone()
    for place, (start, end) in zip(batch["token_profile"], pairwise(batch["token_offsets"].tolist()), strict=True):
        own = slice(start, end)
        x = 4 * genes.weight[batch["token_gene"][own]] @ encoder.gene.weight.T  # sqrt(16)
        x = x + encoder.value(batch["token_value"][own])
        straight = rotation(torch.zeros(len(x), 2).double(), TOKENS.head_width, 50.0, 6400.0)
        for block in encoder.blocks.blocks:
            x = plain_block(block, x, straight, torch.ones(len(x), dtype=torch.bool))  # type: ignore[arg-type]
        expected[place] += encoder.mix(rms(x, encoder.blocks.norm.weight).mean(0))
    torch.testing.assert_close(content, expected)
    sizes = torch.stack([size_of(encoder, batch, i) for i in range(len(out))])
    torch.testing.assert_close(out, expected + sizes)


def test_order_of_tokens_means_nothing() -> None:
    genes, encoder, batch = GeneEmbedding(N_GENES, 16).double(), token_encoder(), double(make_batch(config=TOKENS))
    turned = dict(batch)
    order = torch.cat([torch.arange(a, b).flip(0) for a, b in pairwise(batch["token_offsets"].tolist())])
    turned |= {name: batch[name][order] for name in ("token_gene", "token_value")}
    torch.testing.assert_close(encoder(genes, turned)[0], encoder(genes, batch)[0])


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_content_knows_neither_depth_nor_number_of_genes(expression: str) -> None:
    config = dataclasses.replace(CONFIG, expression=expression)
    genes, encoder, batch = GeneEmbedding(N_GENES, 16), expression_encoder(config), make_batch(config=config)
    before = encoder(genes, batch)
    after = encoder(genes, batch | {name: batch[name] + 1 for name in ("input_log_depth", "input_log_genes")})
    assert torch.equal(before[1], after[1]) and (before[0] != after[0]).any(-1).all()


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_batch_without_any_entry_encodes_and_has_zero_gradients(expression: str) -> None:
    config = dataclasses.replace(CONFIG, expression=expression)
    genes, encoder, batch = GeneEmbedding(N_GENES, 16), expression_encoder(config), make_batch(config=config)
    batch |= {"input_gene": torch.zeros(0).long(), "input_value": torch.zeros(0)}
    batch["input_offsets"] = torch.zeros_like(batch["input_offsets"])
    batch["visible"][:] = False
    out, content = encoder(genes, completed(batch))
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.equal(content, encoder.project.bias.expand_as(content))
    for parameter in (*genes.parameters(), *encoder.parameters()):
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
    assert genes.weight.grad is not None and not genes.weight.grad.any()


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("count", [0, 1, 50_000])
def test_any_count_encodes(count: int, expression: str) -> None:
    """A lone profile of one gene, and of none."""
    shown = torch.ones(1, dtype=torch.bool).numpy()
    row = torch.zeros(min(count, 1), dtype=torch.long).numpy()
    found = tokens.choose(
        row, row, row + count, shown, torch.ones(N_GENES, dtype=torch.bool).numpy(),
        torch.full((N_GENES,), 1 / N_GENES).double().numpy(), 1e4, tokens.TokenSpec(4, 4), None,
    )  # fmt: skip
    batch = {name: torch.from_numpy(array) for name, array in tokens.pack([found]).items()}
    batch |= {name: torch.full((1, 1), float(count)).log1p() for name in ("input_log_depth", "input_log_genes")}
    batch |= {"visible": torch.ones(1, 1, dtype=torch.bool), "region_group": torch.zeros(1).long()}
    batch |= {"input_gene": torch.from_numpy(row), "input_value": torch.full((len(row),), 1e4).log1p()}
    batch |= {"input_offsets": torch.zeros(1).long(), "shown_gene": torch.arange(N_GENES)}
    batch |= {"shown_value": torch.full((N_GENES,), 1e4 / N_GENES).log1p(), "shown_offsets": torch.tensor([0, N_GENES])}
    encoder = expression_encoder(dataclasses.replace(TOKENS, expression=expression))
    initialise(encoder, 0)
    assert torch.isfinite(encoder(GeneEmbedding(N_GENES, 16), batch)[0]).all()


def test_rows_and_sums_of_described_genes_equal_their_formula() -> None:
    genes = described()
    assert genes.project is not None
    kept = torch.arange(N_GENES) % 3 != 0
    table = genes.weight * kept[:, None] + genes.descriptor @ genes.project.weight.T / 4  # sqrt(16)
    gene, offsets = torch.tensor([3, 4, 9, 4, 1]), torch.tensor([0, 2, 2])
    value = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.1]).double()
    torch.testing.assert_close(genes(gene, kept=kept), table[gene])
    rows = value[:, None] * table[gene]
    sums = torch.stack([rows[:2].sum(0), torch.zeros(16).double(), rows[2:].sum(0)])
    torch.testing.assert_close(genes(gene, offsets, value, kept), sums)
    whole = genes.weight + genes.descriptor @ genes.project.weight.T / 4
    torch.testing.assert_close(genes(gene), whole[gene])


def test_a_gene_that_is_left_to_its_descriptor_has_no_gradient_of_its_own() -> None:
    genes = described()
    kept = torch.arange(N_GENES) != 4
    (genes(torch.tensor([3, 4]), kept=kept).sum() + genes(
        torch.tensor([4, 5]), torch.tensor([0]), torch.ones(2).double(), kept
    ).sum()).backward()  # fmt: skip
    assert genes.weight.grad is not None and genes.weight.grad.any(-1).nonzero().flatten().tolist() == [3, 5]
    assert genes.project is not None and genes.project.weight.grad is not None and genes.project.weight.grad.any()
