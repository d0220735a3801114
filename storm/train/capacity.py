"""What a GPU must hold and send, by arithmetic: bytes of state and of network for each ZeRO stage.

In: the number of parameters, ranks and micro-batches. Out: bytes per GPU. Weights, gradients, AdamW's two moments and
what is sent are fp32, under bf16 too: autocast makes copies in bf16 of weights as they are used.
"""

from dataclasses import dataclass

FP32 = 4
STAGES = (0, 1, 2, 3)
BUCKET = 50_000_000  # elements of each of DeepSpeed's two buffers, as storm.train.engine asks for


@dataclass(frozen=True)
class State:
    """Bytes on one GPU, activations apart."""

    parameters: float
    gradients: float
    optimizer: float  # the moments; from stage 1 on also the weights that the optimizer moves
    buffers: float  # of communication
    copies: float  # of weights in bf16

    @property
    def total(self) -> float:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.buffers + self.copies


def state(parameters: int, stage: int, ranks: int, bf16: bool) -> State:
    """What a rank keeps in a ZeRO stage. ZeRO divides: 1 the optimizer's state, 2 gradients too, 3 parameters too."""
    whole, part = FP32 * parameters, FP32 * parameters / ranks
    return State(
        parameters=part if stage == 3 else whole,
        gradients=part if stage >= 2 else whole,
        optimizer=3 * part if stage else 2 * whole,
        buffers=2 * FP32 * min(BUCKET, parameters) if stage else 0,
        copies=2 * parameters if bf16 else 0,
    )


def sent_bytes(parameters: int, stage: int, ranks: int, accumulation: int) -> float:
    """What a GPU sends (and receives) per optimizer step, by rings.

    Stages 0 and 1 sum gradients once per step, stage 2 after every micro-batch; stage 3 also gathers the parameters for
    every forward and every backward pass, the others once per step (0: nothing to gather, but a sum is two passes).
    """
    passes = {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}[stage]
    return passes * FP32 * parameters * (ranks - 1) / ranks
