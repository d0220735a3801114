"""Why a run stops: what asks for it, who agrees, the clock, restarts that lead nowhere, and the table of the docs."""

import signal
import time
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storm import files
from storm.config import RunConfig, StopConfig, load
from storm.train import engine, stop
from storm.train.trainer import FINISHED, Trainer
from tests.train import runs

REPO = Path(__file__).resolve().parents[2]


def requests(folder: Path, rank: int = 0) -> stop.Requests:
    return stop.Requests(folder, rank, StopConfig())


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(stop, "_received", set())


@given(st.lists(st.tuples(*[st.booleans() for _ in stop.REQUESTS]), min_size=1, max_size=5))
def test_all_ranks_agree_on_the_first_reason_that_any_has(asked: list[tuple[bool, ...]]) -> None:
    total = [float(sum(votes)) for votes in zip(*asked, strict=True)]
    ranks = [stop.Requests(Path("nowhere"), rank, StopConfig()) for rank in range(len(asked))]
    for one in ranks:
        one.decide(total)
    assert len({one.agreed for one in ranks}) == 1
    first = next((reason for reason, n in zip(stop.REQUESTS, total, strict=True) if n), None)
    assert ranks[0].agreed == first
    ranks[0].decide([0.0] * len(stop.REQUESTS))
    assert ranks[0].agreed == first  # once agreed, it stands


def asked(one: stop.Requests) -> list[stop.Reason]:
    return [reason for reason, vote in zip(stop.REQUESTS, one.votes(), strict=True) if vote]


def test_signals_set_a_flag_and_say_what_they_mean_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    try:
        stop.listen()
        assert asked(requests(tmp_path)) == []
        signal.raise_signal(signal.SIGTERM)
        assert asked(requests(tmp_path)) == asked(requests(tmp_path, rank=1)) == [stop.TERMINATED]
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        monkeypatch.setattr(stop, "end_of_job", lambda job: None)
        assert asked(requests(tmp_path)) == [stop.PREEMPTED]
        stop._received.clear()
        with stop.deferred():
            signal.raise_signal(signal.SIGUSR2)
            assert asked(requests(tmp_path)) == []
        assert asked(requests(tmp_path)) == [stop.SIGNALLED]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_preempted_job_waits_to_be_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    for reason, times in ((stop.TERMINATED, 0), (stop.SIGNALLED, 0), (stop.FINISHED, 0), (stop.PREEMPTED, 9)):
        one = requests(tmp_path)
        one.agreed = stop.PREEMPTED  # which the last step of all may have agreed on, too
        one.conclude(reason)
        assert len(waited) == times


def test_a_stop_file_ends_a_run_at_its_next_step_and_is_taken_away(
    tiny_shards: Path, world: engine.World, tmp_path: Path
) -> None:
    trainer = Trainer(load(RunConfig, None, runs.words(tiny_shards, tmp_path, 2, "optim.steps=4")), world)
    trainer.start("auto")
    (tmp_path / stop.STOP).touch()
    assert trainer.train() is stop.STOP_FILE
    assert [line["step"] for line in runs.log(tmp_path)] == [1] and not (tmp_path / FINISHED).exists()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_0000001"]
    trainer.requests.conclude(stop.STOP_FILE)
    again = Trainer(load(RunConfig, None, runs.words(tiny_shards, tmp_path, 2, "optim.steps=4")), world)
    again.start("auto")
    assert again.train() is stop.FINISHED and (tmp_path / FINISHED).exists()
    assert [line["step"] for line in runs.log(tmp_path)] == [1, 2, 3, 4]


def test_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    ends = {"1": now + 5000}
    monkeypatch.setattr(stop, "end_of_job", ends.get)
    monkeypatch.setattr(time, "time", lambda: now)
    assert stop.Deadline(StopConfig(), {}).end_s == float("inf")
    assert stop.Deadline(StopConfig(time_limit_s=60), {}).end_s == now + 60
    assert stop.Deadline(StopConfig(time_limit_s=60), {"SLURM_JOB_ID": "1"}).end_s == now + 60
    assert stop.Deadline(StopConfig(), {"SLURM_JOB_ID": "2", "SLURM_JOB_END_TIME": str(now + 7)}).end_s == now + 7
    clock = stop.Deadline(StopConfig(), {"SLURM_JOB_ID": "1"})
    assert clock.end_s == now + 5000 and clock.margin_s == 300
    assert stop.Deadline(StopConfig(time_limit_s=60), {}).margin_s == pytest.approx(6)
    now += 4699
    assert not clock.near()
    now += 2
    assert clock.near()
    ends["1"] += 1000  # prolonged by the administrator
    assert not clock.near()
    now += 1000
    assert clock.near()
    del ends["1"]  # no answer
    assert clock.near()


def test_what_squeue_says_is_read_as_local_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert stop.end_of_job("1") is None
    for said, end in (("2026-11-24T13:15:00", datetime(2026, 11, 24, 13, 15).timestamp()), ("NONE", None)):
        program = tmp_path / "squeue"
        program.write_text(f"#!/bin/sh\necho {said}\n")
        program.chmod(0o755)
        assert stop.end_of_job("1") == end


def test_restarts_by_a_machine_that_come_no_further_are_ended(tmp_path: Path) -> None:
    def start(step: int, count: str = "") -> int:
        stop.count_restart(tmp_path, step, 3, {"SLURM_RESTART_COUNT": count} if count else {})
        return int(files.read_json(tmp_path / stop.RESTARTS)["restarts"])

    assert [start(0), start(0, "1"), start(0, "2"), start(0, "3")] == [0, 1, 2, 3]
    with pytest.raises(stop.GaveUpError, match=r"3 restarts came no further than step 0; .*start it by hand"):
        start(0, "4")
    assert [start(5, "5"), start(5, "6"), start(5), start(5, "1")] == [0, 1, 0, 1]
    files.write_json(tmp_path / stop.RESTARTS, {"step": 5})
    with pytest.raises(ValueError, match=r"restarts\.json: holds no count"):
        start(5, "2")


def test_a_run_that_gave_up_ends_before_its_first_step(
    tiny_shards: Path, world: engine.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    files.write_json(tmp_path / stop.RESTARTS, {"step": 0, "restarts": 3})
    with pytest.raises(stop.GaveUpError) as caught:
        Trainer(load(RunConfig, None, runs.words(tiny_shards, tmp_path, 2)), world).start("auto")
    assert caught.value.code == stop.GAVE_UP


def test_the_docs_have_the_table() -> None:
    lines = (REPO / "launch" / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|") and line.count("|") == 5]
    assert rows[2:] == [f"| {r.name} | {r.does} | {r.code} | {r.requeued_by} |" for r in stop.TABLE]
