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
    expressed: float = 0.0  # profiles that are encoded as tokens
    shown: float = 0.0  # their tokens
    shown_pairs: float = 0.0  # token x token of the same profile


def sizes(batch: dict[str, Tensor], registers: int, padded: bool = False) -> Sizes:
    """Sizes of a batch: what its samples hold, or with `padded` what is computed, padding included."""
    present, profile = batch["tile_present"], batch["profile"]
    encoded_R = (present & ~batch["tile_hidden"]).sum(1)
    context_R = registers + encoded_R + batch["visible"].sum(1)
    tokens_R = registers + present.sum(1) + profile.sum(1)
    shown = _shown(batch, padded)
    if not padded:
        pairs_R = tokens_R * context_R
        return Sizes(
            float(batch["tile_weight"].sum()), int(present.sum()), int(profile.sum()), int(tokens_R.sum()),
            int(context_R.sum()), int(pairs_R.sum()), len(batch["genes"]), *shown,
        )  # fmt: skip
    regions, width = len(present), registers + present.shape[1] + profile.shape[1]
    m = registers + len(batch["context_slots"])
    return Sizes(
        len(batch["tile_weight"]), present.numel(), profile.numel(), regions * width, regions * m, regions * width * m,
        len(batch["genes"]), *shown,
    )  # fmt: skip


def _shown(batch: dict[str, Tensor], padded: bool) -> tuple[float, float, float]:
    """Profiles encoded as tokens, their tokens and pairs of tokens; the dummy where it is computed."""
    if "token_offsets" not in batch or not (padded or bool((batch["token_profile"] >= 0).any())):
        return 0.0, 0.0, 0.0
    lengths = batch["token_offsets"].diff()
    return len(lengths), int(lengths.sum()), int(lengths.square().sum())


def parameters(config: ModelConfig, n_genes: int) -> dict[str, int]:
    """Parameters of each level."""
    image, gene, fusion, space = config.image_width, config.gene_width, config.fusion_width, config.space_width
    small = _linear(3, fusion) + _linear(2, fusion) + 2 * _linear(fusion, fusion)  # measurement; depth and genes
    genes = n_genes * gene + config.descriptor_width * gene
    slopes = space // config.head_width if config.position == "distance_bias" and config.space_depth else 0
    tables = (PARTS - 1) + len(PLATFORMS) + (1 + len(config.organs))  # absent, platform, organ
    return {
        "morphology": encoders.parameters(config) if config.encoder != "vit"
        else _linear(3 * config.patch_px**2, image) + _transformer(config.image_depth, image, config),
        "expression": genes + _encoder(config) + 2 * _linear(image, fusion) + small + tables * fusion
        + _transformer(config.fusion_depth, fusion, config) + _linear(fusion, space),
        "space": _linear(image, space) + (1 + config.registers) * space + slopes
        + _transformer(config.space_depth, space, config),
        "heads": space * gene + n_genes * (1 + TOLD) + _noise_tables(config, n_genes) + _align(config)
        + _linear(space + TOLD, space) + _linear(space, 2) + _linear(space, len(TILE_STATS))
        + (_linear(space, image) if config.image_target == "feature" else 0),
    }  # fmt: skip


def _noise_tables(config: ModelConfig, n_genes: int) -> int:
    """Parameters that the likelihood adds to the composition's."""
    return {"nb": 1, "zinb": 2}.get(config.likelihood, 0) * n_genes + (
        TOLD + 1 if config.likelihood in ("nb", "zinb") else 0
    )


def _align(config: ModelConfig) -> int:
    """Parameters of the two projections and their scale."""
    return (config.image_width + config.fusion_width) * config.align_width + (config.align_width > 0)


def _encoder(config: ModelConfig) -> int:
    """Parameters from genes to the code of a profile, beside those of its depth."""
    bag, width = _linear(config.gene_width, config.fusion_width), config.expression_width
    if config.expression == "bag":
        return bag
    token = config.gene_width * width + _linear(3, width) + _linear(width, width)
    return bag + token + _transformer(config.expression_depth, width, config) + width * config.fusion_width


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
    anchor = whole if config.is_anchored else 0.0
    passes = {"full": 3 * whole + 2 * first, "lora": 2 * whole, "frozen": whole + first}
    return found | {"morphology": 2 * (passes[config.encoder_train] + anchor) if encoded else 0.0}


