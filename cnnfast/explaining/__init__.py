"""explain: where the time of a network goes on a named GPU, by a model, without that GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cnnfast_kernels import gpus

from ..spelling import did_you_mean, keywords_explained
from .explanation import Explanation as Explanation
from .rows import BlockServed as BlockServed
from .rows import ForeignWork as ForeignWork
from .rows import Operation as Operation
from .rows import OperationTotal as OperationTotal
from .steps import OperatorStep as OperatorStep
from .steps import StepAtRates as StepAtRates
from .steps import TrainingStep as TrainingStep
from .working import explained


@keywords_explained
def explain(
    model: nn.Module,
    *example_inputs: Any,
    gpu: str = "h200",
    train: bool = False,
    dtype: torch.dtype | str | None = None,
    memory_format: torch.memory_format | None = torch.channels_last,
) -> Explanation:
    """Models what each operation of a step costs on a GPU that need not be here.

        print(cnnfast.explain(model, torch.empty(256, 3, 224, 224, device="meta"), gpu="h200", train=True))

    In training a residual block is one operator, a stem is one with its pool, and what trains by a Gram matrix does: of
    these the operations that they are made of are listed, and besides them what each block or layer moves and keeps for
    backward, and who serves the blocks, by what row. The whole step stands beside PyTorch's eager mode, both at the
    rates of the roofline.

    A copy of the model is converted and run on tensors that have a shape but no memory; its kernels are chosen as under
    backend("kernels") and not launched. Each operation takes as long as whichever takes longest: the products, the
    issue of instructions, the loads from each level of memory. This is a model: nothing was measured but what tables
    have of the same convolution, which is shown beside it.

    model, example_inputs: of any device, meta too; the model, its gradients and the random numbers stay as they are.
    gpu: one of cnnfast_kernels.gpus.KNOWN, by its name, h200 for example. train: in training mode, with the backward
    pass; the loss and the optimizer are not counted. dtype: floating inputs and the copy are cast to it; a dtype, or
    its name, or "tf32". By default they keep theirs. memory_format: as `convert` takes it; a model with filters of
    three axes, or of no size yet, keeps its own.

    Returns an Explanation: str() is a table; .rows, .totals, .blocks, .bytes, .launches, .training, .to_json(),
    .picture(path).
    Raises ValueError for a GPU or a dtype that is not known; RuntimeError if the model does not run on these inputs, or
    calls nothing that cnnfast has kernels for.
    """
    try:
        known = gpus.named(gpu)
    except ValueError as error:
        advice = did_you_mean(gpu, [known.name for known in gpus.KNOWN])
        raise ValueError(f"explain(): gpu={error}{advice}") from None
    return explained(model, example_inputs, gpu=known, train=train, dtype=dtype, memory_format=memory_format)
