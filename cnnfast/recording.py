"""What `cnnfast.trace()` lists: every operation that ran, who served it, and why."""

from __future__ import annotations

import functools
import io
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

try:
    from cnnfast_kernels import launch
except (ImportError, AttributeError):  # dispatch.NO_KERNELS says why: nothing is launched
    launch = None

if TYPE_CHECKING:
    from rich.console import Group

WIDTH = 120  # of str(trace)
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

    @property
    def sizes(self) -> str:
        """The shapes, as a person reads them: 2x3x8x8 8x3x3x3."""
        return " ".join("x".join(map(str, s)) for s in self.shapes)

    @property
    def servers(self) -> tuple[str, ...]:
        """Who served the call: torch, the library, and each kernel that was launched, with its tile."""
        launched = [f"{e.kernel} [{e.tile}]" if e.tile else e.kernel for e in self.launches]
        others = [] if self.served_by == "kernels" else [self.served_by]
        return (*others, *launched) or ("no launch: nothing to compute",)

    def __str__(self) -> str:
        why = self.reason and (f" ({self.reason})" if self.served_by == "kernels" else f", because {self.reason}")
        return f"{self.operation} {self.sizes} {self.dtype}: {' + '.join(self.servers)}{why}"


class Trace:
    """The calls made while a `trace()` lasted: iterate over them in their order, or ask for len().

    str() is a table, in which equal calls share a row; rich prints it at the width of its console.
    """

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

    @property
    def summary(self) -> str:
        """How many calls there were, and who served them."""
        if not self.calls:
            return "no operation of cnnfast's ran: did the model run inside the `with`, and was it converted?"
        names = {"kernels": "our kernels", "library": "the library", "torch": "PyTorch"}
        counts = Counter(call.served_by for call in self.calls)
        served = ", ".join(f"{counts[server]} by {name}" for server, name in names.items() if counts[server])
        return f"{len(self.calls)} {'call' if len(self.calls) == 1 else 'calls'}: {served}"

    def __repr__(self) -> str:
        return f"<Trace of {self.summary}; print it for the table>" if self.calls else "<Trace of no calls>"

    def __rich__(self) -> Group:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        rows = Counter((c.operation, c.sizes, c.dtype, c.servers, c.reason) for c in self.calls)
        reasons = list(dict.fromkeys(call.reason for call in self.calls if call.reason))
        table = Table("operation", "shapes", "dtype", "served by", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("calls", justify="right")
        table.columns[0].no_wrap = table.columns[2].no_wrap = True
        for (operation, sizes, dtype, servers, reason), count in rows.items():
            mark = f" ({reasons.index(reason) + 1})" if reason else ""
            table.add_row(operation, Text(sizes), dtype, Text("\n".join(servers) + mark), str(count))
        notes = [Text(f"({i}) {reason}") for i, reason in enumerate(reasons, start=1)]
        return Group(Text(self.summary), *([table] if rows else []), *notes)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())

    @property
    def heard_here(self) -> int:
        """How many of its calls this thread made."""
        return self._inside.__dict__.get("heard", 0)

    def add(self, call: Call) -> None:
        self.calls.append(call)
        self._inside.heard = self.heard_here + 1

    def enter(self, call: Call) -> None:
        self.add(call)
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


# Those that last. Another thread's may end at any time: who goes through them all takes a copy first.
traces: list[Trace] = []


@contextmanager
def trace() -> Iterator[Trace]:
    """Lists every operation that runs in this process while the context lasts, backward included, and who served it.

        with cnnfast.trace() as calls:
            loss(model(x)).backward()
        print(calls)

    Gives a Trace: str() is a table; iterate for its calls, each with .operation, .shapes, .dtype, .served_by
    ("kernels", "library" or "torch"), .reason and .launches; .launches of the whole are the names of all kernels, in
    their order. Operations of cnnfast alone are listed: a model that was not converted makes none.
    """
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
    for calls in tuple(traces):
        calls.add(_call(operation, arguments, "torch", reason))


def note(served_by: Server, reason: str) -> None:
    """Tells every trace more of the call of an operator that is running."""
    for calls in tuple(traces):
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
