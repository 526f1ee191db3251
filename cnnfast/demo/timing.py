"""ResNet-50's convolutions, ours beside PyTorch's, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

import cnnfast.functional as F
from cnnfast.bench.shapes import resnet50_convolutions
from cnnfast.checking import check

BATCH = 64
ROUNDS = 9
CHECKED_IMAGES = 2  # float64 takes its time
REPEATS = 10
CONDITIONS = (
    f"ResNet-50's convolutions, batch {BATCH}, bfloat16, channels_last, cudnn.benchmark:"
    f" milliseconds of one call, median of {ROUNDS} interleaved rounds"
)
HEADING = ("convolution", "times in the network", "forward", "PyTorch", "backward", "PyTorch", "against float64")

Timer = Callable[[Callable[[], object]], float]  # milliseconds of one call


@dataclass(frozen=True)
class Layer:
    """A square convolution, padded by half its kernel; `count` is how often the network has it."""

    C: int
    size: int
    K: int
    R: int
    stride: int
    count: int

    def __str__(self) -> str:
        return f"{self.C}x{self.size}x{self.size} > {self.K}, {self.R}x{self.R}/{self.stride}"

    @property
    def output_size(self) -> int:
        return (self.size + 2 * (self.R // 2) - self.R) // self.stride + 1

    def flops(self, N: int) -> int:
        """Of the forward pass; backward has twice as many."""
        return 2 * N * self.output_size**2 * self.K * self.C * self.R**2


def resnet50() -> list[Layer]:
    """The 53 convolutions of ResNet-50 (strides in the 3x3 ones), each distinct one once."""
    return [Layer(*shape) for shape in resnet50_convolutions()]


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one call; `right`: its results held against float64 before it was timed."""

    layer: str
    count: int
    flops: int
    right: bool
    forward: float
    torch_forward: float
    backward: float
    torch_backward: float

    @property
    def cells(self) -> tuple[str, ...]:
        """Under HEADING."""
        times = (f"{ms:.3f}" for ms in (self.forward, self.torch_forward, self.backward, self.torch_backward))
        return (self.layer, str(self.count), *times, "ok" if self.right else "FAIL")


def time_events(call: Callable[[], object]) -> float:
    """Milliseconds of one call on the current stream, the mean of a few in a row, by CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / REPEATS


def time_layer(
    layer: Layer, device: torch.device, dtype: torch.dtype, timer: Timer = time_events, N: int = BATCH, rounds: int = ROUNDS
) -> Timing:
    """Checks a convolution against float64, then times ours and PyTorch's in turn, forward and backward (both gradients)."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        t = torch.randn(size, generator=generator, device=device) * scale
        return t.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()

    x = random(N, layer.C, layer.size, layer.size)
    w = random(layer.K, layer.C, layer.R, layer.R, scale=(layer.C * layer.R**2) ** -0.5)
    geometry: dict[str, Any] = {"stride": layer.stride, "padding": layer.R // 2}
    right = check(lambda x, w: F.conv2d(x, w, **geometry), x[:CHECKED_IMAGES], w).ok

    calls: dict[str, Callable[[], object]] = {}
    for name, convolve in (("", F.conv2d), ("torch_", torch.nn.functional.conv2d)):
        forward = lambda convolve=convolve: convolve(x, w, **geometry)  # noqa: E731
        y = forward()
        dy = torch.ones_like(y)
        calls[f"{name}forward"] = forward
        calls[f"{name}backward"] = lambda y=y, dy=dy: torch.autograd.grad(y, (x, w), dy, retain_graph=True)
    for call in calls.values():  # compiles ours, lets cuDNN choose
        timer(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timer(call))
    return Timing(str(layer), layer.count, layer.flops(N), right, **{name: median(values) for name, values in times.items()})
