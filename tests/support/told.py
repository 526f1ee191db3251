"""A report compared with what a run of the model does: `assert_report_is_true`."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import nn

import cnnfast
import cnnfast.nn as cnn
from cnnfast import functional
from cnnfast.conversion import ConversionReport
from cnnfast.nn import pooled, residual
from cnnfast.recording import Trace

Mode = Literal["no_grad", "eval", "train"]
MODES: tuple[Mode, ...] = ("no_grad", "eval", "train")

# The operators that a fused convolution and norm call, of which gram_statistics is followed by conv_bn_act.
FUSED = ("conv_bn_act", "conv_stats")
STEM = "conv_bn_act_pool"  # a fused convolution, norm and pool
BLOCK = "residual_block"

CONVOLUTIONS = (cnn.Conv1d, cnn.Conv2d, cnn.ConvTranspose2d)
NORMS = (cnn.BatchNorm1d, cnn.BatchNorm2d, cnn.BatchNorm3d)
POOLS = (cnn.MaxPool2d, cnn.AvgPool2d, cnn.AdaptiveAvgPool2d, cnn.GlobalAvgPool2d)

# What a trace calls the forward of one module: an operator of ours, or the function in whose place PyTorch served.
ALONE = ("conv_fprop", "conv_dgrad", "conv1d", "conv2d", "conv_transpose2d")
POOLING = (
    "max_pool",
    "avg_pool",
    "adaptive_avg_pool",
    "global_avg_pool",
    "max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
)


def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def assert_reports_are_true(
    model: nn.Module, *inputs: Any, modes: tuple[Mode, ...] = MODES
) -> dict[Mode, ConversionReport]:
    """The same in every mode; the model's own training flags are then as they were."""
    flags = {m: m.training for m in model.modules()}
    reports: dict[Mode, ConversionReport] = {}
    for mode in modes:
        model.train(mode == "train")
        with torch.set_grad_enabled(mode != "no_grad"):
            reports[mode] = assert_report_is_true(model, *inputs)
    for module, training in flags.items():
        module.training = training
    return reports


def assert_report_is_true(model: nn.Module, *inputs: Any) -> ConversionReport:
    """cnnfast.report(model, *inputs) says what the very model then does on these inputs, as it is now. Returns the
    report.

    Compared are calls: of each convolution by the size of its weight, fused and alone, and of norms and pools. How
    often a module is called is counted by hooks in another run, in which nothing fuses. The model's buffers are
    afterwards as they were.
    """
    report = cnnfast.report(model, *inputs)
    buffers = {name: t.clone() for name, t in model.named_buffers() if not torch.nn.parameter.is_lazy(t)}
    seed()
    with cnnfast.trace() as trace, fused_steps(trace) as steps:
        model(*inputs)
    calls = _calls(model, inputs)
    with torch.no_grad():
        for name, t in model.named_buffers():
            if name in buffers:
                t.copy_(buffers[name])
    told, seen = _told(model, report, calls), _seen(trace, steps)
    assert told == seen, f"{report}\n{trace}"
    modules, statuses = dict(model.named_modules()), {row.name: row.status for row in report.rows}
    assert len(statuses) == len(report.rows), "one row a module"
    for what in ("flops", "bytes"):
        parts = [getattr(row, what) for row in (*report.rows, *report.collected)]
        assert sum(parts) == getattr(report, f"total_{what}"), f"parts of the {what} are missing, or counted twice"
    silent = {name for name, m in modules.items() if isinstance(m, (*CONVOLUTIONS, *POOLS, *NORMS))} - statuses.keys()
    assert not silent, "modules of ours without a row"
    for row in report.rows:
        assert row.reason or row.status == "replaced", row
        for clause in (
            row.reason.removeprefix("not fused: ").split("; ") if row.reason.startswith("not fused: ") else ()
        ):
            # one of its convolutions, or else it is all of them
            named = re.match(r"([\w.]+)( only up to .*)?, because ", clause)
            children = [named[1]] if named else [name for name, _ in modules[row.name].named_children()]
            fused = [name for name in children if statuses.get(f"{row.name}.{name}".removeprefix(".")) == "fused"]
            assert not fused or (named and named[2]), row
    return report


