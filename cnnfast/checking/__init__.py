"""check: every covered call of a model or function, forward and backward, against float64 and beside PyTorch; check_conversion: a
converted model as a whole."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..dispatch import launch
from .capture import Captured, capture_calls
from .judge import judge
from .report import ROW_MARK, Comparison, Report, Row
from .whole import judge_conversion

__all__ = ["Comparison", "Report", "Row", "check", "check_conversion"]

Progress = Callable[[int, int, str], None]


def check(
    target: Callable[..., Any],
    *example_inputs: Any,
    backward: bool = True,
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Checks every convolution, batch norm and pooling that `target(*example_inputs)` calls, be they cnnfast's or torch's own.

    Each call is computed on its actual values by our kernels, by PyTorch, and in float64; the rule is in checking/judge.py. Where
    nothing but compiled kernels could run and the tensors are on the CPU, a child process interprets the kernels.

    What cnnfast.convert makes of a module is judged as a whole, too: its state, outputs, gradients and statistics, in eval and in
    training (checking/whole.py).

    target: a module (copied first; it and its buffers stay as they are, and it keeps its mode) or a function.
    backward: gradients too, of input, parameters and residual. dtype: casts floating inputs and the copy of the module.
    progress: called with (calls and steps judged, in all, what comes next).
    Returns a Report: str() is a table; .ok, .rows, .to_json(). The arguments of all calls are held in memory at once.
    Raises what `target` raises.
    """
    dtype = _dtype("check", dtype)
    calls = capture_calls(target, example_inputs, dtype)
    by_child = _judge_in_child([call for call in calls if _needs_interpreter(call)], backward)
    rows: list[Row] = []
    for i, call in enumerate(calls):
        if progress is not None:
            progress(i, len(calls), " ".join(filter(None, [call.layer, call.operation])))
        rows.append(next(by_child) if _needs_interpreter(call) else judge(call, backward))
    if progress is not None:
        progress(len(calls), len(calls), "")
    return Report(rows)


def check_conversion(model: torch.nn.Module, *example_inputs: Any, backward: bool = True, dtype: torch.dtype | str | None = None) -> Report:
    """Converts a copy of `model` and checks it as a whole beside the original; the rule is in checking/whole.py.

    Rows: state (state_dict, parameters, buffers, loading), eval, training (with gradients and statistics), each as a step of both
    models. Where nothing but compiled kernels could run and the model is on the CPU, a child process interprets the kernels: the model
    must be picklable then. Raises TypeError if it is not.
    """
    data = {"model": model, "inputs": example_inputs, "backward": backward, "dtype": _dtype("check_conversion", dtype)}
    on_cpu = not any(t.is_cuda for t in (*model.parameters(), *model.buffers()))
    if launch is None or launch.INTERPRETED or not on_cpu:
        return Report(list(judge_conversion(**data)))
    try:
        lines = list(interpreted(f"{__name__}.whole", data))
    except (pickle.PicklingError, AttributeError) as error:
        raise TypeError(f"check_conversion(): this model cannot be pickled for the process that interprets kernels: {error}") from error
    return Report([Row.from_dict(json.loads(line.removeprefix(ROW_MARK))) for line in lines if line.startswith(ROW_MARK)])


def _dtype(function: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{function}(): dtype must name a dtype of torch, such as float32")
    return dtype


def _needs_interpreter(call: Captured) -> bool:
    return launch is not None and not launch.INTERPRETED and call.device.type == "cpu"


def _judge_calls_in_child(calls: list[Captured], backward: bool) -> Iterator[Row]:
    if calls:
        yield from _judge_in_child({"backward": backward, "calls": [vars(call) for call in calls]}, len(calls))


def _judge_conversion_in_child(
    model: torch.nn.Module, inputs: tuple[Any, ...], backward: bool, dtype: torch.dtype | None, watch: Callable[[str], None]
) -> Iterator[Row]:
    """What stands in the way of that is said in a row of its own: a model that cannot be pickled, above all."""
    data = {"model": model, "inputs": inputs, "backward": backward, "dtype": dtype}
    try:
        if main := sorted({type(m).__qualname__ for m in model.modules() if type(m).__module__ == "__main__"}):
            raise TypeError(f"{', '.join(main)} is defined in the script that runs, not in a module that could be imported")
        yield from _judge_in_child(data, None, watch)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        advice = "the model does not reach the process that interprets kernels; with TRITON_INTERPRET=1 none is needed"
        yield Row("", STATE, "", "", NOT_JUDGED, f"{advice} ({error})")


def _judge_in_child(data: dict[str, Any], missing: int | None = None, watch: Callable[[str], None] = lambda text: None) -> Iterator[Row]:
    """The rows, `missing` in all if that is known, that a process of its own with TRITON_INTERPRET=1 finds (worker.py)."""
    with tempfile.TemporaryDirectory(prefix="cnnfast-check-") as folder:
        path = Path(folder, "data.pt")
        torch.save(data, path)
        importable = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": importable}
        with Path(folder, "stderr").open("w+") as stderr:
            command = [sys.executable, "-P", "-m", f"{__name__}.worker", str(path)]
            child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
            assert child.stdout is not None
            try:
                found = 0
                for line in child.stdout:
                    if line.startswith(NOTE_MARK):
                        watch(line.removeprefix(NOTE_MARK).strip())
                    elif line.startswith(ROW_MARK):
                        found += 1
                        yield Row.from_dict(json.loads(line.removeprefix(ROW_MARK)))
                if child.wait() or missing not in (None, found):
                    stderr.seek(0)
                    raise RuntimeError(f"the process that interprets kernels ended with {child.returncode}:\n{stderr.read()[-4000:]}")
            finally:
                child.kill()
                child.wait()
                child.stdout.close()