def _products(config: ModelConfig, size: Sizes) -> dict[str, tuple[float, float]]:
    """Multiply-adds of a forward pass: of products whose two factors need a gradient, and of those where one does."""
    image, gene, fusion, space = config.image_width, config.gene_width, config.fusion_width, config.space_width
    patches = size.tiles * (config.tile_px // config.patch_px) ** 2
    pairs = patches * (config.tile_px // config.patch_px) ** 2
    parts = PARTS * size.profiles
    fused = 2 * fusion**2 + 2 * image * fusion + fusion * space
    encoded, first = _encoding(config, size)
    heads = space * gene + gene * size.genes + (space + TOLD) * space + 2 * space
    heads += (image + fusion) * config.align_width
    pixels = 3 * config.patch_px**2
    encoder = {
        "vit": (config.image_depth * _block(image, patches, patches, pairs), patches * pixels * image),
        "colour": (0.0, size.tiles * encoders.ColourEncoder.STATISTICS * image),
    }
    return {
        "morphology": encoder.get(config.encoder) or (size.tiles * encoders.facts(config).flops / 2, 0.0),
        "expression": (
            size.profiles * fused + encoded + config.fusion_depth * _block(fusion, parts, parts, PARTS * parts),
            size.profiles * 5 * fusion + first,
        ),
        "space": (
            size.tiles * image * space + config.space_depth * _block(space, size.tokens, size.context, size.pairs), 0.0
        ),
        "heads": (
            size.profiles * heads + size.slots * space * (len(TILE_STATS) + image * (config.image_target == "feature")),
            size.profiles * (TOLD + 1) + size.genes * config.descriptor_width * gene,
        ),
    }  # fmt: skip


def _encoding(config: ModelConfig, size: Sizes) -> tuple[float, float]:
    """Of what a profile shows of its genes; as `_products`."""
    gene, fusion, width = config.gene_width, config.fusion_width, config.expression_width
    bag = size.profiles * gene * fusion, size.profiles * config.descriptor_width * gene
    if config.expression == "bag":
        return bag
    blocks = config.expression_depth * _block(width, size.shown, size.shown, size.shown_pairs)
    whole = size.shown * (gene * width + width**2) + size.expressed * width * fusion + blocks
    return bag[0] + whole, bag[1] + size.shown * (3 * width + config.descriptor_width * gene)


def _block(width: int, tokens: float, context: float, pairs: float) -> float:
    """Multiply-adds of one block: query, output and MLP of every token, key and value of the context, two per pair."""
    return width * (tokens * (2 * width + 3 * hidden_width(width)) + context * 2 * width + 2 * pairs)


def activation_bytes(config: ModelConfig, size: Sizes, bf16: bool, checkpointing: bool) -> float:
    """Estimate of what a forward pass keeps for its backward pass, from the tensors that autograd saves.

    Per token and block: in fp32 10 widths and 3 hidden widths (as storm.model.fused keeps them), under bf16 autocast 8
    widths in fp32, 8 and 4 hidden widths in bf16. Beside the blocks: the pixels as patches, a dozen arrays of profiles
    x loss genes, and the bias of distances. With `checkpointing` a block keeps its input alone, and one block at a time
    is complete.
    """
    patches = size.tiles * (config.tile_px // config.patch_px) ** 2
    levels = _levels(config, size)
    whole = _blocks(levels, bf16)
    if checkpointing:
        kept = sum(depth * tokens * width * 4 for depth, tokens, width in levels) + max(whole)
    else:
        kept = sum(depth * block for (depth, _, _), block in zip(levels, whole, strict=True))
    if config.position == "distance_bias":  # fp32, and under autocast a copy per block
        heads = config.space_width // config.head_width
        kept += heads * size.pairs * (4 + (2 * config.space_depth if bf16 else 0))
    return kept + patches * 3 * config.patch_px**2 * (2 if bf16 else 4) + 12 * 4 * size.profiles * size.genes


def working_bytes(config: ModelConfig, size: Sizes, bf16: bool) -> float:
    """Estimate of what comes and goes beside that in a backward pass: about as much as its largest block keeps."""
    return max(_blocks(_levels(config, size), bf16))


def _levels(config: ModelConfig, size: Sizes) -> list[tuple[int, float, int]]:
    """(blocks, tokens, width) of each transformer that takes a gradient."""
    patches = size.tiles * (config.tile_px // config.patch_px) ** 2
    return [
        (0 if config.encoder_train == "frozen" else config.image_depth, patches, config.image_width),
        (config.expression_depth, size.shown, config.expression_width),
        (config.fusion_depth, PARTS * size.profiles, config.fusion_width),
        (config.space_depth, size.tokens, config.space_width),
    ]


def _blocks(levels: list[tuple[int, float, int]], bf16: bool) -> list[float]:
    """Bytes that one block of each keeps."""
    a, b = (8 * 4 + 8 * 2, 4 * 2) if bf16 else (10 * 4, 3 * 4)
    return [tokens * (a * width + b * hidden_width(width)) for _, tokens, width in levels]
