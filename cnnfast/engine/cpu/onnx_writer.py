"""Writes an ONNX model node by node: names, constants, numbers, casts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .onnx_sizes import BATCH, KnownTensor, NoOnnxForm

# The newest operator set whose convolutions and pools every onnxruntime since 1.24 and OpenVINO optimise, and which has
# Gelu; and the version of the format that came with it.
OPSET, IR_VERSION = 20, 9
ELEMENTS = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.bool: "BOOL",
}
# Of a constant whose values stay outside the model.
OUTSIDE = "outside"


@dataclass(frozen=True)
class OnnxValue:
    """A tensor in the ONNX graph, with what is known of it before the batch is. value: of a constant."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    value: Tensor | None = None

    def size(self, dim: int) -> int:
        """The size of a dimension that must not depend on the batch."""
        size = self.shape[dim]
        if not isinstance(size, int):
            raise NoOnnxForm(f"dimension {dim} of a tensor {list(self.shape)} depends on the batch")
        return size

    def sizes(self, *dims: int) -> list[int]:
        return [self.size(dim) for dim in dims]


Argument = OnnxValue | str | None
Number = OnnxValue | int | float | bool


class OnnxWriter:
    """result: what is known of the call that is being written, a list of a call with several results; wanted: which of
    these are read. The call's name is the beginning of those of all nodes written for it: "layer1_0_conv1/Conv".
    """

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Tensor] = {}
        self.result: Any = None
        self.wanted: frozenset[int] = frozenset()
        self._call = ""
        self._names: set[str] = set()
        self._constant_names: dict[Any, str] = {}

    def begin(self, call: str, result: Any, wanted: Iterable[int] = ()) -> None:
        self._call, self.result, self.wanted = call, result, frozenset(wanted)

    def unique(self, name: str) -> str:
        number, unique = 1, name
        while unique in self._names:
            number += 1
            unique = f"{name}_{number}"
        self._names.add(unique)
        return unique

    def call(self, operator: str, *inputs: Argument, domain: str = "", **attributes: Any) -> str:
        """The name of the result. Attributes that are None are left out."""
        return self.calls(operator, *inputs, outputs=1, domain=domain, **attributes)[0]

    def calls(self, operator: str, *inputs: Argument, outputs: int, domain: str = "", **attributes: Any) -> list[str]:
        """The names of several results."""
        import onnx

        names = [argument.name if isinstance(argument, OnnxValue) else argument or "" for argument in inputs]
        while names and not names[-1]:  # an input that is left out; onnxruntime crashes on some such at the end
            names.pop()
        name = self.unique(f"{self._call}/{operator}")
        results = [name, *(self.unique(f"{name}:{i}") for i in range(1, outputs))]
        given = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(onnx.helper.make_node(operator, names, results, name, domain=domain, **given))
        return results

    @staticmethod
    def identity(name: str, result: str) -> Any:
        import onnx

        return onnx.helper.make_node("Identity", [name], [result], f"{result}/Identity")

    def constant(self, value: Tensor, name: str) -> OnnxValue:
        """An initialiser. Tensors in the same memory are one."""
        value = value.detach()
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        if key not in self._constant_names:
            self._constant_names[key] = self.unique(name)
            self.constants[self._constant_names[key]] = value.contiguous()
        return OnnxValue(self._constant_names[key], tuple(value.shape), value.dtype, value)

    def turned(self, matrix: OnnxValue) -> str:
        """A constant matrix [A, B] as one of [B, A]."""
        assert matrix.value is not None
        key = (matrix.name, "turned")
        if key not in self._constant_names:
            self._constant_names[key] = self.unique(f"{matrix.name}.T")
            self.constants[self._constant_names[key]] = matrix.value.t().contiguous()
        return self._constant_names[key]

    def number(self, value: Any, dtype: torch.dtype) -> str:
        """A constant, from a number or nested lists of numbers; equal ones are one."""
        key = (str(value), dtype)
        if key not in self._constant_names:
            self._constant_names[key] = self.unique("constant")
            self.constants[self._constant_names[key]] = torch.tensor(value, dtype=dtype)
        return self._constant_names[key]

    def tensor(self, value: Tensor) -> str:
        """A constant that belongs to the call."""
        name = self.unique(f"{self._call}/constant")
        self.constants[name] = value.contiguous()
        return name

    def cast(self, x: Number, dtype: torch.dtype) -> str:
        """x as a tensor of that dtype."""
        if not isinstance(x, OnnxValue):
            return self.number(x, dtype)
        return x.name if x.dtype == dtype else self.call("Cast", x, to=self.element(dtype))

    def integers(self, sizes: Iterable[Number]) -> str:
        """A vector of int64, from numbers that are known and scalars that are not."""
        sizes = list(sizes)
        if not any(isinstance(size, OnnxValue) for size in sizes):
            return self.number([int(size) for size in sizes], torch.int64)  # type: ignore[arg-type]
        parts = [
            self.call("Reshape", size, self.number([1], torch.int64))
            if isinstance(size, OnnxValue)
            else self.number([int(size)], torch.int64)
            for size in sizes
        ]
        return self.call("Concat", *parts, axis=0)

    @staticmethod
    def element(dtype: torch.dtype) -> int:
        import onnx

        return getattr(onnx.TensorProto, ELEMENTS[dtype])

    def information(self, name: str, known: KnownTensor | OnnxValue) -> Any:
        """The declaration of an input or a result; a size that is neither a number nor the batch stays nameless."""
        import onnx

        shape = [size if isinstance(size, int) or size == BATCH else None for size in known.shape]
        return onnx.helper.make_tensor_value_info(name, self.element(known.dtype), shape)

    def initialiser(self, name: str, inside: bool) -> Any:
        import onnx

        value = self.constants[name]
        proto = onnx.TensorProto(name=name, data_type=self.element(value.dtype), dims=value.shape)
        if inside:
            proto.raw_data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        else:
            proto.data_location = onnx.TensorProto.EXTERNAL
            proto.external_data.add(key="location", value=OUTSIDE)
        return proto

    def forget_unused(self, results: Iterable[str]) -> None:
        """Nodes and constants that no result needs: sizes that a form found out by itself, a weight that is turned."""
        needed, kept = set(results), []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        self.nodes = kept[::-1]
        self.constants = {name: constant for name, constant in self.constants.items() if name in needed}

    def model(self, inputs: Sequence[Any], results: Sequence[Any], outside: Iterable[str] = ()) -> Any:
        """An onnx.ModelProto. outside: names of constants whose values whoever runs the model adds."""
        import onnx

        out = set(outside)
        initialisers = [self.initialiser(name, name not in out) for name in self.constants]
        graph = onnx.helper.make_graph(self.nodes, "cnnfast", inputs, results, initialisers)
        opset = [onnx.helper.make_opsetid("", OPSET)]
        return onnx.helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="cnnfast")
