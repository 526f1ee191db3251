"""tune: measures the convolutions of a model on this GPU, its residual blocks in training too, and writes the winners
to the user's table (cnnfast_kernels/tables.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import nn

from cnnfast_kernels import devices, launch, tables

from .. import dispatch
from ..measuring.budget import Budget
from ..measuring.machine import this_machine
from ..measuring.timing import clock_of
from ..measuring.timing import measure as take_turns
from ..precision import float32_products
from ..spelling import keywords_explained
from .ahead import Compiling, compiled_ahead
from .measured import Candidate, Measured, MeasuredBlock
from .planning import device_of, gpu_of, planned
from .racing import Measure, OutOfTimeError, race
from .report import Tuning

__all__ = ["Candidate", "Measured", "MeasuredBlock", "Tuning", "begin", "plan", "proceed", "tune"]

Progress = Callable[[int, int, str], None]

SECONDS = 0.05  # of timing, for each candidate


@keywords_explained
def tune(
    model: nn.Module,
    *example_inputs: Any,
    train: bool = False,
    budget: float | None = None,
    dtype: torch.dtype | str | None = None,
    memory_format: torch.memory_format | None = torch.channels_last,
    table: Path | str | None = None,
    seconds: float = SECONDS,
    measure: Measure | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Measures the convolutions of the model on its GPU, and writes the user's table, which is used from now on.

        print(cnnfast.tune(model, x, train=True, budget=300))  # at most 300 seconds

    The convolutions are those that the converted model makes, in a forward pass and, if `train`, in its backward pass.
    For each of them about a dozen tiles of our kernels, and the library's convolution in its benchmark mode, run on
    random operands. A candidate that computes wrong numbers, by the rule of cnnfast.check, is out. The others take
    turns on the clock, each as one CUDA graph over sets of operands that together do not fit the GPU's second-level
    cache. The row says which of our tiles is the fastest, and whether the library is faster still.

    With `train` a residual block that trains as one operator is a problem of its own: by our kernels, with the tiles
    that were found for its convolutions, or by the library. Forward and backward are judged and timed as a whole, and
    the row of the block says who serves it, whoever won its convolutions.

    model: on a GPU; it stays as it is. example_inputs: with the shapes, dtypes and layouts of the real ones.
    memory_format: as `convert` takes it.

    budget: seconds for the whole, compilation included; by default everything is measured. The layers that cost the
    model most come first: calls x the larger of FLOPs / rate and bytes / bandwidth, an estimate by the round numbers of
    planning.py that only orders them. What no longer fits is in the result's .left, and its rows in the table, if there
    are any, stay.

    dtype: floating inputs and a copy of the model are cast to it. It is a dtype, or its name (bf16, fp16, fp32, fp64,
    or PyTorch's own), or "tf32" for float32 tensors whose products are rounded to TF32. A name says how float32 is
    multiplied: "fp32" means IEEE. Without a name PyTorch's settings say it, which by default let convolutions be TF32.
    TF32 and IEEE have rows of their own, and a call finds those of the settings that it is made under.

    table: a file to which the rows are written too, so that it can be shipped: a new file, or a table of this GPU and
    version. seconds: of one timing. measure: what times steps by their names, by default measuring/timing.py. progress:
    called with (what is done, in all, what comes next).

    A row is written as soon as its convolution is measured, so that an interrupted run loses nothing. Returns a Tuning:
    str() is a table; .ok, .measured, .left, .rows, .to_json(). Raises ValueError for a name that is none of a dtype,
    for seconds that are not positive, and for a `table` that is something else; RuntimeError without a GPU, if the
    model does not run on these inputs, if it makes no convolution, and if the GPU no longer answers; OSError, before
    anything is measured, if a table could not be written.
    """
    table = None if table is None else Path(table)
    _refuse_durations(budget=budget, seconds=seconds)
    time = Budget(budget)
    tuning = begin(model, *example_inputs, trains=(train,), dtype=dtype, memory_format=memory_format, table=table)
    proceed(tuning, device_of(model), budget=time, table=table, seconds=seconds, measure=measure, progress=progress)
    return tuning


