"""What `cnnfast.trace()` lists: every operation that ran, who served it, and why."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

try:
    from cnnfast_kernels import launch
except (ImportError, AttributeError):  # dispatch.NO_KERNELS says why: nothing is launched
    launch = None

Server = Literal["kernels", "library", "torch"]


@dataclass(slots=True)
class Call:
    """One operation as it was served: by "kernels" (`launches` lists them), by "torch", or by "library", which is
    PyTorch's convolution inside our operator. `reason` says why; kernels have one only where their choice needs a word.
    """

    operation: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    served_by: Server
    reason: str = ""
    launches: list[Any] = field(default_factory=list)

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, s)) for s in self.shapes)
        launched = [f"{e.kernel} [{e.tile}]" if e.tile else e.kernel for e in self.launches]
        if self.served_by != "kernels":
            served = f"{' + '.join([self.served_by, *launched])}, because {self.reason}"
        else:
            served = " + ".join(launched) or "no launch: nothing to compute"
            served += f" ({self.reason})" if self.reason else ""
        return f"{self.operation} {shapes} {self.dtype}: {served}"


class Trace:
    """The calls made while a `trace()` lasted: iterate, len(), or print one a line."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._inside = threading.local()  # the calls each thread is inside of; a launch belongs to the innermost

    @property
    def launches(self) -> list[str]:
        """Names of all kernels launched, in the order of the calls."""
        return [event.kernel for call in self.calls for event in call.launches]

    def __iter__(self) -> Iterator[Call]:
        return iter(self.calls)

    def __len__(self) -> int:
        return len(self.calls)

    def __str__(self) -> str:
        return "\n".join(map(str, self.calls))

    def enter(self, call: Call) -> None:
        self.calls.append(call)
        self._inside.__dict__.setdefault("stack", []).append(call)

    def leave(self) -> None:
        self._inside.stack.pop()

    def innermost(self) -> Call | None:
        """The call that this thread is inside of."""
        stack = self._inside.__dict__.get("stack")
        return stack[-1] if stack else None

    def launched(self, event: Any) -> None:
        call = self.innermost()
        if call is not None:
            call.launches.append(event)


traces: list[Trace] = []  # those that last


@contextmanager
def trace() -> Iterator[Trace]:
    """Lists every operation that runs in this process while the context lasts, backward included, and who served it."""
    calls = Trace()
    traces.append(calls)
    try:
        if launch is None:
            yield calls
        else:
            with launch.observe(calls.launched):
                yield calls
    finally:
        traces.remove(calls)


def _call(operation: str, arguments: tuple[Any, ...], served_by: Server, reason: str = "") -> Call:
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
    return Call(operation, tuple(tuple(t.shape) for t in tensors), dtype, served_by, reason)


def record_torch(operation: str, reason: str, *arguments: Any) -> None:
    """Tells every trace that PyTorch serves this call."""
    for calls in traces:
        calls.calls.append(_call(operation, arguments, "torch", reason))


def note(served_by: Server, reason: str) -> None:
    """Tells every trace more of the call of an operator that is running."""
    for calls in traces:
        call = calls.innermost()
        if call is not None:
            call.served_by, call.reason = served_by, reason


def recorded(operation: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates an operator's implementation: every trace learns that our kernels serve it, and which were launched."""

    def decorate(implementation: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(implementation)
        def call(*arguments: Any) -> Any:
            if not traces:
                return implementation(*arguments)
            active = tuple(traces)
            for calls in active:
                calls.enter(_call(operation, arguments, "kernels"))
            try:
                return implementation(*arguments)
            finally:
                for calls in active:
                    calls.leave()

        return call

    return decorate
