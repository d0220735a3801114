"""The model: tiles -> profiles -> region -> heads.

In: a batch (storm.schema.BATCH, and TOKENS and GENE_KEPT where the config asks for them). Out: a dict of tensors,

    log_composition [R, N, K]   log share of each loss gene in the counts of the region's target panel
    log_dispersion  [R, N, K]   log size r of the negative binomial (likelihoods nb and zinb)
    zero_logit      [R, N, K]   logit of a zero beside those of the negative binomial (zinb)
    lognorm         [R, N, K]   log1p(1e4 * composition) (lognorm)
    depth_mean      [R, N]      slide-centred log density of counts, and
    depth_log_var   [R, N]      its log variance
    tile_stats      [R, C, S]   stain statistics, meant for hidden tiles
    tile_feature    [R, C, D]   with image_target=feature in their place in the loss: the standardised encoder feature
    tile_anchor     [T]         of an encoder that trains from given weights: cosine of its summary to that of the start
    embedding       [R, N, D]   the profile's vector, as exported
    align_image, align_expression [R, N, A]   unit vectors of window and counts, and
    align_scale     []          the scale of their products (with an align_width)

Every module runs in every forward; what is absent is masked. Shapes: R regions, C tiles per region, T tiles packed,
N profiles per region, K loss genes, S tile statistics, G vocabulary, D width of the level, F fusion width.
"""

import math

import torch
from torch import Tensor, nn

from storm.model.align import Align
from storm.model.encoders import TimmEncoder, tile_encoder
from storm.model.expression import GeneEmbedding, expression_encoder
from storm.model.footprint import FootprintReader
from storm.model.heads import Decoder, DepthHead, TileHead
from storm.model.layers import Transformer, ZeroLinear, initialise
from storm.model.spatial import Space
from storm.presets import ModelConfig
from storm.schema import PLATFORMS

LOG_SPOT_UM = math.log(55)  # footprint sizes are fed relative to a Visium spot


