"""What every launcher shares: the one function that launches, strides as kernels want them, memory formats, who watches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton import knobs, runtime

# Triton decides at decoration, that is at import, whether kernels are interpreted; so does this.
INTERPRETED: bool = bool(knobs.runtime.interpret)

KERNEL_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch, as an observer sees it. `compiled` is Triton's handle, or None in the interpreter."""

    kernel: str
    tile: Any
    grid: tuple[int, ...]
    compiled: Any


_observers: list[Callable[[Launch], None]] = []
_compile_only = False


@contextmanager
def observe(callback: Callable[[Launch], None], compile_only: bool = False) -> Iterator[None]:
    """Calls `callback` for every launch, from any thread. With compile_only kernels are compiled, not run (aot.py)."""
    global _compile_only
    before = _compile_only
    _observers.append(callback)
    _compile_only = before or compile_only
    try:
        yield
    finally:
        _observers.remove(callback)
        _compile_only = before


def run(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, tile: Any = None, **options: Any) -> None:
    """Launches `kernel` on `device` and its current stream; an empty grid launches nothing.

    `options` are the kernel's constexpr arguments and Triton's num_warps and num_stages. `tile` is what observers are told.
    """
    if 0 in grid:
        return
    if _compile_only:
        compiled = kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **options)
    else:
        # Triton asks the current device for its stream; the tensors' device need not be the current one.
        foreign = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if foreign else nullcontext():
            compiled = kernel[grid](*args, enable_fp_fusion=True, **options)
    if _observers:
        event = Launch(kernel.__name__, tile, grid, compiled)
        for callback in tuple(_observers):
            callback(event)


@functools.cache
def _gpu_architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture(device: torch.device) -> int:
    """90 for sm_90: what kernels for tensors on `device` are compiled for. The interpreter, where it makes no difference, counts as 90."""
    if INTERPRETED:
        return 90
    if device.type == "cuda":
        return _gpu_architecture(device.index)
    ahead_of_time: Any = runtime.driver.active.get_current_target()
    return ahead_of_time.arch


class Strides(NamedTuple):
    """Strides in units of `align` elements, channels last; `c` is None where channels are adjacent.

    Handing kernels `stride * ALIGN` with a constexpr ALIGN tells the compiler that rows are aligned, hence vector loads,
    without specialising on values: another N, H or W compiles nothing.
    """

    n: int
    h: int
    w: int
    c: int | None
    align: int


def strides_nhwc(t: torch.Tensor) -> Strides:
    """Strides of a tensor of logical shape [N, C, H, W] (weights: [K, C, R, S]), in the order n, h, w, c."""
    n, c, h, w = (s if size > 1 else 0 for s, size in zip(t.stride(), t.shape, strict=True))
    if c > 1:  # channels are apart: nothing to vectorise
        return Strides(n, h, w, c, 1)
    align = 8
    pixel = 0 if n or h or w else t.shape[1]  # one pixel is aligned as those of a larger image
    while n % align or h % align or w % align or pixel % align:
        align //= 2
    return Strides(n // align, h // align, w // align, None if t.shape[1] == 1 or c == 1 else c, align)


def is_channels_last(t: torch.Tensor) -> bool:
    """PyTorch's `is_channels_last_strides_2d`, which suggest_memory_format follows and Python cannot call."""
    if t.dim() != 4 or t.stride(1) == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        size, stride = t.shape[d], t.stride(d)
        if size == 0 or stride < least or (d == 0 and least == t.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True


def memory_format(*tensors: torch.Tensor) -> torch.memory_format:
    """The format of a result, as PyTorch's convolutions choose it: channels_last if any operand is."""
    return torch.channels_last if any(is_channels_last(t) for t in tensors) else torch.contiguous_format


def empty(
    shape: Sequence[int], like: torch.Tensor, fmt: torch.memory_format = torch.contiguous_format, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Every output and workspace of this package is allocated here, so that tests can fill them with NaN first."""
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=fmt)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
