"""What a step leaves behind besides its time: memory, and how many kernels it launches."""

from __future__ import annotations

import gc
from typing import Any

import torch

from .job import Job
from .providers import EAGER, Prepared, Provider


def collect(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak(device: torch.device, before: int) -> int | None:
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


def saved_bytes(job: Job, provider: Provider, prepared: Prepared) -> int | None:
    """What a training step keeps for backward, parameters not counted; None of a captured or compiled one, which does
    not say.
    """
    if job.mode != "train" or provider.graph or provider.how != EAGER:
        return None
    kept: dict[int, Any] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, torch.nn.Parameter) and not t.is_sparse:
            kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        prepared.step()
    return sum(storage.nbytes() for storage in kept.values())


def kernels(job: Job, prepared: Prepared) -> int | None:
    """That one step launches on a GPU; None where there is none, or its profiler sees nothing (which may need
    permission).
    """
    if job.device.type != "cuda":
        return None
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        prepared.step()
        torch.cuda.synchronize(job.device)
    events = [event for event in seen.events() or () if event.device_type == DeviceType.CUDA]
    return sum(not event.name.lower().startswith(("memcpy", "memset")) for event in events) // prepared.calls or None
