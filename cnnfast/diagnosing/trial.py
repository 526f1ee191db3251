"""Launches kernels on devices, the smallest kernel first, and compares what they compute with what is right.

    python -m cnnfast.diagnosing.trial 125 cuda:0 cuda:1

This is a process of its own, because a launch may hang, or crash its process. It prints when each step begins and what
came of it, so that its parent knows where it ended. It ends itself after so many seconds (125 above), because its
parent may be gone.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as plain

from cnnfast_kernels import launch, launchable

from .. import dispatch
from ..dtypes import name_of
from .finding import in_a_line

MARK = "cnnfast-trial "

DTYPES = (torch.float16, torch.float32)  # on sm_90 the first is loaded by tensor maps, the second by pointers
SHAPES = (2, 16, 9, 9), (32, 16, 3, 3)  # of the images and the filters
LARGEST = 2  # absolute value in them: sums of 144 products are exact in every dtype


# The steps: what Triton needs, the smallest of kernels, PyTorch's own convolution, and then ours.
LAUNCHER, SMALLEST, PYTORCH = "Triton's launcher", "a kernel that stores one number", "PyTorch's convolution"
LAUNCHING = (LAUNCHER, SMALLEST)


class Outcome(NamedTuple):
    """One step on one device. wrong: what is wrong, "" if nothing is. fatal: whether it must be the last step."""

    device: str
    step: str
    wrong: str
    fatal: bool
    seconds: float


Step = tuple[str, Callable[[], str]]  # its name, and a function that makes it and returns what is wrong


def steps(device: torch.device) -> list[Step]:
    """What is tried on a device, in order."""
    convolutions = [
        (f"our convolution in {name_of(dtype)}", partial(our_convolution, device, dtype)) for dtype in DTYPES
    ]
    return [
        (LAUNCHER, partial(launchable.why_no_launch, device)),
        (SMALLEST, partial(one_number, device)),
        (PYTORCH, partial(torch_convolution, device)),
        *convolutions,
    ]


def run(
    devices: list[torch.device], begin: Callable[[str, str], None] = lambda device, step: None
) -> Iterator[Outcome]:
    """All steps on all devices, up to one that is fatal. begin: called with each (device, step) before it begins.

    A step that raises is fatal, because after an error of CUDA nothing works in the process. A launcher that cannot be
    built is fatal, because it is the same for all devices. Wrong numbers are not.
    """
    for device in devices:
        for step, make in steps(device):
            begin(str(device), step)
            start = time.perf_counter()
            try:
                wrong, fatal = make(), step == LAUNCHER
            except Exception as error:
                wrong, fatal = f"{type(error).__name__}: {in_a_line(error)}", True
            fatal = fatal and bool(wrong)
            yield Outcome(str(device), step, wrong, fatal, time.perf_counter() - start)
            if fatal:
                return


def one_number(device: torch.device) -> str:
    x = torch.ones(1, device=device)
    launch.run(launchable.smallest, (1,), device, x)
    found = x.item()  # waits for the kernel
    return "" if found == 0 else f"it should store 0, but {found:g} is there afterwards"


def torch_convolution(device: torch.device) -> str:
    """PyTorch's own convolution, whose results are near, but not exact: it may use Winograd's algorithm."""
    x, w, expected = operands()
    found = plain.conv2d(_on(device, torch.float32, x), _on(device, torch.float32, w), padding=1).double().cpu()
    return _compared(found, expected, 1.0)


def our_convolution(device: torch.device, dtype: torch.dtype) -> str:
    """Our convolution, which has to be exact: sums of such numbers are the same in any order, and integers far below
    what the dtype holds.
    """
    from .. import functional  # importing its operators takes a second, which doctor spends only if kernels run

    x, w, expected = operands()
    with dispatch.backend("kernels"), torch.no_grad():
        found = functional.conv2d(_on(device, dtype, x), _on(device, dtype, w), padding=1).double().cpu()
    return _compared(found, expected, 0.0)


def operands() -> tuple[Tensor, Tensor, Tensor]:
    """Images, filters and their convolution: integers, in float64, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-LARGEST, LARGEST + 1, shape, generator=generator).double() for shape in SHAPES)
    return x, w, plain.conv2d(x, w, padding=1)


def _on(device: torch.device, dtype: torch.dtype, t: Tensor) -> Tensor:
    return t.to(device, dtype).contiguous(memory_format=torch.channels_last)


def _compared(found: Tensor, expected: Tensor, allowed: float) -> str:
    wrong = ~((found - expected).abs() <= allowed)  # NaN is wrong too
    if not wrong.any():
        return ""
    first = wrong.nonzero()[0].tolist()
    example = f"at {first} {found[tuple(first)]:g} for {expected[tuple(first)]:g}"
    return f"{int(wrong.sum())} of {wrong.numel()} outputs are wrong, {example}"


def main(seconds: str, *names: str) -> None:
    # Unlike Python's own timers, this works even while the process waits for a GPU.
    faulthandler.dump_traceback_later(float(seconds), exit=True)

    def begin(device: str, step: str) -> None:
        print(MARK + json.dumps({"device": device, "step": step}), flush=True)

    for outcome in run(list(map(torch.device, names)), begin):
        print(MARK + json.dumps(outcome._asdict()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
