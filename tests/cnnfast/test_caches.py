"""Launches go to the tensor's device and current stream; nothing keeps an activation alive; other extents compile
nothing.
"""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch

import cnnfast.functional as ours
from cnnfast_kernels import launch
from cnnfast_kernels.tma.tiles import SHAPES
from tests.support.agreement import integers, leaf
from tests.support.child import run_compiled

# ----------------------------------------------------------------------------------------------------------------------
# Memory


def activations(device, dtype=torch.float32):
    """Runs every operation forward and backward twice, and returns weak references to what passed through."""
    seen = []

    def watch(t):
        seen.append(weakref.ref(t))
        return t

    for _ in range(2):
        x = watch(leaf(integers(2, 4, 6, 6, dtype=dtype).to(device)))
        w = watch(leaf(integers(4, 4, 3, 3, dtype=dtype).to(device)))
        y = watch(ours.conv2d(x, w, padding=1))
        y = watch(ours.conv2d(y, w, padding=1, algorithm="im2col"))
        y = watch(ours.conv_bn_act(y, w, residual=y, training=True, padding=1))
        y = watch(ours.max_pool2d(y, 2))
        y = watch(ours.avg_pool2d(ours.batch_norm(y, None, None, training=True), 2, 1))
        y = watch(ours.global_avg_pool2d(y))
        y.sum().backward()
        watch(x.grad)
    return seen


def test_nothing_keeps_an_activation(device):
    seen = activations(device)
    gc.collect()
    assert [ref for ref in seen if ref() is not None] == []


