"""tune: measures the convolutions of a model on this GPU and writes what won to the user's table (cnnfast_kernels/tables.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import nn

from cnnfast_kernels import choosing, launch, tables

from ..dtypes import TF32, argument
from ..measuring.machine import this_machine
from ..measuring.timing import Step, Times, clock_of
from ..measuring.timing import measure as take_turns
from ..precision import allow_tf32, float32_products
from .capture import Convolution, capture
from .report import DEFAULT, LIBRARY, Candidate, Measured, Tuning
from .running import Arguments, Judge, by_library, operands, ours

__all__ = ["Candidate", "Measured", "Tuning", "plan", "tune"]

Progress = Callable[[int, int, str], None]
Measure = Callable[[Mapping[str, Step]], Mapping[str, Times | Exception]]

SECONDS = 0.05  # of timing, for each candidate
# Candidates work on several sets of operands in turn, together larger than any GPU's second-level cache: a network's layers find theirs
# in memory.
COLD_BYTES = 256 * 2**20
MOST_SETS = 16


def tune(
    model: nn.Module,
    *example_inputs: Any,
    training: bool = False,
    dtype: torch.dtype | str | None = None,
    memory_format: torch.memory_format | None = torch.channels_last,
    measure: Measure | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Measures every convolution of the model on its GPU, and writes the user's table, which is used from now on.

    For each convolution that the converted model makes, forward and, if `training`, backward, all tiles worth trying and the library's
    convolution run on random operands. Who computes wrong numbers, by the rule of cnnfast.check, is out; the others take turns on the
    clock. The row says which of our tiles is the fastest, and whether the library is faster still.

    model: on a GPU; it stays as it is. memory_format: as `convert` takes it.
    dtype: casts floating inputs and a copy of the model: a dtype, or its name (bf16, fp16, fp32, fp64, PyTorch's own), or "tf32", float32
    tensors whose products are rounded to TF32. A name says how float32 is multiplied, "fp32" IEEE; otherwise PyTorch's settings do, which
    let convolutions be TF32. Rows of the two are apart, and a call finds those of the settings that it is made under.
    measure: what times steps by their names, by default measuring/timing.py. progress: called with (measured, in all, what comes next).
    An interrupted run keeps what it has measured. Returns a Tuning: str() is a table; .ok, .measured, .rows, .to_json().
    Raises ValueError for a name that is none of a dtype; RuntimeError without a GPU, if the model does not run on these inputs, or if it
    makes no convolution; OSError, before anything is measured, if the table could not be written.
    """
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    gpu = _gpu(device)
    if not gpu.name:
        raise RuntimeError(f"tune() needs a GPU to measure on, but the model is on {device}")
    todo = plan(model, *example_inputs, training=training, dtype=dtype, memory_format=memory_format)
    tables.writable()
    clock = clock_of(device)
    measure = measure or (lambda steps: take_turns(steps, clock, SECONDS))
    tuning = Tuning(*gpu)
    try:
        for measured in todo:
            if progress is not None:
                progress(len(tuning.measured), len(todo), str(measured))
            with float32_products("tf32" if measured.key.dtype == TF32 else "ieee"):
                _measure(measured, device, measure)
            tuning.measured.append(measured)
    finally:
        if tuning.rows:
            about = {name: value for name, value in asdict(this_machine(device)).items() if name != "device"}
            tuning.path = tables.write(*gpu, tuning.rows, about)
            launch.forget_plans()
    if progress is not None:
        progress(len(todo), len(todo), "")
    return tuning


def plan(
    model: nn.Module,
    *example_inputs: Any,
    training: bool = False,
    dtype: torch.dtype | str | None = None,
    memory_format: torch.memory_format | None = torch.channels_last,
) -> list[Measured]:
    """What `tune` would measure, each convolution that tables tell apart once, its candidates still without times. Needs no GPU.

    Arguments, ValueError and RuntimeError as of `tune`.
    """
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    cast, products = argument(dtype, "tune")
    with float32_products(products) if products else nullcontext():
        return _plan(model, example_inputs, device, training=training, dtype=cast, memory_format=memory_format)


def _plan(model: nn.Module, inputs: tuple[Any, ...], device: torch.device, **how: Any) -> list[Measured]:
    convolutions = capture(model, inputs, **how)
    if not convolutions:
        raise RuntimeError(f"{type(model).__name__} makes no convolution that cnnfast has kernels for: there is nothing to measure")
    found: dict[tables.Key, Measured] = {}
    for convolution, count in convolutions.items():
        tf32 = allow_tf32(torch.empty(0, dtype=convolution.dtype, device=device))
        question = convolution.question(tf32, _gpu(device))
        measured = found.setdefault(question.key, Measured(question.key, convolution))
        measured.count += count
        if not measured.candidates:
            default = choosing.default_tile(question)
            measured.candidates = {DEFAULT if t == default else str(t): Candidate(t) for t in choosing.candidates(question)}
            measured.candidates[LIBRARY] = Candidate(None)
    return list(found.values())


def _gpu(device: torch.device) -> launch.Gpu:
    return launch.gpu(device) if launch.INTERPRETED or device.type == "cuda" else launch.NO_GPU


def _measure(measured: Measured, device: torch.device, measure: Measure) -> None:
    """Fills in the candidates; whatever they raise is said there."""
    convolution = measured.convolution
    steps: dict[str, Callable[[Arguments], Any]] = {
        name: partial(by_library, convolution) if c.tile is None else partial(ours, convolution, tile=c.tile)
        for name, c in measured.candidates.items()
    }
    try:
        sets = _sets(convolution, device)
        judge = Judge(convolution, sets[0])
    except (RuntimeError, NotImplementedError) as error:  # memory, above all
        measured.reason = f"PyTorch does not compute it: {_in_a_line(error)}"
        return
    for name, candidate in measured.candidates.items():
        try:
            with launch.poisoned():
                candidate.fault = judge.fault(steps[name](sets[0]))
        except Exception as error:  # too large for this GPU, or not to be compiled
            candidate.failure = _in_a_line(error)
    racing = {name: _in_turn(steps[name], sets) for name, candidate in measured.candidates.items() if candidate.right}
    for name, times in measure(racing).items():
        if isinstance(times, Exception):
            measured.candidates[name].failure = _in_a_line(times)
        else:
            measured.candidates[name].microseconds = times.median * 1e6


def _sets(convolution: Convolution, device: torch.device) -> list[Arguments]:
    first = operands(convolution, device)
    size = sum(t.nbytes for t in first.values() if isinstance(t, torch.Tensor))
    count = min(MOST_SETS, COLD_BYTES // max(size, 1) + 1)
    return [first, *(operands(convolution, device, seed) for seed in range(1, count))]


def _in_turn(step: Callable[[Arguments], Any], sets: list[Arguments]) -> Step:
    turn = cycle(sets)
    return lambda: step(next(turn))


def _in_a_line(error: Exception) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])
