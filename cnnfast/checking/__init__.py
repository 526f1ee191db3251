"""cnnfast.check: every covered call of a model or function, and the whole model converted, is judged against float64
and beside PyTorch.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..dispatch import launch
from ..dtypes import argument
from ..precision import float32_products
from ..spelling import keywords_explained
from .capture import Captured, capture_calls
from .child import interpreted
from .judge import judge
from .report import NOT_JUDGED, NOTE_MARK, ROW_MARK, CheckReport, CheckRow, Comparison
from .whole import STATE, judge_conversion, steps

__all__ = ["CheckReport", "CheckRow", "Comparison", "check"]

Progress = Callable[[int, int, str], None]


@keywords_explained
def check(
    target: Callable[..., Any],
    *example_inputs: Any,
    backward: bool = True,
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Checks every convolution, batch norm and pooling that `target(*example_inputs)` calls, whether of cnnfast or of
    torch.

        report = cnnfast.check(model, x)
        print(report)  # a table: errors against float64, PyTorch's own beside ours
        assert report.ok

    Each call is computed on its actual values by our kernels, by PyTorch, and in float64; the rule is in
    checking/judge.py. For tensors on the CPU, in a process whose kernels are compiled, a child process interprets the
    kernels.

    What cnnfast.convert makes of a module is judged as a whole, too: its state, outputs, gradients and statistics, in
    eval and in training (checking/whole.py).

    Our kernels serve wherever they can, also where the library was measured to be faster; a call that only PyTorch can
    serve is "not ours". float32 is judged with IEEE products, of ours and of PyTorch's, whatever PyTorch's settings
    say.

    target: a module (copied first; it and its buffers stay as they are, and it keeps its mode) or a function.
    backward: gradients too, of input, parameters and residual. dtype: casts floating inputs and the copy of the module:
    a dtype, or its name (bf16, fp16, fp32, fp64, PyTorch's own); "tf32" stands for float32 tensors whose products are
    rounded to TF32, by our kernels in Triton's interpreter too. progress: called with the number of calls and steps
    that are judged, the number of all, and what comes next.

    Returns a CheckReport: str() is a table; .ok, .rows, .to_json(). The arguments of all calls are held in memory at
    once. Raises what `target` raises, and ValueError for a name that is not a dtype's.
    """
    cast, products = argument(dtype, "check")
    tf32 = products == "tf32"
    with float32_products(products or "ieee"):
        calls = capture_calls(target, example_inputs, cast)
    # Conversion cannot see into what torch.compile has wrapped.
    model = getattr(target, "_orig_mod", target) if isinstance(target, torch.nn.Module) and calls else None
    to_come = steps(model, backward) if model is not None else []
    total = len(calls) + len(to_come)

    def tell(done: int, next_one: str) -> None:
        if progress is not None:
            progress(done, total, next_one)

    by_child = _judge_calls_in_child([call for call in calls if _needs_interpreter(call.device)], backward, tf32)
    rows: list[CheckRow] = []
    for call in calls:
        tell(len(rows), " ".join(filter(None, [call.layer, call.operation])))
        rows.append(next(by_child) if _needs_interpreter(call.device) else judge(call, backward, tf32))
    whole: list[CheckRow] = []
    if model is not None:

        def watch(text: str) -> None:
            tell(len(calls) + len(whole), f"whole model, {text}")

        watch(to_come[0])
        devices = {t.device for t in (*model.parameters(), *tree_leaves(example_inputs)) if isinstance(t, torch.Tensor)}
        elsewhere = any(map(_needs_interpreter, devices))
        judged = _judge_conversion_in_child if elsewhere else judge_conversion
        for row in judged(model, example_inputs, backward, cast, watch, tf32):
            whole.append(row)
            if len(whole) < len(to_come):
                watch(to_come[len(whole)])
    tell(total, "")
    return CheckReport(rows, whole)


def _needs_interpreter(device: torch.device) -> bool:
    """Whether kernels on this device run in a process that interprets them."""
    return launch is not None and not launch.INTERPRETED and device.type == "cpu"


def _judge_calls_in_child(calls: list[Captured], backward: bool, tf32: bool) -> Iterator[CheckRow]:
    if calls:
        yield from _judge_in_child(
            {"backward": backward, "tf32": tf32, "calls": [vars(call) for call in calls]}, len(calls)
        )


def _judge_conversion_in_child(
    model: torch.nn.Module,
    inputs: tuple[Any, ...],
    backward: bool,
    dtype: torch.dtype | None,
    watch: Callable[[str], None],
    tf32: bool = False,
) -> Iterator[CheckRow]:
    """The rows of `judge_conversion`, or one row that says why the child process cannot have the model: above all,
    because it cannot be pickled.
    """
    data = {"model": model, "inputs": inputs, "backward": backward, "dtype": dtype, "tf32": tf32}
    try:
        if main := sorted({type(m).__qualname__ for m in model.modules() if type(m).__module__ == "__main__"}):
            raise TypeError(
                f"{', '.join(main)} is defined in the script that runs, not in a module that could be imported"
            )
        yield from _judge_in_child(data, None, watch)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        advice = "the model does not reach the process that interprets kernels; with TRITON_INTERPRET=1 none is needed"
        yield CheckRow("", STATE, "", "", NOT_JUDGED, f"{advice} ({error})")


def _judge_in_child(
    data: dict[str, Any], missing: int | None = None, watch: Callable[[str], None] = lambda text: None
) -> Iterator[CheckRow]:
    """The rows that worker.py finds in a process with TRITON_INTERPRET=1. missing: how many there must be, if that is
    known.
    """
    found = 0
    for line in interpreted(f"{__name__}.worker", data):
        if line.startswith(NOTE_MARK):
            watch(line.removeprefix(NOTE_MARK).strip())
        elif line.startswith(ROW_MARK):
            found += 1
            yield CheckRow.from_dict(json.loads(line.removeprefix(ROW_MARK)))
    if missing not in (None, found):
        raise RuntimeError(f"the process that interprets kernels judged {found} of {missing} calls")