def compiled_activations():
    import gc
    import weakref

    import torch

    from cnnfast import ops
    from cnnfast_kernels.aot.stub_driver import stub_driver

    geometry = ((1, 1), (1, 1, 1, 1), (1, 1), 1)
    seen = []
    with stub_driver() as gpu:
        for algorithm in ("direct", "im2col"):
            x = torch.zeros(2, 16, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
            w = torch.zeros(16, 16, 3, 3, requires_grad=True)
            y = ops.conv_fprop(x, w, None, *geometry, algorithm)
            z = ops.normalize(y, *ops.batch_moments(y.detach()), None, None, None, 1e-5, "relu", 0.0, None, True)
            p = ops.max_pool(z, False, (2, 2), (2, 2), (0, 0), (1, 1), False)[0]
            p.sum().backward()
            seen += [weakref.ref(t) for t in (x, w, y, z, p, x.grad)]
            del x, w, y, z, p
        launched = len(gpu.launches)
        gpu.launches.clear()  # the stub keeps arguments, Triton does not
        gc.collect()
        return launched, sum(ref() is not None for ref in seen)


@pytest.mark.compiled
def test_nothing_keeps_an_activation_of_compiled_kernels():
    launched, alive = run_compiled(compiled_activations)
    assert launched > 12
    assert alive == 0


# ----------------------------------------------------------------------------------------------------------------------
# Device and stream


class Kernel:
    """Notes the device that is current when it is launched."""

    __name__ = "kernel"

    def __init__(self, current):
        self.current, self.ran_on = current, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.ran_on.append(self.current[-1])


def test_a_launch_makes_the_tensors_device_current(monkeypatch):
    """Triton asks for the current device and its stream: where the tensors live elsewhere, that device is current for
    the launch.
    """
    current, entered = [0], []

    @contextlib.contextmanager
    def guard(device):
        entered.append(device)
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", guard)
    kernel = Kernel(current)
    for index in (1, 0, 2):
        launch.run(kernel, (1,), torch.device("cuda", index))
    assert kernel.ran_on == [1, 0, 2]
    assert entered == [torch.device("cuda", 1), torch.device("cuda", 2)]  # the current device costs nothing
    assert current == [0]


def streams_and_devices():
    import torch

    from cnnfast import ops
    from cnnfast_kernels.aot.stub_driver import stub_driver

    x, w = torch.zeros(2, 16, 8, 8), torch.zeros(16, 16, 3, 3)
    with stub_driver() as gpu:
        first = gpu.device
        for stream, device in ((3, first), (5, first), (7, first + 500)):
            gpu.stream, gpu.device = stream, device
            ops.conv_fprop(x, w, None, (1, 1), (1, 1, 1, 1), (1, 1), 1, "auto")
        seen = [[launch.stream, launch.device - first] for launch in gpu.launches]
        functions = [launch.function for launch in gpu.launches]
        return seen, functions[0] == functions[1], functions[0] != functions[2]


@pytest.mark.compiled
def test_compiled_kernels_run_on_the_current_stream_and_are_kept_by_device():
    """Nothing of one launch, its stream or its device's binary, is reused by the next."""
    assert run_compiled(streams_and_devices) == [[[3, 0], [5, 0], [7, 500]], True, True]


# ----------------------------------------------------------------------------------------------------------------------
# Compilations


def specialisations(channels, filters, dtype_name):
    """Operators run over many extents: {operator, layout: [names of the kernels that each of the extents would
    compile]}.
    """
    from types import SimpleNamespace

    import torch
    from triton.runtime.jit import JITFunction

    import cnnfast.ops  # noqa: F401 - defines the operators
    from cnnfast_kernels import launch
    from cnnfast_kernels.aot.stub_driver import stub_driver

    def pretend(self, key, *specialisation):
        """In place of compiling: only whether Triton would is asked here."""
        kernel = self.device_caches[specialisation[1]][0][key] = SimpleNamespace(name=self.__name__, module=None)
        return kernel

    JITFunction._do_compile = pretend
    operators = torch.ops.cnnfast
    dtype = getattr(torch, dtype_name)
    extents = [(3, 9, 7), (2, 16, 32), (16, 5, 16), (1, 8, 8), (5, 1, 6), (4, 7, 1), (1, 1, 5), (7, 64, 3), (1, 17, 1)]
    geometry = ((2, 1), (1, 1, 1, 1), (1, 1), 1)
    one = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    window = ((3, 3), (2, 2), (1, 1), (1, 1), False)
    average = ((3, 3), (2, 2), (1, 1), False, True, None)

    def image(n, c, h, w, fmt):
        return torch.zeros(n, c, h, w, dtype=dtype).contiguous(memory_format=fmt)

    def run(name, n, h, w, fmt):
        last = fmt == torch.channels_last
        x, y = image(n, channels, h, w, fmt), image(n, filters, (h - 1) // 2 + 1, w, fmt)
        weight, pointwise = (
            torch.zeros(filters, channels, 3, 3, dtype=dtype),
            torch.zeros(filters, channels, 1, 1, dtype=dtype),
        )
        stat = torch.zeros(channels)
        pooled = image(n, channels, (h - 1) // 2 + 1, (w - 1) // 2 + 1, fmt)
        match name.split():
            case ["fprop", algorithm]:
                operators.conv_fprop(x, weight, None, *geometry, algorithm)
                operators.conv_fprop(x, pointwise, None, *one, algorithm)
            case ["dgrad", algorithm]:
                operators.conv_dgrad(y, weight, None, x.shape, last, *geometry, algorithm)
                operators.conv_dgrad(image(n, filters, h, w, fmt), pointwise, None, x.shape, last, *one, algorithm)
            case ["wgrad", algorithm]:
                operators.conv_wgrad(x, y, weight.shape, last, *geometry, algorithm)
                operators.conv_wgrad(x, image(n, filters, h, w, fmt), pointwise.shape, last, *one, algorithm)
            case ["depthwise", operation]:
                apart = (*geometry[:3], channels)
                small, y = torch.zeros(channels, 1, 3, 3, dtype=dtype), image(n, channels, (h - 1) // 2 + 1, w, fmt)
                match operation:
                    case "fprop":
                        operators.conv_fprop(x, small, None, *apart, "auto")
                    case "stats":
                        operators.conv_stats(x, small, None, *apart, "auto")
                    case "dgrad":
                        operators.conv_dgrad(y, small, None, x.shape, last, *apart, "auto")
                    case "wgrad":
                        operators.conv_wgrad(x, y, small.shape, last, *apart, "auto")
            case ["moments"]:
                operators.conv_stats(x, weight, None, *geometry, "auto")
                operators.batch_moments(x)
                operators.channel_sum(x)
                operators.update_running(stat, stat, stat, stat, 0.1, n * h * w + 1)
            case ["normalize"]:
                operators.normalize(x, stat, stat, stat, stat, x, 1e-5, "relu", 0.0, None, True)
                operators.normalize_backward(x, x, x, stat, stat, stat, stat, None, 1e-5, "relu", 0.0, True, [True] * 4)
            case ["max"]:
                taps = operators.max_pool(x, True, *window)[1]
                operators.max_pool_indices(taps, x.shape, *window)
                operators.max_pool_backward(pooled, taps, x.shape, last, *window)
            case ["average"]:
                operators.avg_pool(x, *average)
                operators.avg_pool_backward(pooled, x.shape, last, *average)
            case ["global"]:
                operators.global_avg_pool(x)
                operators.adaptive_avg_pool_backward(image(n, channels, 1, 1, fmt), x.shape, last)

    counts = {}
    convolutions = [f"{o} {a}" for o in ("fprop", "dgrad", "wgrad") for a in ("auto", "im2col")]
    convolutions += [f"depthwise {o}" for o in ("fprop", "stats", "dgrad", "wgrad")]
    for fmt in (torch.channels_last, torch.contiguous_format):
        for name in [*convolutions, "moments", "normalize", "max", "average", "global"]:
            with stub_driver() as gpu, launch.observe(lambda event: None, compile_only=True):
                seen = counts[f"{name}, {'NHWC' if fmt == torch.channels_last else 'NCHW'}"] = []
                for n, h, w in extents:
                    before = gpu.compiles
                    run(name, n, h, w, fmt)
                    seen.append([kernel.name for kernel in gpu.compiled[before:]])
    return counts


# A choice that depends on sizes takes one more specialisation of a kernel, once: wgrad by one slot or by several,
# tensor maps where an image fills their boxes, and of these the shape that it fills best.
CHOICES = {"conv_wgrad_kernel": 2, "conv_wgrad_reduce_kernel": 2, "tma_wgrad_kernel": len(SHAPES)}
FAMILIES = {"conv_fprop_kernel", "tma_fprop_kernel", "conv_dgrad_kernel", "tma_dgrad_kernel"}
# Depthwise: the rows of a strip, 2 or 4 here (2, 4 or 8 in dgrad), and for wgrad whether they divide the image and are
# one slot or more.
STRIPS = {
    "depthwise_fprop_kernel": 1,
    "depthwise_dgrad_kernel": 2,
    "depthwise_wgrad_kernel": 3,
    "conv_wgrad_reduce_kernel": 1,
}
# Planes of rows, NCHW: up to six tiles, and rows aligned to 1, 2, 4 or 8 elements.
NORM = {"batch_moments_kernel", "gradient_sums_kernel", "normalize_kernel", "normalize_backward_kernel"}


@pytest.mark.compiled
@pytest.mark.parametrize(("channels", "filters"), [(16, 32), (3, 10)], ids=["aligned", "odd"])
def test_other_extents_compile_nothing(channels, filters):
    """N, H and W among them 1, odd numbers and multiples of 16, which Triton would specialise on."""
    counts = run_compiled(specialisations, channels, filters, "float16")
    for name, (first, *others) in counts.items():
        assert first, name
        again = [kernel for kernels in others for kernel in kernels]
        if name.startswith("wgrad"):
            assert all(again.count(kernel) <= CHOICES[kernel] for kernel in again), name
        elif name.endswith("auto, NHWC"):
            assert set(again) <= FAMILIES
            assert all(again.count(kernel) <= 1 for kernel in again), name
        elif name.startswith("depthwise"):
            assert all(again.count(kernel) <= STRIPS[kernel] for kernel in again), name
        elif name.endswith("NCHW") and name.startswith(("moments", "normalize")):
            assert set(again) <= NORM
            assert max(again.count(kernel) for kernel in NORM) < 6
        else:
            assert again == [], name
