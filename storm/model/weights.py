"""Weights of an encoder from a file that others wrote, under whichever names, into the model that timm builds.

In: a local file of tensors. Out: a state dict under timm's names, complete and without excess.

What is understood: timm's own names; what training wrappers put around them (state_dict, model, teacher) and before
them (module., backbone., visual.trunk., image_encoder. and the like: whatever stands before the stem); DINOv2's names;
Hugging Face's names of Dinov2, Dinov2WithRegisters and ViT; the names of efficientnet-pytorch. Classifier heads are
dropped. A file is never unpickled: it is read as safetensors, or by torch.load with weights_only.
"""

import pickle
import re
import struct
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

State = dict[str, Tensor]

_WRAPPERS = ("teacher", "state_dict", "model")  # the teacher of a self-distillation is what its users evaluate
_HEADS = ("head", "head_dist", "fc", "classifier", "pooler", "dino_head", "ibot_head")
_NAMED = 6  # keys that an error names
_WRAPPED = 8  # wrappers around each other, at most
# What torch's own reader meets in damaged files.
_UNREADABLE = (
    SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError,
    AssertionError, ArithmeticError, MemoryError, struct.error,
)  # fmt: skip

# Hugging Face's names, as patterns, and timm's.
_TRANSFORMERS = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"^(blocks\.\d+)\.attention\.output\.dense\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.attention\.attention\.(query|key|value)\.", r"\1.attn.\2."),
    (r"^(blocks\.\d+)\.layer_scale(\d)\.lambda1$", r"\1.ls\2.gamma"),
    (r"^(blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"^(blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.(intermediate\.dense|mlp\.weights_in)\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.(output\.dense|mlp\.weights_out)\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
)
# DINOv2's names; the number of a chunk of blocks goes, that of the block in the whole model stays.
_DINOV2 = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."), (r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2."),
)  # fmt: skip
_STEMS = {  # the first layer's name -> whose names these are
    "patch_embed.proj.weight": "timm", "embeddings.patch_embeddings.projection.weight": "transformers",
    "_conv_stem.weight": "efficientnet",
}  # fmt: skip


def read(path: Path) -> dict:
    """What a file of tensors holds.

    Raises:
        ValueError: no such file, or it is no safetensors file and holds more than tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; set encoder.weights to a local file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        cure = "give safetensors, or a .pth or .bin that holds tensors alone (code in it is never run)"
        fact = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path}: does not read as weights ({fact}); {cure}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, no named tensors; save the model's state_dict()")
    return found


def load(model: nn.Module, path: Path) -> None:
    """Put the weights of a file into a model of timm's.

    Raises:
        ValueError: as `read`; or names or shapes are missing, or are too many.
    """
    state = under_timm_names(read(path), model, str(path))
    own = {name: tensor for name, tensor in model.state_dict().items() if _counts(name)}
    excess = [name for name in state if name not in own and _counts(name)]
    missing = [name for name in own if name not in state]
    shapes = [f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}" for n in own if n in state
              if state[n].shape != own[n].shape]  # fmt: skip
    faults = [
        f"{len(names)} {what} ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"
        for what, names in (("missing", missing), ("too many", excess), ("of another shape", shapes))
        if names
    ]
    if faults:
        raise ValueError(f"{path}: not the weights of this encoder: {'; '.join(faults)}; see to model.encoder and "
                         "model.encoder_options (launch/ENCODERS.md)")  # fmt: skip
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in own}, strict=False)


def _counts(name: str) -> bool:
    """Whether a tensor must match: not the counter of batches, which nothing reads, nor an adapter."""
    return not name.endswith("num_batches_tracked") and ".lora_" not in name


def under_timm_names(found: dict, model: nn.Module, source: str) -> State:
    """The tensors of an encoder in what a file held, by the names that `model` has for them."""
    state = _unwrapped(found)
    stems = _STEMS | {next(name for name, tensor in model.state_dict().items() if tensor.ndim == 4): "timm"}
    state, form = _inner(state, stems, source)
    if form == "transformers":
        state = _from_transformers(state)
    elif form == "efficientnet":
        state = _from_efficientnet(state, model)
    elif any(re.match(_DINOV2[0][0] + ".*gamma", name) or ".mlp.w12." in name for name in state) or _chunked(
        state, model
    ):
        state = _renamed(state, _DINOV2)
    if "register_tokens" in state:
        state.setdefault("mask_token", torch.zeros(0))  # by it timm knows DINOv2's own form of class token and places
    state = {name: tensor for name, tensor in state.items() if name.split(".")[0] not in _HEADS}
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert:  # timm's own: places resampled where the grid differs, patches where their size does
        state = convert(state, model)
    state.pop("mask_token", None)
    return state


def _unwrapped(found: dict) -> State:
    """The tensors inside what training scripts wrap around them."""
    for _ in range(_WRAPPED):  # a damaged file may wrap itself
        found = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), dict)), found)
    return {str(name): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _inner(state: State, stems: dict[str, str], source: str) -> tuple[State, str]:
    """(the encoder's tensors without what stands before their names, whose names they are)."""
    places = [(name[: -len(stem)], stem) for name in state for stem in stems if f".{name}".endswith(f".{stem}")]
    teachers = [place for place in places if "teacher" in place[0]]
    places = teachers or places
    if len(places) != 1:
        fact = "holds no first layer of an encoder" if not places else "holds several encoders"
        seen = ", ".join(prefix or "(none)" for prefix, _ in places) or ", ".join(list(state)[:_NAMED])
        raise ValueError(f"{source}: {fact} ({seen}); save the state_dict() of the one that is meant")
    ((prefix, stem),) = places
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}, stems[stem]


def _renamed(state: State, names: tuple[tuple[str, str], ...]) -> State:
    found = {}
    for name, tensor in state.items():
        for pattern, new in names:
            name = re.sub(pattern, new, name)
        found[name] = tensor
    return found


def _chunked(state: State, model: nn.Module) -> bool:
    """Whether blocks are counted in chunks, and the model's are not."""
    return any(re.match(_DINOV2[0][0], name) for name in state) and not any(
        re.match(_DINOV2[0][0], name) for name in model.state_dict()
    )


def _from_transformers(state: State) -> State:
    """Hugging Face's names -> timm's; query, key and value become one matrix."""
    state = _renamed(state, _TRANSFORMERS)
    for name in [name for name in state if ".attn.query." in name]:
        parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("query", "qkv")] = torch.cat(parts)
    return state


def _from_efficientnet(state: State, model: nn.Module) -> State:
    """The names of efficientnet-pytorch, whose blocks are counted through, -> timm's, counted by stage."""
    stages = [
        f"{i}.{j}" for i, s in enumerate(model.get_submodule("blocks").children()) for j, _ in enumerate(s.children())
    ]
    expanded = {name.split(".")[1] for name in state if "._expand_conv." in name}
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inverted = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    inverted |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    squeeze = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
    found = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "_blocks":
            names = (inverted if parts[1] in expanded else plain) | squeeze
            place = stages[int(parts[1])] if int(parts[1]) < len(stages) else f"beyond.{parts[1]}"
            found[f"blocks.{place}.{names.get(parts[2], parts[2])}.{parts[3]}"] = tensor
        else:
            found[f"{outer.get(parts[0], parts[0])}.{parts[1]}"] = tensor
    return found
