"""Which path a call takes, and how one sees it.

A call is one of our operators' if its tensors are on an NVIDIA GPU from sm_80 on where Triton can launch, or on the CPU
while Triton interprets (TRITON_INTERPRET=1); otherwise torch.nn.functional is called directly. `why_torch` is the whole
of that decision. Which convolutions the library serves inside our operators is decided there (ops/serving.py).
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch.compiler import assume_constant_result
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

try:
    from cnnfast_kernels import launch, launchable
    from cnnfast_kernels.dtypes import KERNEL_DTYPES
except ImportError:  # no triton on this platform: every operation takes PyTorch's path
    launch = launchable = None
    KERNEL_DTYPES = {}

Backend = Literal["auto", "kernels", "torch"]
Server = Literal["kernels", "library", "torch"]

PLAIN = (torch.Tensor, torch.nn.Parameter)
OLDEST_GPU = (8, 0)
CPU_REASON = "" if launch is None or launch.INTERPRETED else "the tensors are on the CPU, and Triton does not interpret"
_backend: Backend | Literal["prefer kernels"] = "auto"
_meta_on_gpu = False


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Overrides the choice, for the whole process, while the context lasts.

    "auto": kernels where there is a path, PyTorch elsewhere. "kernels": a call that would go to PyTorch raises
    RuntimeError. "torch": PyTorch serves every call.
    """
    if name not in ("auto", "kernels", "torch"):
        raise ValueError(f'backend(name={name!r}): name must be "auto", "kernels" or "torch"')
    with _choosing(name):
        yield


@contextmanager
def prefer_kernels() -> Iterator[None]:
    """Our kernels serve, for the whole process, wherever there is a path, also where the library is faster; elsewhere
    PyTorch does.

    For whoever asks whether our kernels are right, and wants to hear of the calls that are not theirs: not an error, as
    backend("kernels") has it.
    """
    with _choosing("prefer kernels"):
        yield


@contextmanager
def _choosing(choice: Backend | Literal["prefer kernels"]) -> Iterator[None]:
    global _backend
    before, _backend = _backend, choice
    try:
        yield
    finally:
        _backend = before


@contextmanager
def meta_as_gpu() -> Iterator[None]:
    """Meta tensors, which hold nothing, take the path that a GPU's would, for the whole process: operators are called,
    nothing runs.
    """
    global _meta_on_gpu
    before, _meta_on_gpu = _meta_on_gpu, True
    try:
        yield
    finally:
        _meta_on_gpu = before


def on_gpu(x: torch.Tensor) -> bool:
    """Whether it is on a GPU, or taken to be."""
    return x.is_cuda or (_meta_on_gpu and x.is_meta)


def library_allowed() -> bool:
    """Whether the library's convolution may stand in for ours: not where kernels were asked for."""
    return _backend not in ("kernels", "prefer kernels")


def asked_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps the answers; torch.compile takes them too, and does not trace the question."""
    answer = functools.cache(function)

    @assume_constant_result
    @functools.wraps(function)
    def ask(*arguments: Any) -> Any:
        return answer(*arguments)

    return ask


def transformed() -> bool:
    """Whether a functorch transform or forward-mode AD is active: PyTorch has rules for its own operators, and they
    serve then.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def why_transformed() -> str:
    """The reason for that, for the record. Raises RuntimeError under backend("kernels")."""
    return _torch("a functorch transform or forward-mode AD is active")


@assume_constant_result
def _to_onnx() -> bool:
    """Whether a model is being exported to ONNX, which has a translation of PyTorch's operators only."""
    onnx = sys.modules.get("torch.onnx")  # imported by who exports
    return onnx is not None and onnx.is_in_onnx_export()


@asked_once
def _gpu_reason(index: int) -> str:
    if torch.version.hip:
        return "the GPU is not NVIDIA's"
    capability = torch.cuda.get_device_capability(index)
    return "" if capability >= OLDEST_GPU else f"GPU sm_{capability[0]}{capability[1]} is older than sm_80"


@assume_constant_result
def _launch_reason(device: torch.device) -> str:
    """Why Triton cannot launch on a GPU, told in a warning the first time; "" if it can."""
    assert launchable is not None
    reason = launchable.why_no_launch(device)
    if reason:
        _warn_of(reason)
    return reason


