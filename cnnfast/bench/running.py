"""Runs providers on a job: gate, setup, times, memory; a row for each."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import isfinite
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .. import dispatch
from ..measuring.machine import Machine, Peaks
from ..measuring.rotation import copies_for
from ..measuring.timing import Clock, Times, clock_of, cudnn_benchmark, measure
from .gate import expect
from .graph import graph_of
from .job import Job
from .providers import EAGER, Prepared, Provider
from .roofline import OPERATORS, Work, levels
from .rows import FAILED, LAYER, MODEL, OK, UNAVAILABLE, WRONG, Row
from .shapes import Layer

Tell = Callable[[str], None]


def work_of(job: Job) -> dict[str, Work]:
    """At every level of fusion; empty for a model that does not run without values."""
    try:
        return levels(graph_of(job.model, job.shapes, job.dtype, job.mode))
    except Exception:  # whatever a foreign forward raises on meta tensors
        return {}


def layer_job(layer: Layer, batch: int, mode: str, dtype: torch.dtype, device: torch.device) -> Job:
    """With as many sets of buffers that the last-level cache does not hold them."""
    job = Job(str(layer), layer.module, ((batch, layer.C, layer.size, layer.size),), mode, dtype, device)
    return replace(job, copies=copies_for(work_of(job)[OPERATORS].bytes, device))


def run(
    job: Job,
    providers: Iterable[Provider],
    machine: Machine,
    peaks: Peaks,
    *,
    kind: str = MODEL,
    count: int = 1,
    budget: float = 1.0,
    clock: Clock | None = None,
    tell: Tell = lambda text: None,
) -> list[Row]:
    """A row for each provider.

    budget: seconds of timing for each. tell: called with what comes next. Raises what the model itself raises in PyTorch, and
    ValueError if nothing can be judged by it (gate.py), or if it is no baseline because it calls cnnfast itself.
    """
    if "torch._dynamo" in sys.modules:  # of the last job; between providers it would make the earlier ones compile again
        torch._dynamo.reset()
    tell("expected results")
    with dispatch.trace() as calls:
        expected = expect(job)
    if len(calls):
        raise ValueError(f"{job.name} calls cnnfast.functional itself, so there is no PyTorch baseline of it")
    work = work_of(job)
    rows: dict[str, dict[str, Any]] = {}
    prepared: dict[str, Prepared] = {}
    providers = list(providers)
    for provider in providers:
        row = rows[provider.name] = {"status": UNAVAILABLE, "reason": provider.unavailable(job)}
        if row["reason"]:
            continue
        tell(f"{provider.name}: first result")
        try:
            _collect(job.device)
            began, before = time.perf_counter(), _allocated(job.device)
            with empty_caches(provider.how != EAGER):
                ready = provider.prepare(job)
                results = ready.read(ready.step())
            _wait(job.device)
            row["first"] = time.perf_counter() - began
            row["peak_bytes"] = _peak(job.device, before)
            verdict = expected.judge(results)
            del results
            row |= {
                "error": verdict.error if isfinite(verdict.error) else None,
                "status": WRONG if verdict.message else OK,
                "reason": verdict.message,
            }
            if not verdict.message:
                row |= {"saved_bytes": saved_bytes(job, provider, ready), "kernels": kernels(job, ready)}
                prepared[provider.name] = ready
        except Exception as error:  # of whatever kind: it is that provider's
            row |= {"status": FAILED, "reason": in_a_line(error)}
    steps = {name: ready.step for name, ready in prepared.items()}
    times = measure(steps, clock or clock_of(job.device), budget, tell=lambda name: tell(f"{name}: timing"))
    for name, found in times.items():
        rows[name] |= _timed(found, prepared[name].calls)
    return [_row(job, provider, rows[provider.name], work, machine, peaks, kind, count) for provider in providers]


def run_layer(layer: Layer, batch: int, mode: str, dtype: torch.dtype, device: torch.device, *arguments: Any, **options: Any) -> list[Row]:
    """The same for one layer and mode; arguments and options as `run` has them."""
    return run(layer_job(layer, batch, mode, dtype, device), *arguments, kind=LAYER, count=layer.count, **options)


def _timed(found: Times | Exception, calls: int) -> dict[str, Any]:
    if isinstance(found, Exception):
        return {"status": FAILED, "reason": in_a_line(found)}
    each = {name: getattr(found, name) / calls for name in ("median", "low", "high")}
    return {**each, "samples": found.samples}


def _row(
    job: Job, provider: Provider, found: dict[str, Any], work: dict[str, Work], machine: Machine, peaks: Peaks, kind: str, count: int
) -> Row:
    kernels_ran = not provider.ours or job.device.type == "cuda"
    level = provider.level if provider.level in work and kind == MODEL and kernels_ran else OPERATORS
    done = work.get(level)
    return Row(
        kind=kind,
        subject=job.name,
        provider=provider.name,
        baseline=provider.baseline,
        ours=provider.ours,
        mode=job.mode,
        dtype=job.precision,
        layout=provider.layout,
        batch=job.batch,
        input=" ".join("x".join(map(str, shape)) for shape in job.shapes),
        machine=machine,
        peaks=peaks,
        count=count,
        flops=done.flops if done else None,
        bytes=done.bytes if done else None,
        level=level if done else "",
        ceilings={name: each.seconds(peaks) for name, each in work.items()},
        **found,
    )


def in_a_line(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {first}"


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU one thread computes, so that times do not hang on who else uses the cores; cuDNN may try all its algorithms."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        with cudnn_benchmark(True):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def empty_caches(compiling: bool) -> Iterator[None]:
    """Compilers find nothing on disk, so that the first result is a cold one; what this process has compiled before is there."""
    with ExitStack() as stack:
        if dispatch.launch is not None:
            from triton import knobs

            stack.enter_context(knobs.cache.scope())
            knobs.cache.dir = stack.enter_context(TemporaryDirectory(prefix="cnnfast-"))
        if compiling:
            from torch._inductor.utils import fresh_cache

            stack.enter_context(fresh_cache())
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Memory and kernels


def _collect(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak(device: torch.device, before: int) -> int | None:
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


def saved_bytes(job: Job, provider: Provider, prepared: Prepared) -> int | None:
    """What a training step keeps for backward, parameters not counted; None of a captured or compiled one, which does not say."""
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
    """That one step launches on a GPU."""
    if job.device.type != "cuda":
        return None
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        prepared.step()
        torch.cuda.synchronize(job.device)
    events = [event for event in seen.events() or () if event.device_type == DeviceType.CUDA]
    return sum(not event.name.lower().startswith(("memcpy", "memset")) for event in events) // prepared.calls
