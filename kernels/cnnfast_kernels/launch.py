"""What every launcher shares: launches and plans of them, layouts and strides as kernels want them, who watches.

Working out a launch's sixty arguments, and letting Triton find what it compiled for them, costs the host more than many
a kernel takes. All of that follows from shapes, strides and dtypes: a launcher does it once, keeps the `Plan`, and
calls it with the tensors.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs, runtime
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

# Triton decides at decoration, that is at import, whether kernels are interpreted; so does this.
INTERPRETED: bool = bool(knobs.runtime.interpret)

KERNEL_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch, as an observer sees it. `compiled` is Triton's handle, or None in the interpreter."""

    kernel: str
    tile: Any
    grid: tuple[int, ...]
    compiled: Any


Substitute = Callable[[Any, tuple[int, ...], Sequence[Any], Mapping[str, Any]], Any]

_observers: list[Callable[[Launch], None]] = []
_substitutes: dict[int, tuple[Substitute, bool]] = {}  # by thread, and whether observers are told


@contextmanager
def observe(callback: Callable[[Launch], None], compile_only: bool = False) -> Iterator[None]:
    """Calls `callback` for every launch, from any thread. With compile_only this thread's kernels are compiled, not run
    (aot/compiling.py)."""
    _observers.append(callback)
    try:
        with substituted(_compile, told=True) if compile_only else nullcontext():
            yield
    finally:
        _observers.remove(callback)


@contextmanager
def substituted(substitute: Substitute, told: bool = False) -> Iterator[None]:
    """Launches nothing in this thread while the context lasts: substitute(kernel, grid, arguments, options) is called
    instead, and what it returns is taken for Triton's handle. Observers are told of it only if `told`. Other threads
    launch on.
    """
    thread = threading.get_ident()
    before = _substitutes.get(thread)
    _substitutes[thread] = substitute, told
    try:
        yield
    finally:
        if before is None:
            del _substitutes[thread]
        else:
            _substitutes[thread] = before


