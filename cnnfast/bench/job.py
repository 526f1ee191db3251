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
from ..engine import Frozen
from ..precision import allow_tf32
from .numbers import Numbers

# The modes. Of models: "infer" is eval under inference_mode, and "train" a forward pass, all gradients, and SGD with
# momentum, in 16 bits under autocast, as users train. Of single layers, which are in training mode: the forward pass,
# or the gradients of the input ("dgrad"), of the parameters ("wgrad"), or of both ("backward"). Of blocks: a forward
# pass and the gradients of both ("step"), with batch norms in float32 as training in 16 bits has them.
MODELS = ("infer", "train")
BACKWARD = ("dgrad", "wgrad", "backward")
FORWARD, STEP = "forward", "step"
AUTOCAST = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Job:
    """A step to measure.

    model: in PyTorch's own classes (see `plain`), in float32, on the CPU. original: the model over the same parameters
    that cnnfast converts; None for `model` itself. frozen: what a file of cnnfast.freeze held, if that is measured, and
    `model` is its graph. shapes: of the inputs; the first size of each is the batch. dtype: of the inputs, and of the
    parameters, except in mode "train", where those of a 16-bit job stay float32. copies: how many sets of buffers take
    turns, so that a single layer finds them no warmer in the cache than in a network. numbers: what inputs and output
    gradients are filled with; a job that `replace` makes of this one shares them.
    """

    name: str
    model: nn.Module
    shapes: tuple[tuple[int, ...], ...]
    mode: str
    dtype: torch.dtype
    device: torch.device
    copies: int = 1
    original: nn.Module | None = None
    frozen: Frozen | None = None
    numbers: Numbers = field(default_factory=Numbers, compare=False, repr=False)

    @property
    def batch(self) -> int:
        return self.shapes[0][0]

    @property
    def input(self) -> str:
        """The shapes of its inputs, as a row has them."""
        return " ".join("x".join(map(str, shape)) for shape in self.shapes)

    @property
    def tf32(self) -> bool:
        """Whether float32 is multiplied as TF32, by the settings in force now."""
        return allow_tf32(torch.empty(0, dtype=self.dtype, device=self.device))

    @property
    def precision(self) -> str:
        """The name of its dtype, or "tf32"."""
        return name_of(self.dtype, self.tf32)

    def inputs(self, channels_last: bool = True) -> list[Tensor]:
        """New tensors, with the same normally distributed numbers every time."""
        drawn = (self.numbers.normal(i, shape, self.device) for i, shape in enumerate(self.shapes))
        made = [t.to(self.dtype, copy=True) for t in drawn]
        return [channels_last_of(t) for t in made] if channels_last else made

    def output_gradients(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The gradients that a backward pass starts from: the same numbers every time, in the outputs' layouts and
        dtypes.
        """
        drawn = (self.numbers.normal(len(self.shapes) + i, t.shape, self.device) for i, t in enumerate(outputs))
        return [torch.empty_like(t).copy_(numbers) for t, numbers in zip(outputs, drawn, strict=True)]


def numbers_drawn(job: Job) -> int:
    """How many random numbers a run of the job draws, for all providers together: its inputs, and the gradients of its
    outputs. Nothing is computed. Raises what the model raises on meta tensors.
    """
    meta = replace(job, device=torch.device("meta"), numbers=Numbers())
    inputs = meta.inputs(channels_last=False)
    count = sum(math.prod(shape) for shape in job.shapes)
    if job.mode not in ("train", STEP, *BACKWARD):
        return count
    with leaving_no_trace(), dispatch.backend("torch"), torch.no_grad():
        model = copy.deepcopy(job.model).to(device="meta", dtype=job.dtype).train()
        return count + sum(t.numel() for t in float_tensors(model(*inputs)))


def channels_last_of(t: Tensor) -> Tensor:
    """A tensor of images or volumes, or of filters for them, in channels_last; any other tensor as it is."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats[t.dim()]) if t.dim() in formats else t


def plain(model: nn.Module) -> nn.Module:
    """The model as PyTorch alone would run it, without any class of this package.

    A model that is built from blocks of cnnfast.nn becomes the torch.fx graph of the torch.nn modules that it calls in
    the mode that it is in.
    """
    reverted = conversion.revert(model)
    if any(type(module).__module__.startswith("cnnfast.") for module in reverted.modules()):
        return torch.fx.symbolic_trace(reverted)
    return reverted


def without_dropout(model: nn.Module) -> nn.Module:
    """The same model, whose dropout no longer drops anything: results that are random cannot be compared."""
    for module in model.modules():
        if "drop" in type(module).__name__.lower():
            for name in ("p", "drop_prob"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
    return model


def float_tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """All parameters, in the order of their names: a graph of torch.fx has its modules in the order of their calls."""
    return [p for _, p in sorted(model.named_parameters(), key=lambda named: named[0])]


def wanted_by(mode: str, model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The tensors whose gradients a step computes. Inputs among them are made to require a gradient."""
    wanted = [t.requires_grad_() for t in inputs] if mode in ("dgrad", "backward", STEP) else []
    return wanted + (parameters_of(model) if mode in ("wgrad", "backward", STEP) else [])


def placed(model: nn.Module, job: Job) -> nn.Module:
    """A copy on the job's device, in its mode and its dtype; a 16-bit job in mode "train" keeps float32 parameters."""
    model = copy.deepcopy(model).to(job.device).train(job.mode != "infer")
    if job.mode == "train" and job.dtype in AUTOCAST:
        return model
    model = model.to(job.dtype)
    for norm in model.modules() if job.mode == STEP and job.dtype in AUTOCAST else ():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.float()
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Steps: each returns the outputs and the gradients, which the gate judges

Step = Callable[[], list[Tensor]]


def steps_of(
    job: Job, compiled: Callable[[nn.Module], Callable[..., Any]], model: nn.Module, channels_last: bool = True
) -> list[Step]:
    """One step for each set of buffers, that is of inputs and of the model's parameters. compiled: makes a callable of
    the model.
    """
    models = [model, *(copy.deepcopy(model) for _ in range(job.copies - 1))]
    return [step_of(job, compiled(each), each, job.inputs(channels_last)) for each in models]


def step_of(job: Job, network: Callable[..., Any], model: nn.Module, inputs: list[Tensor]) -> Step:
    """A step of the job. network: `model`, or what was compiled from it."""
    if job.mode == "train":
        return _training_step(job, network, model, inputs)
    if job.mode == STEP:
        return _step_of_block(job, network, model, inputs)
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


def _step_of_block(job: Job, network: Callable[..., Any], model: nn.Module, inputs: list[Tensor]) -> Step:
    wanted = wanted_by(job.mode, model, inputs)
    gradients: list[Tensor] = []

    def step() -> list[Tensor]:
        outputs = float_tensors(network(*inputs))
        if not gradients:
            gradients.extend(job.output_gradients(outputs))
        return [*outputs, *torch.autograd.grad(outputs, wanted, gradients)]

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
