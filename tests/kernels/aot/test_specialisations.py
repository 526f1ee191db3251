"""Launches written down and compiled: what a description keeps, which launches are one, and what the compiler refuses
of them.
"""

from __future__ import annotations

import itertools
import json
from typing import NamedTuple

import pytest
import torch
import triton.language as tl

from cnnfast_kernels import batchnorm, conv, launch
from cnnfast_kernels.aot import specialisations
from cnnfast_kernels.epilogue import BatchNorm, Epilogue
from tests.support import records, uncompilable
from tests.support.child import run_compiled
from tests.support.planting import plant
from tests.support.specialisations import described_launches

recorded_here = pytest.mark.skipif(not launch.INTERPRETED, reason="GPU ring: launches are recorded in the interpreter")
GEOMETRY = conv.Geometry((1, 1), (1, 1, 1, 1), (1, 1), 1)
TENSOR_MAPS = (torch.float16, torch.bfloat16)
ALL = (*TENSOR_MAPS, torch.float32, torch.float64)
# Family -> its forward kernel, dtypes, and the shape of w: tensor maps serve whole groups of 8 channels.
FAMILIES = {
    "gather": ("conv_fprop_kernel", ALL, (4, 4, 3, 3)),
    "tma": ("tma_fprop_kernel", TENSOR_MAPS, (64, 64, 3, 3)),
    "depthwise": ("depthwise_fprop_kernel", ALL, (4, 1, 3, 3)),
}


def launch_every_norm(family, device):
    """The forward kernel of a family, with and without a batch norm, and with each of its and the convolution's
    operands or none.
    """
    _, dtypes, (K, C, R, S) = FAMILIES[family]
    geometry = GEOMETRY._replace(groups=K if family == "depthwise" else 1)
    channels = torch.ones(K, device=device)
    for dtype in dtypes:
        x, w = (
            torch.ones(shape, dtype=dtype, device=device).to(memory_format=torch.channels_last)
            for shape in ((1, K if family == "depthwise" else C, 8, 8), (K, C, R, S))
        )
        conv.conv_fprop(x, w, geometry)
        for weight, bias, own in itertools.product((None, channels), repeat=3):
            conv.conv_fprop(x, w, geometry, Epilogue(own, BatchNorm(channels, channels, weight, bias)))


def refused_by_front_end(lines):
    from cnnfast_kernels.aot.specialisations import refused

    return [reason for line in lines if (reason := refused(line, "sm_90")) is not None]


@pytest.mark.compiled
@recorded_here
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_norms_compile_without_their_optional_operands(family, device):
    """What the interpreter made of them, the front end must too: a helper's tuple that held None once passed here and
    nowhere else.
    """
    kernel, dtypes, _ = FAMILIES[family]
    with described_launches() as lines:
        launch_every_norm(family, device)
    operands = {
        tuple(told["arguments"][name] is not None for name in ("bias_ptr", "mean_ptr", "gamma_ptr", "beta_ptr"))
        for told in map(json.loads, lines)
        if told["kernel"].endswith(f":{kernel}")
    }
    assert len(operands) == 9, "every combination was launched, and by this family"
    assert len(lines) == 9 * len(dtypes)
    assert run_compiled(refused_by_front_end, list(lines)) == []


# ----------------------------------------------------------------------------------------------------------------------
# Descriptions


class Pair(NamedTuple):
    first: object
    second: object


RUNTIME, CONSTANT = "y_ptr", "g"  # parameters of sum_rows_kernel


def classes(value):
    """The class of a value and, of a tuple, those of its members."""
    return type(value), tuple(map(classes, value)) if isinstance(value, tuple) else ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (CONSTANT, 1e-5),
        (CONSTANT, float("inf")),
        (CONSTANT, 3),
        (CONSTANT, True),
        (CONSTANT, None),
        (CONSTANT, "relu"),
        (CONSTANT, tl.float64),
        (CONSTANT, (1, (2.5, None), "x")),
        (CONSTANT, Pair(1, Pair(tl.float16, ()))),
        (CONSTANT, records.WINDOW),
        (CONSTANT, records.ENDING),
        (RUNTIME, None),
        (RUNTIME, False),
        (RUNTIME, (None, True)),
    ],
)
def test_constants_come_back_as_they_were(name, value):
    parameter = specialisations.parameters(records.sum_rows_kernel)[name]
    back = specialisations.decoded(json.loads(json.dumps(specialisations.encoded(value, parameter))))
    assert back == value
    assert classes(back) == classes(value)


