"""Descriptions of launches: all that decides what Triton compiles for a launch, and nothing else of it.

    line = described(kernel, arguments, options)  # in an interpreted process, for each launch
    reason = refused(line, "sm_90")  # in another one: why Triton's front end refuses it, or None
    reason = refused(line, "sm_90", whole=True)  # the same for all of the compiler, ptxas included

The interpreter runs programs that the compiler refuses: a helper that returns a tuple which holds None, a variable
whose type changes in a loop, an unknown method. What the tests have interpreted is therefore compiled too.

A description is one line of JSON, and launches that Triton compiles alike have the same one: of a tensor it keeps the
dtype and whether its address is a multiple of 16 bytes, of a tensor map the dtype and the box, of an integer a small
one that makes no difference to Triton, and of constexpr arguments everything; a NamedTuple comes back as its class, by
module and name. To compile a description, arguments like those of the launch are made from it and handed to Triton's
own launch, which works out types, constants and attributes from them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import triton.language as tl
from triton import knobs
from triton._C.libtriton import ir
from triton.compiler import ASTSource, make_backend
from triton.runtime import JITFunction
from triton.runtime.driver import driver
from triton.runtime.jit import KernelParam, MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import launch
from ..gpus import capability_of
from ..tma.views import why_not_on
from .compiling import reason, stderr_captured
from .decisions import decisions
from .stub_driver import require_compiled_kernels, target

ALIGNMENT = 16  # bytes of an address, and what an integer is divisible by, that Triton compiles for


@functools.cache
def parameters(kernel: Any) -> dict[str, KernelParam]:
    """The parameters of a kernel as Triton's compiler knows them, also where it is interpreted."""
    compiled = kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)
    return {parameter.name: parameter for parameter in compiled.params}


# ----------------------------------------------------------------------------------------------------------------------
# Descriptions


def representative(n: int, specialized: bool) -> int:
    """A small integer for which Triton compiles the same code as for `n`. It needs as many bits as `n`; if
    `specialized` it is also 1, or divisible by 16, exactly where `n` is. Triton counts 0 as divisible by 16, and does
    not specialize parameters of do_not_specialize.
    """
    narrow = -(2**31) <= n < 2**31
    if not specialized:
        return 2 if narrow else 2**40
    if n == 1:
        return 1
    base = ALIGNMENT if narrow else 2**40
    return base if n % ALIGNMENT == 0 else base + 2


def encoded(value: Any, parameter: KernelParam) -> Any:
    """What JSON can hold of an argument. Raises TypeError for one of a type that no kernel has had so far."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, tuple):
        members = [encoded(member, parameter) for member in value]
        if type(value) is tuple:
            return {"tuple": members}
        return {"tuple": members, "class": f"{type(value).__module__}:{type(value).__qualname__}"}
    if parameter.is_constexpr:
        if isinstance(value, int | float):
            return value
        if isinstance(value, tl.dtype):
            return {"constant": value.name}
    elif isinstance(value, torch.Tensor):
        return {"tensor": str(value.dtype).removeprefix("torch."), "aligned": value.data_ptr() % ALIGNMENT == 0}
    elif isinstance(value, TensorDescriptor):
        return {"map": str(value.base.dtype).removeprefix("torch."), "box": list(value.block_shape)}
    elif isinstance(value, int):
        return representative(value, not parameter.do_not_specialize)
    elif isinstance(value, float):
        return 0.5  # Triton compiles by the type alone
    raise TypeError(
        f"{parameter.name}={value!r} is of {type(value)}, which aot/specialisations.py cannot write down yet"
    )


class Misaligned:
    """Triton's MockTensor, but that it does not start at a multiple of 16 bytes."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 1


def decoded(value: Any) -> Any:
    """An argument of which `encoded` makes `value`."""
    match value:
        case {"tuple": members, "class": name}:
            module, _, qualified = name.partition(":")
            record: Any = functools.reduce(getattr, qualified.split("."), import_module(module))
            return record(*map(decoded, members))
        case {"tuple": members}:
            return tuple(map(decoded, members))
        case {"constant": name}:
            return tl.dtype(name)
        case {"tensor": dtype, "aligned": aligned}:
            return (MockTensor if aligned else Misaligned)(getattr(torch, dtype))
        case {"map": dtype, "box": box}:
            strides = [ALIGNMENT] * (len(box) - 1) + [1]
            return launch.tensor_map(box, strides, box, getattr(torch, dtype))
    return value


