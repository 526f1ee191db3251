"""Who runs a graph: onnxruntime or oneDNN, by a runner for each size, built when it is first needed."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cpu import onednn, sessions
from .cpu.onnx_graph import NoOnnxForm
from .graph import Graph
from .operators import NAMES
from .planning.planning import plan
from .runner import Runner

# Runners that are kept for one graph. Each has memory of its own, and a server may see images of any size.
MOST = 8

Shapes = tuple[tuple[int, ...], ...]


class Runners:
    """The runners of one graph. Several threads may ask for them at the same time: each is built once, and those that
    have not been used for the longest time are forgotten.

    dtype: of the graph's floating values. why_not_onnxruntime: the reason, or the empty string.
    """

    def __init__(self, graph: Graph, dtype: torch.dtype) -> None:
        self.graph, self.dtype = graph, dtype
        self.why_not_onnxruntime = sessions.available(graph)
        self._held: OrderedDict[Shapes, _Held] = OrderedDict()
        self._lock = threading.Lock()
        self._plain = PlainRunner(graph)

    def runner(self, shapes: Shapes) -> Runner:
        """The runner for inputs of these shapes. Raises ValueError where a step has no result for such sizes."""
        if any(0 in shape for shape in shapes):
            return self._plain  # there is nothing to compute, and engines make a special case of it
        if not self.why_not_onnxruntime and self._have_one_batch(shapes):
            # A session serves every batch size, but the same for all inputs.
            session = self._kept(self._without_batch(shapes), lambda: self._session(shapes))
            if session is not None:
                return session
        runner = self._kept(shapes, lambda: self._planned(shapes))
        assert runner is not None
        return runner

    def _kept(self, key: Shapes, build: Callable[[], Runner | None]) -> Runner | None:
        """What is kept under a key; it is built where there is nothing yet."""
        with self._lock:
            held = self._held.setdefault(key, _Held())
            self._held.move_to_end(key)
            while len(self._held) > MOST:
                self._held.popitem(last=False)
        with held.building:
            if held.runner is None:
                held.runner = build()
            return held.runner

    def _have_one_batch(self, shapes: Shapes) -> bool:
        free = [shape[0] for one, shape in zip(self.graph.inputs, shapes, strict=True) if one.shape[:1] == (None,)]
        return len(set(free)) <= 1

    def _without_batch(self, shapes: Shapes) -> Shapes:
        return tuple(
            (-1, *shape[1:]) if one.shape[:1] == (None,) else shape
            for one, shape in zip(self.graph.inputs, shapes, strict=True)
        )

    def _session(self, shapes: Shapes) -> Runner | None:
        """None where onnxruntime turns out not to serve the graph; why_not_onnxruntime says why from then on."""
        try:
            return sessions.build(self.graph, shapes)
        except NoOnnxForm as error:
            self.why_not_onnxruntime = str(error)
        except ImportError as error:
            self.why_not_onnxruntime = f"it is installed, but does not import: {error}"
        except RuntimeError:
            plan(self.graph, shapes)  # says in a sentence what is wrong with these sizes, if that is the reason
            raise
        return None

    def _planned(self, shapes: Shapes) -> Runner:
        if not onednn.supports(self.dtype):
            return self._plain
        return onednn.build(plan(self.graph, shapes), self.graph.constants)


class _Held:
    """A runner, or the place of one that is being built."""

    def __init__(self) -> None:
        self.building = threading.Lock()
        self.runner: Runner | None = None


class PlainRunner:
    """PyTorch's own operators, call by call: for a batch of no images, and for a dtype that no engine has here."""

    name = "PyTorch"

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.graph.run(inputs)

    def served_by(self) -> dict[str, str]:
        return {node.name: self.name for node in self.graph.calls.nodes if node.target in NAMES}

    def profile(self, inputs: Sequence[Tensor]) -> dict[str, float]:
        began = time.perf_counter()
        self.graph.run(inputs)
        return {"all steps": time.perf_counter() - began}


def own(results: Sequence[Tensor], inputs: Sequence[Tensor], constants: set[int]) -> list[Tensor]:
    """The results as tensors of the caller's own: dense, row after row, and none of them in the memory of an input, of
    a constant, or of another result. constants: the addresses of the graph's.
    """
    taken = {address(t) for t in inputs} | constants
    mine = []
    for t in results:
        if address(t) in taken or (t.is_inference() and not torch.is_inference_mode_enabled()):
            t = t.clone(memory_format=torch.contiguous_format)
        else:
            t = t.contiguous()
        taken.add(address(t))
        mine.append(t)
    return mine


def address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
