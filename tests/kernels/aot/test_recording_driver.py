"""The driver that records: it keeps what Triton's launcher passes, refuses tensor maps that CUDA would, and says when
it cannot be used.
"""

from __future__ import annotations

import struct

import pytest
import triton
import triton.language as tl

from cnnfast_kernels import launch
from cnnfast_kernels.aot.recording_driver import RecordedEncode, recording_driver
from tests.support.child import run_compiled


@triton.jit(do_not_specialize=["i"])
def every_kind(x_ptr, none_ptr, i, f: tl.float32, d: tl.float64, large, one, map_, pair, C: tl.constexpr):
    tl.store(x_ptr, i + f + d + large + one + pair[0] + tl.load(pair[1]) + C)
    map_.store([0, 0], map_.load([0, 0]) + 1)


def launch_one(this_file):
    """One launch of a kernel that has parameters of every kind, and what was recorded."""
    import runpy

    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    from cnnfast_kernels.aot.recording_driver import recording_driver

    every_kind = runpy.run_path(this_file)["every_kind"]
    with recording_driver(90) as driver:
        driver.stream = 7
        x, image = torch.zeros(3), torch.zeros(64, 48, dtype=torch.float16)
        map_ = TensorDescriptor(image, [64, 40], [48, 1], [16, 32])
        arguments = x, None, -7, 1.5, 0.1, 2**40, 1, map_, (3, x)
        compiled = every_kind[(5, 3, 2)](*arguments, C=4, num_warps=2, enable_fp_fusion=True)
        (launched,), (encoded,) = driver.taken()
        kernel = driver.kernels[launched.function]
        nothing_is_told_twice = driver.taken() == ([], [])
    return {
        "x": x.data_ptr(),
        "image": image.data_ptr(),
        "parameters": [p.hex() for p in launched.parameters],
        "sizes": [kernel.parameter_bytes, kernel.passed_bytes],
        "scratch": [kernel.global_scratch_bytes, kernel.profile_scratch_bytes],
        "launch": [launched.grid, launched.block, launched.stream, launched.attributes],
        "of_triton": [
            launched.function == compiled.function,
            launched.shared_bytes == compiled.metadata.shared,
            kernel.name == "every_kind",
        ],
        "map": {
            name: getattr(encoded, name)
            for name in ("address", "dims", "strides", "box", "element_strides", "element_bytes", "refusal")
        },
        "nothing_is_told_twice": nothing_is_told_twice,
    }


@pytest.mark.compiled
def test_what_the_launcher_passes_is_kept():
    seen = run_compiled(launch_one, __file__)
    x, scratch = struct.pack("<Q", seen["x"]), bytes(8)
    parameters = [bytes.fromhex(p) for p in seen["parameters"]]
    # One more argument is a constant, by its value.
    numbers = (struct.pack("<i", -7), struct.pack("<f", 1.5), struct.pack("<d", 0.1), struct.pack("<q", 2**40))
    as_map = *(struct.pack("<i", n) for n in (64, 40)), *(struct.pack("<q", n) for n in (48, 1))
    assert parameters[:5] == [x, *numbers]
    assert len(parameters[5]) == 128
    assert parameters[5].startswith(struct.pack("<Q", seen["image"]))
    assert parameters[6:] == [*as_map, struct.pack("<i", 3), x, scratch, scratch]
    assert seen["sizes"] == [[len(p) for p in parameters]] * 2
    assert seen["scratch"] == [0, 0]
    assert seen["launch"] == [[5, 3, 2], [64, 1, 1], 7, []]
    assert seen["of_triton"] == [True] * 3
    assert seen["map"] == {
        "address": seen["image"],
        "dims": [40, 64],
        "strides": [0, 96],
        "box": [32, 16],
        "element_strides": [1, 1],
        "element_bytes": 2,
        "refusal": "",
    }
    assert seen["nothing_is_told_twice"]


