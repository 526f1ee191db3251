"""What kernels do in Triton's interpreter: programs, products, and the bytes that their masks let through."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


@dataclass
class Counted:
    """Of all launches of a kernel. Bytes of a box are those that lie in its tensor."""

    launches: int = 0
    programs: int = 0
    products: int = 0
    loaded: int = 0
    stored: int = 0


def bytes_through(pointers, mask) -> int:
    return int(np.broadcast_to(mask.data, pointers.data.shape).sum()) * (
        pointers.get_element_ty().primitive_bitwidth // 8
    )


@contextmanager
def counted_bytes() -> Iterator[dict[str, Counted]]:
    """By kernels' names, of what is launched while the context lasts."""
    found: dict[str, Counted] = defaultdict(Counted)
    running = [Counted()]
    call, dot = GridExecutor.__call__, InterpreterBuilder.create_dot
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    grid_idx = InterpreterBuilder.set_grid_idx

    def counted_call(self, *args, **kwargs):
        running[0] = found[self.fn.__name__]
        running[0].launches += 1
        return call(self, *args, **kwargs)

    def counted_program(self, *index):
        running[0].programs += 1
        return grid_idx(self, *index)

    def counted_dot(self, *args, **kwargs):
        running[0].products += 1
        return dot(self, *args, **kwargs)

    def counted_load(self, pointers, mask, *args, **kwargs):
        running[0].loaded += bytes_through(pointers, mask)
        return load(self, pointers, mask, *args, **kwargs)

    def counted_store(self, pointers, value, mask, *args, **kwargs):
        running[0].stored += bytes_through(pointers, mask)
        return store(self, pointers, value, mask, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", counted_call)
        patch.setattr(InterpreterBuilder, "set_grid_idx", counted_program)
        patch.setattr(InterpreterBuilder, "create_dot", counted_dot)
        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        yield found
