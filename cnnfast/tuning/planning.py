"""What there is to measure for a model: what costs it most comes first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from cnnfast_kernels import choosing, devices, launch, questions, tables
from cnnfast_kernels.tiling import Precision

from ..calls import standing_for
from ..dtypes import argument
from ..precision import allow_tf32, float32_products
from .capture import capture
from .measured import DEFAULT, LIBRARY, Candidate, Measured, MeasuredBlock

# Round numbers of a data-centre GPU, from data sheets: FLOPs a second by how operands are multiplied, and bytes of
# memory a second. They put convolutions into an order, and are used for nothing else.
FLOPS_PER_SECOND: dict[Precision, float] = {"half": 8e14, "tf32": 4e14, "ieee": 6e13, "fp64": 6e13}
BYTES_PER_SECOND = 4e12


def device_of(model: nn.Module) -> torch.device:
    """The device of the model: of its first parameter, or buffer."""
    return next((t.device for ts in (model.parameters(), model.buffers()) for t in ts), torch.device("cpu"))


def gpu_of(device: torch.device) -> devices.Gpu:
    """The GPU whose rows are measured on `device`; devices.NO_GPU if it is none."""
    return devices.gpu(device) if launch.INTERPRETED or device.type == "cuda" else devices.NO_GPU


def planned(
    model: nn.Module,
    inputs: tuple[Any, ...],
    trains: Sequence[bool],
    *,
    dtype: torch.dtype | str | None,
    memory_format: torch.memory_format | None,
    gpu: devices.Gpu | None = None,
) -> list[Measured | MeasuredBlock]:
    """Each convolution, and each block, that has a row of its own, for all modes together; the most expensive first, a
    block with its convolutions before it.
    """
    device = device_of(model)
    where = device.type if gpu is None and gpu_of(device).name else "cuda"  # without a GPU here, that of one is assumed
    pretended = gpu is not None
    gpu = gpu or gpu_of(device)
    cast, products = argument(dtype, "tune")
    found: dict[tables.Key, Measured] = {}
    blocks: dict[tables.BlockKey, MeasuredBlock] = {}
    with torch.inference_mode(False), float32_products(products) if products else nullcontext():
        for train in trains:
            how: dict[str, Any] = {"train": train, "dtype": cast, "memory_format": memory_format}
            convolutions, of_blocks = capture(model, inputs, gpu=gpu, device_type=where, **how)
            for block, count in of_blocks.items():
                measured_block = blocks.setdefault(block.key, MeasuredBlock(block.key, block))
                measured_block.count += count
                measured_block.cost += count * _estimated_seconds_of_block(block)
            for convolution, count in convolutions.items():
                with standing_for(gpu, where) if pretended else nullcontext():
                    tf32 = allow_tf32(torch.empty(0, dtype=convolution.dtype, device="meta" if pretended else device))
                question = convolution.question(tf32, gpu)
                measured = found.setdefault(question.key, Measured(question.key, convolution))
                measured.count += count
                measured.cost += count * estimated_seconds(question)
                if not measured.candidates:
                    default = choosing.default_tile(question)
                    measured.candidates = {
                        DEFAULT if t == default else str(t): Candidate(t) for t in choosing.candidates(question)
                    }
                    measured.candidates[LIBRARY] = Candidate(None)
    if not found:
        raise RuntimeError(
            f"{type(model).__name__} makes no convolution that cnnfast has kernels for: there is nothing to measure"
        )
    return _in_order(list(found.values()), list(blocks.values()))


def _in_order(convolutions: list[Measured], blocks: list[MeasuredBlock]) -> list[Measured | MeasuredBlock]:
    """What costs most first. A block comes after its convolutions, since it runs with the tiles that are found for
    them; and right after them, so that a budget which ends early leaves blocks with rows.
    """
    left = sorted(convolutions, key=lambda measured: -measured.cost)
    parts: list[list[Measured | MeasuredBlock]] = []
    for block in sorted(blocks, key=lambda measured: -measured.cost):
        own = [m for m in left if m.key.dtype == block.key.dtype and m.key.problem in block.key.problems]
        left = [m for m in left if m not in own]
        parts.append([*own, block])
    parts.extend([measured] for measured in left)
    parts.sort(key=lambda part: -sum(m.cost for m in part if isinstance(m, Measured)))
    return [measured for part in parts for measured in part]


def _estimated_seconds_of_block(block: questions.BlockQuestion) -> float:
    """Seconds of its products, forward and backward: it only orders blocks."""
    rate = FLOPS_PER_SECOND[questions.precision_of(block.dtype, block.tf32)]
    return 3 * sum(problem.flops for problem in block.problems) / rate


def estimated_seconds(question: questions.Question) -> float:
    """Seconds of one call, if it only multiplied, or if it only moved each of its tensors once: whichever is longer."""
    moved = sum(math.prod(t.shape) * t.dtype.itemsize for t in (*question.images, question.w))
    return max(question.problem.flops / FLOPS_PER_SECOND[question.precision], moved / BYTES_PER_SECOND)
