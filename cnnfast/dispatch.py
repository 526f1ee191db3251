"""Which path a call takes: one of our operators, or torch.nn.functional directly.

A call is one of our operators' if its tensors are on an NVIDIA GPU from sm_80 on where Triton can launch, or on the CPU
while Triton interprets (TRITON_INTERPRET=1). `why_torch` is the whole of that decision. Which convolutions the library
serves inside our operators is decided there (ops/serving.py); recording.py lists what was decided.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.autograd.forward_ad as forward_ad
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .spelling import unknown_value
from .triton_here import why_no_kernels

NO_KERNELS = "triton is not installed"  # why there are none, where there are none
try:
    from cnnfast_kernels import launch, launchable
    from cnnfast_kernels.dtypes import KERNEL_DTYPES
except (ImportError, AttributeError) as error:  # no triton, or one of another version: PyTorch serves every operation
    NO_KERNELS = why_no_kernels(error)
    launch = launchable = None
    KERNEL_DTYPES = {}

Backend = Literal["auto", "kernels", "torch"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
# What somebody may call them, as spelling.py folds words.
OTHER_BACKENDS: dict[str, Backend] = {
    **dict.fromkeys(("triton", "cnnfast", "ours"), "kernels"),
    **dict.fromkeys(("cudnn", "library"), "torch"),
    "default": "auto",
}
Choice = Backend | Literal["prefer kernels"]

PLAIN = (torch.Tensor, torch.nn.Parameter)
STRIDED = torch.strided
OLDEST_GPU = (8, 0)
CPU_REASON = "" if launch is None or launch.INTERPRETED else "the tensors are on the CPU, and Triton does not interpret"

# What a thread chose itself, in `choices`, the last one last, and whether its meta tensors are a GPU's, in `meta`.
_own = threading.local()
# What any thread chose for all, each choice in a list of its own, by which it is found again; and the last of these.
_for_all: list[list[Choice]] = []
_backend: Choice = "auto"
_in_force = 0  # how many choices there are now, of all threads: where there is none, calls ask no further
_guard = threading.Lock()  # of these three


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Overrides the choice while the context lasts: for this thread, and for all threads that make none of their own.

    Among these are autograd's, in which backward passes run, and those that DataParallel starts. Where several threads
    choose, each has what it chose itself last; a thread that chose nothing has what any of them chose last.

    "auto": kernels where there is a path, PyTorch elsewhere. "kernels": a call that would go to PyTorch raises
    RuntimeError. "torch": PyTorch serves every call. Raises ValueError for another name.

        with cnnfast.backend("kernels"):
            model(x)  # by our kernels, or not at all
    """
    if name not in BACKENDS:
        raise unknown_value("backend", "name", name, BACKENDS, OTHER_BACKENDS)
    with _choosing(name):
        yield


@contextmanager
def in_this_thread(name: Backend) -> Iterator[None]:
    """The same for this thread alone: not for a backward pass, which may run in another."""
    with _choosing(name, for_all=False):
        yield


@contextmanager
def prefer_kernels() -> Iterator[None]:
    """Our kernels serve wherever there is a path, also where the library is faster; elsewhere PyTorch does, which is no
    error as it is under backend("kernels"), whose threads these are too.

    This is for checking whether our kernels are right, and which calls are not theirs.
    """
    with _choosing("prefer kernels"):
        yield


@contextmanager
def _choosing(choice: Choice, for_all: bool = True) -> Iterator[None]:
    global _backend, _in_force
    own: list[Choice] = _own.__dict__.setdefault("choices", [])
    own.append(choice)
    entry: list[Choice] = [choice]
    with _guard:
        _in_force += 1
        if for_all:
            _for_all.append(entry)
            _backend = choice
    try:
        yield
    finally:
        own.pop()
        with _guard:
            _in_force -= 1
            _for_all[:] = [other for other in _for_all if other is not entry]
            _backend = _for_all[-1][0] if _for_all else "auto"


def _chosen() -> Choice:
    if is_compiling():  # Dynamo guards a global variable, and not what a thread keeps
        return _backend
    own: list[Choice] = getattr(_own, "choices", [])
    return own[-1] if own else _backend


@contextmanager
def meta_as_gpu() -> Iterator[None]:
    """This thread's meta tensors take the path that a GPU's would. They hold nothing: operators are called, and nothing
    runs.
    """
    before, _own.meta = getattr(_own, "meta", False), True
    try:
        yield
    finally:
        _own.meta = before


