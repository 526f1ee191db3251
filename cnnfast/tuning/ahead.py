"""Candidates' kernels, compiled by other processes while the convolution before them is measured."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from cnnfast_kernels import launch

from ..precision import float32_products
from .report import Measured
from .running import by_library, operands, ours

Compiling = Callable[[launch.Gpu], AbstractContextManager[Callable[[Iterable[str]], Any]]]  # as warming.compiling
Wait = Callable[[Measured, float], None]


class OutOfTimeError(Exception):
    """The budget ends before a convolution is measured."""


@contextmanager
def compiled_ahead(todo: Sequence[Measured], gpu: launch.Gpu, compiling: Compiling | None, note: Callable[[str], None]) -> Iterator[Wait]:
    """Compiles for one convolution after the other, in the order given, as long as the context lasts.

    Gives a function that waits until one of them is compiled, so many seconds at most: then it raises OutOfTimeError. A kernel that does
    not compile fails again, with its reason, where it is launched. Where no other process can compile, `note` is told why, and kernels
    are compiled where they are launched.
    """
    if compiling is None and not launch.INTERPRETED:
        from .. import warming

        compiling = warming.compiling
    if compiling is None:
        yield lambda measured, seconds: None
        return
    lines = [launches(measured, gpu) for measured in todo]  # before anything is launched: recording is of the whole process
    with ExitStack() as stack:
        thread = ThreadPoolExecutor(1, "cnnfast-tune-compiles")
        stack.callback(thread.shutdown)
        compile_ = stack.enter_context(compiling(gpu))
        futures: dict[int, Future[Any]] = {id(m): thread.submit(compile_, each) for m, each in zip(todo, lines, strict=True)}
        stack.callback(lambda: [future.cancel() for future in futures.values()])
        reasons: set[str] = set()

        def wait(measured: Measured, seconds: float) -> None:
            try:
                reason = futures[id(measured)].result(min(max(seconds, 0.0), threading.TIMEOUT_MAX)).reason
            except TimeoutError:
                raise OutOfTimeError from None
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            if reason and reason not in reasons:
                reasons.add(reason)
                note(f"Kernels were compiled one after the other, where they were measured: {reason}")

        yield wait


def launches(measured: Measured, gpu: launch.Gpu) -> list[str]:
    """What all candidates of a convolution launch, one line of JSON a kernel, as warming compiles it. A candidate that cannot be called
    adds nothing: it fails where it is measured."""
    from .. import warming

    lines: dict[str, None] = {}
    for candidate in measured.candidates.values():
        with float32_products(measured.products), warming.recorded(gpu) as recorded:
            a = operands(measured.convolution, torch.device("meta"))
            try:
                by_library(measured.convolution, a) if candidate.tile is None else ours(measured.convolution, a, candidate.tile)
            except Exception:
                continue
        lines |= recorded
    return list(lines)
