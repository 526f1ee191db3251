"""Inference on a CPU as it is deployed: by cnnfast.freeze, onnxruntime and OpenVINO.

Each has as many threads as PyTorch, and takes images as they come from files, in NCHW. The two others read what
torch.onnx exports of the job's model.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..engine import freeze
from ..engine.graph import Graph
from .job import Job, float_tensors, placed

Step = Callable[[], list[Tensor]]


def module_of(graph: Graph) -> nn.Module:
    """A frozen graph as PyTorch runs it, call by call: the model of a job that is given as a file."""
    root, calls = nn.Module(), fx.Graph()
    calls.output(calls.graph_copy(graph.calls, {}))
    names = {name: f"constant_{i}" for i, name in enumerate(graph.constants)}
    for name, value in graph.constants.items():
        root.register_buffer(names[name], value)
    for node in calls.nodes:
        if node.op == "get_attr":
            node.target = names[str(node.target)]
    return fx.GraphModule(root, calls).eval()


def by_freezing(job: Job) -> Step:
    frozen, images = job.frozen, job.inputs(channels_last=False)
    if frozen is None:
        frozen = freeze(placed(job.original or job.model, job), *images)
    return lambda: float_tensors(frozen(*images))


def by_onnxruntime(job: Job) -> Step:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would take the others' cores
    with _exported(job) as file:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    images = dict(zip(names, (t.numpy() for t in job.inputs(channels_last=False)), strict=True))
    return lambda: [torch.from_numpy(result) for result in session.run(None, images)]


def by_openvino(job: Job) -> Step:
    openvino: Any = importlib.import_module("openvino")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # else it computes in bfloat16 where the CPU can
    }
    with _exported(job) as file:
        core = openvino.Core()
        request = core.compile_model(core.read_model(file), "CPU", settings).create_infer_request()
    images = [t.numpy() for t in job.inputs(channels_last=False)]

    def step() -> list[Tensor]:
        request.infer(images)
        return [torch.from_numpy(request.get_output_tensor(i).data) for i in range(len(request.model_outputs))]

    return step


# By the names of the providers: how a step is made, and the packages that are imported for it.
STEPS: dict[str, tuple[Callable[[Job], Step], tuple[str, ...]]] = {
    "frozen": (by_freezing, ()),
    "onnxruntime": (by_onnxruntime, ("onnxruntime", "onnx", "onnxscript")),
    "openvino": (by_openvino, ("openvino", "onnx", "onnxscript")),
}


def unavailable(name: str, job: Job) -> str:
    """Why that engine cannot run the job, or the empty string."""
    if job.device.type != "cpu":
        return "only on a CPU"
    packages = STEPS[name][1]
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        return f"{missing[0]} is not installed"
    return "only in float32" if packages and job.dtype != torch.float32 else ""


@contextmanager
def _exported(job: Job) -> Iterator[Path]:
    """A file of what torch.onnx exports of the job's model, for this batch."""
    with TemporaryDirectory(prefix="cnnfast-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx_log = logging.getLogger("torch.onnx")
        level = onnx_log.level
        onnx_log.setLevel(logging.ERROR)
        try:
            file, images = Path(folder) / "model.onnx", job.inputs(channels_last=False)
            torch.onnx.export(placed(job.model, job), tuple(images), file, dynamo=True, verbose=False)
            yield file
        finally:
            onnx_log.setLevel(level)
