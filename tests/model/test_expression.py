"""The bag encoder against its formula, one profile after the other."""

from itertools import pairwise

import torch

from storm.model.expression import BagEncoder, GeneEmbedding
from tests.model.batches import CONFIG, N_GENES, double, make_batch


def test_bag_equals_its_formula() -> None:
    torch.manual_seed(0)
    genes, encoder, batch = GeneEmbedding(N_GENES, 16).double(), BagEncoder(CONFIG).double(), double(make_batch())
    out, content = (x.flatten(0, 1) for x in encoder(genes, batch))
    starts = [*batch["input_offsets"].tolist(), len(batch["input_gene"])]
    for i, (start, end) in enumerate(pairwise(starts)):
        total = torch.zeros(16).double()
        for gene, value in zip(batch["input_gene"][start:end], batch["input_value"][start:end], strict=True):
            total += value * genes.weight[gene] / (end - start) ** 0.5
        size = torch.stack([batch["input_log_depth"].flatten()[i], batch["input_log_genes"].flatten()[i]])
        torch.testing.assert_close(content[i], encoder.project(total))
        torch.testing.assert_close(out[i], encoder.project(total) + encoder.size(size / 8))


def test_a_batch_without_any_entry_encodes_and_has_zero_gradients() -> None:
    genes, encoder, batch = GeneEmbedding(N_GENES, 16), BagEncoder(CONFIG), make_batch()
    batch |= {"input_gene": torch.zeros(0).long(), "input_value": torch.zeros(0)}
    batch["input_offsets"] = torch.zeros_like(batch["input_offsets"])
    out, _ = encoder(genes, batch)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert genes.weight.grad is not None and not genes.weight.grad.any()
