"""Kernels that Triton's interpreter runs and its compiler refuses: each writes 1 to x [BLOCK] of float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_both(x_ptr, bias_ptr, offsets):
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offsets)
    return tl.load(x_ptr + offsets), bias


@triton.jit
def tuple_holds_none_kernel(x_ptr, bias_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, bias = load_both(x_ptr, bias_ptr, offsets)
    one = x * 0 + 1
    if bias is not None:
        one += bias
    tl.store(x_ptr + offsets, one)


@triton.jit
def type_changes_in_loop_kernel(x_ptr, bias_ptr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for _ in range(tl.program_id(0) + 2):
        total = total + 0.5
    tl.store(x_ptr + tl.arange(0, BLOCK), total)


@triton.jit
def python_function_kernel(x_ptr, bias_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), sum((0.25, 0.75)))


@triton.jit
def product_of_small_blocks_kernel(x_ptr, bias_ptr, BLOCK: tl.constexpr):
    a = tl.full((BLOCK, 4), 0.25, tl.float16)
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.max(tl.dot(a, a.T) * 4.0, 1))


KERNELS = [tuple_holds_none_kernel, type_changes_in_loop_kernel, python_function_kernel, product_of_small_blocks_kernel]
