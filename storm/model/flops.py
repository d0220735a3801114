"""What the model costs, by formula: parameters and matrix-product FLOPs of each level, activations kept for backward.

In: a ModelConfig, the length of the vocabulary, the sizes of a batch. Out: {level: number}. A FLOP is a multiplication
or an addition of a matrix product, as torch's FlopCounterMode counts them; norms, softmax, sampling under footprints
and the losses are left out, and so is what activation checkpointing or a fused attention computes twice. An encoder of
timm's has no formula here: its forward pass is counted once on the meta device (storm.model.encoders.facts), and its
backward pass is taken as twice that, with LoRA as once that, frozen as nothing.

Levels: morphology (tiles), expression (counts, footprints, fusion), space (regions), heads.
"""

from dataclasses import dataclass

from torch import Tensor

from storm.model import encoders
from storm.model.layers import hidden_width
from storm.presets import ModelConfig
from storm.schema import PLATFORMS, TILE_STATS

PARTS = 4  # tokens of the fusion: footprint, window, expression, measurement
TOLD = len(PLATFORMS) - 1


@dataclass(frozen=True)
class Sizes:
    """How much of everything one batch, or any number of batches, holds; sums over regions."""

    tiles: float  # encoded
    slots: float  # tiles present, encoded or hidden
    profiles: float
    tokens: float  # of the space level: registers, tiles present, profiles
    context: float  # of these, what can be attended to
    pairs: float  # token x context of the same region
    genes: float  # loss genes, K


def sizes(batch: dict[str, Tensor], registers: int, padded: bool = False) -> Sizes:
    """Sizes of a batch: what its samples hold, or with `padded` what is computed, padding included."""
    present, profile = batch["tile_present"], batch["profile"]
    encoded_R = (present & ~batch["tile_hidden"]).sum(1)
    context_R = registers + encoded_R + batch["visible"].sum(1)
    tokens_R = registers + present.sum(1) + profile.sum(1)
    if not padded:
        pairs_R = tokens_R * context_R
        return Sizes(
            float(batch["tile_weight"].sum()), int(present.sum()), int(profile.sum()), int(tokens_R.sum()),
            int(context_R.sum()), int(pairs_R.sum()), len(batch["genes"]),
        )  # fmt: skip
    regions, width = len(present), registers + present.shape[1] + profile.shape[1]
    m = int(context_R.max())
    return Sizes(
        len(batch["tile_weight"]), present.numel(), profile.numel(), regions * width, regions * m, regions * width * m,
        len(batch["genes"]),
    )  # fmt: skip


def parameters(config: ModelConfig, n_genes: int) -> dict[str, int]:
    """Parameters of each level."""
    image, gene, fusion, space = config.image_width, config.gene_width, config.fusion_width, config.space_width
    small = _linear(3, fusion) + _linear(2, fusion) + 2 * _linear(fusion, fusion)  # measurement; depth and genes
    tables = (PARTS - 1) + len(PLATFORMS) + (1 + len(config.organs))  # absent, platform, organ
    return {
        "morphology": encoders.parameters(config) if config.encoder != "vit"
        else _linear(3 * config.patch_px**2, image) + _transformer(config.image_depth, image, config),
        "expression": n_genes * gene + _linear(gene, fusion) + 2 * _linear(image, fusion) + small + tables * fusion
        + _transformer(config.fusion_depth, fusion, config) + _linear(fusion, space),
        "space": _linear(image, space) + (1 + config.registers) * space
        + _transformer(config.space_depth, space, config),
        "heads": space * gene + n_genes * (2 + TOLD) + TOLD + 1
        + _linear(space + TOLD, space) + _linear(space, 2) + _linear(space, len(TILE_STATS))
        + (_linear(space, image) if config.image_target == "feature" else 0),
    }  # fmt: skip


def _linear(into: int, out: int) -> int:
    return into * out + out


def _transformer(depth: int, width: int, config: ModelConfig) -> int:
    block = 4 * width**2 + 3 * width * hidden_width(width) + 2 * width + 2 * config.head_width
    return depth * block + width