@functools.cache
def _warn_of(reason: str) -> None:
    warnings.warn(f"PyTorch serves every call of cnnfast's in this process: {reason}", RuntimeWarning, stacklevel=2)


@asked_once
def _interpreter_rounds_bf16() -> bool:
    """Triton's interpreter computes bfloat16 on raw bits, silently wrong; a test suite may have mended it. Asked once,
    by trying.
    """
    from cnnfast_kernels.conv import Geometry, conv_fprop

    x = torch.tensor([1.0, 0.75 * 2**-7], dtype=torch.bfloat16).reshape(1, 1, 1, 2)
    y = conv_fprop(x, torch.ones_like(x), Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1))
    return bool(y.item() == 1 + 2**-7)  # a product on raw bits is far off, truncation gives 1


def _in_bf16(*tensors: torch.Tensor | None) -> bool:
    """Whether CPU tensors are, or would be cast to, bfloat16."""
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return cast or any(t is not None and t.dtype == torch.bfloat16 for t in tensors)


def _torch(reason: str) -> str:
    """The reason for which PyTorch serves a call, if there is one, unless kernels have to."""
    if reason and _backend == "kernels":
        raise RuntimeError(f'backend("kernels"): this call would be served by PyTorch, because {reason}')
    return reason


def why_torch(x: torch.Tensor, *others: torch.Tensor | None, algorithm: str = "auto") -> str:
    """Why PyTorch serves an operation on these tensors; the empty string if our kernels do.

    Raises RuntimeError under backend("kernels") instead of naming a reason.
    """
    if algorithm == "torch":
        return _torch('algorithm="torch"')
    if _backend == "torch":
        return _torch('backend("torch")')
    if launch is None:
        return _torch("triton is not installed")
    if CPU_REASON and x.is_cpu:  # first: what PyTorch serves anyway shall not wait for the other questions
        return _torch(CPU_REASON)
    if transformed():
        return why_transformed()
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]  # what is computed from sizes would be recorded as constants
        return _torch("torch.jit.trace is recording")
    if torch.compiler.is_exporting() and _to_onnx():
        return _torch("the model is being exported to ONNX")
    # those of quantized tensors are not; another dtype of `others` is an error, not a choice
    if x.dtype not in KERNEL_DTYPES:
        return _torch(f"dtype {x.dtype} has no kernel")
    if x.layout is not torch.strided or x.is_nested:  # a lazy negation is done before an operator runs
        return _torch("the tensor is not plain strided memory")
    device = x.device
    # DTensor and its kin have rules for PyTorch's operators only
    if type(x) not in PLAIN and is_traceable_wrapper_subclass(x):
        return _torch("the tensor wraps others")
    for t in others:
        if t is None:
            continue
        if t.device != device:
            return _torch("tensors are on different devices")
        if t.layout is not torch.strided or t.is_nested:
            return _torch("a tensor is not plain strided memory")
        if type(t) not in PLAIN and is_traceable_wrapper_subclass(t):
            return _torch("the tensor wraps others")
    if x.is_cuda:
        return _torch(_gpu_reason(device.index) or _launch_reason(device))
    if not x.is_cpu and not on_gpu(x):
        return _torch(f"device {device.type} has no kernels")
    if launch.INTERPRETED and x.is_cpu and _in_bf16(x, *others) and not _interpreter_rounds_bf16():
        return _torch("Triton's interpreter computes bfloat16 wrongly")
    return ""


@dataclass(slots=True)
class Call:
    """One operation as it was served: by "kernels" (`launches` names them), by "torch", or by "library", PyTorch's
    convolution within our operator, because it was measured to be faster. `reason` says why; of kernels, what else
    there is to say of their choice.
    """

    operation: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    served_by: Server
    reason: str = ""
    launches: list[Any] = field(default_factory=list)

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, s)) for s in self.shapes)
        launched = [f"{e.kernel} [{e.tile}]" if e.tile else e.kernel for e in self.launches]
        if self.served_by != "kernels":
            served = f"{' + '.join([self.served_by, *launched])}, because {self.reason}"
        else:
            served = " + ".join(launched) or "no launch: nothing to compute"
            served += f" ({self.reason})" if self.reason else ""
        return f"{self.operation} {shapes} {self.dtype}: {served}"


