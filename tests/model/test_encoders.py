"""Encoders of timm as the model sees them: maps in their places, frozen ones still, adapters from the start, colour."""

import pytest
import torch

from storm.model import flops
from storm.model.encoders import LAYERS, ColourEncoder, TimmEncoder, facts, fit, tile_encoder
from storm.model.layers import initialise
from storm.presets import ModelConfig
from tests.model.test_morphology import tiles

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "reg_tokens": 3}


def config(train: str = "full", **more: object) -> ModelConfig:
    values = {"encoder": "timm/vit_tiny_patch16_224", "encoder_options": VIT, "encoder_sha256": "0", "tile_px": 32}
    return fit(ModelConfig(**{**values, "encoder_train": train, **more}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "side"), [("vit_tiny_patch16_224", 14), ("swin_tiny_patch4_window7_224", 7), ("resnet18", 7),
                       ("convnext_atto", 7), ("tf_efficientnet_lite0", 7)],
)  # fmt: skip
def test_any_model_gives_a_square_map(name: str, side: int) -> None:
    fitted = fit(ModelConfig(encoder=f"timm/{name}"))
    assert 224 // fitted.patch_px == side == facts(fitted).side
    encoder = tile_encoder(fitted)
    with torch.no_grad():
        found, summary = encoder(tiles(1, 224), torch.ones(1))
    assert found.shape == (1, side**2, fitted.image_width)
    torch.testing.assert_close(summary, found.mean(1))


def test_a_map_lies_row_by_row() -> None:
    """A change of one corner's pixels moves the features of a convolutional network there most, and little far off."""
    encoder = tile_encoder(fit(ModelConfig(encoder="timm/resnet18")))
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)  # those of new residual branches are zero
    pixels = tiles(1, 224)
    other = pixels.clone()
    other[:, :8, -8:] = 255 - other[:, :8, -8:]
    with torch.no_grad():
        moved = (encoder(pixels, torch.ones(1))[0] - encoder(other, torch.ones(1))[0]).abs().sum(-1).view(7, 7)
    assert moved[:2, 5:].max() == moved.max() and moved[6, 0] < 0.1 * moved.max()


@pytest.mark.parametrize("train", ["full", "frozen", "lora"])
def test_what_trains(train: str) -> None:
    encoder = TimmEncoder(config(train), anchored=True)
    initialise(encoder, 0)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    pixels = tiles(2, 32)
    found, summary = encoder(pixels, torch.ones(2))
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert found.requires_grad == (train != "frozen") and bool(trained) == (train != "frozen")
    if train == "lora":
        assert all(".lora_" in name for name in trained)
        torch.testing.assert_close(encoder.similarity(pixels, summary), torch.ones(2))
        torch.nn.init.normal_(encoder.get_parameter("model.blocks.0.attn.qkv.lora_b.weight"))
        assert (encoder.similarity(pixels, encoder(pixels, torch.ones(2))[1]) < 0.999).all()


def test_counted_flops_of_a_vit_are_its_formula() -> None:
    fitted = config()
    tokens, width, depth = 16 + 4, 32, 2  # patches, class token and registers
    products = depth * (12 * tokens * width**2 + 2 * tokens**2 * width) + 16 * 3 * 64 * width
    assert facts(fitted).flops == pytest.approx(2 * products, rel=0.01)
    encoder = TimmEncoder(fitted)
    assert flops.parameters(fitted, 10)["morphology"] == sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize(("key", "name"), [(key, name) for key, names in LAYERS.items() for name in names])
def test_every_known_layer_is_built(key: str, name: str) -> None:
    encoder = tile_encoder(config(encoder_options=VIT | {key: name}, train="full"))
    assert encoder(tiles(1, 32), torch.ones(1))[0].isfinite().all()


def test_colour_alone_is_blind_to_place() -> None:
    encoder = ColourEncoder(ModelConfig(tile_px=32, patch_px=8))
    pixels = tiles(2, 32)
    found, summary = encoder(pixels, torch.tensor([1.0, 0.0]))
    assert found.shape == (2, 16, 64) and not found[1].any() and torch.equal(found[0, 3], summary[0])
    torch.testing.assert_close(encoder(pixels.transpose(1, 2), torch.ones(2))[1][0], summary[0])


@pytest.mark.parametrize(
    ("more", "fact"),
    [
        ({"encoder": "timm/no_such_model"}, "knows no model"),
        ({"encoder": "timm/hf-hub:some/model"}, "knows no model"),
        ({"encoder_options": {"pretrained": True}}, "'pretrained' is none of"),
        ({"encoder_options": {"checkpoint_path": "x"}}, "'checkpoint_path' is none of"),
        ({"encoder_options": {"img_size": 48, "patch_size": 8}}, "does not read tiles of 32 px"),
        ({"encoder_options": {"norm_layer": "LayerNorm"}}, "'norm_layer' is none of"),
        (
            {"encoder_options": {"mlp_layer": "Identity"}},
            "mlp_layer='Identity' is none of Mlp, GluMlp, SwiGLU, SwiGLUPacked",
        ),
        ({"encoder_options": {"mlp_layer": "create_conv2d"}}, "mlp_layer='create_conv2d' is none of"),
        ({"encoder_options": {"act_layer": "Transformer"}}, "act_layer='Transformer' is none of GELU, SiLU, ReLU"),
        ({"encoder_options": {"act_layer": ["GELU"]}}, r"act_layer=\['GELU'\] is none of"),
        ({"encoder_options": {"num_heads": 0}}, "does not build it with"),
        ({"encoder_options": {"img_size": {}}}, "does not build it with"),
        ({"encoder_sha256": ""}, "stays at random"),
        ({"encoder": "timm/resnet18", "encoder_options": {}, "train": "lora", "tile_px": 224}, ""),
    ],
)
def test_what_cannot_be_is_told(more: dict, fact: str) -> None:
    with pytest.raises(ValueError, match=fact or "LoRA is for transformers"):
        tile_encoder(config(**{"train": "frozen", **more}))