def _compile(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    return kernel.warmup(*arguments, grid=grid, enable_fp_fusion=True, **options)


def _tell(kernel: Any, tile: Any, grid: tuple[int, ...], compiled: Any) -> None:
    event = Launch(kernel.__name__, tile, grid, compiled)
    for callback in tuple(_observers):
        callback(event)


def run(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, tile: Any = None, **options: Any) -> Any:
    """Launches `kernel` on `device` and its current stream; an empty grid launches nothing. Returns Triton's handle of
    what it compiled.

    `options` are the kernel's constexpr arguments and Triton's num_warps and num_stages. `tile` is what observers are
    told.
    """
    if 0 in grid:
        return None
    told = True
    if _substitutes and (found := _substitutes.get(threading.get_ident())) is not None:
        substitute, told = found
        compiled = substitute(kernel, grid, args, options)
    else:
        # Triton asks the current device for its stream; the tensors' device need not be the current one.
        foreign = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if foreign else nullcontext():
            compiled = kernel[grid](*args, enable_fp_fusion=True, **options)
    if _observers and told:
        _tell(kernel, tile, grid, compiled)
    return compiled


# The versions of Triton whose CompiledKernel.run takes (grid x, y, z, stream, function, packed_metadata,
# launch_metadata, enter_hook, exit_hook, *arguments). With any other, and where somebody hooks into launches, Triton
# launches by its own code.
RUN_IS_KNOWN = (3, 6) <= tuple(int(n) for n in triton.__version__.split(".")[:2]) <= (3, 9)


def _triton_must_launch() -> bool:
    now: Any = knobs.runtime
    enter, leave = now.launch_enter_hook, now.launch_exit_hook
    return (
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or now.debug
        or now.add_stages_inspection_hook is not None
    )


def tensor_map(
    shape: Sequence[int], strides: Sequence[int], block: Sequence[int], dtype: torch.dtype
) -> TensorDescriptor:
    """How a kernel sees a tensor through boxes of `block` elements, without the tensor: what `Plan` takes as one of its
    `maps`.

    Raises AssertionError where a map cannot be: strides but the last, which is 1, are multiples of 16 bytes, extents
    are positive.
    """
    return TensorDescriptor(torch.empty(0, dtype=dtype, device="meta"), list(shape), list(strides), list(block))


_new = object.__new__


def _placeless(map_: TensorDescriptor) -> type[TensorDescriptor]:
    """A class of maps that differ in nothing but their tensor: one is made in a quarter of the time that all its fields
    would take.
    """
    return type(
        "TensorDescriptor", (TensorDescriptor,), {name: value for name, value in vars(map_).items() if name != "base"}
    )


class Plan:
    """A launch but for its tensors: kernel, grid, and every argument that follows from shapes, strides and dtypes.

    Called with the tensors, the kernel's first parameters (None where absent; the first is present), it launches on
    their device and its current stream. `scalars` are the parameters that follow them; `tile` and `options` as in
    `run`. `maps` names, by position, the tensors that the kernel gets as tensor maps, and the maps; those tensors are
    of the map's dtype and start at a multiple of 16 bytes.

    Keeps what Triton compiled, by what would make Triton compile again: the device, and each other tensor's dtype and
    whether its address is a multiple of 16 bytes. Keeps no tensor: a map is given its tensor at each launch, in which
    Triton encodes it.
    """

    __slots__ = ("compiled", "grid", "kernel", "maps", "options", "pointers", "scalars", "tile")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int],
        *scalars: Any,
        tile: Any = None,
        maps: Mapping[int, TensorDescriptor] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        self.kernel, self.grid, self.scalars, self.tile, self.options = kernel, grid, scalars, tile, options
        self.maps = tuple((i, _placeless(map_)) for i, map_ in maps.items())
        tensors = len(kernel.arg_names) - len(scalars) - sum(name in kernel.arg_names for name in options)
        self.pointers = tuple(i for i in range(tensors) if i not in maps)
        self.compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(self, *tensors: Any) -> None:
        if INTERPRETED or _substitutes or not RUN_IS_KNOWN or _triton_must_launch():
            self.run(tensors)
            return
        driver: Any = runtime.driver.active
        device, own = driver.get_current_device(), tensors[0].get_device()
        if own != device and own >= 0:  # -1: not a GPU's
            with torch.cuda.device(tensors[0].device):
                self(*tensors)
            return
        key, addresses = [device], 0
        for i in self.pointers:
            t = tensors[i]
            if t is None:
                key.append(None)
            else:
                key.append(t.dtype)
                addresses |= t.data_ptr()
        if addresses % 16:
            key += [tensors[i] is not None and tensors[i].data_ptr() % 16 == 0 for i in self.pointers]
        found = self.compiled.get(tuple(key))
        if found is None:
            kernel = self.run(tensors)
            if isinstance(kernel, CompiledKernel):
                parameters = self.kernel.arg_names[len(tensors) + len(self.scalars) :]
                arguments = *self.scalars, *(self.options[name] for name in parameters)
                self.compiled[tuple(key)] = kernel.run, kernel.function, kernel.packed_metadata, arguments, kernel
            return
        launch, function, metadata, arguments, kernel = found
        if self.maps:
            tensors = self.mapped(tensors)
        launch(
            self.grid[0],
            1,
            1,
            driver.get_current_stream(device),
            function,
            metadata,
            None,
            None,
            None,
            *tensors,
            *arguments,
        )
        if _observers:
            _tell(self.kernel, self.tile, self.grid, kernel)

    def mapped(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        """The tensors as the kernel gets them. What a map's constructor checks was checked when the plan was made, but
        for the address.
        """
        arguments = list(tensors)
        for i, placeless in self.maps:
            arguments[i] = seen = _new(placeless)
            seen.base = tensors[i]
        return tuple(arguments)

    def run(self, tensors: tuple[Any, ...]) -> Any:
        arguments = self.mapped(tensors)
        return run(self.kernel, self.grid, tensors[0].device, *arguments, *self.scalars, tile=self.tile, **self.options)


# by each function that makes some: a network has dozens of shapes, images of all sizes make thousands
PLANS_KEPT = 2048
_plan_caches: list[Any] = []


def planned(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps the results of a function that makes plans, or what takes them, from hashable arguments: of those used
    last.
    """
    cached = functools.lru_cache(PLANS_KEPT)(function)
    _plan_caches.append(cached)
    return cached


def forget_plans() -> None:
    """Plans are made anew, where something changed that they were made from: a tile table, a kernel."""
    for cached in _plan_caches:
        cached.cache_clear()


class Gpu(NamedTuple):
    """name: as CUDA tells it, "" where there is none. arch: 90 for sm_90."""

    name: str
    arch: int


NO_GPU = Gpu("", 90)


@functools.cache
def _gpu(index: int) -> Gpu:
    major, minor = torch.cuda.get_device_capability(index)
    return Gpu(torch.cuda.get_device_name(index), 10 * major + minor)


@functools.cache
def _unnamed(arch: int) -> Gpu:
    return Gpu("", arch)


_stand_in: tuple[Gpu, str] | None = None


@contextmanager
def meta_stands_for(gpu: Gpu, device_type: str = "cuda") -> Iterator[None]:
    """Plans for meta tensors, which hold nothing, are made as if they were on `gpu`, for the whole process, while the
    context lasts.

    device_type: what `type_of` says of their device meanwhile.
    """
    global _stand_in
    before, _stand_in = _stand_in, (gpu, device_type)
    try:
        yield
    finally:
        _stand_in = before


def type_of(device: torch.device) -> str:
    """`device.type`, and of meta tensors that stand for others, that of theirs."""
    return device.type if _stand_in is None or device.type != "meta" else _stand_in[1]


def gpu(device: torch.device) -> Gpu:
    """What plans for tensors on `device` are made for. The interpreter runs what sm_90 would."""
    if _stand_in is not None and device.type == "meta":
        return _stand_in[0]
    if INTERPRETED:
        return NO_GPU
    if device.type == "cuda":
        return _gpu(device.index)
    ahead_of_time: Any = runtime.driver.active.get_current_target()
    return _unnamed(ahead_of_time.arch)


def architecture(device: torch.device) -> int:
    """90 for sm_90: what kernels for tensors on `device` are compiled for."""
    return gpu(device).arch


class Strides(NamedTuple):
    """Strides in units of `align` elements, channels last; `c` is None where channels are adjacent.

    Handing kernels `stride * ALIGN` with a constexpr ALIGN tells the compiler that rows are aligned, hence vector
    loads, without specialising on values: another N, H or W compiles nothing.
    """

    n: int
    h: int
    w: int
    c: int | None
    align: int


class Layout(NamedTuple):
    """A tensor but for its memory and device: what plans are made from."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def stride(self, d: int | None = None) -> Any:
        return self.strides if d is None else self.strides[d]

    def dim(self) -> int:
        return len(self.shape)


Laid = torch.Tensor | Layout


def layout(t: Laid) -> Layout:
    return t if isinstance(t, Layout) else Layout(tuple(t.shape), t.stride(), t.dtype)


def dense(shape: Sequence[int], dtype: torch.dtype, fmt: torch.memory_format = torch.contiguous_format) -> Layout:
    """The layout of a tensor that `empty` would allocate."""
    shape = tuple(shape)
    return Layout(shape, torch.empty(shape, device="meta", memory_format=fmt).stride(), dtype)


def strides_nhwc(t: Laid) -> Strides:
    """Strides of a tensor of logical shape [N, C, H, W] (weights: [K, C, R, S]), in the order n, h, w, c."""
    n, c, h, w = (s if size > 1 else 0 for s, size in zip(t.stride(), t.shape, strict=True))
    if c > 1:  # channels are apart: nothing to vectorise
        return Strides(n, h, w, c, 1)
    align = 8
    pixel = 0 if n or h or w else t.shape[1]  # one pixel is aligned as those of a larger image
    while n % align or h % align or w % align or pixel % align:
        align //= 2
    return Strides(n // align, h // align, w // align, None if t.shape[1] == 1 or c == 1 else c, align)


def is_channels_last(t: Laid) -> bool:
    """PyTorch's `is_channels_last_strides_2d`, which suggest_memory_format follows and Python cannot call."""
    if t.dim() != 4:
        return False
    N, C, H, W = t.shape
    n, c, h, w = t.stride()
    if c == 0 or C == 0 or H == 0 or W == 0 or N == 0:
        return False
    # every axis begins where the one inside it ends, from channels outwards
    columns = c * C if C > 1 else c
    rows = w * W if W > 1 else w
    images = h * H if H > 1 else h
    return w >= columns and h >= rows and n >= images and images != c


def memory_format(*tensors: Laid) -> torch.memory_format:
    """The format of a result, as PyTorch's convolutions choose it: channels_last if any operand is."""
    return torch.channels_last if any(is_channels_last(t) for t in tensors) else torch.contiguous_format


def convolution_format(x: Laid, w: Laid) -> torch.memory_format:
    """The format of a convolution's result, and of the gradients of x and w, as PyTorch chooses it for x [N, C, H, W]
    and w [K, C, R, S].

    That is channels_last if either is, and neither is empty. PyTorch then copies them into that format, and asks what
    came of it once more: several images of one element each lie in every format after that, whatever their strides said
    before.
    """
    if 0 in x.shape or 0 in w.shape:
        return torch.contiguous_format
    found = False
    for t in (x, w):
        if is_channels_last(t):
            if t.shape[1:] != (1, 1, 1):
                return torch.channels_last
            found = True
    return torch.channels_last if found and any(map(_is_channels_last_copied, (x, w))) else torch.contiguous_format


def _is_channels_last_copied(t: Laid) -> bool:
    """`is_channels_last` of t.contiguous(memory_format=torch.channels_last), which is t itself where it lies so; t is
    not empty.
    """
    N, C, H, W = t.shape
    if N > 1 and C * H * W == 1:
        return False
    dense = H * W * C, 1, W * C, C
    return is_channels_last(t) or any(
        size > 1 and step != own for size, step, own in zip(t.shape, t.stride(), dense, strict=True)
    )


def empty(
    shape: Sequence[int] | Layout,
    like: torch.Tensor,
    fmt: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Every output and workspace of this package is allocated here, so that tests can fill them with NaN first.

    A layout says it all, and takes half as long.
    """
    if isinstance(shape, Layout):
        extents, strides, dtype = shape
        return like.new_empty_strided(extents, strides, dtype=dtype)
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=fmt)


@contextmanager
def poisoned() -> Iterator[None]:
    """What `empty` returns is full of NaN while the context lasts, for the whole process: an element that no kernel
    writes shows, where memory of a former call might have held the right number.
    """
    global empty
    allocate = empty

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        t = allocate(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    empty = filled
    try:
        yield
    finally:
        empty = allocate


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