def on_gpu(x: torch.Tensor) -> bool:
    """Whether it is on a GPU, or taken to be."""
    return x.is_cuda or (x.is_meta and getattr(_own, "meta", False))


def library_allowed() -> bool:
    """Whether the library's convolution may stand in for ours: not where kernels were asked for."""
    return not _in_force or _chosen() not in ("kernels", "prefer kernels")


def assume_constant_result(function: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes a second:
    torch.compile calls the function when it traces, and takes the answer for a constant.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def asked_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps the answers, which torch.compile takes as constants: it does not trace the question."""
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
    onnx = sys.modules.get("torch.onnx")  # whoever exports has imported it
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
    """Triton's interpreter computes bfloat16 on raw bits, which is silently wrong, unless somebody has mended it, as a
    test suite may. One small convolution tells, once.
    """
    from cnnfast_kernels.conv import conv_fprop
    from cnnfast_kernels.questions import Geometry

    x = torch.tensor([1.0, 0.75 * 2**-7], dtype=torch.bfloat16).reshape(1, 1, 1, 2)
    y = conv_fprop(x, torch.ones_like(x), Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1))
    return bool(y.item() == 1 + 2**-7)  # a product on raw bits is far off, truncation gives 1


def _in_bf16(*tensors: torch.Tensor | None) -> bool:
    """Whether CPU tensors are, or would be cast to, bfloat16."""
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return cast or any(t is not None and t.dtype == torch.bfloat16 for t in tensors)


def _torch(reason: str) -> str:
    """The reason for which PyTorch serves a call, if there is one, unless kernels have to."""
    if reason and _in_force and _chosen() == "kernels":
        raise RuntimeError(f'backend("kernels"): this call would be served by PyTorch, because {reason}')
    return reason


def why_torch(
    x: torch.Tensor,
    *others: torch.Tensor | None,
    algorithm: str = "auto",
    dtypes: Container[torch.dtype] = KERNEL_DTYPES,
    result: torch.dtype | None = None,
) -> str:
    """Why PyTorch serves an operation on these tensors; the empty string if our kernels do. dtypes: those of `x` that
    have a kernel; result: the dtype of the result, where it is not that of `x`.

    Raises RuntimeError under backend("kernels") instead of naming a reason.
    """
    if algorithm == "torch":
        return _torch('algorithm="torch"')
    if _in_force and _chosen() == "torch":
        return _torch('backend("torch")')
    if launch is None:
        return _torch(NO_KERNELS)
    if CPU_REASON and x.is_cpu:  # first: calls that PyTorch serves anyway shall not pay for the other questions
        return _torch(CPU_REASON)
    if transformed():
        return why_transformed()
    # It would record what is computed from sizes as constants.
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return _torch("torch.jit.trace is recording")
    if torch.compiler.is_exporting() and _to_onnx():
        return _torch("the model is being exported to ONNX")
    # Quantized dtypes are none of these. Another dtype in `others` is an error, which is raised later.
    if x.dtype not in dtypes:
        return _torch(f"dtype {x.dtype} has no kernel")
    if x.layout is not STRIDED or x.is_nested:
        return _torch("the tensor is not plain strided memory")
    device = x.device
    # DTensor and other wrappers have rules for PyTorch's operators only.
    if type(x) not in PLAIN and is_traceable_wrapper_subclass(x):
        return _torch("the tensor wraps others")
    for t in others:
        if t is None:
            continue
        if t.device != device:
            return _torch("tensors are on different devices")
        if t.layout is not STRIDED or t.is_nested:
            return _torch("a tensor is not plain strided memory")
        if type(t) not in PLAIN and is_traceable_wrapper_subclass(t):
            return _torch("the tensor wraps others")
    if x.is_cuda:
        return _torch(_gpu_reason(device.index) or _launch_reason(device))
    if not x.is_cpu and not on_gpu(x):
        return _torch(f"device {device.type} has no kernels")
    bf16 = launch.INTERPRETED and x.is_cpu and (result == torch.bfloat16 or _in_bf16(x, *others))
    if bf16 and not _interpreter_rounds_bf16():
        return _torch("Triton's interpreter computes bfloat16 wrongly")
    return ""
