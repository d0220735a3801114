"""Strict typed configs: YAML in, an error for every unknown or ill-typed key, dotted overrides on the command line.

In: a YAML file that holds only what differs from the defaults below, and `key.sub=value` words. Out: a frozen
`RunConfig` (training) or `PrepConfig` (storm.prep_config), and the YAML of all their resolved values.
"""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from storm.presets import ModelConfig, nearest, resolve_model

MASK_MODES = ("image_only", "in_context", "gene_level", "gene_only")
_MOST = 1_000_000_000  # of any whole number but a seed: more overflows, or never ends
_STPATH = {"image_only": 0.0, "in_context": 1.0, "gene_level": 0.0, "gene_only": 0.0, "hide_tiles": 0.0}


class Section(BaseModel):
    """A part of a config: immutable, no key it does not know, no value of another type, no infinite number."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _ends(cls, value: Any, info: ValidationInfo) -> Any:
        if type(value) is int and value > _MOST and info.field_name != "seed":
            raise ValueError(f"is more than {_MOST:,}, the most of any whole number; give a smaller one")
        return value


class MixtureConfig(Section):
    """How often groups come per epoch; by default each exactly once, whatever it is of.

    Shares are of the groups of an epoch, which stays as long as it is without weights.
    """

    corpora: list[float] = Field(default=[], description="weight of each shard set of data.shards; none: equal")
    power: float = Field(
        default=1.0, ge=0, le=1, description="studies, donors of a study and sections of a donor weigh groups ** power"
    )
    study_most: float = Field(default=1.0, gt=0, le=1, description="largest share of one study")
    donor_most: float = Field(default=1.0, gt=0, le=1, description="largest share of one donor")
    platform_least: float = Field(default=0.0, ge=0, le=1, description="smallest share of each platform")
    repeat_most: float = Field(default=8.0, ge=1, description="a group comes at most so often per epoch")


class DataConfig(Section):
    """What is streamed, in which order, and from where."""

    shards: str | list[str] = Field(
        description="folder or URL (https, s3) of a shard set, or several of them with the same genes"
    )
    split: Literal["train", "val", "test"] = "train"
    workers: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"] = Field(
        default="auto", description="loader processes per rank; 0: the rank itself; auto: its cores but one"
    )
    global_batch_size: int = Field(
        default=4, ge=1, le=1_000_000, description="groups per optimizer step over all ranks"
    )
    micro_batch_size: int = Field(default=1, ge=1, le=4096, description="groups per forward on a rank")
    last_batch: Literal["span", "drop"] = Field(
        default="span", description="a batch may span two epochs, or each epoch drops the groups that fill no batch"
    )
    window_shards: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto",
        description="groups are mixed within so many shards; 0: all; auto: all on a local disk, else 32",
    )
    mixture: MixtureConfig = MixtureConfig()
    verify: bool = Field(
        default=True, description="compare each group with its sha256, a tenth of what it takes to decode it"
    )
    descriptors: str = Field(
        default="", description="npz of gene_id and descriptor, for genes outside the vocabulary; empty: none"
    )
    on_error: Literal["fail", "skip"] = Field(default="fail", description="what a damaged group does")
    skip_most: int = Field(default=100, ge=0, description="damaged groups that a rank skips before it fails after all")
    timeout_s: float = Field(default=600.0, gt=0, description="wait for loader processes; then the run ends")
    stage_dir: str = Field(
        default="auto",
        description="folder on a local disk to copy shards to; auto: SLURM_TMPDIR or TMPDIR of a job; empty: none",
    )
    stage_gb: float = Field(default=0.0, ge=0, description="of that disk; 0: four fifths of what is free")
    cache_dir: str = Field(
        default="auto", description="folder for groups of remote shards; auto: as stage_dir; empty: none"
    )
    cache_gb: float = Field(default=50.0, gt=0, description="of that folder, about")
    features: str = Field(
        default="",
        description="cached features of a frozen encoder in place of tiles (launch/features.py makes them): a folder, "
        "or auto for the one beside the shards; empty: none",
    )
    remote_timeout_s: float = Field(default=60.0, gt=0, description="of one request")
    remote_retries: int = Field(
        default=5, ge=0, le=20, description="of a request that failed, each after twice the wait"
    )


class EncoderConfig(Section):
    """The image encoder's weights; which encoder it is, and how it trains, says the model."""

    weights: str = Field(
        default="",
        description="a local file, safetensors or a .pth or .bin that holds tensors alone; empty: from scratch",
    )


