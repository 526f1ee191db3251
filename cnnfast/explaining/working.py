"""From a model to an explanation: its step is followed, and the cost of each call modelled once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from cnnfast_kernels import choosing, devices
from cnnfast_kernels.costs import Limiter
from cnnfast_kernels.gpus import KnownGpu
from cnnfast_kernels.layout import Layout
from cnnfast_kernels.questions import Tile, precision_of

from .. import dispatch
from ..calls import OperatorCall, recorded_run, standing_for
from ..conversion import FORMATS, OTHER_FORMATS
from ..dtypes import argument, name_of
from ..ops.serving import decide
from ..precision import allow_tf32, float32_products
from ..spelling import unknown_value
from ..tuning.capture import OPERATORS as CONVOLUTIONS
from ..tuning.capture import Convolution
from .blocks import blocks_served
from .explanation import Explanation
from .following import Follower, Foreign
from .launching import KernelLaunch, launched
from .modelling import modelled
from .rows import ForeignWork, Operation
from .steps import TrainingStep, at_rates, least_seconds, operator_steps

PACKING = "pack_pixels_kernel"
WITH_WORDS = {"conv_bn_act_words": "conv_bn_act"}  # what leaves its activation's mask besides
PACKS_AGAIN = "conv_bn_act_pool"  # the composed operators that keep no packed image
# What operators do, by the beginnings of their names; all others are of a norm. The forward pass of a transposed
# convolution is a dgrad. By the Gram matrix both gradients of a convolution are one operator.
OPERATION_OF = {
    "gram_gradients": "dgrad",
    "conv_dgrad": "dgrad",
    "conv_wgrad": "wgrad",
    "conv_": "fprop",
    **dict.fromkeys(("max_pool", "avg_pool", "adaptive_avg_pool", "global_avg_pool"), "pool"),
    "channel_sum": "bias",
    "augment": "augment",
    "": "norm",
}


def explained(
    model: nn.Module,
    inputs: tuple[Any, ...],
    *,
    gpu: KnownGpu,
    train: bool,
    dtype: torch.dtype | str | None,
    memory_format: torch.memory_format | None,
) -> Explanation:
    """See `explain`."""
    cast, products = argument(dtype, "explain")
    if memory_format not in FORMATS:
        raise unknown_value("explain", "memory_format", memory_format, FORMATS, OTHER_FORMATS)
    # PyTorch lays out as channels_last neither filters of videos nor what has no size yet.
    if any(is_lazy(p) or p.dim() == 5 for p in model.parameters()):
        memory_format = None
    on = devices.Gpu(gpu.cuda, gpu.arch)
    how: dict[str, Any] = {"train": train, "dtype": cast, "memory_format": memory_format}
    with torch.inference_mode(False), float32_products(products) if products else nullcontext():
        with dispatch.prefer_kernels():
            run = recorded_run(Follower, model, inputs, gpu=on, **how)
        if not run.followed:
            raise RuntimeError(
                f"{type(model).__name__} calls nothing that cnnfast has kernels for: there is nothing to explain"
            )
        model_of = _OperationModel(gpu, on)
        with dispatch.prefer_kernels():
            keeping = [f.step is None or not run.steps[f.step].operator.startswith(PACKS_AGAIN) for f in run.followed]
            pairs = zip(run.followed, keeping, strict=True)
            rows = [replace(model_of(f.call, keeps), layer=f.layer, backward=f.backward) for f, keeps in pairs]
        foreign = _together(run.foreign, gpu)
        blocks = blocks_served(model, inputs, on, dtype=cast, memory_format=memory_format) if train else []
        dtype_name = model_of.dtype_name(run.followed[0].call)
        trained = _trained(run, rows, model_of, model, inputs, how) if train else None
    shapes = [tuple(t.shape) for t in tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    return Explanation(type(model).__name__, gpu, train, dtype_name, shapes, rows, foreign, blocks, trained)


def _trained(
    run: Follower,
    rows: Sequence[Operation],
    model_of: _OperationModel,
    model: nn.Module,
    inputs: tuple[Any, ...],
    how: dict[str, Any],
) -> TrainingStep:
    """What a step of training is besides its operations; for which the same step is followed by PyTorch's operators."""
    with dispatch.backend("torch"):
        eager = recorded_run(Follower, model, inputs, gpu=model_of.on, **how)
    theirs = [call for call in eager.foreign if not call.lays_out]
    gpu, products = model_of.gpu, model_of.products(run.followed[0].call)
    numbered = [(f.step, row) for f, row in zip(run.followed, rows, strict=True)]
    return TrainingStep(
        operator_steps(run.steps, numbered, run.foreign, gpu),
        run.places.saved(),
        at_rates(rows, run.foreign, run.places.saved(), gpu, products),
        at_rates([], theirs, eager.places.saved(), gpu, products),
    )


