"""DeepSpeed, and nothing of it elsewhere: the ranks, the engine around the model, and a few collectives.

In: a model and a RunConfig. Out: forward, backward, the gradient norm, and the optimizer's step over all ranks, which
are those of storm.train.ranks.
"""

import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from storm.config import RunConfig
from storm.train import ranks
from storm.train.optim import parameter_groups
from storm.train.watch import Progress

_TAG = "state"  # name of the one folder inside a checkpoint's deepspeed/
_BUCKET = 50_000_000  # elements; the default of 5e8 takes gigabytes for nothing at these model sizes


@dataclass(frozen=True)
class World:
    """This process among the ranks."""

    rank: int
    size: int
    device: torch.device
    progress: Progress = field(default_factory=Progress, compare=False)


def _deepspeed() -> Any:
    """The library, quiet, and on the CPU where there is no GPU (it would guess, and say so)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils.logging import set_log_level_from_string

    set_log_level_from_string("warning")
    return deepspeed


def connect(place: ranks.Place | None = None) -> World:
    """Join the process group, at the place that the environment tells.

    Raises:
        ValueError: this rank's GPU is not there.
    """
    place = place or ranks.current()
    if place.rank == 0 and (warning := ranks.unlaunched(os.environ)):
        print(warning, file=sys.stderr, flush=True)
    os.environ.update(place.variables())
    deepspeed = _deepspeed()
    if torch.cuda.is_available():
        if place.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"{place} is number {place.local_rank} there, and sees {torch.cuda.device_count()} GPUs: start as many "
                "ranks on a node as it has GPUs, and let each see all of them (--gres=gpu:N, not --gpus-per-task)"
            )
        torch.cuda.set_device(place.local_rank)
        device = torch.device("cuda", place.local_rank)
    else:
        device = torch.device("cpu")
        # A shared-memory all-reduce that DeepSpeed would compile for minutes at the first start; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def refuse_unequal(place: ranks.Place, world: World, precision: str) -> None:
    """Compare what the ranks are made of; all ranks must call it.

    Raises:
        ValueError: devices or versions differ, or bf16 is asked for and missing; the hosts are listed.
    """
    cuda = world.device.type == "cuda"
    own = {"device": torch.cuda.get_device_name(world.device) if cuda else "cpu", "torch": torch.__version__}
    own["bf16"] = "yes" if not cuda or torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    facts = gather((place.host, own))
    if text := ranks.unequal(facts):
        raise ValueError(f"the ranks are not alike ({text}); run on nodes of one kind, with one environment")
    if precision == "bf16" and own["bf16"] == "no":
        hosts = ", ".join(dict.fromkeys(host for host, _ in facts))
        raise ValueError(f"engine.precision=bf16, which {own['device']} lacks ({hosts}); use fp32, or other GPUs")


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