class MaskConfig(Section):
    """What is hidden and how inputs are varied; shares are probabilities."""

    preset: Literal["storm", "stpath"] = Field(
        default="storm",
        description="stpath: in_context alone with a hidden share ~ Beta(10, 1) of single profiles, no tile hidden "
        "(keys that are given still win)",
    )
    image_only: float = Field(default=0.4, ge=0)
    in_context: float = Field(default=0.3, ge=0)
    gene_level: float = Field(default=0.2, ge=0)
    gene_only: float = Field(default=0.1, ge=0)
    hide_tiles: float = Field(
        default=0.3, ge=0, le=1, description="probability of a hidden tile block in modes with genes"
    )
    hide_all_tiles: float = Field(
        default=0.0, ge=0, le=1, description="probability that in_context shows no tile: counts of neighbours alone"
    )
    loss_genes: int = Field(
        default=2048, ge=1, description="genes in the loss of one step; all where the panel has fewer"
    )
    pool_cells: float = Field(
        default=0.5, ge=0, le=1, description="probability that a group's cells or bins are pooled to 8-120 um"
    )
    recut: float = Field(
        default=0.15, ge=0, le=1, description="probability that a group's tiles are cut again at a random offset"
    )
    crop: float = Field(default=0.1, ge=0, le=1, description="probability of a crop to 1 x 1 or 2 x 2 tiles")
    polygon_jitter: float = Field(
        default=0.2, ge=0, le=1, description="probability that a polygon becomes a disc; and that its outline moves"
    )
    flips: bool = True
    stain_jitter: float = Field(default=0.1, ge=0, description="sd of the log gain of each stain channel")
    feature_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of the columns of cached features that a profile does not show"
    )
    thinning: float = Field(default=0.5, ge=0, le=1, description="probability that visible counts are thinned")
    panel_subsampling: float = Field(
        default=0.25, ge=0, le=1, description="probability that visible genes are a random subset"
    )
    position_jitter: bool = True
    drop_platform: float = Field(default=0.5, ge=0, le=1)
    drop_organ: float = Field(default=0.3, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, values: Any) -> Any:
        return _STPATH | values if isinstance(values, dict) and values.get("preset") == "stpath" else values

    @model_validator(mode="after")
    def _shows_something(self) -> Self:
        if not any(getattr(self, mode) for mode in MASK_MODES):
            raise ValueError(f"the shares of {', '.join(MASK_MODES)} are all 0; give one a positive share")
        if self.hide_all_tiles and not self.in_context:
            raise ValueError("hide_all_tiles acts in mode in_context, whose share is 0; give it one, or hide no tiles")
        return self


class OptimConfig(Section):
    """AdamW with warm-up and cosine."""

    steps: int = Field(default=1000, ge=1)
    lr: float = Field(default=3e-4, gt=0)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    weight_decay: float = Field(default=0.05, ge=0, description="not on norms, biases and embeddings")
    warmup_share: float = Field(default=0.02, ge=0, le=1)
    final_lr_share: float = Field(default=0.01, ge=0, le=1)
    clip: float = Field(default=1.0, gt=0)


class LossConfig(Section):
    """Weights of the terms, and from when on those count that need a model which has learned something."""

    expr: float = Field(default=1.0, ge=0)
    depth: float = Field(default=0.1, ge=0)
    image: float = Field(default=0.2, ge=0)
    corr: float = Field(default=0.1, ge=0)
    spatial: float = Field(default=0.5, ge=0)
    align: float = Field(default=0.05, ge=0, description="acts where model.align_width is above 0")
    anchor: float = Field(default=0.1, ge=0, description="acts where the encoder trains from pretrained weights")
    corr_from: float = Field(default=0.1, ge=0, le=1, description="share of the steps before corr has its weight")
    align_from: float = Field(default=0.5, ge=0, le=1, description="share of the steps before align has its weight")
    align_over: Literal["group", "batch"] = Field(
        default="group",
        description="negatives: of the group; or of the micro-batch, which hangs on how ranks split the global batch",
    )

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not any((self.expr, self.depth, self.image, self.corr, self.spatial, self.align, self.anchor)):
            raise ValueError("the weights of all terms are 0: nothing would be learned; give one a positive weight")
        return self


class EngineConfig(Section):
    """How the step is executed."""

    zero_stage: int = Field(default=1, ge=0, le=3, description="what DeepSpeed divides among the ranks")
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
    compile: bool = Field(default=False, description="torch.compile of each transformer block; not with ZeRO 3")

    @model_validator(mode="after")
    def _no_compiled_gathering(self) -> Self:
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile=true: ZeRO 3 gathers weights in hooks that break every graph; use zero_stage 0-2")
        return self


class DeepSpeedConfig(Section):
    """What goes to DeepSpeed unread."""

    extra: dict[str, Any] = Field(default={}, description="its own keys, as nested as there; none that STORM derives")


class ValidationConfig(Section):
    """How a run is watched on the donors of split val."""

    every_steps: int = Field(default=0, ge=0, description="0: never; else also after the last step")
    groups: int = Field(default=256, ge=1, description="of split val, evenly spread over it; all where it has fewer")


class CheckpointConfig(Section):
    """When a checkpoint is written and which are kept."""

    every_steps: int = Field(default=500, ge=1)
    every_minutes: float = Field(default=0.0, ge=0, description="also after so long without one; 0: by steps alone")
    keep_last: int = Field(default=2, ge=1)
    keep_every: int = Field(default=0, ge=0, description="also keep those at multiples of so many steps; 0: none")


