"""What a training step of a model moves, launches and keeps for backward: as cnnfast serves it, beside PyTorch's eager
mode, and what torch.compile keeps. All of it is counted from shapes: nothing is computed, and no GPU need be here.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cnnfast_kernels import devices

from .. import dispatch
from ..aside import does_not_run, leaving_no_trace, meta, meta_copy
from ..conversion.costs import memory_of
from ..conversion.observing import silence
from ..dtypes import argument
from ..precision import float32_products
from .step_counts import StepCount, count_step


@dataclass(frozen=True)
class TrainingTraffic:
    """Of one step. unmeasured: as calls are served that nobody has measured on the GPU. kernels: by kernels of ours
    wherever there is one. eager: by PyTorch. compiled_bytes: those that torch.compile keeps for backward, or None and
    in `reason` why they are not known.
    """

    unmeasured: StepCount
    kernels: StepCount
    eager: StepCount
    compiled_bytes: int | None
    reason: str


def training_traffic(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    gpu: devices.Gpu,
    dtype: torch.dtype | str | None = None,
    memory_format: torch.memory_format | None = torch.channels_last,
) -> TrainingTraffic:
    """Counts a step of a copy of the model in training mode; if it is in that mode already, its members keep theirs.
    The loss and the optimizer are not counted.

    gpu: that meta tensors stand for. dtype: floating inputs and the copy are cast to it; a dtype, or its name, or
    "tf32". memory_format: of images and filters; a model with filters of three axes, or of no size yet, keeps its own.
    Raises ValueError for a dtype that is not known, RuntimeError if nothing of the model is trained, or if it does not
    run on these inputs.
    """
    cast, products = argument(dtype, "training_traffic")
    if not any(p.requires_grad for p in model.parameters()):
        raise RuntimeError(f"{type(model).__name__} has nothing to train: no parameter of it wants a gradient")
    copied: Any = meta_copy(model)
    copied = copied.to(cast) if cast else copied
    if any(is_lazy(p) or p.dim() == 5 for p in model.parameters()):
        memory_format = None
    copied = copied.to(memory_format=memory_format) if memory_format else copied
    copied = copied if model.training else copied.train()
    given = tuple(_prepared(t, cast, memory_format) for t in inputs)
    with torch.inference_mode(False), float32_products(products) if products else nullcontext():
        try:
            unmeasured = count_step(copied, given, None, gpu=gpu)
            kernels = count_step(copied, given, None, "prefer kernels", gpu=gpu)
            eager = count_step(copied, given, None, "torch", converted=False, gpu=gpu)
        except Exception as error:
            raise does_not_run(model, inputs, error) from error
        try:
            compiled, reason = saved_when_compiled(copied, given), ""
        except Exception as error:  # whatever is raised by a forward that cannot be traced
            compiled, reason = None, f"{type(error).__name__}: {error}".splitlines()[0]
    return TrainingTraffic(unmeasured, kernels, eager, compiled, reason)


def saved_when_compiled(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Bytes that a step of the model keeps for backward, parameters and buffers aside, once torch.compile has compiled
    it as one graph: as its default partitioner divides what inductor makes of it, on meta tensors. Nothing is compiled.

    Raises whatever a forward raises that cannot be traced.
    """
    # These import sympy and much of inductor, which takes a second.
    import torch._inductor.lowering  # which the decompositions need, and do not import
    from functorch.compile import aot_module, min_cut_rematerialization_partition, nop
    from torch._inductor.decomposition import select_decomp_table

    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        kept[memory_of(t)] = t
        return t

    with leaving_no_trace(), dispatch.backend("torch"), torch.device("meta"), torch.enable_grad():
        copied = meta_copy(model)
        for module in copied.modules():
            silence(module)
        how: dict[str, Any] = {"fw_compiler": nop, "bw_compiler": nop, "decompositions": select_decomp_table()}
        traced = aot_module(copied, partition_fn=min_cut_rematerialization_partition, **how)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            traced(*meta(inputs))
    own = {memory_of(t) for t in (*copied.parameters(), *copied.buffers())}
    return sum(t.untyped_storage().nbytes() for memory, t in kept.items() if memory not in own)


def _prepared(t: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format | None) -> Tensor:
    t = meta(t)
    t = t.to(dtype) if dtype is not None and t.is_floating_point() else t
    return t if memory_format is None or t.dim() != 4 else t.contiguous(memory_format=memory_format)
