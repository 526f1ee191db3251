"""What is measured: a model, its inputs, and what a step does with them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import conversion, dispatch
from ..aside import leaving_no_trace
from ..dtypes import name_of
from ..precision import allow_tf32
from .numbers import Numbers

# infer: eval, under inference_mode. train: forward, all gradients, SGD with momentum; in 16 bits under autocast, as
# users train. Of single layers, in training mode: forward, and the gradients of the input, of the parameters, or of
# both.
MODELS = ("infer", "train")
BACKWARD = ("dgrad", "wgrad", "backward")
FORWARD = "forward"
AUTOCAST = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Job:
    """A step to measure.

    model: in PyTorch's own classes (see `plain`), float32, on the CPU. original: what cnnfast converts, over the same
    parameters; None: the same. shapes: of its inputs, the first size being the batch. dtype: of the inputs; parameters
    have it too, except 16 bits in mode "train". copies: sets of buffers that take turns, so that a single layer finds
    them no warmer than in a network. numbers: what inputs and output gradients are filled with; a job that `replace`
    makes of this one shares them.
    """

    name: str
    model: nn.Module
    shapes: tuple[tuple[int, ...], ...]
    mode: str
    dtype: torch.dtype
    device: torch.device
    copies: int = 1
    original: nn.Module | None = None
    numbers: Numbers = field(default_factory=Numbers, compare=False, repr=False)

    @property
    def batch(self) -> int:
        return self.shapes[0][0]

    @property
    def tf32(self) -> bool:
        """Whether float32 products are TF32, by the settings in force now."""
        return allow_tf32(torch.empty(0, dtype=self.dtype, device=self.device))

    @property
    def precision(self) -> str:
        """The name of its dtype, or "tf32"."""
        return name_of(self.dtype, self.tf32)

    def inputs(self, channels_last: bool = True) -> list[Tensor]:
        """In memory of their own, the same numbers every time, normally distributed."""
        drawn = (self.numbers.normal(i, shape, self.device) for i, shape in enumerate(self.shapes))
        made = [t.to(self.dtype, copy=True) for t in drawn]
        return [channels_last_of(t) for t in made] if channels_last else made

    def output_gradients(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """What backward starts from: the same numbers every time, laid out as the outputs and of their dtype."""
        drawn = (self.numbers.normal(len(self.shapes) + i, t.shape, self.device) for i, t in enumerate(outputs))
        return [torch.empty_like(t).copy_(numbers) for t, numbers in zip(outputs, drawn, strict=True)]


def numbers_drawn(job: Job) -> int:
    """How many random numbers a run of the job draws, for all providers together: its inputs, and gradients of what it
    returns.

    Nothing is computed; raises what the model raises on meta tensors.
    """
    meta = replace(job, device=torch.device("meta"), numbers=Numbers())
    inputs = meta.inputs(channels_last=False)
    count = sum(math.prod(shape) for shape in job.shapes)
    if job.mode != "train" and job.mode not in BACKWARD:
        return count
    with leaving_no_trace(), dispatch.backend("torch"), torch.no_grad():
        model = copy.deepcopy(job.model).to(device="meta", dtype=job.dtype).train()
        return count + sum(t.numel() for t in float_tensors(model(*inputs)))


def channels_last_of(t: Tensor) -> Tensor:
    """Images and volumes, and filters for them; anything else as it is."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats[t.dim()]) if t.dim() in formats else t


def plain(model: nn.Module) -> nn.Module:
    """The model as PyTorch alone would run it: without any class of this package.

    One that is built from cnnfast.nn is written out as the calls of torch.nn that it makes in the mode that it is in.
    """
    reverted = conversion.revert(model)
    if any(type(module).__module__.startswith("cnnfast.") for module in reverted.modules()):
        return torch.fx.symbolic_trace(reverted)
    return reverted


def without_dropout(model: nn.Module) -> nn.Module:
    """The model itself, which now drops nothing in training: what is random cannot be compared."""
    for module in model.modules():
        if "drop" in type(module).__name__.lower():
            for name in ("p", "drop_prob"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
    return model


def float_tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """By name: torch.fx registers modules in the order of their calls."""
    return [p for _, p in sorted(model.named_parameters(), key=lambda named: named[0])]


def wanted_by(mode: str, model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The tensors whose gradients a step takes; inputs then require one."""
    wanted = [t.requires_grad_() for t in inputs] if mode in ("dgrad", "backward") else []
    return wanted + (parameters_of(model) if mode in ("wgrad", "backward") else [])


def placed(model: nn.Module, job: Job) -> nn.Module:
    """A copy on the job's device, in its mode and, except for 16 bits in mode "train", its dtype."""
    model = copy.deepcopy(model).to(job.device).train(job.mode != "infer")
    return model if job.mode == "train" and job.dtype in AUTOCAST else model.to(job.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Steps: each returns what the gate judges, outputs and gradients

Step = Callable[[], list[Tensor]]


def steps_of(
    job: Job, compiled: Callable[[nn.Module], Callable[..., Any]], model: nn.Module, channels_last: bool = True
) -> list[Step]:
    """One step for each set of buffers, which are inputs and the model's own. compiled: makes the network that runs of
    a model.
    """
    models = [model, *(copy.deepcopy(model) for _ in range(job.copies - 1))]
    return [step_of(job, compiled(each), each, job.inputs(channels_last)) for each in models]


def step_of(job: Job, network: Callable[..., Any], model: nn.Module, inputs: list[Tensor]) -> Step:
    """network: `model`, or what was compiled from it."""
    if job.mode == "train":
        return _training_step(job, network, model, inputs)
    if job.mode in BACKWARD:
        wanted = wanted_by(job.mode, model, inputs)
        outputs = float_tensors(model(*inputs))
        gradients = job.output_gradients(outputs)
        return lambda: list(torch.autograd.grad(outputs, wanted, gradients, retain_graph=True))
    no_gradients = torch.inference_mode if job.mode == "infer" else torch.no_grad

    def step() -> list[Tensor]:
        with no_gradients():
            return float_tensors(network(*inputs))

    return step


def _training_step(job: Job, network: Callable[..., Any], model: nn.Module, inputs: list[Tensor]) -> Step:
    """The learning rate is zero: the optimizer does all its work, and every step is the same."""
    parameters = [p for p in parameters_of(model) if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, fused=job.device.type == "cuda")
    autocast = torch.autocast(job.device.type, job.dtype, enabled=job.dtype in AUTOCAST)
    gradients: list[Tensor] = []

    def step() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            outputs = float_tensors(network(*inputs))
        if not gradients:
            gradients.extend(job.output_gradients(outputs))
        torch.autograd.backward(outputs, gradients)
        optimizer.step()
        return [*outputs, *(p.grad for p in parameters if p.grad is not None)]

    return step
