"""The interpreter's repairs (interpreter.py) prove themselves, with what must stay right or allowed beside what they
refuse.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.support.poison import embed

pytestmark = pytest.mark.cpu_tensors("this file is of the interpreter alone")

if not triton.knobs.runtime.interpret:
    pytest.skip("interpreter ring: a GPU is present, kernels are compiled", allow_module_level=True)


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, OUT: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)[:, None]
    j = tl.arange(0, N)[None, :]
    acc = tl.dot(tl.load(a_ptr + i * N + j), tl.load(b_ptr + i * N + j), out_dtype=OUT)
    tl.store(c_ptr + i * N + j, acc.to(c_ptr.dtype.element_ty))


@triton.jit
def fma_kernel(x_ptr, y_ptr, z_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(z_ptr + i, tl.fma(tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)))


@triton.jit
def cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, OPERATION: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if OPERATION == "add":
        y = x + x
    elif OPERATION == "compare":
        y = tl.where(x > x, x, x)  # against a number, some versions of triton compare in float32
    elif OPERATION == "negate":
        y = -x
    elif OPERATION == "scan":
        y = tl.associative_scan(x, 0, add)
    elif OPERATION == "abs":
        y = tl.abs(x)
    elif OPERATION == "select":
        y = tl.where(i > 0, x, 0.0)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty))


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def copy_kernel(x_ptr, y_ptr, start, count, shift_out, N: tl.constexpr):
    """y[i + shift_out] = x[start + i] for i < count."""
    i = tl.arange(0, N)
    x = tl.load(x_ptr + start + i, mask=i < count, other=0.0)
    tl.store(y_ptr + i + shift_out, x, mask=i < count)


@triton.jit
def increment_kernel(counter_ptr, i):
    tl.atomic_add(counter_ptr + i, 1)


@triton.jit
def copy_first_of_tuple_kernel(pointers, i):
    tl.store(pointers[1], tl.load(pointers[0] + i))


@triton.jit
def copy_box_kernel(x, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i[:, None] * N + i[None, :], x.load([-1, 0]))


@triton.jit
def assert_kernel(x_ptr, limit):
    tl.device_assert(tl.load(x_ptr) < limit, "too large")


@triton.jit
def wrap_kernel(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 0x1000)


def test_fma_rounds_once():
    """Of float32: the rounding error of a product is what is left of it; a sum halfway between two numbers, but for a
    bit far below, goes to the nearer one.
    """
    x, y = (torch.rand(1024, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    z = -x * y
    x[:2], y[:2] = torch.tensor([1 + 2.0**-23, 1 - 2.0**-23]), 2.0**-40
    z[:2] = 1 + 2.0**-23
    x[2:4], y[2:4], z[2:4] = torch.tensor([1 + 2.0**-23, 1 - 2.0**-23]), 2.0**-24, 1
    right = (x.double() * y.double() + z.double()).float()  # exact but for the last two
    right[2:4] = torch.tensor([1 + 2.0**-23, 1.0])
    fma_kernel[(1,)](x, y, z, 1024)
    assert torch.equal(z, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_accumulates_in_float32(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(2, 32, 32).to(dtype)
    c = torch.empty(32, 32)
    matmul_kernel[(1,)](a, b, c, OUT=tl.float32, N=32)
    # float16 would leave 1e-3
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=0, atol=1e-5)


def test_dot_in_float16_operands_overflows_nothing():
    a = torch.full((16, 16), 200.0, dtype=torch.float16)
    c = torch.empty(16, 16)
    matmul_kernel[(1,)](a, a, c, OUT=tl.float32, N=16)
    assert torch.equal(c, torch.full((16, 16), 640000.0))


def test_dot_in_float64():
    a, b = torch.randn(2, 16, 16, dtype=torch.float64)
    c = torch.empty(16, 16, dtype=torch.float64)
    matmul_kernel[(1,)](a, b, c, OUT=tl.float64, N=16)
    torch.testing.assert_close(c, a @ b, rtol=0, atol=1e-14)


def awkward_values(dtype: torch.dtype) -> torch.Tensor:
    """Ties between bfloat16 neighbours, overflow, subnormals, infinities, NaN, and many random bit patterns."""
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64, generator=torch.Generator().manual_seed(0)).to(
        torch.int32
    )
    ties = torch.arange(2048, dtype=torch.int32) * 0x10000 + 0x3F808000
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-40, -1e-45])
    values = torch.cat([bits.view(torch.float32), ties.view(torch.float32), special])
    return torch.nn.functional.pad(values, (0, 8192 - len(values))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_casts_into_bfloat16_round_to_nearest_even(dtype):
    x = awkward_values(dtype)
    y = torch.empty(len(x), dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, N=len(x))
    torch.testing.assert_close(y, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_casts_out_of_bfloat16(dtype):
    x = awkward_values(torch.float32).to(torch.bfloat16)
    y = torch.empty(len(x), dtype=dtype)
    cast_kernel[(1,)](x, y, N=len(x))
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_casts_between_bfloat16_and_integers(dtype):
    x = torch.arange(-64, 64, dtype=dtype)
    y = torch.empty(128, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, N=128)
    assert torch.equal(y, x.to(torch.bfloat16))
    z = torch.empty_like(x)
    cast_kernel[(1,)](y, z, N=128)
    assert torch.equal(z, x)


@pytest.mark.parametrize("operation", ["add", "compare", "negate", "scan"])
def test_bfloat16_arithmetic_is_refused(operation):
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match=r"(on|of) bfloat16: cast to float32 first"):
        arithmetic_kernel[(1,)](x, torch.empty_like(x), OPERATION=operation, N=16)


@pytest.mark.parametrize("operation", ["abs", "select"])
def test_what_is_right_on_raw_bits_is_allowed(operation):
    x = torch.linspace(-8, 7, 16).to(torch.bfloat16)
    y = torch.empty_like(x)
    arithmetic_kernel[(1,)](x, y, OPERATION=operation, N=16)
    assert torch.equal(y, x.abs() if operation == "abs" else torch.where(torch.arange(16) > 0, x, 0))


def test_load_around_a_slice_is_refused():
    x = embed(torch.ones(8), before=4, after=4)
    y = torch.zeros(16)
    copy_kernel[(1,)](x, y, 0, 8, 0, N=16)
    assert torch.equal(y, torch.tensor([1.0] * 8 + [0.0] * 8))
    with pytest.raises(InterpreterError, match=r"load in program .* 1 of 9 .* element 8 of x_ptr, which has 0 to 7"):
        copy_kernel[(1,)](x, y, 0, 9, 0, N=16)
    with pytest.raises(InterpreterError, match="element -1 of x_ptr"):
        copy_kernel[(1,)](x, y, -1, 8, 0, N=16)


def test_store_around_a_slice_is_refused_and_not_done():
    whole = torch.zeros(16)
    with pytest.raises(InterpreterError, match=r"store in program .* element 8 of y_ptr"):
        copy_kernel[(1,)](torch.ones(16), whole[4:12], 0, 8, 1, N=8)
    assert not whole.any()


def test_a_slice_may_be_used_as_far_as_its_strides_reach():
    whole = torch.arange(32.0).view(8, 4)
    y = torch.empty(32)
    copy_kernel[(1,)](whole[:, 1:3], y, 0, 30, 0, N=32)  # from element 1 to 30, gaps included
    assert torch.equal(y[:30], torch.arange(1.0, 31.0))
    with pytest.raises(InterpreterError, match="element 30 of x_ptr"):
        copy_kernel[(1,)](whole[:, 1:3], y, 0, 31, 0, N=32)


def test_masked_addresses_may_lie_anywhere():
    y = torch.zeros(16)
    copy_kernel[(1,)](torch.ones(16), y, 2**40, 0, 0, N=16)
    assert not y.any()


def test_atomics_are_checked():
    counter = torch.zeros(4, dtype=torch.int32)
    increment_kernel[(1,)](counter[1:3], 1)
    assert counter.tolist() == [0, 0, 1, 0]
    with pytest.raises(InterpreterError, match=r"atomic in program .* element 2 of counter_ptr"):
        increment_kernel[(1,)](counter[1:3], 2)


def test_tensors_in_a_tuple_are_known():
    pointers = (torch.arange(4.0), torch.zeros(1))
    copy_first_of_tuple_kernel[(1,)](pointers, 3)
    assert pointers[1].item() == 3
    with pytest.raises(InterpreterError, match=r"of pointers\[0\]"):
        copy_first_of_tuple_kernel[(1,)](pointers, 4)


def test_the_tensor_under_a_descriptor_is_known():
    x = torch.arange(64.0).view(8, 8)
    y = torch.empty(8, 8)
    copy_box_kernel[(1,)](TensorDescriptor.from_tensor(x, [8, 8]), y, N=8)
    assert torch.equal(y, torch.cat([torch.zeros(1, 8), x[:7]]))
    too_tall = TensorDescriptor(x[:2], [8, 8], [8, 1], [8, 8])
    with pytest.raises(InterpreterError, match=r"load .* of x, which has 0 to 15"):
        copy_box_kernel[(1,)](too_tall, y, N=8)


def test_device_assert_fires():
    x = torch.tensor([3])
    assert_kernel[(1,)](x, 4)
    with pytest.raises(InterpreterError, match="too large"):
        assert_kernel[(1,)](x, 3)


def test_integers_wrap_around():
    x = torch.tensor([2**31 - 1], dtype=torch.int32)
    wrap_kernel[(1,)](x)
    assert x.item() == 0x1000 - 2**31 - 1