class Fusion(nn.Module):
    """Level 2: one vector from what is known of a profile alone.

    Four tokens: morphology under the footprint, morphology of the window, expression, and the measurement (footprint
    size, platform, organ, how much of footprint and window was readable). Their mean is read out: on the residual each
    of them reaches the next level from the first step on, which one read-out token alone would have to learn first.
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        width = config.fusion_width
        self.footprint = nn.Linear(config.image_width, width)
        self.window = nn.Linear(config.image_width, width)
        self.absent = nn.Embedding(3, width)  # in place of a missing footprint, window or expression
        self.measure = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width))
        self.platform = nn.Embedding(len(PLATFORMS), width)
        self.organ = nn.Embedding(1 + len(config.organs), width)
        self.blocks = Transformer(config.fusion_depth, width, config.head_width, activation_checkpointing)
        self.out = nn.Linear(width, config.space_width)

    def forward(
        self, feature_RN2D: Tensor, valid_RN2: Tensor, expression_RNF: Tensor, batch: dict[str, Tensor]
    ) -> Tensor:
        """Profile vectors [R, N, D]."""
        known = [self.footprint(feature_RN2D[:, :, 0]), self.window(feature_RN2D[:, :, 1]), expression_RNF]
        present_RN3 = torch.cat([valid_RN2 > 0, batch["visible"][..., None]], dim=-1)
        absent_3F = self.absent(torch.arange(3, device=present_RN3.device))
        parts_RN3F = torch.where(present_RN3[..., None], torch.stack(known, dim=2), absent_3F)
        size_RN1 = batch["footprint_input"][..., None] - LOG_SPOT_UM
        context_RF = self.platform(batch["platform"]) + self.organ(batch["organ"])
        measure_RNF = self.measure(torch.cat([size_RN1, valid_RN2], dim=-1)) + context_RF[:, None]
        tokens = torch.cat([parts_RN3F, measure_RNF[:, :, None]], dim=2).flatten(0, 1)
        return self.out(self.blocks(tokens).mean(1)).unflatten(0, valid_RN2.shape[:2])


class Standard(nn.Module):
    """Columns of a frozen encoder's features brought to mean 0 and sd 1, of training tiles where a cache knows them."""

    mean: Tensor
    sd: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("sd", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D]."""
        return (x - self.mean) / self.sd


class Storm(nn.Module):
    """STORM (this project).

    Args:
        config: sizes.
        n_genes: length of the vocabulary, G.
        seed: of the initial weights, which are the same on every rank.
        activation_checkpointing: recompute each block's activations in the backward pass.
        anchored: tell `tile_anchor`; of an encoder that trains from weights it was given.
    """

    def __init__(
        self, config: ModelConfig, n_genes: int, seed: int = 0, activation_checkpointing: bool = False,
        anchored: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # torch's constructors draw from the global state; leave it as it was
            torch.manual_seed(seed)  # of what timm draws itself
            self.morphology = tile_encoder(config, activation_checkpointing, anchored)
            self.footprint = FootprintReader(config)
            self.genes = GeneEmbedding(n_genes, config.gene_width, config.descriptor_width)
            self.expression = expression_encoder(config, activation_checkpointing)
            self.fusion = Fusion(config, activation_checkpointing)
            self.tile = nn.Linear(config.image_width, config.space_width)
            self.hidden_tile = nn.Embedding(1, config.space_width)
            self.space = Space(config, activation_checkpointing)
            self.decoder = Decoder(config, n_genes)
            self.depth = DepthHead(config)
            self.tile_stats = TileHead(config)
            self.align = Align(config) if config.align_width else None
            by_feature = config.image_target == "feature"
            self.standard = Standard(config.image_width) if config.encoder_train == "frozen" else nn.Identity()
            self.tile_feature = ZeroLinear(config.space_width, config.image_width) if by_feature else None
        initialise(self, seed)

    @torch.no_grad()
    def set_gene_bias(self, log_share_G: Tensor) -> None:
        """Start the decoder at the expected composition: b_g = log share."""
        self.decoder.gene_bias.weight.copy_(log_share_G[:, None])

    @torch.no_grad()
    def set_descriptors(self, descriptor_GC: Tensor, centre_C: Tensor, scale_C: Tensor) -> None:
        """The standardised table of descriptors, and the centre and scale that brought it there."""
        self.genes.descriptor.copy_(descriptor_GC)
        self.genes.centre.copy_(centre_C)
        self.genes.scale.copy_(scale_C)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the module's docstring."""
        feature_RN2D, valid_RN2, summary_TD = self._morphology(batch)
        expression_RNF, content_RNF = self.expression(self.genes, batch)
        profiles_RND = self.fusion(feature_RN2D, valid_RN2, expression_RNF, batch)

        encoded_RC = batch["tile_present"] & ~batch["tile_hidden"]
        tiles_RCD = self._place(self.tile(summary_TD), batch["tile_slot"], encoded_RC)
        context_RL = torch.cat([encoded_RC, batch["visible"]], dim=1)
        place_um_RL2 = torch.cat([batch["tile_pos_um"], batch["pos_um"]], dim=1)
        tiles_RCD, h_RND = self.space(tiles_RCD, profiles_RND, context_RL, place_um_RL2, batch["context_slots"])

        rows_KE = self.genes(batch["genes"], kept=batch.get("gene_kept"))
        depth_mean, depth_log_var = self.depth(h_RND, batch["platform"])
        found = {
            **self.decoder(h_RND, rows_KE, batch),
            "depth_mean": depth_mean,
            "depth_log_var": depth_log_var,
            "tile_stats": self.tile_stats(tiles_RCD),
            "embedding": h_RND,
            **(self.align(feature_RN2D[:, :, 1], content_RNF) if self.align else {}),
        }
        if self.tile_feature is not None:
            found["tile_feature"] = self.tile_feature(tiles_RCD)
        if isinstance(self.morphology, TimmEncoder) and self.morphology.anchored:
            found["tile_anchor"] = self.morphology.similarity(batch["tiles"], summary_TD)
        return found

    def _morphology(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Features [R, N, 2, D] of profiles, their valid share [R, N, 2], summaries [T, D] of tiles.

        From pixels, or where the batch comes with cached features (schema.FEATURES) from these, on every rank alike.
        """
        if "tile_feature" in batch:
            return batch["profile_feature"], batch["profile_valid"], batch["tile_feature"]
        if "tile_map" in batch:  # known already, see storm.tile_maps
            map_TPD, summary_TD = batch["tile_map"], batch["tile_map"].mean(1)
        else:
            map_TPD, summary_TD = self.morphology(batch["tiles"], batch["tile_weight"])
        feature_RN2D, valid_RN2 = self.footprint(map_TPD, batch)
        return self.standard(feature_RN2D), valid_RN2, self.standard(summary_TD)

    @torch.no_grad()
    def unseen(self, h_RND: Tensor, batch: dict[str, Tensor], descriptor_UC: Tensor) -> dict[str, Tensor]:
        """What is expected of genes outside the vocabulary, of profiles with the embeddings `h_RND`; their descriptors
        as the user's table has them. See `Decoder.unseen`."""
        standard_UC = (descriptor_UC - self.genes.centre) / self.genes.scale
        # A column that is one value for the whole vocabulary has taught P nothing: there P is as it was drawn.
        spread_C = self.genes.descriptor.square().sum(0)
        rows_UE = self.genes.describe(standard_UC * (spread_C > spread_C.max() / 2))
        return self.decoder.unseen(h_RND, rows_UE, self.genes(batch["genes"]), batch)

    def _place(self, tile_TD: Tensor, slot_T: Tensor, encoded_RC: Tensor) -> Tensor:
        """[R, C, D]: packed tiles at their slots, the learned vector of a hidden tile elsewhere (under a dummy too)."""
        flat = tile_TD.new_zeros(encoded_RC.numel(), tile_TD.shape[1])
        tiles_RCD = flat.index_add(0, slot_T.clamp_min(0), tile_TD).view(*encoded_RC.shape, -1)
        hidden_1D = self.hidden_tile(slot_T.new_zeros(1)).to(tile_TD.dtype)
        return torch.where(encoded_RC[..., None], tiles_RCD, hidden_1D)
