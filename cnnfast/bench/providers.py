"""Who computes a step: PyTorch in every form that is worth beating, cuDNN's fused kernels, JAX, and cnnfast.

A provider says why it cannot run, or prepares a step. `level` is how far it fuses (roofline.py). Only baselines are
beaten; the NCHW one is there because others compare with it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import conversion, dispatch
from ..measuring.graphs import captured
from ..measuring.rotation import rotating
from . import ahead, folding, jax_model
from .job import BACKWARD, FORWARD, MODELS, Job, channels_last_of, placed, steps_of
from .roofline import CONV, OPERATORS, POINTWISE

SINGLE = (FORWARD, *BACKWARD)
INFER = MODELS[:1]
EAGER, COMPILE, MAX_AUTOTUNE = "eager", "compile", "max-autotune"


@dataclass(frozen=True)
class Prepared:
    """step: what is timed; `calls` steps of the job. read: makes tensors of what it returns, the results on the first
    buffers.
    """

    step: Callable[[], Any]
    calls: int = 1
    read: Callable[[Any], list[Tensor]] = lambda results: results


@dataclass(frozen=True)
class Provider:
    """how: eager, compile or max-autotune. graph: replayed as a CUDA graph. baseline: whether cnnfast has to beat it.
    skipped: why it shall not run, though it could.
    """

    name: str
    text: str
    modes: tuple[str, ...] = (*MODELS, *SINGLE)
    how: str = EAGER
    graph: bool = False
    channels_last: bool = True
    baseline: bool = True
    ours: bool = False
    level: str = OPERATORS
    skipped: str = ""
    in_torch: ClassVar[bool] = True  # whether PyTorch allocates its memory, and so can tell how much there is of it

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "NCHW"

    def unavailable(self, job: Job) -> str:
        """Why it cannot run, or the empty string."""
        if self.skipped:
            return self.skipped
        if job.mode not in self.modes:
            return f"only in mode {' and '.join(self.modes)}"
        if self.graph and job.device.type != "cuda":
            return "CUDA graphs need a GPU"
        return ""

    def network(self, job: Job) -> nn.Module:
        """The model on the job's device, as this provider runs it."""
        return self.laid_out(placed(job.model, job))

    def laid_out(self, model: nn.Module) -> nn.Module:
        if self.channels_last:
            for t in (*model.parameters(), *model.buffers()):
                t.data = channels_last_of(t.data)
        return model

    def prepare(self, job: Job) -> Prepared:
        """A step that has run once: what had to be compiled or captured is. Raises whatever that raises."""
        model = self.network(job)
        self.compile_ahead(job, model)
        with compiler(self.how, job.mode == "infer") as compiled:
            make = lambda: steps_of(job, compiled, model, self.channels_last)  # noqa: E731
            if self.graph:
                return Prepared(captured(make, job.device), job.copies)
            step = rotating(make())
            for _ in range(job.copies):
                step()
        return Prepared(step)

    def compile_ahead(self, job: Job, model: nn.Module) -> None:
        """Where something is to be gained by it."""

    def launches(self, job: Job, input_gradient: bool) -> list[str]:
        """Of our kernels; ahead.py says which."""
        return []


class Ours(Provider):
    """What cnnfast.convert makes of the model."""

    def compile_ahead(self, job: Job, model: nn.Module) -> None:
        ahead.compile_for(job, model)

    def launches(self, job: Job, input_gradient: bool) -> list[str]:
        return ahead.launches(job, self.network(job), input_gradient)

    def network(self, job: Job) -> nn.Module:
        return conversion.convert(self.laid_out(placed(job.original or job.model, job)), inplace=True)


class Kernels(Ours):
    """The same with every call served by our kernels, whether or not they were measured to be faster. What a CUDA graph
    captured stays.
    """

    def prepare(self, job: Job) -> Prepared:
        with dispatch.backend("kernels"):
            return super().prepare(job)

    def launches(self, job: Job, input_gradient: bool) -> list[str]:
        with dispatch.backend("kernels"):
            return super().launches(job, input_gradient)


class Fused(Provider):
    """Batch norm folded into the weights, and one library kernel for a convolution with its bias, activation and
    addition.
    """

    def unavailable(self, job: Job) -> str:
        engine = folding.ENGINES[self.name]
        return super().unavailable(job) or engine.unavailable(job.device) or folding.unavailable(job.model, job.dtype)

    def network(self, job: Job) -> nn.Module:
        folded = folding.fold(job.model, folding.ENGINES[self.name])
        return self.laid_out(folded.to(job.device, job.dtype))


class Jax(Provider):
    """The same folded model, written in jax.numpy, NHWC, compiled by jax.jit."""

    in_torch = False

    def unavailable(self, job: Job) -> str:
        if reason := super().unavailable(job):
            return reason
        if importlib.util.find_spec("jax") is None:
            return "jax is not installed"
        if job.dtype == torch.float64:
            return "jax computes float64 in float32 unless its process is set up otherwise"
        return folding.unavailable(job.model, job.dtype) or jax_model.unavailable(folding.fold(job.model), job.device)

    def prepare(self, job: Job) -> Prepared:
        step = jax_model.step(folding.fold(job.model), job)
        step()
        return Prepared(step, read=lambda results: [jax_model.tensor(y, job.device) for y in results])


# In the order in which they run. Whoever compiles longest comes last: a run that ends early, or whose budget does, has
# the others.
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("eager", "PyTorch eager, cudnn.benchmark"),
        Provider("eager-graph", "the same, replayed as a CUDA graph", graph=True),
        Fused(
            "cudnn-fused",
            "batch norm folded, torch.cudnn_convolution_relu and _add_relu, CUDA graph",
            INFER,
            graph=True,
            level=CONV,
        ),
        Fused("cudnn-graph", "the same by cuDNN's fused graphs (nvidia-cudnn-frontend)", INFER, graph=True, level=CONV),
        Ours("cnnfast", "cnnfast.convert, eager", baseline=False, ours=True, level=CONV),
        Ours("cnnfast-graph", "the same, replayed as a CUDA graph", graph=True, baseline=False, ours=True, level=CONV),
        Kernels(
            "cnnfast-kernels", "the same graph by our kernels alone", graph=True, baseline=False, ours=True, level=CONV
        ),
        Provider("nchw", "PyTorch eager, NCHW: for reference only", channels_last=False, baseline=False),
        Jax("jax", "batch norm folded, jax.jit", INFER, level=CONV),
        Provider("compile", "torch.compile", MODELS, COMPILE, level=POINTWISE),
        Ours(
            "cnnfast-compile",
            "torch.compile of the converted model",
            MODELS,
            COMPILE,
            baseline=False,
            ours=True,
            level=CONV,
        ),
        Provider("max-autotune", "torch.compile, max-autotune and freezing", INFER, MAX_AUTOTUNE, level=POINTWISE),
    )
}


@contextmanager
def compiler(how: str, inference: bool) -> Iterator[Callable[[nn.Module], Callable[..., Any]]]:
    """What makes a model callable; it compiles when first called, within the context."""
    if how == EAGER:
        yield lambda model: model
        return
    import torch._inductor.config as inductor

    with inductor.patch(freezing=inference and how == MAX_AUTOTUNE):
        yield lambda model: torch.compile(model, mode=None if how == COMPILE else how, dynamic=False)
