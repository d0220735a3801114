"""Level 2, expression: the gene table, and the encoders of what a profile shows of its counts.

In: the visible (profile, gene) entries of a batch, what the shown genes are expected to be, tokens chosen from the
entries; their depth and number. Out: two vectors per profile: the code, and what of it is content alone, without depth
and number of genes.
Shapes: B groups, R regions, N profiles, Z visible entries, Q tokens packed, V profiles with tokens, K genes,
G vocabulary, C columns of the descriptors, E gene width, D width of the level, F fusion width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storm.model.layers import Packing, Transformer
from storm.presets import ModelConfig

Code = tuple[Tensor, Tensor]  # [R, N, F] each: everything, and content


class GeneEmbedding(nn.Embedding):
    """The vectors e_g of the vocabulary; one module, called by the encoders and by the decoder.

    e_g = E[g], and with descriptors e_g = E[g] + P(descriptor_g) / sqrt(E): for standardised columns both parts have
    the same size at the start. Where `kept` says so E[g] is left out: P learns to stand for a gene alone, as it must
    for one that the vocabulary lacks.
    """

    descriptor: Tensor
    centre: Tensor
    scale: Tensor

    def __init__(self, n_genes: int, width: int, columns: int = 0) -> None:
        super().__init__(n_genes, width)
        self.project = nn.Linear(columns, width, bias=False) if columns else None
        if columns:
            self.register_buffer("descriptor", torch.zeros(n_genes, columns))  # standardised
            self.register_buffer("centre", torch.zeros(columns))
            self.register_buffer("scale", torch.ones(columns))

    def forward(
        self, gene: Tensor, offsets: Tensor | None = None, value: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """Rows [K, E] of `gene` [K]; with `offsets` [M] and `value` [Z] the M sums of value * row, [M, E].

        Args:
            kept: bool [G], the genes whose E[g] takes part; None = all.
        """
        share = None if kept is None else kept[gene].to(self.weight.dtype)
        if offsets is None or value is None:
            rows = super().forward(gene)
            rows = rows if share is None else rows * share[:, None]
            return rows if self.project is None else rows + self.describe(self.descriptor[gene])
        own = value if share is None else value * share
        total = F.embedding_bag(gene, self.weight, offsets, mode="sum", per_sample_weights=own)
        if self.project is None:
            return total
        return total + self.describe(
            F.embedding_bag(gene, self.descriptor, offsets, mode="sum", per_sample_weights=value)
        )

    def describe(self, standardised: Tensor) -> Tensor:
        """What descriptors [K, C], in the columns' own units of spread, say of e_g: [K, E]."""
        assert self.project is not None
        return self.project(standardised) * self.embedding_dim**-0.5


class BagEncoder(nn.Module):
    """z = W [sum_g (v_g - m_g) e_g sqrt(E / n)] + MLP(log depth, log genes), over the n genes that are shown.

    No panel is built into it, and it is cheap. m_g is v_g at the expected share: without it a code would tell first of
    all which genes are shown. e_g has length 1, so sqrt(E) brings the sum to unit coordinates, as the features of an
    image come: one token ten times as long as another leaves the shorter one unlearned. Depth and number of genes come
    to the sum from beside, so that it has neither.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.fusion_width
        self.size = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.project = nn.Linear(config.gene_width, width)

    def forward(self, genes: GeneEmbedding, batch: dict[str, Tensor]) -> Code:
        """See `Code`; a profile without entries gets the code of depth 0."""
        content_RNF = self.content(genes, batch).unflatten(0, batch["visible"].shape)
        size_RN2 = torch.stack([batch["input_log_depth"], batch["input_log_genes"]], dim=-1)
        return content_RNF + self.size(size_RN2 / 8), content_RNF  # 8: log of a whole spot

    def content(self, genes: GeneEmbedding, batch: dict[str, Tensor]) -> Tensor:
        """[R N, F] of each profile; the bias alone where nothing is shown."""
        kept, offsets, starts = batch.get("gene_kept"), batch["input_offsets"], batch["shown_offsets"]
        ends = torch.cat([offsets[1:], offsets.new_tensor([len(batch["input_gene"])])])
        bag_ME = genes(batch["input_gene"], offsets, batch["input_value"], kept)
        mean_BE = genes(batch["shown_gene"], starts[:-1], batch["shown_value"], kept)
        scale_B = (genes.embedding_dim / starts.diff().clamp_min(1)).to(mean_BE.dtype).sqrt()
        group_M = batch["region_group"].repeat_interleave(batch["visible"].shape[1])
        centred_ME = (bag_ME - mean_BE[group_M]) * (scale_B[group_M] * (ends > offsets))[:, None]
        content_MF: Tensor = self.project(centred_ME)
        return content_MF


class TokenEncoder(BagEncoder):
    """The bag, and a set transformer over each profile's tokens: z = bag + W [their mean] + MLP(log depth, log genes).

    A token is W e_g sqrt(E) + MLP(v, log1p(count), percentile of the count's rank in its profile). Tokens of all
    profiles are packed, so that nothing is padded, and a profile that shows no gene costs nothing. A mean over hundreds
    of tokens hardly differs between profiles at the start: what is there to be learned from comes with the bag.
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False) -> None:
        super().__init__(config)
        width = config.expression_width
        self.gene = nn.Linear(config.gene_width, width, bias=False)
        self.value = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = Transformer(config.expression_depth, width, config.head_width, activation_checkpointing)
        self.mix = nn.Linear(width, config.fusion_width, bias=False)

    def content(self, genes: GeneEmbedding, batch: dict[str, Tensor]) -> Tensor:
        """[R N, F] of each profile; the bias alone where nothing is shown."""
        offsets, profile_V = batch["token_offsets"], batch["token_profile"]
        gene_QE = genes(batch["token_gene"], kept=batch.get("gene_kept")) * genes.embedding_dim**0.5
        tokens_QD = self.gene(gene_QE) + self.value(batch["token_value"])
        packing = Packing(offsets, len(batch["token_slots"]))
        tokens_QD = self.blocks(tokens_QD[None], context=packing)[0]
        every = torch.arange(len(tokens_QD), device=tokens_QD.device)
        mean_VD = F.embedding_bag(every, tokens_QD, offsets[:-1], mode="mean")
        mixed_VF = self.mix(mean_VD) * (profile_V >= 0)[:, None]  # the dummy weighs nothing
        content_MF = super().content(genes, batch)
        return content_MF.index_add(0, profile_V.clamp_min(0), mixed_VF.to(content_MF.dtype))


def expression_encoder(config: ModelConfig, activation_checkpointing: bool = False) -> BagEncoder | TokenEncoder:
    """The encoder that the config names."""
    return TokenEncoder(config, activation_checkpointing) if config.expression == "tokens" else BagEncoder(config)