def launch_with_records():
    """A kernel whose constants are records, launched by Triton and twice by a plan: the launches, and whether the
    binaries fit what is passed.
    """
    import torch

    from cnnfast_kernels.aot.recording_driver import recording_driver
    from cnnfast_kernels.launch import Launch
    from tests.support.records import BLOCK, ENDING, WINDOW, operands, sum_rows_kernel

    found = []
    with recording_driver(90) as driver:
        for dtype in (torch.float32, torch.float16):
            x, y, bias = operands(dtype)
            for optional, stride in ((bias, 2), (None, None)):
                planned = Launch(sum_rows_kernel, (2,), 16, stride, g=WINDOW, e=ENDING, BLOCK=BLOCK)
                planned.run((x, y, optional))
                planned((x, y, optional))  # in which it comes to know the kernel
                planned((x, y, optional))
                by_triton, _, by_plan = driver.taken()[0]
                found.append([by_triton == by_plan, [p.hex() for p in by_plan.parameters], x.data_ptr()])
        fits = [kernel.parameter_bytes == kernel.passed_bytes for kernel in driver.kernels.values()]
    return found, fits


@pytest.mark.compiled
def test_constants_that_are_records_are_not_passed():
    """By Triton nor by a plan, which pass the same: pointers, strides, two pointers to scratch memory."""
    found, fits = run_compiled(launch_with_records)
    assert fits == [True] * 4
    for same, parameters, address in found:
        assert same
        assert bytes.fromhex(parameters[0]) == struct.pack("<Q", address)
    assert [len(parameters) for _, parameters, _ in found] == [7, 5, 7, 5]


def encode(cases):
    """[what cuTensorMapEncodeTiled returns, the refusal on record] for each of `cases`, which change a legal map of
    float16 in two axes.
    """
    import ctypes

    from cnnfast_kernels.aot.recording_driver import recording_driver

    legal = {
        "offset": 0, "type": 6, "rank": 2, "address": 4096,
        "dims": [64, 64], "strides": [128], "box": [64, 16], "steps": [1, 1],
        "interleave": 0, "swizzle": 3, "promotion": 2, "fill": 0,
    }  # fmt: skip
    memory = ctypes.create_string_buffer(512)
    start = -ctypes.addressof(memory) % 128
    found = []
    with recording_driver(90) as driver:
        for case in cases:
            c = legal | case
            kinds = {
                "dims": ctypes.c_uint64,
                "strides": ctypes.c_uint64,
                "box": ctypes.c_uint32,
                "steps": ctypes.c_uint32,
            }
            lists = {name: (kind * len(c[name]))(*c[name]) for name, kind in kinds.items()}
            code = driver.library.cuTensorMapEncodeTiled(
                ctypes.byref(memory, start + c["offset"]), c["type"], c["rank"], ctypes.c_void_p(c["address"]),
                lists["dims"], lists["strides"], lists["box"], lists["steps"],
                c["interleave"], c["swizzle"], c["promotion"], c["fill"],
            )  # fmt: skip
            ((), (encoded,)) = driver.taken()
            found.append([code, encoded.refusal])
    return found


SIX = [16, 16, 16, 16, 16, 16]
ILLEGAL = [
    ({"offset": 32}, "the map lies at"),
    ({"rank": 0}, "rank 0"),
    ({"rank": 6, "dims": SIX, "strides": SIX, "box": SIX, "steps": SIX}, "rank 6"),
    ({"type": 13}, "data type 13"),
    ({"interleave": 1}, "interleave 1"),
    ({"promotion": 4}, "L2 promotion 4"),
    ({"fill": 2}, "fill 2"),
    ({"type": 3, "box": [16, 16], "fill": 1}, "NaN outside of a tensor of integers"),
    ({"address": 4104}, "0x1008"),
    ({"dims": [64, 0]}, "extent 0 of axis 1"),
    ({"dims": [2**32 + 1, 64]}, "extent 4294967297 of axis 0"),
    ({"box": [0, 16]}, "box of 0 along axis 0"),
    ({"box": [64, 257]}, "box of 257 along axis 1"),
    ({"steps": [1, 0]}, "element stride 0 of axis 1"),
    ({"steps": [9, 1]}, "element stride 9 of axis 0"),
    ({"strides": [136]}, "stride of 136 bytes of axis 1"),
    ({"strides": [2**40]}, "not below 2^40"),
    ({"swizzle": 4}, "swizzle 4"),
    ({"box": [12, 16]}, "a line of the box has 24 bytes"),
    ({"box": [72, 16]}, "a line of the box has 144 bytes, more than the 128"),
    ({"box": [64, 16], "swizzle": 2}, "more than the 64"),
    ({"box": [64, 16], "swizzle": 1}, "more than the 32"),
    (
        {"rank": 3, "dims": [64] * 3, "strides": [128, 128], "box": [64, 256, 8], "steps": [1] * 3},
        "a box of 262144 bytes",
    ),
]
LEGAL = [
    {},
    {"dims": [2**32, 1]},
    {"strides": [2**40 - 16]},
    {"strides": [0]},
    {"box": [64, 256]},
    {"box": [256, 4], "swizzle": 0},
    {"steps": [1, 8]},
    {"fill": 1},
    {"offset": 64},
    {"rank": 1, "dims": [8], "strides": [], "box": [8], "steps": [1]},
    {"rank": 5, "dims": [64] * 5, "strides": [128, 16, 8192, 32], "box": [64, 1, 2, 1, 2], "steps": [1] * 5},
]