def test_tensors_and_maps_come_back_as_their_like():
    parameter = specialisations.parameters(records.sum_rows_kernel)["x_ptr"]
    memory = torch.zeros(64, dtype=torch.float16)
    start = -memory.data_ptr() // 2 % 8
    for offset, aligned in ((start, True), (start + 1, False)):
        told = specialisations.encoded(memory[offset : offset + 8], parameter)
        assert told == {"tensor": "float16", "aligned": aligned}
        back = specialisations.decoded(told)
        assert (back.dtype, back.data_ptr() % 16 == 0) == (torch.float16, aligned)
    told = specialisations.encoded(
        launch.tensor_map((2, 5, 5, 24), (600, 120, 24, 1), (1, 8, 8, 64), torch.bfloat16), parameter
    )
    assert told == {"map": "bfloat16", "box": [1, 8, 8, 64]}
    back = specialisations.decoded(told)
    assert (back.base.dtype, list(back.block_shape)) == (torch.bfloat16, [1, 8, 8, 64])


@pytest.mark.parametrize("name", [RUNTIME, CONSTANT])
def test_what_cannot_be_written_down_is_named(name):
    with pytest.raises(TypeError, match=rf"{name}=.*is of <class 'object'>"):
        specialisations.described(records.sum_rows_kernel, (), {name: object()})


def triton_sees():
    """The kernels whose launches were compared, those that there are, and the launches that Triton would not compile as
    described.
    """
    import torch
    from triton import knobs

    from cnnfast_kernels import aot, launch
    from cnnfast_kernels.aot import specialisations
    from cnnfast_kernels.aot.cases import cases
    from cnnfast_kernels.gather.fprop import conv_fprop_kernel

    seen = []

    def see(*, compile, **_):
        seen.append(
            (
                compile["signature"],
                compile["constants"],
                compile["configs"],
                compile["num_warps"],
                compile["num_stages"],
            )
        )
        return True

    launches = []
    launch.run = lambda kernel, grid, device, *arguments, tile=None, **options: launches.append(
        (kernel, arguments, options)
    )
    knobs.runtime.jit_cache_hook = see
    with aot.target("sm_90"):
        for case in cases():
            case.run()
        kernel, arguments, options = next(item for item in launches if item[0] is conv_fprop_kernel)
        order = kernel.arg_names
        memory = torch.zeros(64, dtype=torch.float16)
        for n in (0, 1, 2, 15, 16, 24, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 16, 2**40):
            for name in ("K", "N", "w_stride_k"):
                changed = list(arguments)
                changed[order.index(name)] = n
                launches.append((kernel, changed, options))
        for i in range(8):
            launches.append((kernel, [memory[i:], *arguments[1:]], options))
        wrong = []
        for kernel, arguments, options in launches:
            line = specialisations.described(kernel, arguments, options)
            told = specialisations.Described.of(line)
            kernel.warmup(*arguments, grid=(1,), **options)
            kernel.warmup(
                **{name: specialisations.decoded(v) for name, v in told.arguments.items()}, grid=(1,), **told.options
            )
            ours, theirs = seen.pop(), seen.pop()
            if ours != theirs:
                wrong.append([line, str(theirs)])
    return [sorted({kernel.__name__ for kernel, *_ in launches}), sorted(aot.kernel_modules()), wrong]


def test_kernels_that_the_package_does_not_hold_are_left_out(monkeypatch, tmp_path, device):
    """Those into which a test plants a fault: no other process could import them."""
    y = torch.ones(2, 4, 3, 3, device=device)
    with described_launches() as right:
        batchnorm.batch_moments(y)
    plant(monkeypatch, tmp_path, batchnorm.statistics, "raise ValueError(", "raise RuntimeError(")
    launch.forget_plans()
    with described_launches() as planted:
        batchnorm.batch_moments(y)
    launch.forget_plans()
    kernels = [{json.loads(line)["kernel"].partition(":")[2] for line in lines} for lines in (right, planted)]
    assert kernels == [{"batch_moments_kernel", "combine_kernel"}, {"combine_kernel"}]


