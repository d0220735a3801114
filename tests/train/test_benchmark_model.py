"""The benchmarks of the model at tiny sizes: their tables hold what was asked, their works are what they say."""

import sys
from dataclasses import replace

import pytest
import torch

from launch import benchmark as command
from storm.model.storm import Storm
from storm.presets import ModelConfig
from storm.train import benchmark_memory, benchmark_model

TINY = ModelConfig(tile_px=32, patch_px=16, image_depth=1, space_depth=1, align_width=8)
GROUP = replace(benchmark_model.GROUP, side=2, profiles=3, panel=50, seen=5)
CELLS = replace(benchmark_model.CELLS, side=2, profiles=12, panel=40, seen=5)


def rows(text: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_speed_beside_timm_and_products() -> None:
    text = benchmark_model.gemm_share(TINY, GROUP, 2, "vit_tiny_patch16_224", side=64)
    assert "8 tiles of 32 px, 6 profiles, 50 loss genes" in text
    product, storm, encoder, plain, same = rows(text)
    assert float(product["GFLOP/s"]) > 0 and plain["/ timm vit_tiny_patch16_224"] == "1.000"
    assert same["/ timm of the same block"] == "1.000"
    assert float(storm["GFLOP"]) >= float(encoder["GFLOP"]) and float(storm["/ product"]) > 0


def test_the_same_block_has_as_many_weights_and_flops() -> None:
    ours = Storm(TINY, benchmark_model.GENES).morphology
    theirs = benchmark_model.timm_models(TINY, "vit_tiny_patch16_224")["timm of the same block"]
    weights = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert abs(weights[1] / weights[0] - 1) < 0.02  # timm's patches and hidden width differ by a little


def test_profiles_per_second() -> None:
    found = rows(benchmark_model.profile_rates(TINY, (CELLS, GROUP), 1))
    assert [(row["shown"], row["profiles"]) for row in found] == [
        (shown, number) for number in ("12", "6") for shown in benchmark_model.SHOWN
    ]  # fmt: skip
    assert all(float(row["ratio"]) > 0 for row in found)


def test_features_given_leave_the_rest_of_the_step() -> None:
    network, batch = Storm(TINY, benchmark_model.GENES), benchmark_model.make_batch(CELLS, TINY)
    assert batch["visible"].sum() == 6 and batch["wholly_hidden"].sum() == 6
    assert not benchmark_model.make_batch(CELLS, TINY, shown=False)["visible"].any()
    rest = benchmark_model.with_features(batch, TINY.image_width)
    assert torch.isfinite(benchmark_model.train(network, rest))
    assert rest["profile_feature"].grad is not None and rest["tile_feature"].grad is not None
    has = {name for name, p in network.named_parameters() if p.grad is None}
    assert has == {name for name, _ in network.named_parameters() if name.startswith("morphology")}


def test_memory_of_a_region() -> None:
    wide = replace(TINY, tile_px=64, image_depth=8, image_width=256)
    found, kept, gradients = benchmark_memory.case_apart(wide, replace(GROUP, side=5), 50, False, 1)
    assert found > gradients > 4 * 8 * 12 * 256**2 and kept > 0


def test_the_command_prints_the_tables_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    for name in ("GROUP", "CELLS", "SPOTS"):
        monkeypatch.setattr(benchmark_model, name, replace(GROUP, name=name))
    monkeypatch.setattr(benchmark_memory, "EXPRESSIONS", ("bag",))
    words = ["benchmark", "model", "--turns", "1", "--threads", "1", "--preset", "tiny", "--only", "profiles", "memory"]
    monkeypatch.setattr(sys, "argv", words)
    try:
        assert command.main() == 0
    finally:
        torch.set_num_threads(threads)
    parts = capsys.readouterr().out.split("### ")[1:]
    assert [part.splitlines()[0] for part in parts] == ["profiles, preset tiny", "memory, preset tiny"]
    assert [row["checkpointing"] for row in rows(parts[1])] == ["no", "yes"]
