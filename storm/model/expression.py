"""Level 2, expression: the gene table, and the encoder of what a profile shows of its counts.

In: the visible (profile, gene) entries of a batch, their depth and number. Out: two vectors per profile, of all that
is known of its counts, and of its content alone: which genes, and how they stand to each other.
Shapes: R regions, N profiles, Z visible entries, K genes, E gene width, D fusion width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storm.presets import ModelConfig


class GeneEmbedding(nn.Embedding):
    """The vectors e_g of the vocabulary; one module, called by the encoder (sums) and the decoder (rows)."""

    def forward(self, gene: Tensor, offsets: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        """Rows [K, E] of `gene` [K]; with `offsets` [M] and `value` [Z] the M sums of value * row, [M, E]."""
        if offsets is None:
            return super().forward(gene)
        return F.embedding_bag(gene, self.weight, offsets, mode="sum", per_sample_weights=value)


class BagEncoder(nn.Module):
    """z = W [sum_g v_g e_g / sqrt(n_g)] + MLP(log depth, log genes): no panel is built into it, and it is cheap."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.fusion_width
        self.project = nn.Linear(config.gene_width, width)
        self.size = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, genes: GeneEmbedding, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(vector, content), each [R, N, D]; a profile without entries gets the code of depth 0.

        The content is told neither depth nor number of genes: it is what image and expression are aligned by.
        """
        offsets, value = batch["input_offsets"], batch["input_value"]
        ends = torch.cat([offsets[1:], offsets.new_tensor([len(value)])])
        bag_ME = genes(batch["input_gene"], offsets, value)
        bag_ME = bag_ME * (ends - offsets).clamp_min(1).to(bag_ME.dtype).rsqrt()[:, None]
        size_RN2 = torch.stack([batch["input_log_depth"], batch["input_log_genes"]], dim=-1)
        content_RND = self.project(bag_ME).unflatten(0, size_RN2.shape[:2])
        return content_RND + self.size(size_RN2 / 8), content_RND  # 8: log of a whole spot
