"""What a step leaves behind besides its time: memory, and how many kernels it launches."""

from __future__ import annotations

import gc
from typing import Any

import torch

from .job import STEP, Job
from .providers import EAGER, Prepared, Provider


def collect(device: torch.device) -> None:
    """Frees what no longer is in use on a GPU, and lets its peak of memory start anew."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def allocated(device: torch.device) -> int:
    """Bytes that PyTorch has allocated on a GPU now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak(device: torch.device, before: int) -> int | None:
    """How many bytes more than `before` were allocated at the most since `collect`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


def saved_bytes(job: Job, provider: Provider, prepared: Prepared) -> int | None:
    """Bytes that a training step keeps for its backward pass, without parameters. None for a step that is captured or
    compiled, since that does not call the hooks of saved tensors.
    """
    if job.mode not in ("train", STEP) or provider.graph or provider.how != EAGER:
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
    """How many kernels one step launches on a GPU. None without a GPU, or if the profiler sees none, which may be for
    want of permission.
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
