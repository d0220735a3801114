"""The log: tags that stay what they are, the same values in both places, no overlapping curve after a resume."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from storm.presets import ModelConfig
from storm.train import engine, meter, metrics
from storm.train.meter import Meter
from tests.model.batches import CONFIG, make_batch

TERMS = ["expr", "depth", "image", "corr", "spatial", "align", "anchor"]
MODES = ["image_only", "in_context", "gene_level", "gene_only"]
FROZEN = [
    "train/loss", *(f"train/loss/{term}" for term in TERMS), *(f"train/loss/expr_{mode}" for mode in MODES),
    "val/loss", *(f"val/{term}" for term in TERMS), *(f"val/expr_{mode}" for mode in MODES), "val/pearson",
    "perf/profiles_per_s", "perf/tiles_per_s", "perf/mfu", "perf/step_s", "perf/checkpoint_s",
    "perf/data_wait", "perf/data_wait_worst", "perf/rank_skew",
    "mem/device_peak_bytes", "mem/host_resident_bytes", "optim/lr", "optim/grad_norm",
    "data/unknown", "data/st", "data/visium", "data/visium_hd", "data/xenium", "data/cosmx",
    "progress/samples", "progress/epoch",
]  # fmt: skip


def test_tags_are_frozen() -> None:
    assert list(metrics.TAGS) == FROZEN


def curve(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows of a run."""
    board = EventAccumulator(str(run_dir / metrics.TENSORBOARD)).Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / metrics.LOG).read_text().splitlines()]


def test_a_resumed_log_has_no_overlapping_curve_and_says_so(tmp_path: Path) -> None:
    log = metrics.RunLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "train/loss": 10.0 + step, "train/loss/image": None, "progress/samples": 4 * step})
    log.close()
    with (tmp_path / metrics.LOG).open("a") as torn:
        torn.write('{"step": 4, "train/lo')
    with (tmp_path / metrics.LOG).open("ab") as torn:
        torn.write(b"\xff\0\n7\n")
    log = metrics.RunLog(tmp_path, 1)
    log.write({"step": 2, "train/loss": 5.0})
    log.close()
    assert lines(tmp_path) == [
        {"step": 1, "train/loss": 11.0, "train/loss/image": None, "progress/samples": 4},
        {"step": 1, "event": "resumed", "lines_dropped": 4},
        {"step": 2, "train/loss": 5.0},
    ]
    assert curve(tmp_path, "train/loss") == [(1, 11.0), (2, 5.0)]
    assert "train/loss/image" not in EventAccumulator(str(tmp_path / metrics.TENSORBOARD)).Reload().Tags()["scalars"]
    log = metrics.RunLog(tmp_path, 1)  # once more: the mark of before stays, its step is not after the checkpoint
    log.close()
    assert [line.get("event") for line in lines(tmp_path)] == [None, "resumed", "resumed"]


def test_a_run_resumed_within_the_second_is_read_after_what_it_takes_back(tmp_path: Path) -> None:
    first, number = tmp_path / "first", 0
    while set(str(number)) != {"9"}:  # the writer of this process after 9, 99 or 999 has a name that sorts before its
        first = tmp_path / f"run{number}"
        first.mkdir()
        log = metrics.RunLog(first, 0)
        number = int(next((first / metrics.TENSORBOARD).iterdir()).name.rsplit(".", 1)[1])
        log.write({"step": 1, "train/loss": 1.0})
        log.close()
    log = metrics.RunLog(first, 0)
    log.write({"step": 1, "train/loss": 2.0})
    log.close()
    assert curve(first, "train/loss") == [(1, 2.0)]


def test_a_file_of_a_clock_that_runs_ahead_is_waited_for_a_second_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept_s: list[float] = []
    monkeypatch.setattr("time.sleep", slept_s.append)
    (tmp_path / "events.out.tfevents.9999999999.host.1.0").touch()
    metrics.wait_for_next_second(tmp_path)
    assert slept_s == [1.0]


