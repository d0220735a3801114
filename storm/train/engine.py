"""DeepSpeed, and nothing of it elsewhere: the ranks, the engine around the model, and a few collectives.

In: a model and a RunConfig. Out: forward, backward, the gradient norm, and the optimizer's step over all ranks, which
are those of storm.train.ranks.
"""

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from storm.config import RunConfig
from storm.model import layers
from storm.model.layers import Block
from storm.train import ranks
from storm.train.optim import parameter_groups
from storm.train.watch import Progress

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter, beside the number of its steps
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
    # DeepSpeed's calls of two functions that torch renames; one line each time would bury what a run has to say.
    renamed = r".torch\.distributed\.(all_gather_into|reduce_scatter)_tensor. is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
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
    """DeepSpeed's own config, derived from a run's, with `deepspeed.extra` merged into it.

    Raises:
        ValueError: `deepspeed.extra` sets a key that is derived.
    """
    derived = {
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
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    _merge(derived, config.deepspeed.extra)
    return derived


# What DeepSpeed would take from its own config and STORM decides elsewhere.
_ELSEWHERE = {"optimizer": "optim", "scheduler": "optim", "bf16": "engine.precision", "fp16": "engine.precision",
              "torch_autocast": "engine.precision", "activation_checkpointing": "engine.activation_checkpointing",
              "compile": "engine.compile"}  # fmt: skip


def _merge(derived: dict[str, Any], extra: dict[str, Any], place: str = "") -> None:
    """Add the keys of `extra`; one that is there already, or decided by another key of ours, is refused."""
    for name, value in extra.items():
        key = f"{place}{name}"
        if isinstance(derived.get(name), dict) and isinstance(value, dict):
            _merge(derived[name], value, f"{key}.")
        elif name in derived or key in _ELSEWHERE:
            cure = f"set {_ELSEWHERE[key]} instead" if key in _ELSEWHERE else "leave it out"
            raise ValueError(f"deepspeed.extra.{key}: STORM derives this key of DeepSpeed's from its own; {cure}")
        else:
            derived[name] = value


class _Autocast(nn.Module):
    """The model under bf16 autocast where asked; weights, gradients and optimizer stay fp32."""

    def __init__(self, model: nn.Module, enabled: bool, device: torch.device) -> None:
        super().__init__()
        self.model, self.enabled, self.device_type = model, enabled, device.type

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.enabled):
            outputs: dict[str, Tensor] = self.model(batch)
        return outputs


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the blocks alone: they hold the work, and are of few shapes. The whole would be compiled for minutes.

    Lengths differ from batch to batch: attention of packed sequences stays outside the graphs.
    """
    layers.attend_packed = torch.compiler.disable(layers.attend_packed)
    for block in (module for module in model.modules() if isinstance(module, Block)):
        block.compile(dynamic=True, backend=backend)


class Engine:
    """A model in training on all ranks."""

    def __init__(self, model: nn.Module, config: RunConfig, accumulation: int, world: World) -> None:
        self.world, self.accumulation = world, accumulation
        self.model = model.to(world.device)
        if config.engine.compile:
            compile_blocks(self.model)
        module = _Autocast(self.model, config.engine.precision == "bf16", world.device)
        betas = (config.optim.betas[0], config.optim.betas[1])
        self._optimizer = torch.optim.AdamW(
            parameter_groups(module, config.optim.weight_decay), lr=config.optim.lr, betas=betas,
            fused=world.device.type == "cuda",
        )  # fmt: skip
        self._deepspeed = _deepspeed()
        self.stage = config.engine.zero_stage
        self._engine, *_ = self._deepspeed.initialize(
            model=module, optimizer=self._optimizer, config=settings(config, accumulation), dist_init_required=False
        )
        self._engine.train()
        self._make_moments()

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
        if self.stage == 0:
            norms = [torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])]
        elif self.stage == 3:
            norms = self._engine.optimizer._get_norm_groups()
        else:
            norms = [self._engine.optimizer.scaled_global_norm()]
        found = torch.stack([torch.as_tensor(norm, dtype=torch.float64, device="cpu") for norm in norms])
        return float(found.norm()) if bool((found.isfinite() & (found >= 0)).all()) else math.nan  # -1: NaN or infinity

    def gradients(self) -> dict[str, Tensor]:
        """Name -> global gradient, after the last backward and before `step`; all ranks must call it."""
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p).detach().clone() for name, p in self._trained()}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are not frozen, by name: only these have a gradient and moments."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _kept(self) -> list[tuple[str, Tensor]]:
        """Buffers that are of the model's state, as the statistics of a BatchNorm; whole on every rank."""
        parameters = dict(self.model.named_parameters())
        return [
            (name, tensor) for name, tensor in self.model.state_dict(keep_vars=True).items() if name not in parameters
        ]

    def own_norm(self, batch: dict[str, Tensor], loss: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Norm of the gradient of `loss(outputs)` for a batch of this rank alone; the gradient of the step stays as it
        is. All ranks must call it as often."""
        if self.stage == 3:
            over = [p for _, p in self._trained()]
            outputs = self._engine(batch)
        else:  # through copies: DeepSpeed's hooks on the parameters would add the gradient to the step's
            trained = {name: p for name, p in self._engine.module.named_parameters() if p.requires_grad}
            copies = {name: p.detach().requires_grad_() for name, p in trained.items()}
            over = list(copies.values())
            outputs = torch.func.functional_call(self._engine.module, copies, (batch,))
        found = torch.autograd.grad(loss(outputs), over, allow_unused=True)
        return torch.nn.utils.get_total_norm([gradient for gradient in found if gradient is not None])

    def step(self, learning_rate: float) -> None:
        """Clip and move the weights."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()

    def weights(self) -> dict[str, Tensor]:
        """The model's state in fp32 on the CPU, on rank 0; empty elsewhere. All ranks must call it."""
        found = {}
        for name, parameter in self.model.named_parameters():
            with self._whole(parameter, writer=None):
                if self.world.rank == 0:
                    found[name] = parameter.detach().float().cpu().clone()
        if self.world.rank == 0:
            found |= {name: tensor.detach().cpu().clone() for name, tensor in self._kept()}
        return found

    def moments(self) -> dict[str, Tensor]:
        """This rank's share of AdamW's moments, whole tensors in fp32 on the CPU: 'exp_avg/<parameter>' -> tensor.

        Each parameter is with one rank, so that all ranks write at once. All ranks must call it.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        found = {}
        for i, (name, parameter) in enumerate(self._trained()):
            for moment in MOMENTS:
                if self.stage:
                    whole = safe_get_full_optimizer_state(parameter, moment)
                else:
                    whole = self._optimizer.state[parameter][moment]
                if i % self.world.size == self.world.rank:
                    found[f"{moment}/{name}"] = whole.detach().cpu().clone()
        return found

    def _whole(self, parameter: nn.Parameter, writer: int | None) -> Any:
        """A context in which a parameter is whole on every rank; after it, all have what rank `writer` left in it."""
        if self.stage == 3:
            return self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=writer)
        return torch.no_grad()

    @torch.no_grad()
    def set_weights(self, read: Callable[[str], Tensor]) -> None:
        """Take each parameter and each table from `read(name)`; all ranks must call it."""
        for name, parameter in self.model.named_parameters():
            with self._whole(parameter, writer=0):
                if self.stage < 3 or self.world.rank == 0:
                    parameter.copy_(read(name))
        for name, tensor in self._kept():
            tensor.copy_(read(name))
        if self.stage:
            self._engine.optimizer.refresh_fp32_params()

    @torch.no_grad()
    def load(self, step: int, read: Callable[[str], Tensor]) -> None:
        """Stand where an engine stood after `step` steps, whatever its stage and world.

        Args:
            read: the tensor of a name, '<parameter>', 'exp_avg/<parameter>' or 'exp_avg_sq/<parameter>'.
        """
        self.set_weights(read)
        for state in self._optimizer.state.values():
            state["step"].fill_(step)
        for name, parameter in self._trained():
            for moment in MOMENTS:
                self._set_moment(parameter, moment, read(f"{moment}/{name}").to(self.world.device))

    def _set_moment(self, parameter: nn.Parameter, moment: str, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage == 0:
            self._optimizer.state[parameter][moment].copy_(whole)
        elif self.stage < 3:
            safe_set_full_optimizer_state(parameter, whole, moment)
        else:  # its own division of a whole tensor fails where the ranks do not divide the tensor's size
            size = -(-whole.numel() // self.world.size)
            padded = torch.nn.functional.pad(whole.flatten(), (0, size * self.world.size - whole.numel()))
            safe_set_local_optimizer_state(parameter, padded[size * self.world.rank :][:size], moment)

    def _make_moments(self) -> None:
        """AdamW's state, which it would make at its first step, for the tensors that it moves: the parameters, or the
        flat partitions into which DeepSpeed has put them. Left to itself DeepSpeed links parameters with the state of
        the first parameter group alone, because the others have not stepped yet when it does."""
        zero = self._engine.optimizer
        if self.stage == 0:
            moved = [p for _, p in self._trained()]
        else:
            moved = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for tensor in moved:
            count = torch.zeros((), device=tensor.device if self._optimizer.defaults["fused"] else "cpu")
            moments = {moment: torch.zeros_like(tensor) for moment in MOMENTS}
            self._optimizer.state[tensor] = {"step": count, **moments}
        if self.stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()