@pytest.mark.compiled
def test_triton_compiles_a_description_as_it_compiles_the_launch():
    """Types, constants, divisibility, warps and stages, of launches of every kernel and of the integers where Triton's
    choices change.
    """
    compared, kernels, wrong = run_compiled(triton_sees)
    assert wrong == []
    assert compared == kernels


def binaries_of_records():
    """For each launch of a kernel whose constants are records, the binaries that Triton makes of the launch itself and
    of its description.
    """
    from cnnfast_kernels.aot import specialisations
    from cnnfast_kernels.aot.stub_driver import stub_driver
    from tests.support.records import BLOCK, ENDING, WINDOW, operands, sum_rows_kernel

    x, y, bias = operands()
    found = []
    with stub_driver(90):
        for g in (WINDOW, WINDOW._replace(C=16)):
            for e in (ENDING, ENDING._replace(ACTIVATION=None)):
                for optional in ((bias, 2), (None, None)):
                    arguments, options = (x, y, optional[0], 16, optional[1]), {"g": g, "e": e, "BLOCK": BLOCK}
                    line = specialisations.described(sum_rows_kernel, arguments, options)
                    launched = sum_rows_kernel[(2,)](*arguments, enable_fp_fusion=True, **options)
                    found.append([launched.hash, specialisations.Described.of(line).compile().hash])
    return found


@pytest.mark.compiled
def test_a_description_with_records_is_compiled_as_its_launch():
    found = run_compiled(binaries_of_records)
    assert [launched for launched, _ in found] == [described for _, described in found]
    assert len({launched for launched, _ in found}) == 8


# ----------------------------------------------------------------------------------------------------------------------
# Which launches are one


def how_many_programs(lines, pairs):
    """For each (change, change) of arguments of one of the lines: how many programs the two are. "g.C" is field C of
    argument g.
    """
    import json

    from cnnfast_kernels.aot.specialisations import Described, decoded

    def changed(kernel, change):
        told = next(told for told in map(json.loads, lines) if told["kernel"].endswith(f":{kernel}"))
        for name, value in change.items():
            record, _, field = name.partition(".")
            if field:
                fields = type(decoded(told["arguments"][record]))._fields
                told["arguments"][record]["tuple"][fields.index(field)] = value
            else:
                told["arguments"][name] = value
        return Described.of(json.dumps(told)).program()

    return [len({changed(kernel, one), changed(kernel, other)}) for kernel, one, other in pairs]


TENSOR = {"tensor": "float16", "aligned": True}
RECORDS = "sum_rows_kernel"
FPROP, DGRAD, WGRAD = "conv_fprop_kernel", "conv_dgrad_kernel", "conv_wgrad_kernel"
DEPTHWISE = "depthwise_fprop_kernel"
WINDOW = {"tuple": list(records.WINDOW), "class": "tests.support.records:Window"}


def limits(upper):
    """Limits, as a description has them."""
    return {"tuple": [0.0, upper], "class": "tests.support.records:Limits"}


