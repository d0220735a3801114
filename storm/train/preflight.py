"""Before a run: every node looked at, every link of neighbouring ranks measured, and what will fail, with its cure.

In: the ranks of a job that is about to train. Out: text, and the list of faults, the same on every rank. Rank r sends
to and receives from rank r + 1, even pairs first, then odd ones, so that each rank's two links are measured apart: a
slow all-reduce tells that some host is slow, these tell which.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed

from storm.config import RunConfig
from storm.model import flops
from storm.shards import ShardSet
from storm.train import capacity, engine, node
from storm.train.engine import World
from storm.train.trainer import fit_model

_BYTES = {"cuda": 256_000_000, "cpu": 16_000_000}  # per message
_TRIES, _ROUNDS = 3, 5
_SLOW = 0.5  # of the median link of its kind

Link = tuple[int, int, float]  # two ranks, bytes per second in each direction


def preflight(config: RunConfig) -> int:
    """Join the job's ranks, print the report on rank 0; the exit code: 2 where something will fail."""
    world = engine.connect()
    try:
        text, faults = report(config, world)
        if world.rank == 0:
            print(text, flush=True)
        return 2 if faults else 0
    finally:
        engine.disconnect()


def report(config: RunConfig, world: World) -> tuple[str, list[str]]:
    """(the report, its faults), the same on every rank; all ranks must call it.

    Raises:
        ValueError: of the shards; it names the file, the fact and the cure.
    """
    shards = [config.data.shards] if isinstance(config.data.shards, str) else config.data.shards
    local = [Path(name) for name in shards if "://" not in name]
    folders = {"run_dir": Path(config.run_dir)} | {f"shards {i}" if i else "shards": p for i, p in enumerate(local)}
    own = dataclasses.replace(node.look(folders, world.rank), skew_s=clock_skew_s())
    ranks: list[node.Facts] = engine.gather(own)
    hosts = [facts.host for facts in ranks]
    sent, links = bandwidth(world)
    faults = node.faults(ranks, needs(config, local)) + slow_hosts(links, hosts)
    return f"{node.table(ranks)}\n\n{links_text(sent, links, hosts)}\n\n" + (
        "\n".join(f"FAULT {fault}" for fault in faults) or "no fault found"
    ), faults


def needs(config: RunConfig, shards: list[Path]) -> node.Needs:
    """What a run asks of its nodes: among it, room for its checkpoints and the one that is being written."""
    run_bytes = 0.0
    if shards:
        first = ShardSet(shards[0])
        parameters = sum(
            flops.parameters(fit_model(config.model, first, config.encoder.weights), len(first.genes)).values()
        )
        run_bytes = (config.checkpoint.keep_last + 1) * 3 * capacity.FP32 * parameters
    workers = config.data.workers
    return node.Needs(workers if isinstance(workers, int) else 0, run_bytes, config.engine.precision == "bf16")


def clock_skew_s() -> float:
    """By how much this rank's clock is ahead of rank 0's, to about the time that a barrier takes; all ranks call it."""
    offsets = []
    for _ in range(_ROUNDS):
        engine.barrier()
        moments = engine.gather_numbers([time.time()])
        offsets.append(moments[torch.distributed.get_rank()][0] - moments[0][0])
    return statistics.median(offsets)


def bandwidth(world: World) -> tuple[float | None, list[Link]]:
    """(bus bandwidth of an all-reduce over all ranks, that of each pair of neighbours), bytes per second."""
    if world.size == 1:
        return None, []
    values = torch.ones(_BYTES[world.device.type] // 4, device=world.device)
    size = values.numel() * 4
    seconds = _best_s(world, lambda: engine.sum_over_ranks(values))
    links: list[Link] = []
    other = torch.empty_like(values)
    for pairs in rounds(world.size):
        mine = next((pair for pair in pairs if world.rank in pair), None)
        partner = None if mine is None else sum(mine) - world.rank
        taken = _best_s(world, lambda partner=partner: _swap(values, other, partner))  # type: ignore[misc]
        found = engine.gather_numbers([taken])
        links += [(a, b, size / max(found[a][0], found[b][0])) for a, b in pairs]
    return 2 * (world.size - 1) / world.size * size / seconds, links


def rounds(ranks: int) -> list[list[tuple[int, int]]]:
    """Pairs of neighbours that exchange at once, in two rounds; the ring is closed where the ranks are even."""
    even = [(r, r + 1) for r in range(0, ranks - 1, 2)]
    odd = [(r, r + 1) for r in range(1, ranks - 1, 2)]
    return [even, [*odd, (ranks - 1, 0)] if ranks % 2 == 0 and ranks > 2 else odd]


def _swap(values: torch.Tensor, other: torch.Tensor, partner: int | None) -> None:
    """Send to and receive from a rank at once."""
    if partner is not None:
        send = torch.distributed.P2POp(torch.distributed.isend, values, partner)
        receive = torch.distributed.P2POp(torch.distributed.irecv, other, partner)
        for work in torch.distributed.batch_isend_irecv([send, receive]):
            work.wait()


def _best_s(world: World, exchange: Callable[[], object]) -> float:
    """Seconds of the fastest of some exchanges; one before them opens the connections."""
    best = float("inf")
    for attempt in range(1 + _TRIES):
        engine.barrier()
        began = time.perf_counter()
        exchange()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        if attempt:
            best = min(best, time.perf_counter() - began)
    return best


def slow_hosts(links: list[Link], hosts: list[str]) -> list[str]:
    """A line per host whose links are slow beside others of their kind (within a node, or between two).

    Between nodes a link is as slow as its slower end, so a host counts by its best one; within a node by its worst.
    """
    lines = []
    for inside, kind, pick in ((True, "within the node", min), (False, "to its neighbours", max)):
        some = [link for link in links if (hosts[link[0]] == hosts[link[1]]) == inside]
        if len(some) < 2:
            continue
        usual = statistics.median(speed for _, _, speed in some)
        for host in dict.fromkeys(hosts):
            own = [speed for a, b, speed in some if host in (hosts[a], hosts[b])]
            if own and pick(own) < _SLOW * usual:
                lines.append(
                    f"{host}: links {kind} carry {pick(own) / 1e9:.2f} GB/s, others {usual / 1e9:.2f}: leave the host "
                    "out (--exclude), and have its network cards and cables looked at"
                )
    return lines


def links_text(sent: float | None, links: list[Link], hosts: list[str]) -> str:
    """The measured bandwidths; of the links the slowest few."""
    if sent is None:
        return "one rank: no link to measure"
    lines = [f"all-reduce over {len(hosts)} ranks: {sent / 1e9:.2f} GB/s on the bus"]
    for a, b, speed in sorted(links, key=lambda link: link[2])[:4]:
        lines.append(f"rank {a} ({hosts[a]}) - rank {b} ({hosts[b]}): {speed / 1e9:.2f} GB/s each way")
    return "\n".join(lines)
