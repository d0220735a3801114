"""A step keeps its device busy: nothing in it waits for a value on the host, and shapes that vary compile no new graph.

A CPU has no device to wait for, so reads are found by the operations that would wait on one: where an operation's
result or its shape depends on a tensor's values.
"""

import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from storm import losses
from storm.model import encoders, layers
from storm.model.storm import Storm
from storm.train import engine
from tests.model.batches import CONFIG, N_GENES, Batch, awake, make_batch

REPO = Path(__file__).resolve().parents[2]
READS = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::histc",
}  # fmt: skip
BY_MASK = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index"}  # reads where an index is bool
METHODS = {Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.item}  # on a CPU some of these reach no operation
# (file, operation) -> why it stays. What is no longer read must leave this list.
KNOWN = {
    (
        "storm/model/layers.py",
        "Tensor.tolist",
    ): "lengths of packed sequences, on the CPU alone",
}
SWITCHED = dataclasses.replace(
    CONFIG, expression="tokens", expression_width=16, position="distance_bias", descriptor_width=6, likelihood="zinb",
)  # fmt: skip
GIVEN = encoders.fit(dataclasses.replace(
    CONFIG, encoder="timm/vit_tiny_patch16_224", encoder_train="lora", encoder_sha256="0",
    encoder_options={"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
))  # fmt: skip
MOST_PACKED = 6  # the parts of a block around the attention of packed sequences
MOST_GRAPHS = 6  # of the blocks over 20 steps: one per level and kind of pass, and one for a single region


def site() -> str:
    """The innermost file of ours that is running; the backward pass runs below this test's own call of it."""
    frame: Any = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(REPO / "storm"):
            return path.relative_to(REPO).as_posix()
        frame = frame.f_back
    return "outside of storm"


class Operations(TorchDispatchMode):
    """Notes reads among the operations, those of the backward pass too."""

    def __init__(self, found: "Counter[tuple[str, str]]") -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        masks = name in BY_MASK and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        repeats = name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in READS or masks or repeats:
            self.found[site(), name] += 1
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Notes copies to the host that a CPU does not carry out."""

    def __init__(self, found: "Counter[tuple[str, str]]") -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        moved = func is Tensor.to and "cpu" in map(str, (*args[1:], *(kwargs or {}).values()))
        if moved or func in METHODS - {Tensor.item}:
            self.found[site(), f"Tensor.{func.__name__}"] += 1
        return func(*args, **(kwargs or {}))


def reads(work: Callable[[], Any]) -> "Counter[tuple[str, str]]":
    """(file, operation) -> how often `work` reads a value on the host."""
    found: Counter[tuple[str, str]] = Counter()
    with Methods(found), Operations(found):
        work()
    return found


def step(model: Storm, batch: Batch) -> None:
    """Forward, losses and what the log tells of them, backward."""
    counts, outputs = losses.counts(batch, losses.absent(model.config)), model(batch)
    found = losses.terms(outputs, batch)
    losses.expr_by_mode(outputs, batch)
    torch.stack([total / counts[term].clamp_min(1) for term, (total, _) in found.items()]).sum().backward()


def test_no_step_reads_a_value_that_is_not_on_the_list() -> None:
    found: Counter[tuple[str, str]] = Counter()
    for config in (CONFIG, SWITCHED, GIVEN):
        model = awake(Storm(config, N_GENES, activation_checkpointing=True, anchored=config.is_anchored))
        for batch in (make_batch(images=images, config=config) for images in (True, False)):
            found += reads(functools.partial(step, model, batch))
    assert set(found) - set(KNOWN) == set(), "reads a tensor's value on the host: a device waits there at every step"
    assert set(KNOWN) - set(found) == set(), "on the list, and read no longer: remove it there"


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.nonzero(),
        lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: x.numpy(), lambda x: x.unique(),
        lambda x: x.repeat_interleave(torch.tensor([1, 2, 3])), lambda x: torch.equal(x, x),
        lambda x: x.masked_fill_(x > 0, 1)[x > 0], lambda x: torch.masked_select(x, x > 0),
    ],
)  # fmt: skip
def test_the_detector_sees_each_kind_of_read(read: Callable[[Tensor], Any]) -> None:
    assert reads(lambda: read(torch.arange(3.0))).total() >= 1


def test_the_detector_sees_a_read_in_the_backward_pass_and_none_where_there_is_none() -> None:
    x = torch.arange(3.0, requires_grad=True)
    x.register_hook(lambda gradient: gradient * gradient.sum().item())
    assert reads(lambda: (x * 2).sum().backward()).total() == 1
    assert reads(lambda: torch.where(x > 0, x, 0)[torch.tensor([0, 2])].sum()).total() == 0


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[nn.Module], None]]:
    """What makes a model's blocks compiled ones, with nothing compiled before; what is counted precedes the code."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(layers, "attend_packed", layers.attend_packed)  # put back at the end
    yield functools.partial(engine.compile_blocks, backend="aot_eager")
    torch._dynamo.reset()


def test_batches_of_varying_sizes_share_their_graphs(compiler: Callable[[nn.Module], None]) -> None:
    model, graphs = awake(Storm(CONFIG, N_GENES)), []
    compiler(model)
    for number in range(20):
        step(model, make_batch(regions=1 + number % 3, side=2 + number % 2, n=5 + number, k=8 + number, seed=number))
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[-1] <= MOST_GRAPHS, graphs
    assert counters["graph_break"] == {}, "a break in a block"


def test_packed_sequences_of_varying_lengths_share_their_graphs(compiler: Callable[[nn.Module], None]) -> None:
    model, graphs = layers.Transformer(2, 16, 8), []
    compiler(model)
    for number in range(20):
        length = torch.arange(3 + number, 0, -1 - number % 2)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])
        x = torch.randn(1, int(length.sum()), 16, requires_grad=True)
        model(x, context=layers.Packing(offsets, int(length.max()))).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[-1] <= MOST_PACKED, graphs
    assert len(counters["graph_break"]) == 1, "a break beside that at the attention of packed sequences"
