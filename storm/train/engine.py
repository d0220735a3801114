"""DeepSpeed, and nothing of it elsewhere: the ranks, the engine around the model, and a few collectives.

In: a model and a RunConfig. Out: forward, backward, the gradient norm, and the optimizer's step over all ranks. The
ranks are those that the environment tells (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, as the `deepspeed`
launcher sets them); without them the process is one rank alone.
"""

import contextlib
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from storm.config import RunConfig
from storm.train.optim import parameter_groups

_TAG = "state"  # name of the one folder inside a checkpoint's deepspeed/
_BUCKET = 50_000_000  # elements; the default of 5e8 takes gigabytes for nothing at these model sizes


@dataclass(frozen=True)
class World:
    """This process among the ranks."""

    rank: int
    size: int
    device: torch.device


def _deepspeed() -> Any:
    """The library, quiet, and on the CPU where there is no GPU (it would guess, and say so)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils.logging import set_log_level_from_string

    set_log_level_from_string("warning")
    return deepspeed


def connect() -> World:
    """Join the process group."""
    deepspeed = _deepspeed()
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(alone)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        # A shared-memory all-reduce that DeepSpeed would compile for minutes at the first start; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def disconnect() -> None:
    """Leave the process group; without it rank 0 may abort at its end."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    torch.distributed.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on every rank."""
    torch.distributed.all_reduce(values)
    return values


def gather_numbers(values: list[float]) -> list[list[float]]:
    """Each rank's numbers, as many on every rank, on every rank."""
    own = torch.tensor(values, dtype=torch.float64, device=_device())
    found = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, own)
    return [[float(x) for x in row] for row in torch.stack(found).tolist()]


def _device() -> torch.device:
    """Where the process group moves tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def gather(value: Any) -> list[Any]:
    """Each rank's value (pickled between the processes of one job), on every rank."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def settings(config: RunConfig, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's own config, derived from a run's."""
    return {
        "train_batch_size": config.data.global_batch_size,
        "train_micro_batch_size_per_gpu": config.data.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": {
            "stage": config.engine.zero_stage,
            "reduce_bucket_size": _BUCKET,
            "allgather_bucket_size": _BUCKET,
            "contiguous_gradients": True,
        },
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


class _Autocast(nn.Module):
    """The model under bf16 autocast where asked; weights, gradients and optimizer stay fp32."""

    def __init__(self, model: nn.Module, enabled: bool, device: torch.device) -> None:
        super().__init__()
        self.model, self.enabled, self.device_type = model, enabled, device.type

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.enabled):
            outputs: dict[str, Tensor] = self.model(batch)
        return outputs


class Engine:
    """A model in training on all ranks."""

    def __init__(self, model: nn.Module, config: RunConfig, accumulation: int, world: World) -> None:
        self.world, self.accumulation = world, accumulation
        self.model = model.to(world.device)
        module = _Autocast(self.model, config.engine.precision == "bf16", world.device)
        betas = (config.optim.betas[0], config.optim.betas[1])
        self._optimizer = torch.optim.AdamW(
            parameter_groups(module, config.optim.weight_decay), lr=config.optim.lr, betas=betas,
            fused=world.device.type == "cuda",
        )  # fmt: skip
        self._engine, *_ = _deepspeed().initialize(
            model=module, optimizer=self._optimizer, config=settings(config, accumulation), dist_init_required=False
        )
        self._engine.train()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's outputs for a batch on this rank's device."""
        outputs: dict[str, Tensor] = self._engine(batch)
        return outputs

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """In here a forward is no step of training; every rank must run as many of them."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch's share of the global loss; after the `last` one it is summed over ranks.

        DeepSpeed averages over ranks and micro-batches; the factor takes that back, so shares add up to the loss.
        """
        self._engine.backward(loss * (self.world.size * self.accumulation))
        if not last:
            self._engine.step()  # only counts; the optimizer moves in `step`

    def grad_norm(self) -> float:
        """Norm of the global gradient, after the last backward and before `step`; NaN where it is not finite."""
        if self._engine.zero_optimization():
            norm = float(self._engine.optimizer.scaled_global_norm())  # -1 stands for NaN and infinity
        else:
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))
        return norm if math.isfinite(norm) and norm >= 0 else math.nan

    def gradients(self) -> dict[str, Tensor]:
        """Name -> global gradient, after the last backward and before `step`; all ranks must call it."""
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p).detach().clone() for name, p in self.model.named_parameters()}

    def step(self, learning_rate: float) -> None:
        """Clip and move the weights."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()

    def save(self, folder: Path) -> None:
        """Write the engine's own files; all ranks must call it."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, with as many ranks. The files are pickles: verify their hashes first."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG, load_lr_scheduler_states=False)
        if path is None:
            raise ValueError(f"{folder}: DeepSpeed found no checkpoint there; resume from an older one")

    def weights(self) -> dict[str, Tensor]:
        """The model's state in fp32 on the CPU (ZeRO 0 and 1 keep all of it on every rank)."""
        return {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
