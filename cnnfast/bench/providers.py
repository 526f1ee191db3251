"""Who computes a step: PyTorch in every form that is worth beating, cuDNN's fused kernels, JAX, and cnnfast.

A provider says why it cannot run, or prepares a step. Only baselines are to be beaten; the NCHW provider is none, and
is there because others compare with it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import conversion, dispatch
from ..measuring.graphs import captured
from ..measuring.rotation import rotating
from . import ahead, engines, folding, jax_model
from .gate import Expected, Verdict
from .job import BACKWARD, FORWARD, MODELS, STEP, Job, channels_last_of, placed, steps_of
from .roofline import CONV, OPERATORS, POINTWISE

SINGLE = (FORWARD, *BACKWARD, STEP)
COMPILED = (*MODELS, STEP)
INFER = MODELS[:1]
EAGER, COMPILE, FREEZING, MAX_AUTOTUNE = "eager", "compile", "freezing", "max-autotune"


@dataclass(frozen=True)
class Prepared:
    """step: what is timed. calls: how many steps of the job it makes. read: makes tensors of what it returns, which are
    the results on the first set of buffers.
    """

    step: Callable[[], Any]
    calls: int = 1
    read: Callable[[Any], list[Tensor]] = lambda results: results


@dataclass(frozen=True)
class Provider:
    """One way to compute a step.

    text: what the legend of a report says of it. how: eager, compile, freezing or max-autotune. graph: whether it is
    replayed as a CUDA graph. baseline: whether cnnfast has to beat it. level: how far it fuses (roofline.py). skipped:
    why it shall not run, though it could.
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
    in_torch: ClassVar[bool] = True  # whether PyTorch allocates its memory, and can tell how much that is

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "NCHW"

    def unavailable(self, job: Job) -> str:
        """Why it cannot run, or the empty string."""
        return self.refusal(job)

    def refusal(self, job: Job) -> str:
        """The same, as far as the job's mode and device tell, which takes no time to find out."""
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
        """A step that has run once, so that all is compiled and captured. Raises whatever that raises."""
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

    def judge(self, expected: Expected, results: Sequence[Tensor]) -> Verdict:
        """Whether what `Prepared.read` made of a step's results is right."""
        return expected.judge(results)

    def counted(self, job: Job, prepared: Prepared) -> dict[str, Any]:
        """What is counted of a step, by the names that a row has for it. Nothing is counted of models."""
        return {}

    def compile_ahead(self, job: Job, model: nn.Module) -> None:
        """Compiles what the model will launch, by several processes. Here there is nothing to compile."""

    def launches(self, job: Job, input_gradient: bool) -> list[str]:
        """Descriptions of those of our kernels that a step launches (ahead.py)."""
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
    """The same with every call served by our kernels, whether or not they were measured to be faster. The backend is
    set while the step is captured, and its CUDA graph keeps the kernels.
    """

    def prepare(self, job: Job) -> Prepared:
        with dispatch.backend("kernels"):
            return super().prepare(job)

    def launches(self, job: Job, input_gradient: bool) -> list[str]:
        with dispatch.backend("kernels"):
            return super().launches(job, input_gradient)


class Fused(Provider):
    """Batch norms folded into the weights, and one kernel of a library for a convolution with bias, sum and ReLU."""

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


class CpuEngine(Provider):
    """What a CPU's inference is deployed with (engines.py)."""

    in_torch = False

    def unavailable(self, job: Job) -> str:
        return super().unavailable(job) or engines.unavailable(self.name, job)

    def prepare(self, job: Job) -> Prepared:
        step = engines.STEPS[self.name][0](job)
        step()
        return Prepared(step)


# In the order in which they run. Those that compile longest come last, so that a run that ends early has the others.
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
        CpuEngine("frozen", "cnnfast.freeze", INFER, channels_last=False, baseline=False, ours=True, level=CONV),
        CpuEngine("onnxruntime", "torch.onnx's export in onnxruntime", INFER, channels_last=False, level=CONV),
        CpuEngine("openvino", "torch.onnx's export in OpenVINO", INFER, channels_last=False, level=CONV),
        Jax("jax", "batch norm folded, jax.jit", INFER, level=CONV),
        Provider("compile", "torch.compile", COMPILED, COMPILE, level=POINTWISE),
        Ours(
            "cnnfast-compile",
            "torch.compile of the converted model",
            COMPILED,
            COMPILE,
            baseline=False,
            ours=True,
            level=CONV,
        ),
        Provider("compile-freezing", "torch.compile and freezing", INFER, FREEZING, level=POINTWISE),
        Provider("max-autotune", "torch.compile, max-autotune and freezing", INFER, MAX_AUTOTUNE, level=POINTWISE),
    )
}


@contextmanager
def compiler(how: str, inference: bool) -> Iterator[Callable[[nn.Module], Callable[..., Any]]]:
    """A function that makes a callable of a model. The callable compiles when it is first called, which has to be
    within this context.
    """
    if how == EAGER:
        yield lambda model: model
        return
    import torch._inductor.config as inductor

    with inductor.patch(freezing=inference and how != COMPILE):
        yield lambda model: torch.compile(model, mode=how if how == MAX_AUTOTUNE else None, dynamic=False)
