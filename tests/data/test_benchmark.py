"""The benchmark of the loader: contenders give the same pixels and counts; measures order what they should."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from launch import benchmark as command
from storm.data import benchmark, benchmark_order
from storm.data.stream import batches


def test_contenders_decode_the_same(tmp_path: Path) -> None:
    """storm's way from the tar to pixels and counts beside the plain one: webdataset, simplejpeg, numpy."""
    folder = benchmark.make_shards(tmp_path / "set", (1, 2, 3, 50), groups=6, per_shard=3)
    found = benchmark.contenders(folder, tmp_path / "litdata")
    told = {name: list(itertools.islice(source, 6)) for name, source in found.items() if "litdata" not in name}
    plain = {pixels.tobytes(): arrays["count"].tobytes() for pixels, arrays in told.pop("webdataset")}
    assert len(plain) == 6
    for name, decoded in told.items():
        counts = [p["count"] if isinstance(p, dict) else p.count for _, p in decoded]
        own = {pixels.tobytes(): count.tobytes() for (pixels, _), count in zip(decoded, counts, strict=True)}
        assert own == plain, name
    assert set(benchmark.rates({"a": itertools.repeat((np.zeros(1, np.uint8), None))}, 2, 100)) == {"a"}


def test_the_measures_of_a_shuffle() -> None:
    slides = np.repeat(np.arange(8), 50)
    mixed = np.random.default_rng(0).permutation(slides)
    assert benchmark_order.slide_share(slides, 10) == 1.0 and benchmark_order.slide_share(mixed, 10) < 0.4
    assert benchmark_order.unevenness(slides) > 0.5 > 0.2 > benchmark_order.unevenness(mixed) > 0
    text = benchmark_order.shuffle_table(pools=2, per_shard=20)
    rows = [line.split("|") for line in text.splitlines() if line.startswith("|")][2:]
    share = {row[1].strip(): float(row[2]) for row in rows}
    assert share["full permutation"] <= share["windows of 32 shards"] < share["as written"]


def test_a_synthetic_index_streams(tmp_path: Path) -> None:
    stream = benchmark.open_stream(benchmark_order.make_index(tmp_path / "set", 500), 64)
    assert stream.order.groups == 500 and len(stream.order.shards) == 5
    assert len(next(batches(stream, 6, 7, workers=0))["region_group"]) == 64
    assert sorted(stream.order.epoch(0).tolist()) == list(range(500))
    assert benchmark_order.private_bytes() > 1e6


def test_the_command_prints_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(benchmark, "CONTENTS", {"few": (1, 1, 2, 10)})
    monkeypatch.setattr(benchmark, "GROUPS", {"few": 4})
    words = [
        "benchmark",
        "loader",
        "--turns",
        "1",
        "--scratch",
        str(tmp_path),
        "--groups",
    ]  # no index: it starts processes
    monkeypatch.setattr(sys, "argv", words)
    assert command.main() == 0
    text = capsys.readouterr().out
    assert [line[4:12] for line in text.splitlines() if line.startswith("###")] == ["few: 1 x", "Shuffles"]
    rows = {line.split("|")[1].strip(): line.split("|")[2:] for line in text.splitlines() if line.startswith("|")}
    assert float(rows["storm"][1]) == 1.0 and float(rows["webdataset"][0]) > 0
