"""The dry run: what it says of a config is what the parts of training say, and it leaves nothing behind."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from storm.config import RunConfig, load
from storm.model import flops
from storm.model.storm import Storm
from storm.shards import ShardSet
from storm.train import capacity, dry_run
from tests.train import runs

REPO = Path(__file__).resolve().parents[2]


def config(shards: Path, preset: str, *more: str) -> RunConfig:
    words = [f"data.shards={shards}", "run_dir=nowhere", *more]
    return load(RunConfig, REPO / "configs" / f"pretrain_{preset}.yaml", words)


def test_the_command(tiny_shards: Path, tmp_path: Path) -> None:
    words = [*runs.words(tiny_shards, tmp_path / "run"), "--dry-run", "--ranks", "2"]
    command = [sys.executable, str(REPO / "launch/pretrain.py")]
    done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=REPO, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    sections = re.findall(r"^# (.*)$", done.stdout, re.MULTILINE)
    assert sections == ["config", "layout", "model", "one step", "memory per GPU", "one synthetic batch"]
    assert "4 groups per step = 2 ranks x 2 micro-batches x 1 groups; ZeRO stage 1, fp32" in done.stdout
    model = load(RunConfig, None, runs.words(tiny_shards, tmp_path)).model
    organs = tuple(ShardSet(tiny_shards).manifest["organs"])
    built = Storm(type(model)(**{**vars(model), "tile_px": 112, "organs": organs}), len(ShardSet(tiny_shards).genes))
    assert re.search(rf"^all +{sum(p.numel() for p in built.parameters()):,}$", done.stdout, re.MULTILINE)
    assert re.search(r"loss \d+\.\d+, gradient norm \d+\.\d+", done.stdout)
    done = subprocess.run(
        [*command, *runs.words(tiny_shards, tmp_path / "run", 3), "--dry-run"],
        capture_output=True, text=True, cwd=REPO, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "data.global_batch_size=4 cannot be dealt" in done.stderr


@pytest.mark.parametrize(("preset", "ranks"), [("small", 8), ("base", 32)])
def test_larger_presets_run_a_batch_that_is_cut_on_a_cpu(tiny_shards: Path, preset: str, ranks: int) -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU the batch is not cut")
    text = dry_run.dry_run(config(tiny_shards, preset), ranks)
    assert f"= {ranks} ranks x 1 micro-batches" in text and "ZeRO stage 1, bf16" in text
    assert re.search(r"1 groups of 4 tiles and 16 profiles \(cut from \d groups of .* TFLOP on a CPU\)", text)


def test_large_by_formula(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "synthetic", lambda *_: "left out here: it takes 2 GB")
    text = dry_run.dry_run(config(tiny_shards, "large", "engine.zero_stage=0"), 64)
    total = sum(flops.parameters(config(tiny_shards, "large").model, len(ShardSet(tiny_shards).genes)).values())
    row = re.search(r"^ZeRO 0 +([\d.]+) +([\d.]+) +([\d.]+) .*<- engine\.zero_stage$", text, re.MULTILINE)
    assert row
    assert [float(cell) for cell in row.groups()] == pytest.approx([total * b / 1e9 for b in (4, 4, 8)], rel=0.01)


def test_state_by_stage() -> None:
    n, ranks = 1_000_000, 4
    found = [capacity.state(n, stage, ranks, bf16=False) for stage in capacity.STAGES]
    assert [s.parameters / n for s in found] == [4, 4, 4, 1]
    assert [s.gradients / n for s in found] == [4, 4, 1, 1]
    assert [s.optimizer / n for s in found] == [8, 3, 3, 3]
    assert capacity.state(n, 0, ranks, bf16=True).total == 18 * n


def test_network_by_stage() -> None:
    sent = [capacity.sent_bytes(1_000_000, stage, 4, accumulation=3) for stage in capacity.STAGES]
    assert [volume / 3_000_000 for volume in sent] == [2, 2, 4, 9]
    assert capacity.sent_bytes(1_000_000, 3, 1, 1) == 0
