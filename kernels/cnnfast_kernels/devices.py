"""The GPU that kernels are chosen and compiled for: the one of the tensors, or one that meta tensors stand for."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton import runtime

from . import launch


class Gpu(NamedTuple):
    """name: as CUDA tells it, "" where there is none. arch: 90 for sm_90."""

    name: str
    arch: int


NO_GPU = Gpu("", 90)


@functools.cache
def _gpu(index: int) -> Gpu:
    major, minor = torch.cuda.get_device_capability(index)
    return Gpu(torch.cuda.get_device_name(index), 10 * major + minor)


@functools.cache
def _unnamed(arch: int) -> Gpu:
    return Gpu("", arch)


_own = threading.local()  # `stand_in`: (GPU, type of device) that a thread's meta tensors stand for, or None


def _stand_in() -> tuple[Gpu, str] | None:
    return getattr(_own, "stand_in", None)


@contextmanager
def meta_stands_for(gpu: Gpu, device_type: str = "cuda") -> Iterator[None]:
    """Plans for this thread's meta tensors, which hold nothing, are made as if they were on `gpu` while the context
    lasts.

    device_type: what `type_of` says of their device meanwhile.
    """
    before, _own.stand_in = getattr(_own, "stand_in", None), (gpu, device_type)
    try:
        yield
    finally:
        _own.stand_in = before


def type_of(device: torch.device) -> str:
    """`device.type`, and of meta tensors that stand for others, that of theirs."""
    if device.type == "meta" and (found := _stand_in()):
        return found[1]
    return device.type


def gpu(device: torch.device) -> Gpu:
    """What plans for tensors on `device` are made for. The interpreter runs what sm_90 would."""
    if device.type == "meta" and (found := _stand_in()):
        return found[0]
    if launch.INTERPRETED:
        return NO_GPU
    if device.type == "cuda":
        return _gpu(device.index)
    ahead_of_time: Any = runtime.driver.active.get_current_target()
    return _unnamed(ahead_of_time.arch)


def architecture(device: torch.device) -> int:
    """90 for sm_90: what kernels for tensors on `device` are compiled for."""
    return gpu(device).arch
