"""Work on many items in processes of their own, so that one that dies takes no other with it.

In: items and a function of one. Out: an answer for each as it ends; a process that died answers with how it died.
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

_SHARED = ["data_prep.one_slide", "data_prep.inputs", "data_prep.platforms.visium"]
Item = TypeVar("Item")
Answer = TypeVar("Answer")


def _child(work: Callable[[Item], Answer], item: Item, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends its children
    answer = work(item)
    with contextlib.suppress(BrokenPipeError):  # the parent is gone; what was made stays
        sender.send(answer)


def run(
    items: Sequence[Item], work: Callable[[Item], Answer], died: Callable[[Item, str], Answer], workers: int
) -> Iterator[Answer]:
    """The answers, in the order in which they come; one worker works in this very process.

    Args:
        work: must not raise, and must be known by name to another process.
        died: the answer for an item whose process ended without one, from the reason.
    """
    if workers == 1:
        yield from map(work, items)
        return
    # OpenSlide's handles and threads do not survive a fork, so every process is forked from a server that has opened
    # nothing, and has imported once what they all need.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_SHARED)
    waiting = list(items)
    running: dict[Connection, tuple[Item, Any]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            receiver, sender = context.Pipe(duplex=False)
            item = waiting.pop(0)
            process = context.Process(target=_child, args=(work, item, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (item, process)
        for receiver in cast(list[Connection], wait(list(running))):  # readable: an answer, or the end of its process
            yield _answer(*running.pop(receiver), receiver, died)


def _answer(item: Item, process: Any, receiver: Connection, died: Callable[[Item, str], Answer]) -> Answer:
    with contextlib.suppress(EOFError):  # it died before it could send
        answer: Answer = receiver.recv()
        process.join()
        return answer
    process.join()
    return died(
        item, f"its process ended with code {process.exitcode} (see above; -9 is often a lack of memory); run again"
    )
