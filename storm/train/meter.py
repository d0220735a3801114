"""What the steps since the last record cost and held, on every rank, summed up in one small exchange per record.

In: the micro-batches as the loader gives them, and the moments of a step. Out: the metrics `perf/*`, `mem/*`, `data/*`.
Nothing here waits for a device: sizes are read from tensors that are still on the host, and a device's time between two
events of a step is asked for after the step, when the loss has been read anyway.
"""

import os
import time
from pathlib import Path

import torch
from torch import Tensor

from storm.model import flops
from storm.presets import ModelConfig
from storm.schema import PLATFORMS
from storm.train import engine
from storm.train.engine import World

# Dense bf16 peak of devices, FLOP/s, by words of their name, the more exact ones first; vendors' data sheets.
PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "A100": 312e12, "A40": 150e12, "A10": 125e12, "L40S": 362e12, "L4": 121e12,
}  # fmt: skip
_GEMM, _TRIES = 1024, 8
_SUMS = ("flops", "profiles", "tiles", *PLATFORMS)
_TIMES = ("wait_s", "computed_s", "step_s")


def peak_flops(device: torch.device) -> float:
    """FLOP/s against which `perf/mfu` is taken: of a known device its bf16 peak, else a measured fp32 matrix product.

    The product is measured because a CPU tells no peak, and fp32 because many CPUs have no fast bf16.
    """
    if device.type == "cuda" and (known := known_peak(torch.cuda.get_device_name(device))):
        return known
    a, b = (torch.ones(_GEMM, _GEMM, device=device) for _ in range(2))
    best_s = min(_seconds(a, b) for _ in range(1 + _TRIES))  # the first one warms up
    return 2 * _GEMM**3 / best_s


def known_peak(name: str) -> float | None:
    """The dense bf16 peak of a device by the name that its driver tells; None where the table lacks it."""
    words = set(name.replace("-", " ").split())
    return next((peak for told, peak in PEAKS.items() if words >= set(told.split())), None)


def _seconds(a: Tensor, b: Tensor) -> float:
    began = time.perf_counter()
    float((a @ b)[0, 0])  # reading a value waits for the device
    return time.perf_counter() - began


class _Moment:
    """A point in the work of a rank: of the device's queue where there is one, else of the clock."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._s = time.perf_counter()
        if self._event:
            self._event.record()

    def since_s(self, earlier: "_Moment") -> float:
        """Seconds from `earlier` to this moment; both have passed."""
        if self._event and earlier._event:
            return float(earlier._event.elapsed_time(self._event)) / 1000
        return self._s - earlier._s


class Meter:
    """Counts and times of this rank since the last `read`.

    Args:
        model: sizes of the model.
        platforms: slide -> its platform. Batches tell it only where the view lets the model know.
        world: this rank.
    """

    def __init__(self, model: ModelConfig, platforms: dict[str, str], world: World) -> None:
        self._model, self._platforms, self._world = model, platforms, world
        self._peak = peak_flops(world.device)
        self._reset()

    def _reset(self) -> None:
        self._steps, self._sums = 0, dict.fromkeys((*_SUMS, *_TIMES), 0.0)
        if self._world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._world.device)

    def count(self, batch: dict[str, Tensor], keys: list[str]) -> None:
        """Add a micro-batch, still on the host, of the groups `keys`."""
        size = flops.sizes(batch, self._model.registers)
        self._sums["flops"] += sum(flops.training(self._model, size, "tiles" in batch).values())
        self._sums["profiles"] += size.profiles
        self._sums["tiles"] += size.tiles
        of_group = torch.zeros(len(keys), dtype=torch.int64).index_add(
            0, batch["region_group"], batch["profile"].sum(1)
        )
        for key, profiles in zip(keys, of_group.tolist(), strict=True):
            platform = self._platforms[key.rpartition("_")[0]]
            self._sums[platform if platform in PLATFORMS else PLATFORMS[0]] += profiles

    def begin(self) -> None:
        """A step begins: the rank turns to its loader."""
        self._began = time.perf_counter()

    def loaded(self) -> None:
        """The step's micro-batches are there."""
        self._wait_s = time.perf_counter() - self._began

    def start(self) -> None:
        """All ranks have their micro-batches."""
        self._start = _Moment(self._world.device)

    def arrive(self) -> None:
        """All is computed that waits for no other rank: the last backward, which sums gradients, comes now."""
        self._arrived = _Moment(self._world.device)

    def end(self) -> None:
        """The step is over, and its loss was read."""
        self._sums["wait_s"] += self._wait_s
        self._sums["computed_s"] += self._arrived.since_s(self._start)
        self._sums["step_s"] += time.perf_counter() - self._began
        self._steps += 1

    def read(self) -> dict[str, float | None]:
        """The metrics of all ranks since the last call, by tag; all ranks must call it."""
        device_bytes = torch.cuda.max_memory_allocated(self._world.device) if self._world.device.type == "cuda" else 0
        own = [*self._sums.values(), self._peak, device_bytes, resident_bytes()]
        found = metrics(engine.gather_numbers(own), self._steps)
        self._reset()
        return found


def metrics(ranks: list[list[float]], steps: int) -> dict[str, float | None]:
    """The metrics by tag, from each rank's sums, peak FLOP/s and bytes in the order of `Meter.read`."""
    columns = list(zip(*ranks, strict=True))
    names = (*_SUMS, *_TIMES)
    of, (peaks, device_bytes, host_bytes) = dict(zip(names, columns, strict=False)), columns[len(names) :]
    step_s, profiles = max(of["step_s"]), sum(of["profiles"])
    mean_s = sum(of["computed_s"]) / len(ranks)
    return {
        "perf/profiles_per_s": profiles / step_s,
        "perf/tiles_per_s": sum(of["tiles"]) / step_s,
        "perf/mfu": sum(of["flops"]) / (step_s * sum(peaks)),
        "perf/step_s": step_s / steps,
        "perf/data_wait": sum(of["wait_s"]) / len(ranks) / step_s,
        "perf/data_wait_worst": max(of["wait_s"]) / step_s,
        "perf/rank_skew": (max(of["computed_s"]) - mean_s) / step_s,
        "mem/device_peak_bytes": max(device_bytes) or None,
        "mem/host_resident_bytes": max(host_bytes),
        **{f"data/{platform}": sum(of[platform]) / profiles if profiles else None for platform in PLATFORMS},
    }


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
