"""What a training step is made of beyond single operations: the operators that are several of them, what each layer
keeps for backward, and how long the whole takes at the rates of the roofline, beside PyTorch's eager mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from cnnfast_kernels.gpus import KnownGpu
from cnnfast_kernels.questions import precision_of

from .following import FollowedStep, Foreign
from .rows import Operation


@dataclass(frozen=True)
class OperatorStep:
    """The calls of one operator that is composed of others, forward or backward, in one layer: a residual block, a
    convolution with its norm, or a stem with its pool.

    layer: the module's name. operator: of torch.ops.cnnfast. modelled_us: of the operations that it is made of.
    bytes, launches: of these and of PyTorch's operators in it.
    """

    layer: str
    operator: str
    backward: bool
    modelled_us: float
    bytes: int
    launches: int


@dataclass(frozen=True)
class StepAtRates:
    """A whole step, forward and backward, of which each launch of ours and each operator of PyTorch's takes as long as
    its products or as what it reads and writes, at the GPU's highest rates.

    us: microseconds by this model. bytes: read and written. saved_bytes: kept for backward, parameters and buffers
    aside.
    """

    us: float
    bytes: int
    saved_bytes: int


@dataclass(frozen=True)
class TrainingStep:
    """operators: in their order. saved: bytes that each layer is the first to keep for backward, by its name. ours,
    eager: the whole step by our kernels wherever there is one, and by PyTorch's operators.
    """

    operators: Sequence[OperatorStep]
    saved: Mapping[str, int]
    ours: StepAtRates
    eager: StepAtRates


def operator_steps(
    steps: Sequence[FollowedStep],
    rows: Iterable[tuple[int | None, Operation]],
    foreign: Iterable[Foreign],
    gpu: KnownGpu,
) -> list[OperatorStep]:
    """steps: in their order; rows: with the number of the step that each is a part of."""
    us, moved, launches = [0.0] * len(steps), [0] * len(steps), [0] * len(steps)
    for i, row in rows:
        if i is not None:
            us[i] += row.modelled_us
            moved[i] += row.bytes
            launches[i] += row.launches
    for work in foreign:
        if work.step is not None:
            us[work.step] += 1e6 * least_seconds(work, gpu)
            moved[work.step] += work.bytes
            launches[work.step] += 1
    return [
        OperatorStep(step.layer, step.operator, step.backward, us[i], moved[i], launches[i])
        for i, step in enumerate(steps)
    ]


def at_rates(
    rows: Iterable[Operation], foreign: Iterable[Foreign], saved: Mapping[str, int], gpu: KnownGpu, flops: float
) -> StepAtRates:
    """flops: that products of ours reach in a second."""
    us, moved = 0.0, 0
    for row in rows:
        us += 1e6 * max(row.bytes / gpu.memory, row.flops / flops)
        moved += row.bytes
    for work in foreign:
        us += 1e6 * least_seconds(work, gpu)
        moved += work.bytes
    return StepAtRates(us, moved, sum(saved.values()))


def least_seconds(call: Foreign, gpu: KnownGpu) -> float:
    moving = call.bytes / gpu.memory
    if not call.flops:
        return moving
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]
    return max(moving, call.flops / gpu.flops(precision_of(call.dtype, tf32)))
