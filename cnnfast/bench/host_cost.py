"""What a call costs the host: every operation of cnnfast.functional, over kernels that are launched and not executed.

For processes in which kernels are compiled, not interpreted. The tensors lie on the CPU, and dispatch takes them for a
GPU's. So the code that runs is the one that a GPU would see, except for CUDA's own part: allocating memory from its
pool, encoding tensor maps, and taking launches in its driver.

    with pretended_gpu(launcher=True), prepared("conv2d", "inference") as call:
        print(microseconds(call))

benchmarks/test_host_cost.py prints the figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from cnnfast_kernels import conv, launch, memory
from cnnfast_kernels.aot.recording_driver import recording_driver
from cnnfast_kernels.aot.stub_driver import stub_driver
from cnnfast_kernels.epilogue import PLAIN
from cnnfast_kernels.keys import fprop_key
from cnnfast_kernels.operands import FpropOperands

from .. import dispatch, ops
from .. import functional as F

CHANNELS = 64
GEOMETRY = ((1, 1), (1, 1, 1, 1), (1, 1), 1)
MODES = ("inference", "gradients", "backward")


@contextmanager
def pretended_gpu(launcher: bool) -> Iterator[None]:
    """Every call on CPU tensors is served by our kernels (backend("kernels")): they are launched, and do not run.

    With `launcher` Triton's own launcher turns the arguments into a launch and asks for each tensor map, and a libcuda
    that does nothing takes both (aot/recording_driver). Without it the stub driver takes the arguments as they are.
    Raises RuntimeError where kernels are interpreted.
    """
    if launch.INTERPRETED:
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET and start again")
    driver = recording_driver(record=False) if launcher else stub_driver(record=False)
    with driver, patch.object(dispatch, "CPU_REASON", ""), dispatch.backend("kernels"):
        yield


def tensors() -> dict[str, torch.Tensor]:
    """Operands of a 3x3 convolution, as a network in half precision has them. They are small, because some calls fill
    tensors, which PyTorch does on the CPU here.
    """
    half = {name: torch.ones(2, CHANNELS, 8, 8, dtype=torch.float16) for name in ("x", "z")}
    half["w"] = torch.ones(CHANNELS, CHANNELS, 3, 3, dtype=torch.float16)
    vectors = {name: torch.ones(CHANNELS) for name in ("mean", "var", "g", "b")}
    return {name: t.contiguous(memory_format=torch.channels_last) for name, t in half.items()} | vectors


# By name: the operands that want gradients, and the call.
OPERATIONS: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "conv2d": ("x w", lambda x, w, **_: F.conv2d(x, w, None, 1, 1)),
    "conv_bn_act": (
        "x w b",
        lambda x, w, mean, var, g, b, z: F.conv_bn_act(x, w, mean, var, g, b, residual=z, padding=1),
    ),
    "conv_bn_act, training": (
        "x w g b",
        lambda x, w, mean, var, g, b, z: F.conv_bn_act(x, w, mean, var, g, b, padding=1, training=True),
    ),
    "conv_act": ("x w", lambda x, w, z, **_: F.conv_act(x, w, None, 1, 1, residual=z)),
    "batch_norm": ("x g b", lambda x, mean, var, g, b, **_: F.batch_norm(x, mean, var, g, b)),
    "batch_norm, training": ("x g b", lambda x, mean, var, g, b, **_: F.batch_norm(x, mean, var, g, b, True)),
    "max_pool2d": ("x", lambda x, **_: F.max_pool2d(x, 3, 2, 1)),
    "avg_pool2d": ("x", lambda x, **_: F.avg_pool2d(x, 2)),
    "global_avg_pool2d": ("x", lambda x, **_: F.global_avg_pool2d(x)),
}


@contextmanager
def prepared(operation: str, mode: str) -> Iterator[Callable[[], Any]]:
    """The call to time, which has run before. mode: "inference" is under inference_mode, "gradients" records what the
    gradients need, and "backward" computes all of them.
    """
    leaves, function = OPERATIONS[operation]
    operands = tensors()
    if mode == "inference":
        with torch.inference_mode():
            yield warmed(lambda: function(**operands))
        return
    wanted = [operands[name].requires_grad_() for name in leaves.split()]
    if mode == "gradients":
        yield warmed(lambda: function(**operands))
        return
    y = function(**operands)
    dy = torch.ones_like(y)
    yield warmed(lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True))


def warmed(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, once its kernels are compiled, its launches are planned, and Triton's caches know both."""
    for _ in range(3):
        call()
    return call


LAYERS = (
    "functional.conv2d",
    "its operator, by the dispatcher",
    "its operator, as functional enters it",
    "the kernels' conv_fprop",
    "a launch by its plan",
    "a launch by Triton",
)


def layers() -> dict[str, Callable[[], Any]]:
    """conv2d from the outermost layer to the innermost: each call contains those that come after it. The last one, a
    launch by Triton alone, is what a plan spares.
    """
    x, w = tensors()["x"], tensors()["w"]
    geometry = conv.Geometry(*GEOMETRY)
    conv.conv_fprop(x, w, geometry)
    planned: Any = conv.fprop_plan(fprop_key(x, w, geometry, PLAIN, False, False, None))
    operands = FpropOperands(x, w, memory.empty(planned.result, x))
    calls: list[Callable[[], Any]] = [
        lambda: F.conv2d(x, w, None, 1, 1),
        lambda: torch.ops.cnnfast.conv_fprop(x, w, None, *GEOMETRY, "auto"),
        lambda: ops.conv_fprop(x, w, None, *GEOMETRY, "auto"),
        lambda: conv.conv_fprop(x, w, geometry),
        lambda: planned.prepared(operands),
        lambda: planned.prepared.run(operands),
    ]
    return dict(zip(LAYERS, map(warmed, calls), strict=True))


# Functions of a module, torch.nn.functional or ours, on an image of one pixel: such a call costs hardly more than the
# host's part of it.
ONE_PIXEL: dict[str, Callable[[Any, torch.Tensor], Callable[[], Any]]] = {
    "conv2d": lambda f, x: partial(f.conv2d, x, x),
    "batch_norm": lambda f, x: partial(f.batch_norm, x, x.flatten(), x.flatten()),
    "max_pool2d": lambda f, x: partial(f.max_pool2d, x, 1),
    "avg_pool2d": lambda f, x: partial(f.avg_pool2d, x, 1),
    "adaptive_avg_pool2d": lambda f, x: partial(f.adaptive_avg_pool2d, x, 1),
}


def bare_operator() -> Callable[[], Any]:
    """An operator that takes a tensor and returns an empty one: what PyTorch's dispatcher costs, and so how fast this
    machine is at present.
    """
    library = torch.library.Library("cnnfast_host_cost", "DEF")
    library.define("bare(Tensor x) -> Tensor")
    library.impl("bare", torch.empty_like, "CPU")
    x, operator = torch.ones(1), torch.ops.cnnfast_host_cost.bare.default
    return lambda: (library, operator(x))[1]  # an operator ends with the Library that defined it


def microseconds(call: Callable[[], Any], repeat: int = 20) -> float:
    """The time of one call, as the mean of `repeat` calls: so few that the system seldom gives the processor to others
    meanwhile.
    """
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat * 1e6


def fastest(calls: dict[str, Callable[[], Any]], rounds: int = 400) -> dict[str, float]:
    """The least microseconds of each call. They take turns, and the least counts because what else runs on the machine
    can only add to a time.
    """
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            least[name] = min(least[name], microseconds(call))
    return least
