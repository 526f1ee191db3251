"""Work that may take too long, such as torch.export's algebra on sizes, done in a thread that can be made to end."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

import sympy
import torch

Result = TypeVar("Result")

# Here nothing but algebra happens: an exception between any two steps is as harmless as one that sympy raises.
# Elsewhere it is not: PyTorch ends the process where a dispatch mode is left half entered.
ALGEBRA = (
    os.path.dirname(sympy.__file__) + os.sep,
    os.path.join(os.path.dirname(torch.__file__), "utils", "_sympy") + os.sep,
)
# An exception within one of these would leave undone what a `with` statement promises to undo.
UNINTERRUPTIBLE = {"__enter__", "__exit__", "__del__"}
POLL = 0.01


class _GivenUp(BaseException):
    """Not an Exception, so that no one takes it for a failure of what they tried."""


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """What work() returns, or raises, if that takes no more than so many seconds; raises TimeoutError otherwise. The
    thread that works has ended in either case, and whatever context managers it was in are left. It is made to end
    where it does algebra: what does none comes to its own end, and its result counts, however late.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="cnnfast capture", daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    finally:  # also when the caller is interrupted
        _end(thread)
    if results:
        return results[0]
    error = errors[0]
    if isinstance(error, _GivenUp):
        raise TimeoutError(f"not done within {seconds:g} seconds")
    raise error


def _end(thread: threading.Thread) -> None:
    """Raises an exception in the thread, at a place where that is safe, until the thread has ended."""
    while thread.is_alive():
        # Python gives another thread its turn only after 5 ms: what is seen here still holds when the exception is set.
        frame = sys._current_frames().get(thread.ident or 0)
        if frame is not None and _is_safe(frame):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_GivenUp))
            del frame
            thread.join(1.0)  # the way out of all context managers
        else:
            del frame
            thread.join(POLL)


def _is_safe(frame: FrameType) -> bool:
    if not frame.f_code.co_filename.startswith(ALGEBRA):
        return False
    return UNINTERRUPTIBLE.isdisjoint(one.f_code.co_name for one in _stack(frame))


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