class Trace:
    """The calls made while a `trace()` lasted: iterate, len(), or print one a line."""

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

    def __str__(self) -> str:
        return "\n".join(map(str, self.calls))

    def enter(self, call: Call) -> None:
        self.calls.append(call)
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


_traces: list[Trace] = []


@contextmanager
def trace() -> Iterator[Trace]:
    """Lists every operation that runs in this process while the context lasts, backward included, and who served it."""
    calls = Trace()
    _traces.append(calls)
    try:
        if launch is None:
            yield calls
        else:
            with launch.observe(calls.launched):
                yield calls
    finally:
        _traces.remove(calls)


def _call(operation: str, arguments: tuple[Any, ...], served_by: Server, reason: str = "") -> Call:
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
    return Call(operation, tuple(tuple(t.shape) for t in tensors), dtype, served_by, reason)


Observer = Callable[[str, tuple[Any, ...], dict[str, Any]], AbstractContextManager[None]]
_captures: list[Observer] = []


@contextmanager
def capture(observer: Observer) -> Iterator[None]:
    """Every call of a cnnfast.functional function runs within `observer(name, args, kwargs)`, a context manager."""
    _captures.append(observer)
    try:
        yield
    finally:
        _captures.remove(observer)


def captured() -> bool:
    """Whether calls are being captured."""
    return bool(_captures)


def _refuse_non_tensors(
    function: Callable[..., Any],
    refusal: Callable[[Mapping[str, Any]], type[Exception]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Raises if an argument is no tensor where `function` is annotated to take one."""
    signature = inspect.signature(function)
    given = signature.bind(*args, **kwargs).arguments
    for name, value in given.items():
        kinds = signature.parameters[name].annotation.split(" | ")
        if "Tensor" in kinds and not isinstance(value, torch.Tensor) and not (value is None and "None" in kinds):
            error = TypeError if "None" in kinds else refusal(given)
            raise error(f"{function.__name__}(): {name} must be a Tensor, not {type(value).__name__}") from None


def operation(
    function: Callable[..., Any], refusal: Callable[[Mapping[str, Any]], type[Exception]] = lambda given: TypeError
) -> Callable[..., Any]:
    """Marks a function of cnnfast.functional: its calls can be captured, and go to the __torch_function__ of arguments
    that have one; what is no tensor is refused by its argument's name.

    That is looked into once something failed for want of a tensor's attributes: other calls do not wait for it.
    `refusal` tells what to raise of a required tensor, given all arguments: what PyTorch raises.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if has_torch_function(args) or (kwargs and has_torch_function(tuple(kwargs.values()))):
            return handle_torch_function(call, (*args, *kwargs.values()), *args, **kwargs)
        try:
            if not _captures:
                return function(*args, **kwargs)
            with ExitStack() as stack:
                for observer in tuple(_captures):
                    stack.enter_context(observer(function.__name__, args, kwargs))
                return function(*args, **kwargs)
        except AttributeError:
            _refuse_non_tensors(function, refusal, args, kwargs)
            raise

    return call


def record_torch(operation: str, reason: str, *arguments: Any) -> None:
    """Tells every trace that PyTorch serves this call."""
    for calls in _traces:
        calls.calls.append(_call(operation, arguments, "torch", reason))


def note(served_by: Server, reason: str) -> None:
    """Tells every trace more of the call of an operator that is running."""
    for calls in _traces:
        call = calls.innermost()
        if call is not None:
            call.served_by, call.reason = served_by, reason


def recorded(operation: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates an operator's implementation: every trace learns that our kernels serve it, and which were launched."""

    def decorate(implementation: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(implementation)
        def call(*arguments: Any) -> Any:
            if not _traces:
                return implementation(*arguments)
            active = tuple(_traces)
            for calls in active:
                calls.enter(_call(operation, arguments, "kernels"))
            try:
                return implementation(*arguments)
            finally:
                for calls in active:
                    calls.leave()

        return call

    return decorate
