"""A small encoder of timm with weights in a file, for runs that begin with one."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from storm.config import RunConfig, load
from storm.model.encoders import create
from storm.presets import ModelConfig
from tests.train import runs

NAME = "timm/vit_tiny_patch16_224"
OPTIONS = {"img_size": 112, "embed_dim": 32, "depth": 1, "num_heads": 2}
ENCODER = [f"model.encoder={NAME}", f"model.encoder_options={json.dumps(OPTIONS)}"]


def write_weights(path: Path, seed: int) -> Path:
    """Random weights, as safetensors."""
    torch.manual_seed(seed)
    save_file(create(ModelConfig(encoder=NAME, encoder_options=OPTIONS)).state_dict(), path)
    return path


def config(shards: Path, run_dir: Path, weights: Path, train: str, *more: str) -> RunConfig:
    """A run of three steps that begins with the weights of a file; `train`: full, frozen or lora."""
    given = [*ENCODER, f"encoder.weights={weights}", f"model.encoder_train={train}"]
    return load(RunConfig, None, [*runs.words(shards, run_dir, 2, "optim.steps=3"), *given, *more])
