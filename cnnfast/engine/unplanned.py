"""A frozen network without a plan: a model that torch.export cannot capture, served by its converted copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..aside import leaving_no_trace
from ..conversion import convert
from . import judging
from .accepting import accept
from .frozen import Frozen
from .graph import Input
from .images.preprocessing import Preprocessing
from .judging import Reference, SelfCheck
from .network import Network
from .original import Original
from .profiling import Profile
from .reporting import UNPLANNED, FrozenReport
from .runtime import Shapes, address, own
from .serving import plainly
from .structures import Structure


class Unplanned(Frozen):
    """Called as any Frozen. It has no network: save, to_onnx and profile raise ValueError, with the reason."""

    def __init__(
        self,
        original: Original,
        result: Any,
        reason: str,
        surroundings: tuple[Preprocessing | None, tuple[str, ...] | None],
        notes: list[str],
    ) -> None:
        leaves, self._arguments = Structure.flatten(original.inputs)
        self._takes = tuple(Input(f"tensor {i + 1}", (None,) * t.dim(), t.dtype) for i, t in enumerate(leaves))
        self._example = tuple(tuple(t.shape) for t in leaves)
        self._floating = next((t.dtype for t in _tensors(result) if t.is_floating_point()), torch.float32)
        self._dtype, self._name, self.reason = original.dtype, original.name, reason
        self._preprocessing, self._classes = surroundings
        with leaving_no_trace():
            self._model = convert(original.model).to(original.dtype)
        self._constants = {address(t) for t in (*self._model.parameters(), *self._model.buffers())}
        self._check, self._notes = None, tuple(notes)

    def __call__(self, *inputs: Any) -> Any:
        leaves = accept(inputs, self._arguments, self._takes, self._dtype)
        with plainly():
            result = self._model(*self._arguments.build(leaves))
        try:
            results, structure = Structure.flatten(result)
        except ValueError:  # an object of a class of the model's own
            return result
        mine = own(results, leaves, self._constants)
        return structure.build([t.to(self._floating) if t.dtype == self._dtype else t for t in mine])

    def self_check(self, original: Original) -> SelfCheck | None:
        """Against PyTorch in the same dtype: how many boxes a detector finds, for example, depends on roundings."""
        try:
            with leaving_no_trace():
                results, structure = Structure.flatten(self(*original.inputs))
            right = judging.computed(original.model, original.inputs, original.dtype)
        except ValueError:
            return None
        against = Reference(right, f"{original.dtype} by PyTorch")
        self._check = judging.judge(results, against, structure, original.dtype, lambda: right)
        return self._check

    @property
    def network(self) -> Network:
        self._refuse("has no network")

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def example(self) -> Shapes:
        return self._example

    @property
    def preprocessing(self) -> Preprocessing | None:
        return self._preprocessing

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self._classes

    def save(self, path: str | Path) -> NoReturn:
        self._refuse("cannot be saved")

    def to_onnx(self, path: str | Path) -> NoReturn:
        self._refuse("cannot be written as ONNX")

    def profile(self, *inputs: Any) -> Profile:
        self._refuse("has no steps to time")

    def report(self) -> FrozenReport:
        return FrozenReport(UNPLANNED, self._why, (), 0, 0, "as the model has them", self._check, self._notes)

    @property
    def _why(self) -> str:
        return f"torch.export cannot capture {self._name}: {self.reason}"

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"frozen: this network {what}, because {self._why}")

    def __repr__(self) -> str:
        return f"<cnnfast.Frozen of {self._name}, without a plan: {self._why}>"


def _tensors(result: Any) -> list[Tensor]:
    try:
        return Structure.flatten(result)[0]
    except ValueError:
        return []