class _OperationModel:
    """Models a call of an operator, and equal calls once."""

    def __init__(self, gpu: KnownGpu, on: devices.Gpu) -> None:
        self.gpu, self.on = gpu, on
        self.found: dict[OperatorCall, Operation] = {}
        self.packed: set[Any] = set()  # layouts of images that a forward pass packs, which its gradient then takes

    def __call__(self, call: OperatorCall, keeps: bool) -> Operation:
        """keeps: whether an image that is packed is kept for its gradient."""
        if call not in self.found:
            self.found[call] = self.operation(call, keeps)
        return self.found[call]

    def takes_packed(self, call: OperatorCall) -> bool:
        """Whether a gradient takes the image that its forward pass has packed."""
        return call.operator == "conv_wgrad" and call["x"] in self.packed

    def operation(self, call: OperatorCall, keeps: bool) -> Operation:
        replayed = launched(call, self.on)
        launches, rate = replayed.launches, self.gpu.memory
        if call.operator in CONVOLUTIONS and any(launch.kernel == PACKING for launch in launches):
            if self.takes_packed(call):
                launches = [launch for launch in launches if launch.kernel != PACKING]
            elif call.operator != "conv_dgrad" and keeps:
                self.packed.add(call["x"])
        moved = sum(launch.bytes for launch in launches)
        most = max(launches, key=lambda launch: launch.bytes, default=None)
        row = Operation(
            layer="",
            operation=next(operation for name, operation in OPERATION_OF.items() if call.operator.startswith(name)),
            backward=False,
            shapes=" ".join("x".join(map(str, t.shape)) for _, t in call.arguments if isinstance(t, Layout)),
            kernel=most.kernel if most else "",
            tile=None,
            registers=None,
            exact=None,
            residents=None,
            intensity=None,
            limiter="memory",
            modelled_us=1e6 * moved / rate,
            roofline_us=1e6 * replayed.least_bytes / rate,
            flops=0,
            bytes=moved,
            launches=len(launches),
            served="kernels",
        )
        convolution = WITH_WORDS.get(call.operator, call.operator)
        if convolution in CONVOLUTIONS:
            return self.convolution(replace(call, operator=convolution), row, launches)
        flops = flops_of(call)
        return self.multiplying(row, call, flops) if flops else row

    def multiplying(self, row: Operation, call: OperatorCall, flops: int) -> Operation:
        """The row of an operator that multiplies by kernels of several kinds: these take as long as their products, or
        as what all of them read and write.
        """
        products = 1e6 * flops / self.products(call)
        limiter: Limiter = "tensor" if products > row.modelled_us else "memory"
        modelled_us = max(products, row.modelled_us)
        roofline_us = max(products, min(row.roofline_us, row.modelled_us))  # a stride leaves some of a tensor unread
        return replace(row, limiter=limiter, modelled_us=modelled_us, roofline_us=roofline_us, flops=flops)

    def convolution(self, call: OperatorCall, row: Operation, launches: Sequence[KernelLaunch]) -> Operation:
        """The row of a convolution, completed."""
        convolution = Convolution(call.operator, call.arguments)
        q = convolution.question(self.tf32(convolution.dtype), self.on)
        row = replace(row, flops=q.problem.flops)
        main = next((launch for launch in launches if isinstance(launch.tile, Tile)), None)
        # By im2col many kernels serve, or there is nothing to compute. A residual block asks for "direct".
        if call["algorithm"] == "im2col" or main is None:
            return self.multiplying(row, call, q.problem.flops)
        cost, roofline, registers, exact = modelled(q, main.tile, self.gpu, packs=not self.takes_packed(call))
        measured = choosing.measured(q)
        decision = decide(q, measured, True)
        ours, times = ("kernels", {}) if measured is None else ("measured row", measured.microseconds)
        return replace(
            row,
            kernel=main.kernel,
            tile=str(main.tile),
            registers=registers,
            exact=exact,
            residents=cost.residents,
            intensity=cost.intensity,
            limiter=cost.limiter,
            modelled_us=1e6 * cost.seconds,
            roofline_us=1e6 * roofline,
            served="library" if decision.library else ours,
            measured_us=times.get("kernels"),
            library_us=times.get("library"),
        )

    def products(self, call: OperatorCall) -> float:
        """FLOPs a second that the products of a call reach."""
        dtype = next(value.dtype for _, value in call.arguments if isinstance(value, Layout))
        return self.gpu.flops(precision_of(dtype, self.tf32(dtype)))

    def tf32(self, dtype: torch.dtype) -> bool:
        with standing_for(self.on):
            return allow_tf32(torch.empty(0, dtype=dtype, device="meta"))

    def dtype_name(self, call: OperatorCall) -> str:
        """Of what a call computes in."""
        dtype = next(value.dtype for _, value in call.arguments if isinstance(value, Layout))
        return name_of(dtype, self.tf32(dtype))


def flops_of(call: OperatorCall) -> int:
    """Of the products that an operator which is none of CONVOLUTIONS takes; 0 of one that multiplies nothing."""
    if call.operator == "conv_dgrad_below":
        return 2 * _pixels(call["dy"]) * prod(call["w"].shape)
    if call.operator == "gram_statistics":
        N, C, H, W = call["x"].shape
        stride_h, stride_w = call["stride"]
        return 2 * N * -(-H // stride_h) * -(-W // stride_w) * C * C
    if call.operator.startswith("gram_gradients"):
        K, C = call["w"].shape[:2]
        dx, dw = call["needs"] if call.operator == "gram_gradients" else (True, call["need_w"])
        return 2 * _pixels(call["g"]) * (dx * (K + C) + dw * K) * C
    return 0


def _pixels(t: Layout) -> int:
    N, _, P, Q = t.shape
    return N * P * Q


def _together(calls: Iterable[Foreign], gpu: KnownGpu) -> list[ForeignWork]:
    """All calls of one operator in one module, in the order of the first ones."""
    groups: dict[tuple[str, bool, str], list[Foreign]] = {}
    for call in calls:
        groups.setdefault((call.layer, call.backward, call.operator), []).append(call)
    return [
        ForeignWork(
            layer,
            operator,
            backward,
            calls=len(group),
            flops=sum(call.flops for call in group),
            bytes=sum(call.bytes for call in group),
            roofline_us=1e6 * sum(least_seconds(call, gpu) for call in group),
        )
        for (layer, backward, operator), group in groups.items()
    ]