# What differs, the kernel, two changes of its arguments, and how many programs they are.
PAIRS = [
    ("channels and blocks that they fill", FPROP, {"g.C": 32, "BLOCK_K": 16}, {"g.C": 64, "BLOCK_K": 32}, 1),
    ("an extent", FPROP, {"N": 2}, {"N": 16}, 1),
    ("a float", FPROP, {"e.eps": 1e-5}, {"e.eps": 1e-3}, 1),
    ("an address", FPROP, {"residual_ptr": TENSOR}, {"residual_ptr": TENSOR | {"aligned": False}}, 1),
    (
        "a stride and the taps of its classes",
        DGRAD,
        {"g.R": 9, "g.stride_h": 2, "form.STEP_H": 2},
        {"g.R": 9, "g.stride_h": 3, "form.STEP_H": 3},
        1,
    ),
    ("the turns of an unrolled loop", DEPTHWISE, {"block.ROWS": 4}, {"block.ROWS": 8}, 1),
    ("an operand is absent", FPROP, {"residual_ptr": None}, {"residual_ptr": TENSOR}, 2),
    ("the dtype of an operand", FPROP, {"residual_ptr": TENSOR}, {"residual_ptr": TENSOR | {"tensor": "float32"}}, 2),
    ("a number is absent", FPROP, {"x_stride_c": None}, {"x_stride_c": 2}, 2),
    ("a name", FPROP, {"e.activation": None}, {"e.activation": "relu"}, 2),
    ("a type", WGRAD, {"ACC": {"constant": "fp32"}}, {"ACC": {"constant": "fp64"}}, 2),
    ("a number is 1", FPROP, {"K": 1}, {"K": 2}, 2),
    ("a number takes 64 bits", FPROP, {"K": 2}, {"K": 2**40}, 2),
    ("EVEN", FPROP, {"g.C": 32, "BLOCK_K": 16}, {"g.C": 33, "BLOCK_K": 16}, 2),
    ("FLAT", FPROP, {"g.C": 33, "BLOCK_K": 64}, {"g.C": 33, "BLOCK_K": 16}, 2),
    (
        "more taps than an int has bits",
        FPROP,
        {"g.C": 32, "BLOCK_K": 16, "g.R": 3},
        {"g.C": 32, "BLOCK_K": 16, "g.R": 11},
        2,
    ),
    (
        "what a helper decides: class_axis, of rows alone",
        DGRAD,
        {"g.stride_w": 2, "g.stride_h": 1},
        {"g.stride_w": 2, "g.stride_h": 2},
        2,
    ),
    ("an unrolled loop of one turn", DEPTHWISE, {"block.ROWS": 1}, {"block.ROWS": 2}, 2),
    ("numbers of a record", RECORDS, {"g.C": 8, "g.STRIDE": 2}, {"g.C": 16, "g.STRIDE": 3}, 1),
    ("the class of a record", RECORDS, {"g": WINDOW}, {"g": WINDOW | {"class": "tests.support.records:Ending"}}, 2),
    ("a name in a record", RECORDS, {"e.ACTIVATION": None}, {"e.ACTIVATION": "clamp"}, 2),
    ("a type in a record", RECORDS, {"e.ACC": {"constant": "fp32"}}, {"e.ACC": {"constant": "fp64"}}, 2),
    ("a number in a record is absent", RECORDS, {"e.LIMITS": limits(40.0)}, {"e.LIMITS": limits(None)}, 2),
    ("a number in a record of a record", RECORDS, {"e.LIMITS": limits(40.0)}, {"e.LIMITS": limits(3.0)}, 1),
]


@pytest.fixture(scope="module")
def programs():
    """How many programs each of PAIRS is."""
    x, w, narrow = (torch.ones(shape, dtype=torch.float16) for shape in ((1, 32, 4, 4), (4, 32, 3, 3), (32, 1, 3, 3)))
    with described_launches() as lines:
        y = conv.conv_fprop(x, w, GEOMETRY)
        conv.conv_dgrad(y, w, x.shape, GEOMETRY)
        conv.conv_wgrad(x, y, w.shape, GEOMETRY)
        conv.conv_fprop(x, narrow, GEOMETRY._replace(groups=32))
    constants = {"g": records.WINDOW, "e": records.ENDING, "BLOCK": records.BLOCK}
    told = specialisations.described(records.sum_rows_kernel, (*records.operands(), 16, None), constants)
    return run_compiled(how_many_programs, [*lines, told], [pair[1:4] for pair in PAIRS])


@pytest.mark.compiled
@recorded_here
@pytest.mark.parametrize("i", range(len(PAIRS)), ids=[pair[0] for pair in PAIRS])
def test_launches_are_one_program_if_types_and_decisions_are_the_same(i, programs):
    assert programs[i] == PAIRS[i][-1]


def decided_of_parts():
    from cnnfast_kernels.aot.decisions import UNKNOWN, decisions
    from cnnfast_kernels.tma.boxes import take_part

    return [len(decisions(take_part, {"PARTS": parts})) for parts in (1, 8, UNKNOWN)]


