"""How long check will take where Triton interprets the kernels: what each call costs there, in small measured pieces.

The interpreter runs a program, and within it one step of the main loop, in numpy: its cost is that of Python, some
milliseconds a step whatever the tile holds. So a convolution costs what its steps do, and what goes over an image once
costs by the elements, for blocks are of much the same size. The constants are seconds of a core, and were measured on a
server's; a machine of today is rarely further from them than a factor of two. What else runs on the machine is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..dtypes import argument
from ..measuring.load import cores_for
from .capture import Captured, capture_calls
from .whole import AS_GIVEN, STATE, steps

STEP = 2.5e-3  # seconds of a step of a convolution's main loop
BLOCK = (64, 32, 16)  # output pixels, filters and channels that a step multiplies
GRADIENTS = 4.0  # a convolution's two gradients, and sums, in units of its forward pass
POINT = 5e-6  # seconds an element of what passes over memory once: a norm, an activation
TAP = 12e-6  # seconds an element of a pooling window
START = 6.0  # seconds: processes start, models are copied, PyTorch computes in float64


def foreseen(
    target: Callable[..., Any], inputs: tuple[Any, ...], *, backward: bool, dtype: torch.dtype | str | None
) -> tuple[int, float]:
    """How many calls `check` will judge, and the seconds that it takes to interpret them and the whole model,
    estimated. The model runs once, served by PyTorch.
    """
    cast, _ = argument(dtype, "check")
    calls = capture_calls(target, inputs, cast)
    whole = steps(target, backward) if isinstance(target, torch.nn.Module) and calls else []
    return len(calls), (START + estimated_seconds(calls, whole, backward)) / cores_for(1)


def estimated_seconds(calls: Sequence[Captured], whole: Sequence[str], backward: bool) -> float:
    """Seconds of the kernels alone. Each call runs forward, and again with gradients; so does the whole model, in each
    step but the first, which runs nothing.
    """
    forward, both = (sum(_seconds(call, gradients) for call in calls) for gradients in (False, True))
    judged = forward + (both if backward else 0.0)
    for step in whole:
        if step != STATE:
            judged += both if backward and step in (*whole[2:], AS_GIVEN) else forward
    return judged


def _seconds(call: Captured, gradients: bool) -> float:
    """Of one forward pass, with its gradients if they are asked for."""
    given = call.arguments
    x, weight = given["input"], given.get("weight")
    if weight is None or weight.dim() == 1:  # a pooling, or a norm without a convolution
        taps = math.prod(_pair(given.get("kernel_size", 1)))
        return x.numel() * (TAP if taps > 1 else POINT) * (3.0 if gradients else 1.0)
    groups, strides = given["groups"], math.prod(_pair(given["stride"]))
    # A transposed convolution has as many products as the convolution that it is the gradient of.
    pixels = x.numel() / x.shape[1] / (1 if call.operation == "conv_transpose2d" else strides)
    filters, channels = weight.shape[0], weight.shape[1]
    blocks = math.ceil(pixels / BLOCK[0]) * groups * math.ceil(filters / groups / BLOCK[1])
    seconds = STEP * blocks * math.prod(weight.shape[2:]) * math.ceil(channels / BLOCK[2])
    norm = POINT * pixels * filters * (2.0 if call.training else 0.0)
    return (seconds + norm) * (1.0 + GRADIENTS if gradients else 1.0)


def _pair(size: Any) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)
