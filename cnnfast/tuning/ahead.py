"""Candidates' kernels, compiled by other processes while the convolution before them is measured."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager

import torch

from cnnfast_kernels import devices, launch
from cnnfast_kernels.aot.processes import usable_cores

from .. import warming
from ..precision import float32_products
from .racing import OutOfTimeError
from .report import Measured
from .running import by_library, operands, ours

Compiling = Callable[[devices.Gpu], AbstractContextManager[warming.Compile]]  # as warming.compiling
Wait = Callable[[Measured, float], None]

SECONDS_TO_END = 5.0  # that the kernel which is being compiled may take, when nothing more is to be


@contextmanager
def compiled_ahead(
    todo: Sequence[Measured], gpu: devices.Gpu, compiling: Compiling | None, note: Callable[[str], None]
) -> Iterator[Wait]:
    """Compiles for one convolution after the other, in the order given, as long as the context lasts.

    Gives a function that waits until one of them is compiled, so many seconds at most: then it raises OutOfTimeError. A
    kernel that does not compile fails again, with its reason, where it is launched. Where no other process can compile,
    `note` is told why, and kernels are compiled where they are launched.
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

    def work(compile_: warming.Compile) -> None:
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

    def wait(measured: Measured, seconds: float) -> None:
        nonlocal noted
        try:
            compiled[id(measured)].result(min(max(seconds, 0.0), threading.TIMEOUT_MAX))
        except TimeoutError:
            raise OutOfTimeError from None
        except Exception as error:
            if not noted:
                note(
                    f"Kernels were compiled where they were measured, one after the other: {type(error).__name__}: {error}"
                )
            noted = True

    with compiling(gpu) as compile_:
        # A daemon: where it waits for another process that compiles, nobody waits for it when this one is interrupted.
        thread = threading.Thread(target=work, args=(compile_,), name="cnnfast-tune-compiles", daemon=True)
        thread.start()
        try:
            yield wait
        finally:
            ended.set()
            thread.join(SECONDS_TO_END)


def _beside_measuring(gpu: devices.Gpu) -> AbstractContextManager[warming.Compile]:
    """One core is this process's, which must not keep the GPU waiting."""
    return warming.compiling(gpu, max(1, usable_cores() - 1))


def launches(measured: Measured, gpu: devices.Gpu) -> list[str]:
    """What all candidates of a convolution launch, one line of JSON a kernel, as warming compiles it. A candidate that
    cannot be called adds nothing: it fails where it is measured.
    """
    lines: dict[str, None] = {}
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