@pytest.mark.compiled
def test_tensor_maps_are_judged_by_the_limits_of_cuda():
    found = run_compiled(encode, [case for case, _ in ILLEGAL] + LEGAL)
    for (case, says), (code, refusal) in zip(ILLEGAL, found, strict=False):
        assert code == 1, case
        assert says in refusal, case
    assert found[len(ILLEGAL) :] == [[0, ""]] * len(LEGAL)


def map_of(dims, strides, element_bytes=2):
    return RecordedEncode(0, dims, (0, *strides), dims, dims, 6, element_bytes, 0, 0, 0, 0, "")


def test_permuted_and_overlapping_maps():
    dense, permuted = map_of((8, 4, 3), (16, 64)), map_of((8, 3, 4), (64, 16))
    assert [m.permuted for m in (dense, permuted)] == [False, True]
    assert [m.overlapping for m in (dense, permuted)] == [False, False]
    assert map_of((24, 4), (16,)).overlapping  # windows of 24 elements, each 8 behind the one before it
    assert map_of((8, 5, 3), (16, 64)).overlapping
    assert not map_of((24, 1), (16,)).overlapping  # an axis of one position goes nowhere


def other_uses():
    """What a driver that does not record keeps, launches of several threads, and the errors."""
    from concurrent.futures import ThreadPoolExecutor

    import torch
    from triton.runtime.driver import driver as drivers

    from cnnfast_kernels.aot.recording_driver import recording_driver
    from cnnfast_kernels.launchable import smallest

    def go(x):
        smallest[(1,)](x, enable_fp_fusion=True)

    tensors = [torch.zeros(4) for _ in range(200)]
    told = {}
    before = drivers._active
    with recording_driver(80, record=False) as driver:
        go(tensors[0])
        told["kept"] = driver.taken()
        told["capability"] = driver.get_current_target().arch
    with recording_driver(90) as driver, ThreadPoolExecutor(8) as pool:
        go(tensors[0])
        driver.taken()
        list(pool.map(go, tensors))
        launches, _ = driver.taken()
        told["of_threads"] = sorted(launch.parameters[0].hex() for launch in launches) == sorted(
            t.data_ptr().to_bytes(8, "little").hex() for t in tensors
        )
    told["restored"] = drivers._active is before
    try:
        with recording_driver(75):
            pass
    except ValueError as error:
        told["unknown"] = str(error)
    return told


@pytest.mark.compiled
def test_without_recording_nothing_is_kept_and_threads_may_launch():
    told = run_compiled(other_uses)
    assert told.pop("unknown").startswith("capability=75 is not known here: use one of 80, 86")
    assert told == {"kept": [[], []], "capability": 80, "of_threads": True, "restored": True}


def use_beside_another():
    import ctypes

    from cnnfast_kernels.aot import recording_driver
    from cnnfast_kernels.aot.recording_driver import library

    ctypes.CDLL(str(library.build()))
    try:
        with recording_driver.recording_driver(90):
            pass
    except RuntimeError as error:
        return str(error)


@pytest.mark.compiled
def test_another_libcuda_in_the_process_is_an_error():
    assert (
        run_compiled(use_beside_another)
        == "another libcuda.so.1 is loaded in this process: record launches in a process of its own"
    )


@pytest.mark.skipif(not launch.INTERPRETED, reason="GPU ring: kernels are not interpreted")
def test_interpreted_kernels_are_not_launched():
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"), recording_driver(90):
        pass
