"""ResNet-50's convolutions on a GPU: our kernels beside the library's, measured as `cnnfast bench --layers` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cnnfast.bench.job import FORWARD
from cnnfast.bench.providers import PROVIDERS
from cnnfast.bench.rows import LEFT_OUT, OK, BenchRow
from cnnfast.bench.series import Series
from cnnfast.bench.shapes import LayerShape, layers
from cnnfast.bench.surroundings import one_thread, quick_collections
from cnnfast.bench.task import Task, layer_task
from cnnfast.measuring.budget import Budget
from cnnfast.measuring.machine import Peaks, measure_peaks, this_machine

BATCH = 64
DTYPE = torch.bfloat16
SECONDS = 0.1  # of timing, for each of the two in each direction
OURS, THEIRS = "cnnfast-kernels", "eager-graph"
CONDITIONS = (
    f"ResNet-50's convolutions, batch {BATCH}, bfloat16, channels_last: milliseconds of one call, median of interleaved"
    " rounds, of our kernels alone (whatever would serve by default) and of PyTorch's with cudnn.benchmark; both are"
    " CUDA graphs over so many copies of the operands that the last-level cache does not hold them"
)
HEADING = ("convolution", "times in the network", "forward", "PyTorch", "backward", "PyTorch", "against float64")


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one call in each direction, None where it was not measured.

    backward: both gradients, or only that of the filters for the network's first layer, whose input needs none.
    problem: what went wrong with our kernels; "" if nothing did. left_out: why nothing was measured, or "".
    """

    layer: str
    count: int
    forward: float | None
    torch_forward: float | None
    backward: float | None
    torch_backward: float | None
    problem: str = ""
    left_out: str = ""

    @property
    def timed(self) -> bool:
        """Whether there is any time of it."""
        return any((self.forward, self.torch_forward, self.backward, self.torch_backward))

    @property
    def right(self) -> bool:
        """Whether our kernels computed right numbers, or were not measured."""
        return not self.problem

    @property
    def cells(self) -> tuple[str, ...]:
        """Under HEADING."""
        times = (self.forward, self.torch_forward, self.backward, self.torch_backward)
        shown = ("" if ms is None else f"{ms:.3f}" for ms in times)
        return (
            self.layer,
            str(self.count),
            *shown,
            f"FAIL: {self.problem}" if self.problem else "left out" if self.left_out else "ok",
        )


def convolutions() -> list[LayerShape]:
    """The 53 convolutions of ResNet-50, each distinct one once."""
    return [layer for layer in layers() if isinstance(layer.module, nn.Conv2d) and layer.module.groups == 1]


def directions(layer: LayerShape, device: torch.device, batch: int, dtype: torch.dtype) -> list[Task]:
    """Forward and backward."""
    backward = "backward" if "dgrad" in layer.modes else "wgrad"
    providers = [PROVIDERS[name] for name in (THEIRS, OURS)]
    return [layer_task(layer, batch, mode, dtype, device, providers) for mode in (FORWARD, backward)]


def time_layers(device: torch.device, budget: Budget, tell: Callable[[int, int, str], None]) -> list[Timing]:
    """The layers in which the network spends most come first.

    tell: called with the number of directions that are done, the number of all, and what comes next.
    """
    with one_thread(device), quick_collections():
        machine, peaks = this_machine(device), measure_peaks(device, DTYPE)
        found = costliest_first([(layer, directions(layer, device, BATCH, DTYPE)) for layer in convolutions()], peaks)
        series = Series([task for _, tasks in found for task in tasks], machine, peaks)
        series.run(SECONDS, budget, tell)
    both = zip(series.results[::2], series.results[1::2], strict=True)
    return [timing_of(layer, *rows) for (layer, _), rows in zip(found, both, strict=True)]


def costliest_first(found: list[tuple[LayerShape, list[Task]]], peaks: Peaks) -> list[tuple[LayerShape, list[Task]]]:
    return sorted(found, key=lambda each: -sum(task.seconds(peaks) for task in each[1]))


def timing_of(layer: LayerShape, forward: Sequence[BenchRow], backward: Sequence[BenchRow]) -> Timing:
    """The times of a layer, taken from bench's rows of both directions."""
    by_name = [{row.provider: row for row in rows} for rows in (forward, backward)]
    milliseconds = (
        row.median * 1000 if (row := rows[name]).median else None for rows in by_name for name in (OURS, THEIRS)
    )
    forward_by_us, forward_by_torch, backward_by_us, backward_by_torch = milliseconds
    ours = [rows[OURS] for rows in by_name]
    problem = next((row.reason for row in ours if row.status not in (OK, LEFT_OUT)), "")
    left_out = next((row.reason for row in ours if row.status == LEFT_OUT), "")
    return Timing(
        str(layer),
        layer.count,
        forward_by_us,
        forward_by_torch,
        backward_by_us,
        backward_by_torch,
        problem=problem,
        left_out=left_out,
    )
