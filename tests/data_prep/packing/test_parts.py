"""The parts of a pack: tasks that share the work give the bytes of one command, and only what is missing is written."""

from pathlib import Path

import pytest

from data_prep import pack
from data_prep.packing import finish, write
from data_prep.packing.manifest import Options
from storm import shards
from tests.conftest import PREP_TINY
from tests.data_prep.test_pack import CONFIG, content, info, write_store

WORDS = ["shard_mb=0.1", "pool_mb=0.4"]  # several shards in several pools of each split


def test_tasks_write_what_one_command_writes(
    tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--store", str(tiny_store), "--config", str(PREP_TINY), *WORDS, "--out"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert pack.main([*base, str(whole)]) == 0
    assert pack.main([*base, str(parts), "--finish", "--tasks", "3"]) == 2
    assert "no task has packed these stores with this config; run the tasks" in capsys.readouterr().err
    assert pack.main([*base, str(parts), "--plan"]) == 0
    assert "as many tasks as pools" in capsys.readouterr().out
    for task in (2, 0):
        assert pack.main([*base, str(parts), "--task", str(task), "--tasks", "3"]) == 0
    assert pack.main([*base, str(parts), "--finish", "--tasks", "3"]) == 2
    told = capsys.readouterr().err
    assert "shards are missing: train/00000" in told
    assert "run --task 1 of --tasks 3 again, and then finish" in told
    assert not parts.exists()
    for _ in range(2):  # the second finds nothing to write
        assert pack.main([*base, str(parts), "--task", "1", "--tasks", "3"]) == 0
    assert "0 B written" in capsys.readouterr().out
    assert pack.main([*base, str(parts), "--finish", "--tasks", "3"]) == 0
    assert content(parts) == content(whole)
    assert len(list((whole / "train").glob("*.tar"))) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts", "whole"]
    assert pack.main([*base, str(parts), "--task", "1", "--tasks", "3"]) == 0  # comes late
    assert "current, nothing to do" in capsys.readouterr().out


def test_shards_of_a_pool_are_near_their_size(tiny_store: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"shard_mb": 0.3, "min_profiles": 8})
    manifest = pack.pack(tiny_store, tmp_path / "out", config)
    sizes = [shard["bytes"] / 1e6 for shard in manifest["splits"]["train"]["shards"]]
    assert len(sizes) == 3
    assert all(0.28 < size < 0.6 for size in sizes[:-1])


def test_only_missing_shards_are_written(tiny_store: Path, tmp_path: Path) -> None:
    job = pack.open_job(tiny_store, tmp_path / "out", CONFIG.model_copy(update={"shard_mb": 0.1}))
    planned = job.plan()
    numbers = range(len(planned.pools))
    pack.write_pools(job, planned, numbers)
    tars = sorted(job.work.rglob("*.tar"))
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tars}
    tars[1].unlink()
    shards.sidecar_path(tars[2].parent, int(tars[2].stem)).unlink()
    assert sum(len(write.missing_shards(job.work, planned, n)) for n in numbers) == 2
    pack.write_pools(job, planned, numbers)
    assert {p: p.read_bytes() for p in tars} == {p: data for p, (data, _) in before.items()}
    assert [p.stat().st_mtime_ns != before[p][1] for p in tars] == [i in (1, 2) for i in range(len(tars))]


def test_a_store_that_was_built_anew_meanwhile_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "stores", info("a", "d1"), 80)
    job = pack.open_job(tmp_path / "stores", tmp_path / "out", CONFIG)
    planned = job.plan()
    write_store(tmp_path / "stores", info("a", "d1"), 81)
    with pytest.raises(ValueError, match="is not the store that was planned; let builds end before packing"):
        pack.write_pools(job, planned, [0])


def test_parts_of_the_work_are_named_rightly(
    tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--store", str(tiny_store), "--out", str(tmp_path / "out"), "--config", str(PREP_TINY)]
    assert pack.main([*base, "--task", "3", "--tasks", "3"]) == 2
    assert "--task K goes with --tasks N, and K is 0 to N - 1" in capsys.readouterr().err
    assert pack.main([*base, "--task", "0", "--tasks", "3", "--finish"]) == 2
    assert "three parts of the work; name one of them" in capsys.readouterr().err


def test_workers_write_the_same_bytes(tiny_store: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"shard_mb": 0.1, "pool_mb": 0.4})
    for workers in (1, 2):
        pack.pack(tiny_store, tmp_path / str(workers), config, Options(workers=workers))
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_leftovers_of_other_plans_go_with_the_next_pack(tiny_store: Path, tmp_path: Path) -> None:
    job = pack.open_job(tiny_store, tmp_path / "out", CONFIG.model_copy(update={"seed": 9}))
    job.plan()
    assert [p.name for p in tmp_path.iterdir()] == [finish.work_folder(job.out, job.fingerprint).name]
    pack.pack(tiny_store, tmp_path / "out", CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