def _calls(model: nn.Module, inputs: tuple[Any, ...]) -> Counter[str]:
    """How often each module is called."""
    calls: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *call, name=name: calls.update([name]))
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    seed()
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _told(model: nn.Module, report: ConversionReport, calls: Counter[str]) -> dict[str, Any]:
    """What a trace has to show if the report is true."""
    told: dict[str, Any] = {"fused": Counter(), "alone": Counter(), "norms fused": 0, "norms alone": 0, "pools": 0}
    for row in report.rows:
        module, n = model.get_submodule(row.name), calls[row.name]
        if row.status == "left" or not n:
            continue
        fused = n if row.status == "fused" else 0
        if mixed := re.match(r"(\d+) of its (\d+) calls fused", row.reason):
            fused = int(mixed[1])
            assert n == int(mixed[2]), row
        if isinstance(module, CONVOLUTIONS):
            told["fused"][_weight(module)] += fused
            told["alone"][_weight(module)] += n - fused
        elif isinstance(module, POOLS):
            told["pools"] += n
        elif isinstance(module, NORMS) or "Norm" in type(module).__name__:
            told["norms fused"] += fused
            told["norms alone"] += n - fused
    return told


class Step(NamedTuple):
    """A call of one of functional's fused functions, or a layer of a residual block that is one. weight: the size of
    the convolution's, if it has one. calls: which of a trace's calls were made in it.
    """

    function: str
    weight: tuple[int, ...] | None
    calls: range


@contextmanager
def fused_steps(trace: Trace) -> Iterator[list[Step]]:
    """The fused steps of whatever runs in this context. They are told by who is called, as capturing the calls would
    let conversion fuse more.
    """
    steps: list[Step] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = len(trace)
            result = function(*args, **kwargs)
            weight = _size(args[1].shape) if name.startswith("conv") else None
            steps.append(Step(name, weight, range(before, len(trace))))
            return result

        return call

    def block(x: Any, layers: Any, projection: Any, *how: Any) -> Any:
        before = len(trace)
        result = computed(x, layers, projection, *how)
        for layer in (*layers, *([] if projection is None else [projection])):
            steps.append(Step(BLOCK, _size(layer.weight.shape), range(before, len(trace))))
        return result

    computed = residual.computed
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(residual, "computed", block))
        for name in ("conv_bn_act", "conv_act", "bn_act"):
            function = watched(name, getattr(functional, name))
            stack.enter_context(mock.patch.object(functional, name, function))
        function = watched(STEM, pooled.computed)
        stack.enter_context(mock.patch.object(pooled, "computed", function))
        yield steps


def _seen(trace: Trace, steps: list[Step]) -> dict[str, Any]:
    inside = {i for step in steps for i in step.calls}
    alone = [call for i, call in enumerate(trace) if i not in inside]
    operations = Counter(call.operation for call in alone)
    return {
        "fused": Counter(step.weight for step in steps if step.weight is not None),
        "alone": Counter(_size(call.shapes[1]) for call in alone if call.operation in ALONE),
        "norms fused": sum(step.function != "conv_act" for step in steps),
        "norms alone": operations["normalize"] + operations["batch_norm"],
        "pools": sum(operations[name] for name in POOLING) + sum(step.function == STEM for step in steps),
    }


def _weight(conv: Any) -> tuple[int, ...]:
    """The size of its weight. To read a parametrized one is to compute it, which may count as a step of training."""
    channels = (conv.in_channels, conv.out_channels) if conv.transposed else (conv.out_channels, conv.in_channels)
    return _size((channels[0], channels[1] // conv.groups, *conv.kernel_size))


def _size(weight: Any) -> tuple[int, ...]:
    """Of a convolution's weight; a 1-D convolution is computed as a 2-D one of one row."""
    return tuple(n for n in weight if n != 1)
