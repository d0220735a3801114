"""Level 1 by other means than the own ViT: any timm model that yields a feature map, or colour alone.

In: packed tile pixels. Out: as TileEncoder, a feature map [T, P, D] and a summary [T, D], the mean of the map.

What a timm model gives (side and width of its map, pixel mean and sd, FLOPs) is found from the model itself on torch's
meta device, where it has no weights and costs no time. Its normalisation statistics never move, however it trains: they
would differ from rank to rank. Nothing is downloaded: names with a scheme and options that load are refused.
"""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from storm import files
from storm.model import lora, weights
from storm.model.morphology import PIXEL_MEAN, PIXEL_SD, TileEncoder
from storm.presets import TIMM, ModelConfig

_AT_ONCE = 8  # tiles on a CPU without gradients: of more, what lies between two layers leaves the caches
_MOST_BLOCKS = 512  # each takes time and memory to build, also where it has no weights; an export's config is foreign
INSTALL = "python -m pip install 'storm-tissue[timm]'"
# Options of timm.create_model that shape a model. None of those that fetch or read anything is among them.
OPTIONS = (
    "img_size", "patch_size", "embed_dim", "depth", "depths", "num_heads", "mlp_ratio", "mlp_layer", "act_layer",
    "init_values", "reg_tokens", "no_embed_class", "class_token", "dynamic_img_size", "qkv_bias", "qk_norm",
    "proj_bias", "pos_embed", "global_pool", "window_size", "dims", "drop_path_rate",
)  # fmt: skip
# By which name timm may be told a layer; of its own and torch's many others none is built at a config's word.
LAYERS = {"mlp_layer": ("Mlp", "GluMlp", "SwiGLU", "SwiGLUPacked"), "act_layer": ("GELU", "SiLU", "ReLU")}
# What timm meets where an option is of another type or size than it thought of.
_UNBUILT = (TypeError, ValueError, AttributeError, AssertionError, RuntimeError, ArithmeticError, LookupError)


@dataclass(frozen=True)
class Facts:
    """What a timm model gives."""

    side: int  # patches along a tile
    width: int
    pixel_mean: tuple[float, ...]
    pixel_sd: tuple[float, ...]
    flops: int  # of one tile, counted, as torch's FlopCounterMode counts


def create(config: ModelConfig) -> nn.Module:
    """The timm model of a config, without its classifier; weights are timm's random ones.

    Raises:
        ValueError: timm is missing, or does not build it; it names the cure.
    """
    name = config.encoder.removeprefix(TIMM)
    try:
        import timm
    except ModuleNotFoundError:
        raise ValueError(f"model.encoder={config.encoder}: timm is not installed; {INSTALL}") from None
    if not timm.is_model(name):
        near = timm.list_models(f"*{name[:12]}*")[:4]
        raise ValueError(f"model.encoder={config.encoder}: timm {timm.__version__} knows no model {name!r}; it has "
                         f"{', '.join(near) or 'others: see timm.list_models()'}")  # fmt: skip
    if unknown := sorted(set(config.encoder_options) - set(OPTIONS)):
        raise ValueError(f"model.encoder_options: {unknown[0]!r} is none of {', '.join(OPTIONS)}")
    options = dict(config.encoder_options)
    if _blocks(options) > _MOST_BLOCKS:
        raise ValueError(
            f"model.encoder_options: {_blocks(options)} blocks; depth or depths are {_MOST_BLOCKS} at most"
        )
    for key in LAYERS.keys() & options.keys():
        if options[key] not in LAYERS[key]:
            raise ValueError(f"model.encoder_options.{key}={options[key]!r} is none of {', '.join(LAYERS[key])}")
        options[key] = getattr(timm.layers if key == "mlp_layer" else nn, options[key])
    try:
        model: Any = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except _UNBUILT as error:
        fact = str(error) or type(error).__name__
        raise ValueError(
            f"model.encoder={config.encoder}: timm does not build it with {options} ({fact}); see model.encoder_options"
        ) from None
    model.forward = (
        model.forward_features
    )  # so that a call runs the hooks by which ZeRO 3 gathers class token and places
    return model  # type: ignore[no-any-return]


def _blocks(options: dict[str, Any]) -> int:
    """How many blocks the options ask for; what is no number is left to timm."""
    told = [options.get("depth", 0), *(of if isinstance(of := options.get("depths", ()), list | tuple) else ())]
    return sum(n for n in told if isinstance(n, int))