def test_a_run_from_its_start_replaces_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / metrics.LOG).write_text('{"step": 1, "train/loss": 1.0}\n')
    metrics.RunLog(tmp_path, 0).close()
    assert lines(tmp_path) == []


def test_the_screen_shows_the_last_record(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = metrics.RunLog(tmp_path, 0)
    log.write({"step": 1, "train/loss": 2.0})
    log.write({"step": 2, "train/loss": 1.0}, last=True)
    log.close()
    assert capsys.readouterr().out == "step 2: loss 1.0000\n"


def test_a_full_disk_names_the_log(tmp_path: Path) -> None:
    log = metrics.RunLog(tmp_path, 0)
    with contextlib.suppress(OSError), Path("/dev/full").open("a") as full, pytest.raises(OSError, match=r"log\.jsonl"):
        log._lines = full
        log.write({"step": 1})


def test_a_tag_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    log = metrics.RunLog(tmp_path, 0)
    with pytest.raises(KeyError, match="loss/mine"):
        log.write({"step": 1, "train/loss/mine": 1.0})
    log.close()


def test_what_ranks_measured_becomes_metrics() -> None:
    fast = dict.fromkeys((*meter._SUMS, *meter._TIMES), 0.0)
    fast |= {"flops": 4e9, "profiles": 60, "tiles": 20, "visium": 60, "wait_s": 0.1, "computed_s": 1.0, "step_s": 4.0}
    slow = fast | {"profiles": 20, "visium": 0, "xenium": 20, "wait_s": 0.5, "computed_s": 3.0}
    ranks = [[*fast.values(), 1e9, 0, 5e8], [*slow.values(), 1e9, 0, 7e8]]
    found = meter.metrics(ranks, steps=2)
    expected = {
        "perf/profiles_per_s": 20, "perf/tiles_per_s": 10, "perf/mfu": 1.0, "perf/step_s": 2.0, "perf/data_wait": 0.075,
        "perf/data_wait_worst": 0.125, "perf/rank_skew": 0.25, "mem/host_resident_bytes": 7e8, "data/visium": 0.75,
        "data/xenium": 0.25, "data/st": 0.0,
    }  # fmt: skip
    assert {tag: found[tag] for tag in expected} == pytest.approx(expected)
    assert found["mem/device_peak_bytes"] is None and found.keys() <= metrics.TAGS.keys()


def test_the_meter_counts_what_the_samples_hold(world: engine.World) -> None:
    config = ModelConfig(**{**vars(CONFIG)})
    counting = Meter(config, {"one": "visium", "two": "elsewhere"}, world)
    batch = make_batch(regions=2, n=6, config=config)
    counting.begin()
    counting.loaded()
    counting.start()
    counting.count(batch, ["one_0007", "two_0001"])
    counting.arrive()
    counting.end()
    found = counting.read()
    assert (found["data/visium"], found["data/unknown"]) == (6 / 11, 5 / 11)
    step_s = found["perf/step_s"]
    assert step_s and found["perf/tiles_per_s"] == pytest.approx(6 / step_s)
    assert math.isfinite(found["perf/mfu"] or math.nan) and 0 < (found["mem/host_resident_bytes"] or 0) < 1e11


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362),
        ("NVIDIA GH200 480GB", 989), ("Tesla V100-SXM2-32GB", None), ("NVIDIA A10G", None),
    ],
)  # fmt: skip
def test_the_peak_of_a_known_device(name: str, tflops: int | None) -> None:
    found = meter.known_peak(name)
    assert found == (None if tflops is None else tflops * 1e12)


def test_the_peak_of_a_cpu_is_measured() -> None:
    assert 1e9 < meter.peak_flops(torch.device("cpu")) < 1e14


def test_the_page_lists_every_tag() -> None:
    page = (Path(__file__).resolve().parents[2] / "launch/WATCHING.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows == [f"| `{tag}` | {text} |" for tag, text in metrics.TAGS.items()]
