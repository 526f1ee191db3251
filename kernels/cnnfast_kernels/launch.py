"""Launching kernels: at once by `run`, or again and again by a prepared `Launch`; and observing what is launched.

To work out the thirty arguments of a launch, and to let Triton find what it compiled for them, costs the host more time
than many a kernel takes. All of that follows from shapes, strides and dtypes: a launcher does it once, keeps the
`Launch`, and calls it with the tensors.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
import triton
from triton import knobs, runtime
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

# Triton decides when a kernel is decorated, hence at import, whether it is interpreted. So does this.
INTERPRETED: bool = bool(knobs.runtime.interpret)


@dataclass(frozen=True, slots=True)
class Launched:
    """One kernel launch, as an observer sees it. `compiled` is Triton's handle, or None in the interpreter."""

    kernel: str
    tile: Any
    grid: tuple[int, ...]
    compiled: Any


Substitute = Callable[[Any, tuple[int, ...], Sequence[Any], Mapping[str, Any]], Any]

# Triton's interpreter keeps the position in the grid in one object for all threads, and replaces functions of
# triton.language while a kernel runs: two threads' kernels would mix. Compiled kernels need no lock.
_interpreting = threading.Lock()

_observers: list[Callable[[Launched], None]] = []
# By thread: what is called in place of a launch, and whether observers are told of it.
_substitutes: dict[int, tuple[Substitute, bool]] = {}


@contextmanager
def observe(callback: Callable[[Launched], None], compile_only: bool = False) -> Iterator[None]:
    """Calls `callback` for every launch, from any thread. With compile_only this thread's kernels are compiled and not
    run (aot/compiling.py).
    """
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
    event = Launched(kernel.__name__, tile, grid, compiled)
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
        with torch.cuda.device(device) if foreign else _interpreting if INTERPRETED else nullcontext():
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
    """A tensor map without its tensor, one of the `maps` of a `Launch`: the kernel sees the tensor in boxes of `block`
    elements.

    Raises AssertionError where there can be no such map: the last stride is 1, the others are multiples of 16 bytes,
    and extents are positive.
    """
    return TensorDescriptor(torch.empty(0, dtype=dtype, device="meta"), list(shape), list(strides), list(block))


_new = object.__new__


def _placeless(map_: TensorDescriptor) -> type[TensorDescriptor]:
    """A class whose instances are equal to a map but for their tensor. Such an instance is made in a quarter of the
    time that a map takes, whose constructor sets and checks every field.
    """
    return type(
        "TensorDescriptor", (TensorDescriptor,), {name: value for name, value in vars(map_).items() if name != "base"}
    )


Operands = TypeVar("Operands", bound=tuple[torch.Tensor | None, ...])


class Launch(Generic[Operands]):
    """A launch but for its tensors: kernel, grid, and every argument that follows from shapes, strides and dtypes.

    Called with a record of the tensors (operands.py), which are the kernel's first parameters (None where absent; the
    first is present), it launches on their device and its current stream. `scalars` are the parameters that follow
    them; `tile` and `options` as in `run`. `maps` gives, by its position, each tensor that the kernel takes as a tensor
    map; those tensors are of the map's dtype and start at a multiple of 16 bytes.

    What Triton compiled is kept by what would make Triton compile again: the device, and for every tensor that is no
    map its dtype and whether its address is a multiple of 16 bytes. No tensor is kept: a map gets its tensor at each
    launch, in which Triton encodes it.
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

    def __call__(self, operands: Operands) -> None:
        tensors: Any = operands
        if INTERPRETED or _substitutes or not RUN_IS_KNOWN or _triton_must_launch():
            self.run(tensors)
            return
        driver: Any = runtime.driver.active
        device, own = driver.get_current_device(), tensors[0].get_device()
        if own != device and own >= 0:  # -1: not a GPU's
            with torch.cuda.device(tensors[0].device):
                self(operands)
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
        """The tensors as the kernel takes them. What a map's constructor checks was checked when the launch was
        prepared, except for the address.
        """
        arguments = list(tensors)
        for i, placeless in self.maps:
            arguments[i] = seen = _new(placeless)
            seen.base = tensors[i]
        return tuple(arguments)

    def run(self, tensors: tuple[Any, ...]) -> Any:
        arguments = self.mapped(tensors)
        return run(self.kernel, self.grid, tensors[0].device, *arguments, *self.scalars, tile=self.tile, **self.options)


# Of each function that prepares launches: a network has dozens of shapes, and images of all sizes make thousands.
PLANS_KEPT = 2048
_plan_caches: list[Any] = []
_forgotten = 0  # how often plans were forgotten


def planned(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps the results of a function that makes plans, or what takes them, from hashable arguments: of those used
    last.

    Several threads may ask at once, and may make the same plan twice. A plan that another thread's forget_plans
    overtakes while it is made is made again: it would be kept although it is an old one.
    """

    @functools.wraps(function)
    def make(*arguments: Any, **options: Any) -> Any:
        while True:
            forgotten = _forgotten
            result = function(*arguments, **options)
            if forgotten == _forgotten:
                return result

    cached = functools.lru_cache(PLANS_KEPT)(make)
    _plan_caches.append(cached)
    return cached


def forget_plans() -> None:
    """Plans are made anew, where something changed that they were made from: a tile table, a kernel."""
    global _forgotten
    _forgotten += 1
    for cached in _plan_caches:
        cached.cache_clear()
