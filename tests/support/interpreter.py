"""What Triton's interpreter (TRITON_INTERPRET=1) leaves wrong or unchecked, put right for the tests. Works on triton
3.6 to 3.9.

The interpreter keeps bfloat16 as its raw 16 bits: products of them are silently wrong, and casts truncate. It reads and
writes any address. It ignores tl.device_assert. `install()` replaces the methods of its builder that do so:

- tl.fma of float32 rounds once, which it does from triton 3.9 on.
- tl.dot of bfloat16 is computed in float32, casts into bfloat16 round to nearest even, any other arithmetic on bfloat16
  raises.
- Every address that a load, store or atomic really uses must lie within one of the launch's tensor arguments, as far as
  sizes and strides of that view reach: what lies around a slice is out of bounds too.
- tl.device_assert fires.

Whatever is raised inside a kernel reaches the caller as triton.runtime.errors.InterpreterError with the message in it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, ScanOps, TensorHandle


def install() -> None:
    """Patches the interpreter of this process; a second call does nothing."""
    if getattr(InterpreterBuilder, "repaired", False):
        return
    InterpreterBuilder.repaired = True
    fuse_float32()
    compute_bfloat16_as_float32()
    refuse_bfloat16_arithmetic()
    check_addresses()
    # sanitize_overflow would come with debug: kernels may wrap around on purpose, as they do on a GPU.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=False)


# --- tl.fma -----------------------------------------------------------------------------------------------------------


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of float32, rounded once. The product is exact in float64; the sum is rounded there to an odd last bit
    where it is not exact, so that rounding it again, to float32, is what rounding the exact sum would be.
    """
    product, addend = x.astype(np.float64) * y, np.asarray(z, np.float64)
    total = product + addend
    rest = (product - (total - (total - product))) + (addend - (total - product))  # Knuth's: what the sum has lost
    even = (np.ascontiguousarray(total).view(np.int64) & 1) == 0
    lost = even & (rest != 0) & np.isfinite(total)
    return np.where(lost, np.nextafter(total, np.copysign(np.inf, rest)), total).astype(np.float32)


