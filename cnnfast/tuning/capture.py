"""Which convolutions a model makes, forward and backward, and which residual blocks it trains: it is converted and run
once, and no kernel is launched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cnnfast_kernels import devices
from cnnfast_kernels.layout import Layout
from cnnfast_kernels.questions import (
    BlockQuestion,
    Geometry,
    Question,
    Statistics,
    dgrad_question,
    fprop_question,
    wgrad_question,
)

from .. import dispatch
from ..calls import CallRecorder, OperatorCall, recorded_run
from ..ops.block_serving import asked_first

# The operators of a forward pass, and what their kernels do besides the convolution (choosing.py has the words).
FORWARD: dict[str, Statistics] = {"conv_fprop": "", "conv_stats": "stats", "conv_act": "", "conv_bn_act": "norm"}
OPERATORS = (*FORWARD, "conv_dgrad", "conv_wgrad")


@dataclass(frozen=True)
class Convolution(OperatorCall):
    """A call of one of OPERATORS."""

    @property
    def dtype(self) -> torch.dtype:
        return next(value.dtype for _, value in self.arguments if isinstance(value, Layout))

    @property
    def geometry(self) -> Geometry:
        return Geometry(self["stride"], self["padding"], self["dilation"], self["groups"])

    @property
    def format(self) -> torch.memory_format:
        """The memory format of a gradient."""
        return torch.channels_last if self["channels_last"] else torch.contiguous_format

    def question(self, tf32: bool, gpu: devices.Gpu) -> Question:
        """What a tile is chosen by. Tensors are taken to start at multiples of 16 bytes, as allocated ones do."""
        if self.operator == "conv_dgrad":
            return dgrad_question(self["dy"], self["w"], self["x_shape"], self.format, self.geometry, gpu, tf32=tf32)
        if self.operator == "conv_wgrad":
            return wgrad_question(self["x"], self["dy"], self["w_shape"], self.format, self.geometry, gpu, tf32=tf32)
        fused = self.operator in ("conv_act", "conv_bn_act")
        residual = self["residual"].strides if fused and self["residual"] else None
        activation = self["activation"] if fused else None
        return fprop_question(
            self["x"], self["w"], self.geometry, gpu, statistics=FORWARD[self.operator], residual_strides=residual,
            activation=activation, tf32=tf32,
        )  # fmt: skip


class CallCounter(CallRecorder):
    """Counts equal calls, and the blocks for which a row would be asked. In these our kernels serve, so that the calls
    are those of which a block by our kernels needs tiles.
    """

    def __init__(self, model: nn.Module, with_numbers: bool) -> None:
        super().__init__(model, with_numbers)
        self.calls: Counter[OperatorCall] = Counter()
        self.blocks: Counter[BlockQuestion] = Counter()
        self.stack = ExitStack()

    def __enter__(self) -> CallCounter:
        self.stack.enter_context(asked_first(self.serves))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.stack.close()
        super().__exit__(*error)

    def serves(self, block: BlockQuestion, less_memory: bool) -> bool:
        self.blocks[block] += not less_memory
        return True

    def record(self, call: OperatorCall) -> None:
        self.calls[call] += 1


def capture(
    model: nn.Module, inputs: tuple[Any, ...], *, gpu: devices.Gpu, device_type: str, **how: Any
) -> tuple[Counter[Convolution], Counter[BlockQuestion]]:
    """The convolutions that our operators would be called with on a GPU, and how often each, whatever backend is in
    force; and the residual blocks. Arguments and RuntimeError are as calls.recorded_run has them.
    """
    with dispatch.backend("auto"):
        run = recorded_run(CallCounter, model, inputs, gpu=gpu, device_type=device_type, **how)
    found: Counter[Convolution] = Counter()
    for call, n in run.calls.items():
        for operator, arguments in _asked(call):
            if operator in OPERATORS:
                found[Convolution(operator, arguments)] += n
    return found, +run.blocks


def _asked(call: OperatorCall) -> Iterator[tuple[str, tuple[tuple[str, Any], ...]]]:
    """The call; in the place of one that leaves words of bits, that without, by whose row its tile is chosen; of one by
    the Gram matrix, those of the other way, by whose row it is decided which of the two a layer takes (ops/gram.py); of
    a gradient with an epilogue, which a block asks of our kernels alone, that without.
    """
    if call.operator == "conv_bn_act_words":
        yield "conv_bn_act", call.arguments
        return
    if call.operator == "conv_dgrad_below":
        names = ("dy", "w", "x_shape", "channels_last", "stride", "padding", "dilation", "groups", "algorithm")
        yield "conv_dgrad", tuple({**{name: call[name] for name in names}, "bias": None}.items())
        return
    if call.operator not in ("gram_statistics", "gram_gradients", "gram_gradients_below"):
        yield call.operator, call.arguments
        return
    x, w = call["x"], call["w"]
    how = {
        "stride": call["stride"], "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1, "algorithm": "auto",
    }  # fmt: skip
    if call.operator == "gram_statistics":
        yield "conv_stats", tuple({"x": x, "w": w, "bias": call["bias"], **how}.items())
        return
    dy, (dx, dw) = call["g"], call["needs"] if call.operator == "gram_gradients" else (True, call["need_w"])
    if dx:
        of_x = {"dy": dy, "w": w, "bias": None, "x_shape": x.shape, "channels_last": True}
        yield "conv_dgrad", tuple({**of_x, **how}.items())
    if dw:
        yield "conv_wgrad", tuple({"x": x, "dy": dy, "w_shape": w.shape, "channels_last": True, **how}.items())
