"""Launches of the tensor-map kernels, compiled: what a repeated one passes, what is kept, what other extents compile.

Each function that a test runs is run in a process of its own, over a driver that executes nothing.
"""

from __future__ import annotations

import pytest

from tests.support.child import run_compiled


def repeated():
    """What Triton was handed by the first launch, which is Triton's own, and by the second, which is the plan's."""
    import gc
    import weakref

    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    from cnnfast_kernels.aot.stub_driver import stub_driver
    from cnnfast_kernels.conv import Geometry, conv_dgrad, conv_fprop, conv_wgrad
    from cnnfast_kernels.epilogue import Epilogue

    def described(argument):
        if isinstance(argument, TensorDescriptor):
            fields = {name: value for name, value in vars(argument).items() if name != "base"}
            return [
                sorted((name, list(v) if isinstance(v, tuple | list) else v) for name, v in fields.items()),
                list(argument.base.shape),
            ]
        return list(argument.shape) if isinstance(argument, torch.Tensor) else argument

    geometry = Geometry((1, 1), (1, 1, 1, 1), (1, 1), 1)
    told = {"same": [], "bases": [], "alive": 0, "kernels": []}
    with stub_driver() as gpu:
        seen = []
        for _ in range(2):
            x, dy = (
                torch.zeros(8, 64, 16, 16, dtype=torch.float16).to(memory_format=torch.channels_last) for _ in range(2)
            )
            w = torch.zeros(64, 64, 3, 3, dtype=torch.float16).to(memory_format=torch.channels_last)
            y = conv_fprop(x, w, geometry, Epilogue(residual=dy))
            dx = conv_dgrad(dy, w, x.shape, geometry, fmt=torch.channels_last)
            conv_wgrad(x, dy, w.shape, geometry)
            seen += [weakref.ref(t) for t in (x, dy, y, dx, w)]
            bases = [
                launched.arguments[0].base is (dy if "dgrad" in launched.kernel else x)
                for launched in gpu.launches[-4:-1]
            ]
            told["bases"] += bases
        half = len(gpu.launches) // 2
        told["kernels"] = [launched.kernel for launched in gpu.launches[:half]]
        told["compiles"] = [gpu.compiles, half]
        for first, second in zip(gpu.launches[:half], gpu.launches[half:], strict=True):
            told["same"].append(
                first.function == second.function
                and first.grid == second.grid
                and [described(a) for a in first.arguments] == [described(a) for a in second.arguments]
            )
        del x, dy, w, y, dx, first, second
        gpu.launches.clear()  # the stub keeps arguments, Triton does not
        gc.collect()
        told["alive"] = sum(ref() is not None for ref in seen)
    return told


@pytest.mark.compiled
def test_a_plan_launches_as_triton_would_and_keeps_no_tensor():
    told = run_compiled(repeated)
    assert told["kernels"] == ["tma_fprop_kernel", "tma_dgrad_kernel", "tma_wgrad_kernel", "conv_wgrad_reduce_kernel"]
    assert told["compiles"] == [4, 4], "the second launch of each compiled nothing"
    assert told["same"] == [True] * 4
    assert told["bases"] == [True] * 6, "a map is that of the tensor at hand"
    assert told["alive"] == 0


def extents():
    """[kernel compiled] for images of many sizes that one tile serves, after the first."""
    import torch

    from cnnfast_kernels.aot.stub_driver import stub_driver
    from cnnfast_kernels.conv import Geometry, conv_dgrad, conv_fprop, conv_wgrad
    from cnnfast_kernels.tma.tiles import BoxTile

    def image(n, h, w):
        return torch.zeros(n, 64, h, w, dtype=torch.float16).to(memory_format=torch.channels_last)

    geometry = Geometry((2, 1), (1, 1, 1, 1), (1, 1), 1)
    w = image(64, 3, 3)
    tile = BoxTile(1, 8, 8, 64, 64)
    with stub_driver() as gpu:
        for i, (n, height, width) in enumerate(
            [(2, 16, 16), (1, 8, 9), (16, 2, 1), (5, 64, 7), (1, 18, 32), (3, 2, 17)]
        ):
            x, y = image(n, height, width), image(n, height // 2, width)
            conv_fprop(x, w, geometry, tile=tile)
            conv_dgrad(y, w, x.shape, geometry, fmt=torch.channels_last, tile=tile)
            conv_wgrad(x, y, w.shape, geometry, tile=tile)
            if i == 0:
                first = gpu.compiles
        return first, [kernel.name for kernel in gpu.compiled[first:]]


@pytest.mark.compiled
def test_other_extents_compile_nothing():
    assert run_compiled(extents) == [3, []]
