"""The candidates of one convolution, or of one block: which compute right numbers, and how long each takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch

from cnnfast_kernels import memory

from ..measuring.failing import in_a_line, lost
from ..measuring.graphs import captured
from ..measuring.rotation import copies_for
from ..measuring.timing import Step, Times, cudnn_benchmark
from .measured import KERNELS, LIBRARY, Measured, MeasuredBlock
from .running import Arguments, Judge, by_library, operands, ours
from .running_blocks import BlockJudge, by_us
from .running_blocks import operands as operands_of_block

Measure = Callable[[Mapping[str, Step]], Mapping[str, Times | Exception]]
Compute = Callable[[Arguments], Any]
Draw = Callable[[int], Arguments]  # of operands, by a seed

FEWEST_SETS = 2


class OutOfTimeError(Exception):
    """The budget ended before a convolution was measured."""


class Contested(NamedTuple):
    """What is the candidates' own: how each computes, on which operands, and who judges them."""

    computes: dict[str, Compute]
    draw: Draw
    judge: Callable[[Arguments], Judge | BlockJudge]


def _contested(measured: Measured | MeasuredBlock, device: torch.device) -> Contested:
    if isinstance(measured, MeasuredBlock):
        block = measured.block
        computes: dict[str, Compute] = {name: partial(by_us, block, name == KERNELS) for name in measured.candidates}
        return Contested(computes, partial(operands_of_block, block, device), partial(BlockJudge, block))
    convolution = measured.convolution
    computes = {
        name: partial(by_library, convolution) if c.tile is None else partial(ours, convolution, tile=c.tile)
        for name, c in measured.candidates.items()
    }
    return Contested(computes, lambda seed: operands(convolution, device, seed), partial(Judge, convolution))


def race(
    measured: Measured | MeasuredBlock, device: torch.device, measure: Measure, in_time: Callable[[], None]
) -> None:
    """Judges and times the candidates, and writes the results, or what they raised, into them. in_time: called between
    candidates, raises OutOfTimeError if there is no time left. measure: leaves out what it has no time for.

    Raises OutOfTimeError if some could not be measured in time, and RuntimeError if the GPU no longer answers.
    """
    computes, draw, judge_of = _contested(measured, device)
    try:
        first = draw(0)
        judge = judge_of(first)
    except Exception as error:  # for want of memory, mostly
        end_if_lost(device, f"PyTorch on {measured}", error)
        measured.reason = f"PyTorch does not compute it: {in_a_line(error)}"
        return
    for name, candidate in measured.candidates.items():
        in_time()
        try:
            with memory.poisoned(), _at_its_best(name):
                candidate.fault = judge.fault(computes[name](first))
            candidate.computes = not candidate.fault
        except Exception as error:  # too large for this GPU, or not to be compiled
            end_if_lost(device, f"{name} on {measured}", error)
            candidate.failure = in_a_line(error)
    in_time()
    del judge  # which holds results in float64
    right = {name: computes[name] for name, candidate in measured.candidates.items() if candidate.computes}
    for name, result in timed(right, draw, first, device, measure).items():
        if isinstance(result, Exception):
            end_if_lost(device, f"{name} on {measured}", result)
            measured.candidates[name].failure = in_a_line(result)
        else:
            measured.candidates[name].microseconds = result * 1e6


def timed(
    computes: Mapping[str, Compute], draw: Draw, first: Arguments, device: torch.device, measure: Measure
) -> dict[str, float | Exception]:
    """The median seconds of one call of each candidate, or why it was not timed.

    They take turns, each with a pass over the same sets of operands, of which `first` is one. On a GPU a pass is one
    CUDA graph, and the sets together are larger than the second-level cache, because the layers of a network find their
    operands in memory, too. A candidate that cannot be captured is not timed. Where memory is short there are fewer
    sets, down to two; if that does not help, each candidate is measured alone.
    """
    bytes_of_one = sum(t.nbytes for t in first.values() if isinstance(t, torch.Tensor))
    count = max(FEWEST_SETS, copies_for(bytes_of_one, device)) if device.type == "cuda" else FEWEST_SETS
    while True:
        passes = _passes(computes, draw, first, count, device)
        if not any(isinstance(result, Exception) and _is_of_memory(result) for result in passes.values()):
            break
        if count == FEWEST_SETS:
            if len(computes) == 1:
                break
            passes.clear()  # frees the memory that their graphs hold
            alone = ({name: compute} for name, compute in computes.items())
            return {name: result for one in alone for name, result in timed(one, draw, first, device, measure).items()}
        passes.clear()
        count = max(FEWEST_SETS, count // 2)
    times = measure({name: step for name, step in passes.items() if not isinstance(step, Exception)})
    results: dict[str, float | Exception] = {}
    for name, step in passes.items():
        if not isinstance(step, Exception) and name not in times:
            raise OutOfTimeError
        result = step if isinstance(step, Exception) else times[name]
        results[name] = result if isinstance(result, Exception) else result.median / count
    return results


def _passes(
    computes: Mapping[str, Compute], draw: Draw, first: Arguments, count: int, device: torch.device
) -> dict[str, Step | Exception]:
    """For each candidate a step that is one pass over `count` sets of operands, or why there is none."""
    try:
        sets = [first, *(draw(seed) for seed in range(1, count))]
    except torch.OutOfMemoryError as error:
        return dict.fromkeys(computes, error.with_traceback(None))
    passes: dict[str, Step | Exception] = {}
    for name, compute in computes.items():
        steps = [partial(compute, a) for a in sets]
        if device.type != "cuda":
            passes[name] = partial(_one_after_the_other, steps)
            continue
        try:
            with _at_its_best(name):
                passes[name] = captured(lambda steps=steps: steps, device)
        except Exception as error:
            passes[name] = error.with_traceback(None)  # the frames of its traceback would hold memory
    return passes


def _one_after_the_other(steps: Sequence[Step]) -> Any:
    first, *_ = [step() for step in steps]
    return first


def _at_its_best(name: str) -> AbstractContextManager[None]:
    """The library may try all its algorithms at its first call. It remembers the best, which a graph then holds."""
    return cudnn_benchmark(True) if name == LIBRARY else nullcontext()


def end_if_lost(device: torch.device, who: str, error: Exception) -> None:
    """Raises RuntimeError if the GPU no longer answers, for then nothing that comes later can be measured. `who` ran
    last, and `error` is what it raised.
    """
    if lost(device):
        raise RuntimeError(f"the GPU no longer answers since {who} ran: {in_a_line(error)}") from error


def _is_of_memory(error: BaseException | None) -> bool:
    """Whether memory was short, also if the end of the capture has raised another error because of that."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None