def fuse_float32() -> None:
    create_fma = InterpreterBuilder.create_fma

    def fused(self, x, y, z):
        if z.data.dtype != np.float32:
            return create_fma(self, x, y, z)
        with np.errstate(all="ignore"):
            return TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    InterpreterBuilder.create_fma = fused


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds to the nearest, ties to even, through float32 as PyTorch does; every NaN becomes the quiet one."""
    values = np.asarray(values).astype(np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def widen(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(from_bfloat16(handle.data), tl.float32) if is_bfloat16(handle) else handle


def compute_bfloat16_as_float32() -> None:
    dot, cast, fp_to_fp = (
        InterpreterBuilder.create_dot,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_fp_to_fp,
    )

    def create_dot(self, a, b, acc, *options):
        if is_bfloat16(acc):
            raise TypeError("tl.dot accumulating in bfloat16: ask for out_dtype=tl.float32")
        return dot(self, widen(a), widen(b), acc, *options)

    def cast_impl(self, source, dtype):
        if is_bfloat16(source) == (dtype.scalar == tl.bfloat16):
            return cast(self, source, dtype)
        if is_bfloat16(source):
            source = widen(source)
            return source if dtype.scalar == tl.float32 else cast(self, source, dtype)
        return TensorHandle(to_bfloat16(source.data), tl.bfloat16)

    def create_fp_to_fp(self, source, dtype, rounding):
        half = (tl.float16, tl.float32, tl.float64)
        toward_zero = getattr(rounding, "name", None) == "RTZ"
        if dtype.scalar == tl.bfloat16 and source.dtype.scalar in half and not toward_zero:
            return cast_impl(self, source, dtype)
        return fp_to_fp(self, source, dtype, rounding)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


# Moving, selecting and masking the sign (create_fabs) are right on raw bits; these are not. Every other arithmetic
# method of the builder goes through binary_op or unary_op.
ARITHMETIC = ("binary_op", "unary_op", "create_fma", "create_clampf", "create_rsqrt", "create_erf", "create_atomic_rmw")


def refuse_bfloat16_arithmetic() -> None:
    def guard(method: Callable, what: str) -> Callable:
        @functools.wraps(method)
        def guarded(self, *operands):
            if any(is_bfloat16(o) for o in operands):
                raise TypeError(f"{what} on bfloat16: cast to float32 first, the interpreter computes on the raw bits")
            return method(self, *operands)

        return guarded

    def guard_reduction(method: Callable, what: str) -> Callable:
        @functools.wraps(method)
        def guarded(self, inputs):
            if any(is_bfloat16(t.handle) for t in inputs):
                raise TypeError(f"{what} of bfloat16: cast to float32 first, the interpreter computes on the raw bits")
            return method(self, inputs)

        return guarded

    for name in ARITHMETIC:
        setattr(InterpreterBuilder, name, guard(getattr(InterpreterBuilder, name), name))
    ReduceOps.apply_impl = guard_reduction(ReduceOps.apply_impl, "reduction")
    ScanOps.apply_impl = guard_reduction(ScanOps.apply_impl, "scan")


# --- addresses --------------------------------------------------------------------------------------------------------


class Extent(NamedTuple):
    """Bytes [begin, end) that sizes and strides of the argument `name` reach."""

    name: str
    begin: int
    end: int


def extents_of(name: str, argument: Any) -> Iterator[Extent]:
    """The bytes of a tensor, of each tensor in a tuple, or of the tensor under a descriptor; nothing for anything
    else.
    """
    if isinstance(argument, tuple | list):
        for i, item in enumerate(argument):
            yield from extents_of(f"{name}[{i}]", item)
        return
    tensor = getattr(argument, "base", argument)  # TensorDescriptor, and Triton's TensorWrapper
    if isinstance(argument, torch.Tensor):
        tensor = argument
    if isinstance(tensor, torch.Tensor) and tensor.numel():
        begin = tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        yield Extent(name, begin, begin + (last + 1) * tensor.element_size())


def check_addresses() -> None:
    extents: list[Extent] = []  # of the launch in progress: the interpreter runs one at a time
    init_args = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic_rmw, atomic_cas = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas

    def init_args_hst(self, args, kwargs):
        host_args, host_kwargs = init_args(self, args, kwargs)
        named = [*zip(self.arg_names, host_args, strict=False), *host_kwargs.items()]
        extents[:] = [extent for name, argument in named for extent in extents_of(name, argument)]
        return host_args, host_kwargs

    def check(builder, operation: str, pointers: TensorHandle, mask: np.ndarray | bool) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        used = pointers.data[np.broadcast_to(mask, pointers.data.shape).astype(bool)]
        if not used.size:
            return
        low, high = int(used.min()), int(used.max()) + size
        if any(e.begin <= low and high <= e.end for e in extents):
            return
        inside = np.zeros(used.shape, bool)
        for e in extents:
            inside |= (used >= e.begin) & (used + np.uint64(size) <= e.end)
        if inside.all():
            return
        first = int(used[~inside][0])
        message = (
            f"{operation} in program {builder.grid_idx}: {np.sum(~inside)} of {used.size} addresses are out of bounds"
        )
        if extents:
            near = min(extents, key=lambda e: max(e.begin - first, first - e.end))
            element, last = (first - near.begin) // size, (near.end - near.begin) // size - 1
            message += f", the first at element {element} of {near.name}, which has 0 to {last}"
        raise IndexError(message)

    def create_masked_load(self, pointers, mask, *rest, **options):
        check(self, "load", pointers, mask.data)
        return load(self, pointers, mask, *rest, **options)

    def create_masked_store(self, pointers, value, mask, *rest, **options):
        check(self, "store", pointers, mask.data)
        return store(self, pointers, value, mask, *rest, **options)

    def create_atomic_rmw(self, operation, pointers, value, mask, *rest):
        check(self, "atomic", pointers, mask.data)
        return atomic_rmw(self, operation, pointers, value, mask, *rest)

    def create_atomic_cas(self, pointers, *rest):
        check(self, "atomic", pointers, True)
        return atomic_cas(self, pointers, *rest)

    GridExecutor._init_args_hst = init_args_hst
    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store
    InterpreterBuilder.create_atomic_rmw = create_atomic_rmw
    InterpreterBuilder.create_atomic_cas = create_atomic_cas


if __name__ == "__main__":  # a script, and its arguments, with the interpreter as tests have it
    import runpy
    import sys

    install()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