def plan(
    model: nn.Module,
    *example_inputs: Any,
    train: bool = False,
    dtype: torch.dtype | str | None = None,
    memory_format: torch.memory_format | None = torch.channels_last,
    gpu: devices.Gpu | None = None,
) -> list[Measured | MeasuredBlock]:
    """What `tune` would measure, in that order: each convolution that has a row of its own, and each residual block,
    with candidates that have no times yet.

    No GPU is needed: `gpu` is the one that it would be measured on, by default the model's, or else any of sm_90. Other
    arguments, ValueError and RuntimeError are as `tune` has them.
    """
    return planned(model, example_inputs, (train,), dtype=dtype, memory_format=memory_format, gpu=gpu)


def begin(
    model: nn.Module,
    *example_inputs: Any,
    trains: tuple[bool, ...] = (False,),
    dtype: torch.dtype | str | None = None,
    memory_format: torch.memory_format | None = torch.channels_last,
    table: Path | None = None,
) -> Tuning:
    """The first half of `tune`: a Tuning with everything left to measure, for `proceed`.

    The caller holds it, and so has what was measured however `proceed` ends. trains: the modes to measure; (False,
    True) is both eval and training.
    """
    device = device_of(model)
    gpu = gpu_of(device)
    if not gpu.name:
        raise RuntimeError(f"tune() needs a GPU to measure on, but the model is on {device}")
    with dispatch.backend("auto"):
        reason = dispatch.why_torch(torch.empty(0, device=device))
    if reason:
        raise RuntimeError(f"tune() has nothing to measure on {device}, where PyTorch serves every call: {reason}")
    tables.writable()
    if table is not None:
        tables.refuse_foreign(table, *gpu)
    left = planned(model, example_inputs, trains, dtype=dtype, memory_format=memory_format)
    return Tuning(*gpu, left=left)


def proceed(
    tuning: Tuning,
    device: torch.device,
    *,
    budget: Budget | None = None,
    table: Path | None = None,
    seconds: float = SECONDS,
    measure: Measure | None = None,
    progress: Progress | None = None,
    compiling: Compiling | None = None,
) -> None:
    """The second half of `tune`: measures what is left of a tuning, as far as it fits into the budget, and writes rows.

    compiling: what compiles ahead in other processes, by default workers.compiling; where kernels are interpreted
    nothing is compiled. Raises whatever ends it early; the tuning then holds what was measured, and that is written.
    """
    budget = budget or Budget()
    gpu = devices.Gpu(tuning.gpu, tuning.arch)
    clock = clock_of(device)
    measure = measure or (lambda passes: take_turns(passes, clock, seconds, left=lambda: budget.left))
    machine = {name: value for name, value in asdict(this_machine(device)).items() if name != "device"}
    about = {**machine, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    todo, written = list(tuning.left), len(tuning.rows)
    # Seconds that each candidate of the last convolution, or block, took. The next ones cost less, and should not take
    # longer.
    each: dict[type, float] = {}

    def write() -> None:
        nonlocal written
        if fresh := tuning.rows[written:]:
            tuning.path = tables.write(*gpu, fresh, about)
            if table is not None:
                tuning.table = tables.write(*gpu, fresh, about, table)
            written += len(fresh)

    def in_time() -> None:
        if budget.left <= 0:
            raise OutOfTimeError

    began = monotonic()
    try:
        with _undisturbed(device), compiled_ahead(todo, gpu, compiling, tuning.notes.append) as wait:
            for done, measured in enumerate(todo):
                if budget.left < each.get(type(measured), 0.0) * len(measured.candidates):
                    continue
                if progress is not None:
                    progress(done, len(todo), str(measured))
                try:
                    wait(measured, budget.left)
                    started = monotonic()
                    if isinstance(measured, MeasuredBlock):
                        launch.forget_plans()  # it runs with the tiles that were found since those were made
                    with float32_products(measured.products):
                        race(measured, device, measure, in_time)
                except OutOfTimeError:
                    measured.forget()
                    continue
                tuning.measured.append(measured)
                tuning.left.remove(measured)
                write()
                each[type(measured)] = (monotonic() - started) / len(measured.candidates)
        if progress is not None:
            progress(len(todo), len(todo), "")
    finally:
        tuning.seconds += monotonic() - began
        write()  # in case it was interrupted after a measurement, and before its row was written
        launch.forget_plans()


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Whatever modes the caller is in: operands keep their dtypes, gradients can be computed, and the GPU is the
    current one.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def _refuse_durations(**durations: float | None) -> None:
    for name, value in durations.items():
        if value is not None and not (isfinite(value) and value > 0):
            raise ValueError(f"tune(): {name}={value} is no duration: give a positive number of seconds")
