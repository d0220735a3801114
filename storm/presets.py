"""The model's own configuration and its four presets; a plain dataclass, so that loading an export needs no pydantic.

In: a preset name and what differs from it. Out: `ModelConfig`, as stored in every export's config.json.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any

LIKELIHOODS = ("nb", "poisson", "zinb", "lognorm")
READS = ("footprint", "tile")
EXPRESSIONS = ("bag", "tokens")  # encoders of what a profile shows of its counts
POSITIONS = ("rotary", "distance_bias", "none")  # how tokens of a region know where they lie
_MAY_BE_0 = ("registers", "align_width", "space_depth", "expression_zeros", "descriptor_width")
_MOST = 1_000_000  # of any size: beyond it products overflow before anything tells that memory ends
TIMM = "timm/"  # begins the name of an encoder that timm builds
ENCODERS, ENCODER_TRAIN, IMAGE_TARGETS = ("vit", "colour"), ("full", "frozen", "lora"), ("stain", "feature")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the three levels. Widths are multiples of their head width; the head width is a multiple of 8."""

    tile_px: int = 224  # side of a tile in pixels; the export's tile_mpp tells its microns
    tile_mpp: float = 0.5
    patch_px: int = 16
    image_width: int = 64
    image_depth: int = 2
    gene_width: int = 64  # width of a gene's embedding, shared by encoder and decoder
    fusion_width: int = 64
    fusion_depth: int = 1
    space_width: int = 64
    space_depth: int = 2
    head_width: int = 16
    registers: int = 4  # learned context tokens per region
    likelihood: str = "nb"  # of counts: one of LIKELIHOODS
    align_width: int = 0  # of the vectors that align image and expression; 0: none
    organs: tuple[str, ...] = ()  # names behind organ ids 1, 2, ...; 0 = unknown
    reads: str = "footprint"  # or "tile": each profile gets the mean of the tile that holds its centre (an ablation)
    expression: str = "bag"  # of EXPRESSIONS
    expression_width: int = 64  # of `tokens`, as the three below; a bag has the width of a gene's embedding
    expression_depth: int = 2
    expression_genes: int = 128  # genes with counts of a profile that become tokens, at most
    expression_zeros: int = 64  # measured genes without a count that do
    position: str = "rotary"  # of POSITIONS
    descriptor_width: int = 0  # columns of the table that describes genes; 0: no table
    # The tile encoder. "colour" is an ablation. Of "timm/<model>" a run sets image_width, patch_px, pixel_mean,
    # pixel_sd and encoder_sha256 itself (storm.model.encoders.fit); its image_depth means nothing.
    encoder: str = "vit"
    encoder_options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of timm; launch/ENCODERS.md
    encoder_train: str = "full"
    encoder_sha256: str = ""  # of the file that its weights came from; empty: from scratch
    lora_rank: int = 8
    pixel_mean: tuple[float, ...] = ()  # of red, green, blue in [0, 1]; empty: the encoder's own
    pixel_sd: tuple[float, ...] = ()
    image_target: str = "stain"  # what the image loss regresses; "feature": that of a frozen encoder, from a cache

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name in _MAY_BE_0 else 1
            if field.type is int and value < least:
                raise ValueError(f"model.{field.name}={value} must be {least} or more")
            if field.type is int and value > _MOST:
                raise ValueError(f"model.{field.name}={value} must be {_MOST:,} or less")
        if not 0 < self.tile_mpp < math.inf:
            raise ValueError(f"model.tile_mpp={self.tile_mpp} must be above 0")
        self._check_words()
        self._check_encoder()
        own = () if self.encoder.startswith(TIMM) else ("image_width",)
        for name in (*own, "fusion_width", "space_width", *self._token_widths):
            if getattr(self, name) % self.head_width:
                raise ValueError(f"model.{name}={getattr(self, name)} is no multiple of head_width={self.head_width}")
        if self.head_width % 8:
            raise ValueError(f"model.head_width={self.head_width} must be a multiple of 8 (2-D rotary pairs)")
        if self.tile_px % self.patch_px:
            raise ValueError(f"model.tile_px={self.tile_px} is no multiple of patch_px={self.patch_px}")

    def _check_words(self) -> None:
        words = {
            "likelihood": LIKELIHOODS, "reads": READS, "expression": EXPRESSIONS, "position": POSITIONS,
            "encoder_train": ENCODER_TRAIN, "image_target": IMAGE_TARGETS,
        }  # fmt: skip
        for name, known in words.items():
            if (word := getattr(self, name)) not in known:
                raise ValueError(f"model.{name}={word!r} is unknown{nearest(word, list(known))}")

    def _check_encoder(self) -> None:
        timm = self.encoder.startswith(TIMM)
        if self.encoder not in ENCODERS and not timm:
            raise ValueError(f"model.encoder={self.encoder!r} is none of {', '.join(ENCODERS)}, {TIMM}<model>")
        if not timm and (self.encoder_options or self.encoder_train == "lora" or self.encoder_sha256):
            raise ValueError(
                f"model.encoder={self.encoder!r} takes no options, no lora and no weights; {TIMM}<model> does"
            )
        if not timm and self.encoder_train == "frozen":
            raise ValueError(f"model.encoder={self.encoder!r} starts without weights: frozen it would stay random; set "
                             f"encoder_train=full, or encoder={TIMM}<model>")  # fmt: skip
        if self.image_target == "feature" and self.encoder_train != "frozen":
            raise ValueError("model.image_target=feature: features stand still of a frozen encoder alone; set "
                             "encoder_train=frozen, or image_target=stain")  # fmt: skip
        for name in ("pixel_mean", "pixel_sd"):
            if len(getattr(self, name)) not in (0, 3) or not all(0 < x < 1 for x in getattr(self, name)):
                raise ValueError(f"model.{name}={getattr(self, name)}: three numbers between 0 and 1, or none")

    @property
    def _token_widths(self) -> tuple[str, ...]:
        return ("expression_width",) if self.expression == "tokens" else ()

    @property
    def is_anchored(self) -> bool:
        """Whether the encoder trains from weights that it was given, and is held near them (the term anchor)."""
        return bool(self.encoder_sha256) and self.encoder_train != "frozen"

    @property
    def tile_um(self) -> float:
        """Side of a tile in um."""
        return self.tile_px * self.tile_mpp

    @property
    def patch_um(self) -> float:
        """Side of a patch in um."""
        return self.patch_px * self.tile_mpp


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"image_width": 384, "image_depth": 12, "gene_width": 256, "fusion_width": 384, "fusion_depth": 2}
    | {"space_width": 384, "space_depth": 4, "head_width": 64, "align_width": 128}
    | {"expression_width": 256, "expression_depth": 4, "expression_genes": 512},  # with expression=tokens
    "base": {"image_width": 768, "image_depth": 12, "gene_width": 512, "fusion_width": 768, "fusion_depth": 3}
    | {"space_width": 768, "space_depth": 8, "head_width": 64, "align_width": 128}
    | {"expression": "tokens", "expression_width": 512, "expression_depth": 8, "expression_genes": 512},
    "large": {"image_width": 1024, "image_depth": 24, "gene_width": 768, "fusion_width": 1024, "fusion_depth": 4}
    | {"space_width": 1024, "space_depth": 16, "head_width": 64, "align_width": 128}
    | {"expression": "tokens", "expression_width": 768, "expression_depth": 12, "expression_genes": 1024},
}


