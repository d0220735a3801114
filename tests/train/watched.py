"""One rank of a small job that is watched, without DeepSpeed: it does what its word says. For test_watch.

In: `WORD STALL_S` and the variables of a rank. Out: lines, and an exit code as launch/pretrain.py would have it.
"""

import os
import sys
import time

import torch
import torch.distributed

from storm.train import ranks, stop, watch

watch.LOST_BEATS = 8  # in place of 30, to be short


def work(word: str, rank: int, progress: watch.Progress) -> None:
    """Steps of one sum, until something happens to rank 1."""
    for step in range(1_000_000):
        if step == 3 and rank == 1 and word == "fails":
            raise ValueError("its disk is full")
        if step == 3 and word == "hangs":  # as a kernel that waits for a rank: no error comes out of it
            print(f"rank {rank}: pid {os.getpid()}", flush=True)
            time.sleep(1000)
        if step == 3 and rank == 1 and word == "stalls":
            with progress.waiting("its loader"):
                print(f"rank {rank}: pid {os.getpid()}", flush=True)
                time.sleep(1000)
        with progress.waiting("the other ranks"):
            torch.distributed.all_reduce(torch.ones(1))
        progress.step = step + 1


def main(word: str, stall_s: float) -> int:
    """The job of one rank; the exit code."""
    place, progress = ranks.current(), watch.Progress()
    os.environ.update(place.variables())
    torch.distributed.init_process_group("gloo")
    try:
        with watch.Watch(place, progress, stall_s):
            work(word, place.rank, progress)
    except stop.ToldError as error:
        return error.code
    except (ValueError, stop.RankLeftError) as error:
        print(f"error: {error}", flush=True)
        return int(getattr(error, "code", stop.USAGE))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2])))
