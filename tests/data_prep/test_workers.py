"""workers: an answer for every item, whatever happens to its process."""

import os
import signal

import pytest

from data_prep import workers


def work(number: int) -> str:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{number} done"


def died(number: int, reason: str) -> str:
    return f"{number}: {reason}"


@pytest.mark.parametrize("processes", [2, 8])
def test_a_process_that_is_killed_is_told_and_the_others_go_on(processes: int) -> None:
    found = sorted(workers.run([1, 2, 3], work, died, processes))
    assert [found[0], found[2]] == ["1 done", "3 done"]
    assert found[1].startswith("2: its process ended with code -9")


def test_one_worker_is_this_process() -> None:
    assert list(workers.run([1, 3], lambda n: os.getpid(), died, 1)) == [os.getpid()] * 2


def large(number: int) -> bytes:
    return bytes(number)


def test_an_answer_may_be_larger_than_a_pipe() -> None:
    assert [len(answer) for answer in workers.run([3_000_000], large, lambda n, reason: b"", 2)] == [3_000_000]
