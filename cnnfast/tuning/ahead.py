"""The kernels of candidates are compiled by other processes, while the convolutions before them are measured."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress

import torch
from torch import nn

from cnnfast_kernels import devices, launch
from cnnfast_kernels.aot.processes import usable_cores

from .. import calls, warming, workers
from ..precision import float32_products
from .capture import CallCounter
from .measured import KERNELS, Measured, MeasuredBlock
from .racing import OutOfTimeError
from .running import by_library, operands, ours
from .running_blocks import by_us
from .running_blocks import operands as operands_of_block

Compiling = Callable[[devices.Gpu], AbstractContextManager[workers.Compile]]  # as workers.compiling
Wait = Callable[[Measured | MeasuredBlock, float], None]

SECONDS_TO_END = 5.0  # how long the end waits for a kernel that is being compiled


@contextmanager
def compiled_ahead(
    todo: Sequence[Measured | MeasuredBlock], gpu: devices.Gpu, compiling: Compiling | None, note: Callable[[str], None]
) -> Iterator[Wait]:
    """Compiles for one convolution after the other, in the order given, as long as the context lasts.

    The context is a function that waits until the kernels of one convolution are compiled, for so many seconds at most,
    and then raises OutOfTimeError. A kernel that does not compile fails again, with its reason, when it is launched.
    Where no other process can compile, `note` is told why, and kernels are compiled when they are launched.
    """
    compiling = compiling or (None if launch.INTERPRETED else _beside_measuring)
    if compiling is None:
        yield lambda measured, seconds: None
        return
    lines = [launches(measured, gpu) for measured in todo]
    compiled: dict[int, Future[None]] = {id(measured): Future() for measured in todo}
    ended = threading.Event()

    def end_early(done: int, total: int) -> None:
        if ended.is_set():
            raise InterruptedError

    def work(compile_: workers.Compile) -> None:
        submitted: set[str] = set()
        for measured, each in zip(todo, lines, strict=True):
            try:
                end_early(0, 0)
                compile_([line for line in each if line not in submitted], end_early)
                submitted.update(each)
                compiled[id(measured)].set_result(None)
            except Exception as error:
                compiled[id(measured)].set_exception(error)

    noted = False

    def wait(measured: Measured | MeasuredBlock, seconds: float) -> None:
        nonlocal noted
        try:
            compiled[id(measured)].result(min(max(seconds, 0.0), threading.TIMEOUT_MAX))
        except TimeoutError:
            raise OutOfTimeError from None
        except Exception as error:
            if not noted:
                why = f"{type(error).__name__}: {error}"
                note(f"Kernels were compiled where they were measured, one after the other: {why}")
            noted = True

    with compiling(gpu) as compile_:
        # A daemon: it may wait for another process that compiles, and shall not keep this one alive after an interrupt.
        thread = threading.Thread(target=work, args=(compile_,), name="cnnfast-tune-compiles", daemon=True)
        thread.start()
        try:
            yield wait
        finally:
            ended.set()
            thread.join(SECONDS_TO_END)


def _beside_measuring(gpu: devices.Gpu) -> AbstractContextManager[workers.Compile]:
    """Compiles on all cores but one, which this process needs, so that the GPU does not wait for it."""
    return workers.compiling(gpu, max(1, usable_cores() - 1))


def launches(measured: Measured | MeasuredBlock, gpu: devices.Gpu) -> list[str]:
    """The kernels that the candidates of a convolution launch, each as a line of JSON (aot/specialisations.py). A
    candidate that cannot be called adds none, and fails when it is measured. So do those of a block.
    """
    lines: dict[str, None] = {}
    if isinstance(measured, MeasuredBlock):
        for name in measured.candidates:
            with float32_products(measured.products), suppress(Exception):
                lines |= _launches_of_block(measured, name == KERNELS, gpu)
        return list(lines)
    for candidate in measured.candidates.values():
        with float32_products(measured.products), warming.recorded(gpu) as recorded:
            a = operands(measured.convolution, torch.device("meta"))
            try:
                by_library(measured.convolution, a) if candidate.tile is None else ours(
                    measured.convolution, a, candidate.tile
                )
            except Exception:
                continue
        lines |= recorded
    return list(lines)


def _launches_of_block(measured: MeasuredBlock, ours: bool, gpu: devices.Gpu) -> dict[str, None]:
    """Of one candidate: the operators that it calls are seen on meta tensors, and then each is run."""
    counter = CallCounter(nn.Identity(), False)
    with calls.standing_for(gpu), counter:
        by_us(measured.block, ours, operands_of_block(measured.block, torch.device("meta")))
    with warming.recorded(gpu) as recorded:
        for call in counter.calls:
            calls.replay(call)
    return recorded
