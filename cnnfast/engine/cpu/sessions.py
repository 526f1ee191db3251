"""Runs a graph by onnxruntime."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..graph import Graph
from ..operators import NAMES
from ..runner import Runner
from .onnx_graph import FORMS, model_of

# Constants from this many bytes on are not copied into the model: onnxruntime reads PyTorch's memory.
SHARED_FROM = 1024
# In a profile: what onnxruntime spends on steps that no node of the graph stands for.
OWN_STEPS = "(onnxruntime)"


def available(graph: Graph) -> str:
    """Why onnxruntime cannot run the graph; empty if it can. A call that has no form in ONNX because of its arguments
    is found by build() only.
    """
    for package in ("onnxruntime", "onnx"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (pip install '.[cpu]')"
    floating = {t.dtype for t in (*graph.constants.values(), *graph.inputs) if t.dtype.is_floating_point}
    if others := floating - {torch.float32}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        return f"onnxruntime computes convolutions on a CPU in float32 only, and the network is in {names}"
    targets = {node.target for node in graph.calls.nodes if node.op == "call_function"}
    missing = sorted({NAMES.get(t, str(t)) for t in targets} - FORMS.keys())  # type: ignore[arg-type]
    return f"no form in ONNX for {', '.join(missing)}" if missing else ""


def build(graph: Graph, shapes: Sequence[Sequence[int]]) -> Runner:
    """Serves any batch where the graph leaves it open, and the image sizes of `shapes`.

    Raises NoOnnxForm, a ValueError, where the graph cannot be written as ONNX.
    """
    return OnnxSession(graph, shapes)


class OnnxSession:
    name = "onnxruntime"

    def __init__(self, graph: Graph, shapes: Sequence[Sequence[int]]) -> None:
        self._graph, self._shapes = graph, [tuple(shape) for shape in shapes]
        self._session, self._constants = self._start()
        self._inputs = [given.name for given in self._session.get_inputs()]

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if any(x.numel() == 0 for x in inputs):  # a batch of no images, which not all of onnxruntime's steps take
            return self._graph.run(inputs)
        answers = self._session.run(None, self._fed(inputs))
        return tuple(torch.from_numpy(answer) for answer in answers)

    def served_by(self) -> dict[str, str]:
        return {node.name: self.name for node in self._graph.calls.nodes if node.op == "call_function"}

    def profile(self, inputs: Sequence[Tensor]) -> dict[str, float]:
        """By a session of its own, since onnxruntime writes what it times into a file, at the session's end. Steps that
        it fuses count under the first of them, by whose name theirs begin; what it adds, like changes of layout,
        counts together under "(onnxruntime)".
        """
        with tempfile.TemporaryDirectory() as folder:
            session, _constants = self._start(profile=Path(folder) / "profile")
            fed = self._fed(inputs)
            for _ in range(2):  # the first run of a session waits for memory
                session.run(None, fed)
            events = json.loads(Path(session.end_profiling()).read_text())
        seconds = dict.fromkeys(self.served_by(), 0.0)
        # Names of steps in the blocked layout are made of their results' names: of a result of the graph, the caller's.
        results = {one.name: node.name for one, node in zip(session.get_outputs(), self._graph.results, strict=True)}
        (first, _second) = (i for i, event in enumerate(events) if event["name"] == "model_run")
        for event in events[first:]:
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
                name = event["name"].removesuffix("_kernel_time").removesuffix("_nchwc")
                step = results.get(name, name.partition("/")[0])
                counted = step if step in seconds else OWN_STEPS
                seconds[counted] = seconds.get(counted, 0.0) + event["dur"] * 1e-6
        return seconds

    def _fed(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        given = zip(self._inputs, self._graph.inputs, inputs, strict=True)
        return {name: x.detach().to(one.dtype).resolve_neg().contiguous().numpy() for name, one, x in given}

    def _start(self, profile: Path | None = None) -> tuple[Any, list[Any]]:
        """A session, and the constants whose memory it reads as long as it lives."""
        import onnxruntime

        model, beside = model_of(self._graph, self._shapes, outside=lambda constant: constant.nbytes >= SHARED_FROM)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3  # errors: it warns of its own optimisations
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        shared = [onnxruntime.OrtValue.ortvalue_from_numpy(constant.numpy()) for constant in beside.values()]
        options.add_external_initializers(list(beside), shared)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        return session, [*beside.values(), *shared]