def nearest(name: str, known: list[str]) -> str:
    """' (nearest: ...)' with the known name most like `name`, or all known names, for an error message."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)  # below it names share letters, no meaning
    return f" (nearest: {close[0]})" if close else f" (known: {', '.join(known)})"


def _types(default: Any) -> tuple[type, ...]:
    """What a value in place of `default` may be: of its type, or a whole number where it is a fraction."""
    return (float, int) if isinstance(default, float) else (type(default),)


def _tuple(key: str, value: list[Any] | tuple[Any, ...]) -> tuple[Any, ...]:
    """The value of a key that holds several: names of organs, or numbers."""
    types: tuple[type, ...] = (str,) if key == "organs" else (float, int)
    if any(isinstance(one, bool) or not isinstance(one, types) for one in value):
        raise ValueError(f"model.{key}={list(value)!r} should hold {'names' if key == 'organs' else 'numbers'} alone")
    return tuple(value)


def resolve_model(values: dict[str, Any]) -> ModelConfig:
    """A ModelConfig from a dict as in a YAML section or an export: an optional `preset`, then what differs.

    Raises:
        ValueError: unknown preset or key (the nearest valid one is named), or a value of another type.
    """
    values = dict(values)
    preset = values.pop("preset", "tiny")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"model.preset={preset!r} is unknown{nearest(str(preset), list(PRESETS))}")
    plain = ModelConfig()
    defaults = {f.name: getattr(plain, f.name) for f in dataclasses.fields(ModelConfig)}
    for key, value in values.items():
        if key not in defaults:
            raise ValueError(f"model.{key} is no key{nearest(str(key), [*defaults, 'preset'])}")
        kind = type(defaults[key])
        if kind is tuple and isinstance(value, list | tuple):
            values[key] = _tuple(key, value)
        elif isinstance(value, bool) or not isinstance(value, _types(defaults[key])):
            raise ValueError(f"model.{key}={value!r} should be of type {type(defaults[key]).__name__}")
    return ModelConfig(**{**PRESETS[preset], **values})
