"""The stub driver proves itself, in a child process: this one may have kernels interpreted."""

from __future__ import annotations

import pytest

from tests.support.child import run_compiled

pytestmark = pytest.mark.compiled


def launch_on_a_stub(archs):
    """Launches one convolution thrice on each architecture: as it is, with other extents, with another dtype."""
    import torch

    from cnnfast_kernels.aot.stub_driver import stub_driver
    from cnnfast_kernels.gather.fprop import fprop
    from cnnfast_kernels.problem import ConvProblem
    from cnnfast_kernels.tiling import TileConfig

    def convolve(n, size, dtype, device):
        x = torch.zeros(n, 32, size, size, dtype=dtype, device=device).to(memory_format=torch.channels_last)
        w = torch.zeros(32, 32, 1, 1, dtype=dtype, device=device)
        problem = ConvProblem.of(x.shape, w.shape, (1, 1), (0,) * 4, (1, 1), 1)
        fprop(problem, TileConfig(64, 32, 32, 4, 2), "half", x, w, torch.empty_like(x))

    seen = {}
    for arch in archs:
        with stub_driver(arch) as gpu:
            gpu.stream = 7
            counts = []
            for case in ((2, 8, torch.float16, "cpu"), (3, 17, torch.float16, "cpu"), (2, 8, torch.bfloat16, "meta")):
                convolve(*case)
                counts.append(gpu.compiles)
            seen[arch] = {
                "counts": counts,
                "kernels": [launch.kernel for launch in gpu.launches],
                "grids": [launch.grid for launch in gpu.launches],
                "streams": [launch.stream for launch in gpu.launches],
                "on_its_device": [launch.device == gpu.device for launch in gpu.launches],
                "same_function": gpu.launches[0].function == gpu.launches[1].function != gpu.launches[2].function,
                "target": gpu.launches[0].metadata.target.arch,
                "binary": len(gpu.compiled[0].asm["cubin"]) > 0,
            }
    return seen


def test_launches_and_compilations_are_counted():
    seen = run_compiled(launch_on_a_stub, [80, 90])
    for arch in (80, 90):
        assert seen[str(arch)] == {
            "counts": [1, 1, 2],
            "kernels": ["conv_fprop_kernel"] * 3,
            "grids": [[2, 1, 1], [14, 1, 1], [2, 1, 1]],
            "streams": [7] * 3,
            "on_its_device": [True] * 3,
            "same_function": True,
            "target": arch,
            "binary": True,
        }


def test_a_failing_child_fails_the_test():
    with pytest.raises(AssertionError, match="no such thing"):
        run_compiled("raise ValueError('no such thing')")


def test_a_child_is_not_interpreted():
    assert run_compiled("import json, triton; print(json.dumps(bool(triton.knobs.runtime.interpret)))") is False