def described(kernel: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> str:
    """The description of a launch of `kernel`, as `launch.run` is given it: positional arguments, constexprs and
    Triton's options.

    Raises TypeError, with the name of the parameter, for an argument that cannot be written down.
    """
    known = parameters(kernel)
    named = dict(zip(known, arguments, strict=False)) | {
        name: value for name, value in options.items() if name in known
    }
    told = {
        "kernel": f"{kernel.fn.__module__}:{kernel.fn.__qualname__}",
        "arguments": {name: encoded(value, known[name]) for name, value in named.items()},
        "options": {name: value for name, value in options.items() if name not in known},
    }
    return json.dumps(told)


# ----------------------------------------------------------------------------------------------------------------------
# Which of them to compile


def named_numbers(name: str, value: Any) -> Iterator[tuple[str, int]]:
    """The integers of a decoded constant, each with its name: "C", and "g.C" for a field of a record."""
    if type(value) is int:
        yield name, value
    elif isinstance(value, tuple):
        for field, member in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
            yield from named_numbers(f"{name}.{field}", member)


def without_numbers(value: Any) -> Any:
    """An encoded constant, with the same in place of every number, those of a record among them."""
    if type(value) in (int, float):
        return 0
    if isinstance(value, dict) and "tuple" in value:
        return value | {"tuple": [without_numbers(member) for member in value["tuple"]]}
    return value


@dataclass(frozen=True, slots=True)
class Described:
    """A description, read again. `arguments` are as `encoded` makes them."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    @classmethod
    def of(cls, line: str) -> Described:
        """Raises ValueError for a launch that this package cannot make: it was recorded from other sources."""
        told = json.loads(line)
        module, _, name = told["kernel"].partition(":")
        kernel = getattr(import_module(module), name, None)
        if kernel is None or not set(told["arguments"]) <= set(parameters(kernel)):
            raise ValueError(
                f"no such kernel, or not with such parameters: {told['kernel']}({', '.join(told['arguments'])})"
            )
        return cls(kernel, told["arguments"], told["options"])

    def compile(self) -> Any:
        """Triton's handle of what it compiles, or finds in its cache, for the active driver (stub_driver.target)."""
        arguments = {name: decoded(value) for name, value in self.arguments.items()}
        return self.kernel.warmup(**arguments, grid=(1,), enable_fp_fusion=True, **self.options)

    def operands(self) -> str:
        """The operands, for a reader: each tensor with its dtype, and which are absent, as in "x_ptr float16,
        bias_ptr None".
        """
        told = []
        for name, value in self.arguments.items():
            if value is None:
                told.append(f"{name} None")
            elif isinstance(value, dict) and "map" in value:
                told.append(f"{name} {value['map']} in boxes {'x'.join(map(str, value['box']))}")
            elif isinstance(value, dict) and "tensor" in value:
                told.append(f"{name} {value['tensor']}")
        return ", ".join(told)

    def numbers(self) -> dict[str, int]:
        """The integers among the constexpr arguments, and in the records among them."""
        known = parameters(self.kernel)
        constants = {name: decoded(value) for name, value in self.arguments.items() if known[name].is_constexpr}
        return dict(number for name, value in constants.items() for number in named_numbers(name, value))

    def program(self) -> tuple[Any, ...]:
        """What makes another program to Triton's front end: the types of operands, which of them are absent or the
        constant 1, constants that are no numbers, and what the kernel decides by numbers.
        """
        known = parameters(self.kernel)
        types: list[Any] = []
        constants: dict[str, Any] = {}
        for name, value in self.arguments.items():
            if known[name].is_constexpr or value is None or value == 1:
                constants[name] = decoded(value)
            if isinstance(value, dict) and "map" in value:
                types.append((value["map"], len(value["box"])))
            elif isinstance(value, dict) and "tensor" in value:
                types.append(value["tensor"])
            elif known[name].is_constexpr:
                types.append(json.dumps(without_numbers(value)))
            elif isinstance(value, int) and value > 1:
                types.append(value.bit_length() > 32)
            else:
                types.append(json.dumps(value))
        return self.kernel, tuple(types), decisions(self.kernel, constants)


def representatives(lines: Iterable[str]) -> list[str]:
    """The lines to compile: one for each program to Triton's front end, and one for each further number that a
    parameter has, in each dtype. Numbers alone make no other program, unless the kernel or a helper decides by them;
    but a block of 8 may be refused where one of 16 is not. Raises RuntimeError where kernels are interpreted, and
    what `Described.of` does.
    """
    require_compiled_kernels()
    told = {line: Described.of(line) for line in sorted(set(lines))}
    first: dict[Any, str] = {}
    for line, launched in told.items():
        first.setdefault(launched.program(), line)
    chosen = dict.fromkeys(first.values())
    numbers: set[Any] = set()
    for line in [*chosen, *told]:  # those that are chosen anyway tell their numbers first
        launched = told[line]
        tensors = (value for value in launched.arguments.values() if isinstance(value, dict))
        dtype = next((value[kind] for value in tensors for kind in ("tensor", "map") if kind in value), None)
        own = {(launched.kernel, dtype, *item) for item in launched.numbers().items()}
        if line in chosen or not own <= numbers:
            chosen[line] = None
            numbers |= own
    return list(chosen)


# ----------------------------------------------------------------------------------------------------------------------
# Compilation


def runs_on(line: str, arch: str) -> bool:
    """Whether a description's launch can be compiled for `arch`: one with tensor maps only for those that have them."""
    return '"map"' not in line or not why_not_on(capability_of(arch))


def front_end(*, fn: Any, compile: Any, **_: Any) -> bool:
    """For Triton's jit_cache_hook: goes from the source of a kernel to Triton's intermediate code, and no further."""
    source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
    gpu: Any = driver.active.get_current_target()
    backend: Any = make_backend(gpu)
    options = backend.parse_options(
        {name: compile[name] for name in ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion")}
    )
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source.make_ir(gpu, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    return True  # Triton is to compile nothing itself


def refused(line: str, arch: str, whole: bool = False) -> str | None:
    """Why Triton refuses to compile a description's launch for `arch`, or None: its front end alone, or with `whole`
    all of it.

    The reason is led by the kernel and its operands. Raises RuntimeError where kernels are interpreted, and what
    `Described.of` does.
    """
    launched = Described.of(line)
    before = knobs.runtime.jit_cache_hook
    with stderr_captured() as said, target(arch):
        try:
            knobs.runtime.jit_cache_hook = None if whole else front_end
            launched.compile()
        except Exception as error:  # whatever a compiler raises: the launch must be named, and the others be compiled
            return f"{arch} {launched.kernel.__name__}({launched.operands()}): {reason(error, said())}"
        finally:
            knobs.runtime.jit_cache_hook = before
    return None