def forward(config: ModelConfig, size: Sizes) -> dict[str, float]:
    """FLOPs of one forward pass at each level."""
    return {level: 2 * (whole + first) for level, (whole, first) in _products(config, size).items()}


def training(config: ModelConfig, size: Sizes, encoded: bool = True) -> dict[str, float]:
    """FLOPs of one forward and one backward pass: thrice the forward pass, twice for products with the input itself.

    `encoded`: the tiles were, and did not come as cached features.
    """
    products = _products(config, size)
    found = {level: 2 * (3 * whole + 2 * first) for level, (whole, first) in products.items()}
    whole, first = products["morphology"]
    anchor = whole if encoders.is_anchored(config) else 0.0
    passes = {"full": 3 * whole + 2 * first, "lora": 2 * whole, "frozen": whole + first}
    return found | {"morphology": 2 * (passes[config.encoder_train] + anchor) if encoded else 0.0}


def _products(config: ModelConfig, size: Sizes) -> dict[str, tuple[float, float]]:
    """Multiply-adds of a forward pass: of products whose two factors need a gradient, and of those where one does."""
    image, gene, fusion, space = config.image_width, config.gene_width, config.fusion_width, config.space_width
    patches = size.tiles * (config.tile_px // config.patch_px) ** 2
    pairs = patches * (config.tile_px // config.patch_px) ** 2
    parts = PARTS * size.profiles
    fused = gene * fusion + 2 * fusion**2 + 2 * image * fusion + fusion * space
    heads = space * gene + gene * size.genes + (space + TOLD) * space + 2 * space
    pixels = 3 * config.patch_px**2
    encoder = {
        "vit": (config.image_depth * _block(image, patches, patches, pairs), patches * pixels * image),
        "colour": (0.0, size.tiles * encoders.ColourEncoder.STATISTICS * image),
    }
    return {
        "morphology": encoder.get(config.encoder) or (size.tiles * encoders.facts(config).flops / 2, 0.0),
        "expression": (
            size.profiles * fused + config.fusion_depth * _block(fusion, parts, parts, PARTS * parts),
            size.profiles * 5 * fusion,
        ),
        "space": (
            size.tiles * image * space + config.space_depth * _block(space, size.tokens, size.context, size.pairs), 0.0
        ),
        "heads": (
            size.profiles * heads + size.slots * space * (len(TILE_STATS) + image * (config.image_target == "feature")),
            size.profiles * (TOLD + 1),
        ),
    }  # fmt: skip


def _block(width: int, tokens: float, context: float, pairs: float) -> float:
    """Multiply-adds of one block: query, output and MLP of every token, key and value of the context, two per pair."""
    return width * (tokens * (2 * width + 3 * hidden_width(width)) + context * 2 * width + 2 * pairs)


def activation_bytes(config: ModelConfig, size: Sizes, bf16: bool, checkpointing: bool) -> float:
    """Estimate of what a forward pass keeps for its backward pass, from the tensors that autograd saves.

    Per token and block: in fp32 14 widths and 4 hidden widths, under bf16 autocast half of these in 2 bytes. Beside the
    blocks: the pixels as patches, and a dozen arrays of profiles x loss genes. With `checkpointing` a block keeps its
    input alone, and one block at a time is complete.
    """
    patches = size.tiles * (config.tile_px // config.patch_px) ** 2
    levels = [
        (0 if config.encoder_train == "frozen" else config.image_depth, patches, config.image_width),
        (config.fusion_depth, PARTS * size.profiles, config.fusion_width),
        (config.space_depth, size.tokens, config.space_width),
    ]  # fmt: skip
    a, b = (8 * 4 + 8 * 2, 4 * 2) if bf16 else (14 * 4, 4 * 4)
    whole = [tokens * (a * width + b * hidden_width(width)) for _, tokens, width in levels]
    if checkpointing:
        kept = sum(depth * tokens * width * 4 for depth, tokens, width in levels) + max(whole)
    else:
        kept = sum(depth * block for (depth, _, _), block in zip(levels, whole, strict=True))
    return kept + patches * 3 * config.patch_px**2 * (2 if bf16 else 4) + 12 * 4 * size.profiles * size.genes
