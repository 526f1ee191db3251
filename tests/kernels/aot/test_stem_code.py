"""The machine code of a ResNet's stem on a packed image: none of what loading it one element at a time takes."""

from __future__ import annotations

import pytest

from tests.support.child import run_compiled


def compile_stem(arch):
    """Of each kernel that a default of the stem launches, what its machine code says."""
    from functools import partial

    import torch

    from cnnfast_kernels import aot, launch
    from cnnfast_kernels.aot import compiling, sass
    from cnnfast_kernels.aot.layers import STEM
    from cnnfast_kernels.conv import conv_fprop

    half = torch.bfloat16
    runs = {
        "plain": partial(conv_fprop, STEM.x(half), STEM.w(half), STEM.geometry),
        "norm and residual": partial(STEM.infer, None, "half", half),
        "moments": partial(STEM.train, None, "half", half),
        "wgrad": partial(STEM.wgrad, None, "half", half),
    }
    found = {}
    for name, run in runs.items():
        seen = []
        with aot.target(arch), launch.observe(seen.append, compile_only=True):
            run()
        (launched,) = (one for one in seen if one.kernel in ("conv_fprop_kernel", "conv_wgrad_kernel"))
        binary = compiling.Binary.of(launched.compiled)
        (code,) = sass.disassemble([binary.cubin], binary.capability)
        row_of = compiling.KernelRow(launched.kernel, name, str(launched.tile), arch)
        (row,) = compiling.inspect([(row_of, binary)])
        copies = [i.opcode for i in code if i.family == "LDGSTS"]
        loads = [i.opcode for i in code if i.family == "LDG"]
        loop = sass.main_loop(code)
        found[name] = {"tile": str(launched.tile), "copies": copies, "loads": loads, "loop": len(loop), **row}
    return found


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("arch", "most_registers"),
    [  # three programs live on a multiprocessor with 168; but two on sm_80 by triton 3.7.1 with statistics
        ("sm_80", {"plain": 168, "norm and residual": 168, "moments": 176, "wgrad": 168}),
        ("sm_90", {"plain": 140, "norm and residual": 200, "moments": 200, "wgrad": 200}),
    ],
)
def test_every_copy_is_of_16_bytes(arch, most_registers):
    found = run_compiled(compile_stem, arch)
    for name, kernel in found.items():
        assert kernel["tile"].startswith("packed 64x128x32" if name == "wgrad" else "packed 128x64x32"), name
        assert len(kernel["copies"]) == kernel["async_copies"] >= 24, name
        assert all(opcode.endswith(".128") for opcode in kernel["copies"]), name
        assert not any(part in ("U8", "S8", "U16", "S16") for load in kernel["loads"] for part in load.split(".")), name
        assert kernel["spill_bytes"] == 0, name
        assert kernel["registers"] <= most_registers[name], name
        assert kernel["serialised"] is False, name
        assert kernel["dot"] == "bf16", name
    # what is loaded to registers is loaded where a tile is summed again, which is the one loop of fprop: its k-steps
    # are unrolled
    assert len(found["plain"]["loads"]) == 12
    assert found["wgrad"]["loads"] == []
    assert found["wgrad"]["loop"] <= 348
