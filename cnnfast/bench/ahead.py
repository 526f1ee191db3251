"""Kernels compiled before they are launched, by several processes at once, as cnnfast.warm does for its users (warming.py).

Triton compiles a kernel at its first launch, one after the other: of a ResNet-50 for a minute, of all single layers for longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import dispatch
from .job import AUTOCAST, MODELS, Job, channels_last_of
from .rows import LAYER

if TYPE_CHECKING:
    from .task import Task

WINDOW = 16  # tasks that are compiled for at a time: a short budget shall not be spent on what is never measured
INPUT_GRADIENT = ("dgrad", "backward")

_launched: set[str] = set()  # by models in this process, which compiles none of them again, wherever its cache is


def launches(job: Job, network: nn.Module, input_gradient: bool = False) -> list[str]:
    """Descriptions of what a step of the job launches where `network` computes it; none where PyTorch serves.

    Of a single layer they are those of all its modes, with input_gradient that of its input too. Raises RuntimeError under
    backend("kernels") where PyTorch would have to serve, and what the network raises.
    """
    if job.device.type != "cuda":
        return []
    held = next(network.parameters(), None)
    if dispatch.why_torch(torch.empty(0, dtype=job.dtype, device=job.device) if held is None else held):
        return []
    from cnnfast_kernels import launch

    from .. import warming

    if launch.INTERPRETED:
        return []
    if job.mode in MODELS:  # with numbers: under autocast, or if it branches on them, a model is run where it lies
        inputs = job.inputs()
    else:
        described = (torch.empty(shape, dtype=job.dtype, device="meta") for shape in job.shapes)
        inputs = [channels_last_of(t).requires_grad_(input_gradient) for t in described]
    with torch.autocast("cuda", job.dtype, enabled=job.mode == "train" and job.dtype in AUTOCAST):
        return warming.launches(network, *inputs, train=job.mode != "infer", gpu=launch.gpu(job.device))


def compile_for(job: Job, network: nn.Module) -> None:
    """What a model will launch, unless this process has launched it before. Raises nothing: whatever cannot be found or compiled now is
    compiled, or raises, when it is launched."""
    new: list[str] = []
    if job.mode in MODELS:
        with suppress(Exception):
            new = [line for line in launches(job, network) if line not in _launched]
    if new:
        from cnnfast_kernels import launch

        from .. import warming

        with suppress(OSError):  # no process can be started
            warming.compile_ahead(new, launch.gpu(job.device))
        _launched.update(new)


class LayersAhead:
    """Compiles for the layers among some tasks, a window of them at a time; a context, in which its processes live."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.until = 0
        self.traced: set[tuple[int, str]] = set()
        self.compiled: set[str] = set()
        self.stack = ExitStack()
        self.compile: Any = None

    def __enter__(self) -> LayersAhead:
        return self

    def __exit__(self, *raised: object) -> None:
        self.stack.close()

    def before(self, i: int, tell: Callable[[str], None]) -> None:
        """Called before task `i` is run."""
        if self.tasks[i].kind != LAYER or i < self.until:
            return
        self.until = i + WINDOW
        window = self.tasks[i : self.until]
        lines = [line for line in dict.fromkeys(line for task in window for line in self.lines(task)) if line not in self.compiled]
        if not lines:
            return
        self.compiled.update(lines)
        tell(f"compiling {len(lines)} kernels")
        if self.compile is None:
            from cnnfast_kernels import launch

            from .. import warming

            self.compile = self.stack.enter_context(warming.compiling(launch.gpu(self.tasks[i].job.device)))
        with suppress(OSError):  # as above
            self.compile(lines, lambda done, total: tell(f"compiling kernels, {done} of {total}"))

    def lines(self, task: Task) -> list[str]:
        """For all tasks of the same layer; none for the second of them."""
        found: list[str] = []
        model = id(task.job.model)
        gradient = any(id(other.job.model) == model and other.job.mode in INPUT_GRADIENT for other in self.tasks)
        for provider in task.providers:
            if provider.ours and not provider.unavailable(task.job) and (model, provider.name) not in self.traced:
                self.traced.add((model, provider.name))
                with suppress(Exception):  # of whatever kind: it raises again, and is then that provider's
                    found += provider.launches(task.job, gradient)
        return found