@pytest.mark.compiled
def test_a_helper_that_calls_itself_is_read_to_an_end():
    """As often as it has parts, and if these are not known not for ever."""
    assert run_compiled(decided_of_parts) == [1, 4, 0]


def chosen(recordings):
    from cnnfast_kernels.aot.specialisations import representatives

    return [representatives(lines) for lines in recordings]


@pytest.mark.compiled
@recorded_here
def test_one_launch_of_each_program_and_one_of_each_number():
    with described_launches() as lines:
        conv.conv_fprop(torch.ones(1, 4, 3, 3), torch.ones(4, 4, 1, 1), GEOMETRY)
    (line,) = lines
    told = json.loads(line)

    def changed(**arguments):
        return json.dumps(told | {"arguments": told["arguments"] | arguments})

    e = told["arguments"]["e"]
    alike = [line, changed(N=16), changed(e=e | {"tuple": [0.5, *e["tuple"][1:]]})]
    # blocks of 64 and 128 rows, and of 256 and 512 columns, are told by three launches: a fourth says nothing new
    numbers = [changed(BLOCK_M=block, BLOCK_N=columns) for block in (64, 128) for columns in (256, 512)]
    constants = {"e": records.ENDING, "BLOCK": records.BLOCK}
    in_records = [
        specialisations.described(
            records.sum_rows_kernel,
            (*records.operands(), 16, None),
            constants | {"g": records.WINDOW._replace(C=C, STRIDE=stride)},
        )
        for C in (8, 16)
        for stride in (1, 2)
    ]
    twice, one, *three = run_compiled(chosen, [[line, line], alike, numbers, in_records])
    assert twice == [line]
    assert one == [min(alike)]
    assert three == [sorted(numbers)[:3], sorted(in_records)[:3]]


# ----------------------------------------------------------------------------------------------------------------------
# What the compiler refuses


def refusals(whole):
    import torch

    from cnnfast_kernels.aot.specialisations import described, refused
    from tests.support.uncompilable import KERNELS

    x = torch.ones(16)
    lines = [described(kernel, (x, None), {"BLOCK": 16, "num_warps": 1}) for kernel in KERNELS]
    return [refused(line, "sm_90", whole) for line in lines]


@pytest.mark.skipif(not launch.INTERPRETED, reason="GPU ring: kernels are compiled here")
@pytest.mark.parametrize("kernel", uncompilable.KERNELS, ids=lambda kernel: kernel.__name__)
def test_the_interpreter_runs_them(kernel, device):
    x = torch.zeros(16, device=device)
    kernel[(1,)](x, None, BLOCK=16, num_warps=1)
    assert (x == 1).all()


@pytest.mark.compiled
@pytest.mark.parametrize("whole", [False, True])
def test_a_refused_launch_is_told_with_its_kernel_operands_and_the_reason(whole):
    words = ("None", "Loop-carried variable total", "sum is not defined", "K >= 16")
    for kernel, word, told in zip(uncompilable.KERNELS, words, run_compiled(refusals, whole), strict=True):
        head, _, message = told.partition("): ")
        assert head == f"sm_90 {kernel.__name__}(x_ptr float32, bias_ptr None"
        assert word in message


@pytest.mark.parametrize(
    "change", [{"kernel": "cnnfast_kernels.gather.fprop:lost_kernel"}, {"arguments": {"lost": None}}]
)
def test_a_description_of_other_sources_is_an_error(change):
    told = {"kernel": "cnnfast_kernels.gather.fprop:conv_fprop_kernel", "arguments": {}, "options": {}}
    with pytest.raises(ValueError, match=r"no such kernel, or not with such parameters: .*lost"):
        specialisations.Described.of(json.dumps(told | change))


def test_interpreted_processes_are_refused():
    if not launch.INTERPRETED:
        pytest.skip("GPU ring: kernels are compiled here")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        specialisations.representatives([])
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        specialisations.refused(
            '{"kernel": "cnnfast_kernels.gather.fprop:conv_fprop_kernel", "arguments": {}, "options": {}}', "sm_90"
        )