class StopConfig(Section):
    """When a run ends before its schedule, and when a stall is told."""

    time_limit_s: float = Field(default=0.0, ge=0, description="from the start; 0: only as SLURM tells")
    margin_s: float = Field(
        default=300.0, ge=0, description="save and end so long before the job's end, a tenth of it at most"
    )
    max_restarts: int = Field(default=3, ge=0, description="by a machine, without a new checkpoint")
    stall_s: float = Field(default=300.0, gt=0, description="tell what a step waits for that takes so long")


class RunConfig(Section):
    """One pretraining run."""

    run_dir: str = Field(description="folder of the run: config, logs, checkpoints, FINISHED")
    seed: int = Field(default=0, ge=0, lt=1 << 32)
    log_every: int = Field(default=1, ge=1, description="steps between log lines")
    data: DataConfig
    model: ModelConfig = ModelConfig()
    encoder: EncoderConfig = EncoderConfig()
    mask: MaskConfig = MaskConfig()
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    engine: EngineConfig = EngineConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    stop: StopConfig = StopConfig()

    @model_validator(mode="after")
    def _features_of_a_frozen_encoder(self) -> Self:
        if self.data.features and self.model.encoder_train != "frozen":
            raise ValueError(
                "data.features: features are cached of a frozen encoder alone; set model.encoder_train=frozen"
            )
        if self.mask.feature_dropout and not self.data.features:
            raise ValueError("mask.feature_dropout acts on cached features; set data.features=auto, or leave it out")
        if self.model.image_target == "feature" and not self.data.features:
            raise ValueError("model.image_target=feature needs cached features; set data.features=auto")
        return self

    @field_validator("model", mode="before")
    @classmethod
    def _expand_preset(cls, value: Any) -> Any:
        return resolve_model(value) if isinstance(value, dict) else value


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 3e-4 as text; users mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)  # fmt: skip

Config = TypeVar("Config", bound=Section)


def load(kind: type[Config], path: Path | None, overrides: list[str] | None = None) -> Config:
    """Read a config.

    Args:
        kind: RunConfig or PrepConfig.
        path: a YAML file, or None for defaults and overrides alone.
        overrides: words `section.key=value`, the value in YAML.

    Raises:
        ValueError: naming the file and the key, and for an unknown key the nearest valid one.
    """
    name = str(path) if path else "config"
    values = _read(path) if path else {}
    for word in overrides or []:
        _override(values, word)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        given = [word.partition("=")[0] for word in overrides or []]
        faults = _explain(kind, error)
        raise ValueError("\n".join(f"{_source(key, given, name)}: {line}" for key, line in faults)) from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    try:
        values = _parse(path.read_bytes().decode())
    except ValueError as error:
        raise ValueError(f"{path}: not readable as YAML ({error}); write it as in configs/") from None
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{path}: a config is a mapping of keys, this file holds a {type(values).__name__}")
    return values or {}


def _parse(text: str) -> Any:
    """The value that YAML tells. Raises ValueError where it tells none."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:  # the latter: of a thousand brackets
        raise ValueError(" ".join(str(error).split())) from None


def _override(values: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ValueError(f"override {word!r}: write section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"override {word!r}: {section!r} is no section")
    try:
        values[last] = _parse(text)
    except ValueError as error:
        raise ValueError(f"override {word!r}: the value is not readable as YAML ({error}); quote it") from None


def _keys(kind: type[BaseModel], place: tuple[str | int, ...]) -> list[str]:
    """The valid keys of the section that holds `place`."""
    for part in place[:-1]:
        annotation = kind.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        kind = annotation
    return list(kind.model_fields)


def _source(key: str, given: list[str], name: str) -> str:
    """Where a key that is at fault was written: among the words of the command, or in the file."""
    related = (f"{word}.".startswith(f"{key}.") or f"{key}.".startswith(f"{word}.") for word in given)
    return "command line" if any(related) else name


def _explain(kind: type[BaseModel], error: ValidationError) -> list[tuple[str, str]]:
    """(key, what is wrong with it) of each fault."""
    lines = []
    for fault in error.errors():
        place = fault["loc"]
        key = ".".join(str(p) for p in place)
        if fault["type"] == "extra_forbidden":
            text = f"{key} is no key{nearest(str(place[-1]), _keys(kind, place))}"
        elif fault["type"] == "missing":
            text = f"{key} is required; set it in the file or as {key}=VALUE"
        else:
            text = f"{key}={fault['input']!r}: {fault['msg']}"
        lines.append((key, text))
    return lines


def dump(config: Section) -> str:
    """All resolved values as YAML that `load` reads back to an equal config."""
    values = config.model_dump(mode="python")
    if isinstance(config, RunConfig):
        model = dataclasses.asdict(config.model)
        values["model"] = {key: list(value) if isinstance(value, tuple) else value for key, value in model.items()}
    return yaml.safe_dump(values, sort_keys=False)