def feature_map(model: nn.Module, pixels: Tensor) -> Tensor:
    """[T, P, D] of standardised pixels [T, 3, px, px], row by row, without class and register tokens.

    Raises:
        ValueError: what the model gives is no square map.
    """
    found: Tensor = model(pixels)
    if found.ndim == 3:
        found = found[:, int(getattr(model, "num_prefix_tokens", 0)) :]
        square = found.shape[1] == int(found.shape[1] ** 0.5 + 0.5) ** 2
    elif found.ndim == 4:
        channels_last = found.shape[1] == found.shape[2] != found.shape[3]
        found = found if channels_last else found.permute(0, 2, 3, 1)
        square = found.shape[1] == found.shape[2]
        found = found.flatten(1, 2)
    else:
        square = False
    if not square:
        raise ValueError(f"its features {tuple(found.shape)} are no square map; choose another model")
    return found


def facts(config: ModelConfig) -> Facts:
    """What the timm model of a config gives.

    Raises:
        ValueError: as `create`; its map is no square one, or does not lie on the tile patch by patch.
    """
    return _facts(config.encoder, json.dumps(config.encoder_options, sort_keys=True), config.tile_px)


@functools.lru_cache(maxsize=8)
def _facts(encoder: str, options: str, tile_px: int) -> Facts:
    config = ModelConfig(tile_px=tile_px, patch_px=tile_px, encoder=encoder, encoder_options=json.loads(options))
    with torch.device("meta"):
        model = create(config).eval()
        pixels = torch.empty(1, 3, tile_px, tile_px)
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            found = feature_map(model, pixels)
    except _UNBUILT as error:
        cure = f"set model.encoder_options={{img_size: {tile_px}}} where it has that option"
        raise ValueError(f"model.encoder={encoder}: does not read tiles of {tile_px} px ({error}); {cure}") from None
    side = round(found.shape[1] ** 0.5)
    stride = int(getattr(model, "feature_info", [{}])[-1].get("reduction", tile_px // side))
    if stride * side != tile_px:
        fact = f"its map of {side} x {side} patches of {stride} px does not lie on a tile of {tile_px} px"
        raise ValueError(f"model.encoder={encoder}: {fact}; build and pack with a tile_px that {stride} divides")
    cfg = model.default_cfg
    mean, sd = (tuple(float(x) for x in cfg[key]) for key in ("mean", "std"))  # type: ignore[index]
    return Facts(side, found.shape[2], mean, sd, counter.get_total_flops())


def parameters(config: ModelConfig) -> int:
    """How many an encoder has, adapters included, the frozen copy of `anchored` not."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in tile_encoder(config).parameters())


def fit(config: ModelConfig, path: str = "") -> ModelConfig:
    """The config with what its encoder gives, and with the hash of the file of its weights.

    Raises:
        ValueError: as `facts`; weights without an encoder of timm's, or of no such file.
    """
    if not config.encoder.startswith(TIMM):
        if path:
            raise ValueError(f"encoder.weights={path}: model.encoder={config.encoder} trains from scratch; name {TIMM}"
                             "<model>")  # fmt: skip
        return config
    if path and not Path(path).is_file():
        raise ValueError(f"encoder.weights={path}: no such file; give a local file of weights")
    if not path and not config.encoder_sha256 and config.encoder_train != "full":
        fact = "without weights this encoder stays at random"
        raise ValueError(f"model.encoder_train={config.encoder_train}: {fact}; set encoder.weights to a local file "
                         "(launch/ENCODERS.md), or encoder_train=full")  # fmt: skip
    found = facts(config)
    return replace(
        config, image_width=found.width, patch_px=config.tile_px // found.side,
        pixel_mean=config.pixel_mean or found.pixel_mean, pixel_sd=config.pixel_sd or found.pixel_sd,
        encoder_sha256=files.sha256_file(Path(path)) if path else config.encoder_sha256,
    )  # fmt: skip


def pixel_statistics(config: ModelConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, sd) of red, green and blue in [0, 1], by which pixels are standardised."""
    return config.pixel_mean or PIXEL_MEAN, config.pixel_sd or PIXEL_SD


def tile_encoder(config: ModelConfig, activation_checkpointing: bool = False, anchored: bool = False) -> nn.Module:
    """The encoder of a config. `anchored`: it also tells how far it is from the weights it was given."""
    if config.encoder.startswith(TIMM):
        return TimmEncoder(config, activation_checkpointing, anchored)
    encoder: nn.Module = (
        ColourEncoder(config) if config.encoder == "colour" else TileEncoder(config, activation_checkpointing)
    )
    return encoder.requires_grad_(config.encoder_train != "frozen")


class ColourEncoder(nn.Module):
    """A linear map of fifteen colour statistics of a tile, the same at each of its patches: what colour alone tells."""

    STATISTICS = 15  # of R, G, B: mean, sd, and three quantiles

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patches = (config.tile_px // config.patch_px) ** 2
        self.project = nn.Linear(self.STATISTICS, config.image_width)

    def forward(self, tiles: Tensor, tile_weight_T: Tensor) -> tuple[Tensor, Tensor]:
        """Feature map [T, P, D] and summary [T, D] of uint8 tiles [T, px, px, 3]; zero where the weight is zero."""
        summary_TD = self.project(self.statistics(tiles).to(self.project.weight.dtype)) * tile_weight_T[:, None]
        return summary_TD[:, None].expand(-1, self.patches, -1), summary_TD

    @staticmethod
    def statistics(tiles: Tensor) -> Tensor:
        """[T, 15] of tiles, each about in -2..2: mean and sd of every channel, its quantiles .1, .5 and .9."""
        x = tiles[:, ::2, ::2].flatten(1, 2).float() / 255  # [T, pixels, 3]; every second pixel is as good
        ordered, n = x.sort(dim=1).values, x.shape[1]
        quantiles = [ordered[:, round(q * (n - 1))] for q in (0.1, 0.5, 0.9)]
        centred = [(value - 0.65) / 0.2 for value in (x.mean(1), *quantiles)]
        return torch.cat([*centred, x.std(1) / 0.1 - 1], dim=1)


class TimmEncoder(nn.Module):
    """A timm model over tiles, from scratch or from weights: trained, frozen, or with LoRA adapters.

    Frozen it takes no gradient and has none. Its normalisation and dropout layers stay as in evaluation.
    """

    pixel_mean: Tensor
    pixel_sd: Tensor

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False, anchored: bool = False) -> None:
        super().__init__()
        self.train_as, self.encoder = config.encoder_train, config.encoder
        self.model = create(config)
        self.anchor = create(config).requires_grad_(False) if anchored and self.train_as == "full" else None
        self.anchored = anchored and self.train_as != "frozen"
        if self.train_as == "lora":
            lora.adapt(self.model, config.lora_rank, f"model.encoder={config.encoder}")
        elif self.train_as == "frozen":
            self.model.requires_grad_(False)
        if activation_checkpointing and self.train_as != "frozen":
            self.model.set_grad_checkpointing(True)  # type: ignore[operator]
        found, has = facts(config), (config.tile_px // config.patch_px, config.image_width)
        if has != (found.side, found.width):
            raise ValueError(f"model.encoder={config.encoder}: gives {found.side} x {found.side} patches of width "
                             f"{found.width}, the config says {has}; use storm.model.encoders.fit")  # fmt: skip
        mean, sd = (torch.tensor(value)[:, None, None] for value in pixel_statistics(config))
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_sd", sd, persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "TimmEncoder":
        """Stays as in evaluation; `mode` is of the modules around it."""
        return super().train(False)

    def load(self, path: Path) -> None:
        """Take the weights of a file. Raises ValueError as storm.model.weights.load."""
        weights.load(self.model, path)
        if self.anchor is not None:
            weights.load(self.anchor, path)

    def forward(self, tiles: Tensor, tile_weight_T: Tensor) -> tuple[Tensor, Tensor]:
        """Feature map [T, P, D] and summary [T, D] of uint8 tiles [T, px, px, 3]; zero where the weight is zero."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_as != "frozen"):
            map_TPD = self._map(tiles)
        map_TPD = map_TPD * tile_weight_T[:, None, None]
        return map_TPD, map_TPD.mean(1)

    def _map(self, tiles: Tensor) -> Tensor:
        if torch.is_grad_enabled() or tiles.device.type != "cpu":
            return feature_map(self.model, self._pixels(tiles))
        parts = [feature_map(self.model, self._pixels(some)) for some in tiles.split(_AT_ONCE)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def similarity(self, tiles: Tensor, summary_TD: Tensor) -> Tensor:
        """[T] cosine of summaries to those of the weights that were loaded."""
        pixels = self._pixels(tiles)
        with torch.no_grad():
            if self.anchor is not None:
                first_TD = feature_map(self.anchor, pixels).mean(1)
            else:
                with lora.plain(self.model):
                    first_TD = feature_map(self.model, pixels).mean(1)
        return F.cosine_similarity(summary_TD, first_TD, dim=1)

    def _pixels(self, tiles: Tensor) -> Tensor:
        """Standardised pixels [T, 3, px, px]."""
        scaled = tiles.permute(0, 3, 1, 2).to(self.pixel_mean.dtype) / 255
        return (scaled - self.pixel_mean) / self.pixel_sd


def fingerprint(encoder: nn.Module, config: ModelConfig) -> str:
    """sha256 of all that a cached feature depends on: weights, pixels, geometry, and how maps are read."""
    told: dict[str, Any] = {
        "encoder": config.encoder, "options": config.encoder_options, "pixels": pixel_statistics(config),
        "tile_px": config.tile_px, "tile_mpp": config.tile_mpp, "patch_px": config.patch_px,
        "reads": config.reads,
    }  # fmt: skip
    hashes = {
        name: files.sha256_of(tensor.detach().cpu().contiguous().numpy().tobytes())
        for name, tensor in sorted(encoder.state_dict().items())
    }
    return files.sha256_of(files.dump_json(told | {"weights": hashes}))
