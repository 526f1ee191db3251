"""Watches the Python that a forward runs while it is traced, for what a trace does not show.

A traced forward is run once, and its decisions are kept. So they may depend only on things whose change conversion
notices: children, and plain values among the container's own attributes. `watched` raises Refused if the forward, or a
function that it calls, reads anything else that may change, asks what an object is, catches errors, enters a context or
writes attributes.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from .refused import Refused

# Builtins that tell objects apart, look into them or act beyond the forward. isinstance is not among them: the proxies
# of tracing.py answer it.
_BUILTINS = "callable delattr eval exec globals hasattr hash id input issubclass locals open print setattr type vars"
FORBIDDEN_BUILTINS = {getattr(builtins, name) for name in _BUILTINS.split()} | {warnings.warn}
FORBIDDEN_OPERATIONS = {
    "PUSH_EXC_INFO": "catches errors or enters a context",
    "STORE_ATTR": "sets an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_GLOBAL": "sets a global variable",
}
# Parts of torch that change how something is computed, which a trace does not record.
FORBIDDEN_TORCH = (
    "torch.utils.checkpoint",
    "torch.autograd",
    "torch.amp",
    "torch.cuda",
    "torch.utils._contextlib",
    "torch._compile",
)
CONSTANT = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    types.EllipsisType,
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.Size,
)
UNREAD: Any = object()  # a value that is not followed further


@contextmanager
def watched(block: nn.Module) -> Iterator[None]:
    """While `block` runs, raises Refused at the first thing in its Python that a trace would not show."""
    forward: Any = type(block).forward
    starts = {getattr(f, "__code__", None) for f in (forward, inspect.unwrap(forward))}
    own: set[Any] = set()  # the code of the forward and of the functions that it calls, without torch's

    def observe(frame: types.FrameType, event: str, argument: Any) -> None:
        if event == "call":
            code, caller = frame.f_code, frame.f_back
            if code in own or not (code in starts or (caller is not None and caller.f_code in own)):
                return
            module = frame.f_globals.get("__name__", "")
            if module == "torch" or module.startswith("torch."):
                if module.startswith(FORBIDDEN_TORCH):
                    raise Refused(f"its forward goes through {module}")
            elif not module.startswith("cnnfast.conversion"):  # the proxies' own methods
                own.add(code)
                _examine(code, frame, block)
        elif event == "c_call" and frame.f_code in own and argument in FORBIDDEN_BUILTINS:
            raise Refused(f"its forward calls {argument.__name__}()")

    before = sys.getprofile()
    sys.setprofile(observe)
    try:
        yield
    finally:
        sys.setprofile(before)


def _examine(code: types.CodeType, frame: types.FrameType, block: nn.Module) -> None:
    """Reads the instructions of a function that is about to run, and raises Refused at one that is not allowed."""
    value: Any = UNREAD
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in FORBIDDEN_OPERATIONS:
            raise Refused(f"its forward {FORBIDDEN_OPERATIONS[name]}")
        if name in ("LOAD_ATTR", "LOAD_METHOD"):
            value = _attribute(value, instruction.argval, block)
        elif name == "LOAD_GLOBAL":
            value = _outside(
                instruction.argval,
                frame.f_globals.get(instruction.argval, getattr(builtins, str(instruction.argval), None)),
            )
        elif name in ("LOAD_DEREF", "LOAD_CLASSDEREF"):
            found = frame.f_locals.get(instruction.argval)
            # a plain value is the same at each call: only the enclosing function could bind another
            value = UNREAD if _is_plain(found) else _outside(instruction.argval, found)
        elif name.startswith("LOAD_FAST"):
            local = instruction.argval[-1] if isinstance(instruction.argval, tuple) else instruction.argval
            found = frame.f_locals.get(local)
            value = found if issubclass(type(found), nn.Module) else UNREAD  # isinstance would ask the proxy
        elif name not in ("CACHE", "PUSH_NULL", "EXTENDED_ARG", "RESUME", "COPY_FREE_VARS"):
            value = UNREAD


def _outside(name: str, value: Any) -> Any:
    """The value of a global variable, or of an enclosing function's. Raises Refused unless it is a module, a class,
    a function or a constant: nothing that changes.
    """
    if issubclass(type(value), fx.Proxy):
        return UNREAD
    if any(value is forbidden for forbidden in FORBIDDEN_BUILTINS):
        raise Refused(f"its forward uses {name}()")
    if callable(value) or isinstance(value, types.ModuleType):
        return value
    if isinstance(value, str | tuple | None) or (name.isupper() and isinstance(value, CONSTANT)):
        return UNREAD
    raise Refused(f"its forward reads the variable {name} from outside")


def _attribute(value: Any, name: str, block: nn.Module) -> Any:
    """The value of `value.name`, if it is to be followed further. Raises Refused if it may change unnoticed."""
    if value is UNREAD or value is None:
        return UNREAD
    if isinstance(value, types.ModuleType):
        found = getattr(value, name, None)
        if (
            isinstance(found, types.ModuleType)
            or callable(found)
            or value.__name__.startswith(("torch", "math", "numpy"))
        ):
            return found
        raise Refused(f"its forward reads {value.__name__}.{name}")
    if not isinstance(value, nn.Module):
        return UNREAD
    child = value._modules.get(name)
    if child is not None or name in ("training", "_modules"):
        return child if child is not None else UNREAD
    found = value.__dict__.get(name, UNREAD)
    if found is UNREAD or callable(found):
        return UNREAD  # methods and properties are watched when they run
    if value is block and _is_plain(found):
        return UNREAD
    raise Refused(f"its forward reads {name}, which may change unnoticed")


def _is_plain(value: Any) -> bool:
    if issubclass(type(value), fx.Proxy):
        return False
    return isinstance(value, CONSTANT) or (isinstance(value, tuple) and all(map(_is_plain, value)))
