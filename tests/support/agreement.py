"""Our functions against PyTorch's: the same call on the same inputs, its result and the gradients of all inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import cnnfast
from cnnfast.recording import Trace

Function = Callable[..., Tensor]


def integers(*shape: int, largest: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers, the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(t: Tensor) -> Tensor:
    """The same memory, in a tensor that wants a gradient."""
    return t.detach().requires_grad_()


@dataclass(frozen=True, slots=True)
class Outcome:
    y: Tensor
    grads: tuple[Tensor | None, ...]
    trace: Trace

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.y, *self.grads

    @property
    def operations(self) -> list[str]:
        return [call.operation for call in self.trace]


def like_the_result(y: Tensor) -> Tensor:
    """A gradient of small integers, laid out as the result."""
    return torch.empty_like(y, requires_grad=False).copy_(integers(*y.shape, seed=1))


def run(
    function: Function,
    inputs: Sequence[Tensor | None],
    frozen: Sequence[int] = (),
    dy: Callable[[Tensor], Tensor] = like_the_result,
) -> Outcome:
    """function(*inputs) and, for the gradient that `dy` makes of the result, the gradients of the inputs that are not
    `frozen`.
    """
    arguments = [t if t is None or i in frozen else leaf(t) for i, t in enumerate(inputs)]
    wanted = [i for i, t in enumerate(arguments) if t is not None and t.requires_grad]
    grads: list[Tensor | None] = [None] * len(arguments)
    with cnnfast.trace() as trace:
        y = function(*arguments)
        if wanted:
            for i, grad in zip(wanted, torch.autograd.grad(y, [arguments[i] for i in wanted], dy(y)), strict=True):
                grads[i] = grad
    return Outcome(y.detach(), tuple(grads), trace)


def exact(function: Function, inputs: Sequence[Tensor | None], frozen: Sequence[int] = ()) -> Outcome:
    """run(function, inputs) with the inputs in float64 on the CPU, for a function of PyTorch's."""
    return run(function, [None if t is None else t.detach().cpu().double().contiguous() for t in inputs], frozen)


def assert_served_by_kernels(trace: Trace) -> None:
    assert len(trace) > 0
    assert not [str(call) for call in trace if call.served_by != "kernels"]


def assert_bits(ours: Outcome, right: Outcome) -> None:
    """Asserts that every result equals what float64 says, for inputs of which every result is representable."""
    for mine, theirs in zip(ours.tensors, right.tensors, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            rounded = theirs.to(mine.dtype)
            assert torch.equal(rounded.double(), theirs), "the test asks for numbers that the dtype cannot hold"
            torch.testing.assert_close(mine.cpu(), rounded, rtol=0, atol=0)


def assert_close(ours: Outcome, right: Outcome, tolerance: float = 1e-11) -> None:
    for mine, theirs in zip(ours.tensors, right.tensors, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(
                mine.cpu(), theirs.to("cpu", mine.dtype), rtol=tolerance, atol=tolerance, equal_nan=True
            )


def assert_same_strides(ours: Outcome, theirs: Outcome) -> None:
    """Asserts that the result and all gradients have the same strides."""
    strides = [[None if t is None else t.stride() for t in outcome.tensors] for outcome in (ours, theirs)]
    assert strides[0] == strides[1]


@contextmanager
def saved_for_backward() -> Iterator[dict[int, int]]:
    """Collects the tensors that autograd saves: the address of each storage, and its bytes."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield seen


def saved_bytes(function: Function, inputs: Sequence[Tensor | None], frozen: Sequence[int] = ()) -> int:
    """Bytes of all storages that one call keeps alive for its backward."""
    with saved_for_backward() as saved:
        y = function(*(t if t is None or i in frozen else leaf(t) for i, t in enumerate(inputs)))
    assert y.grad_fn is not None or len(frozen) == len(inputs)
    return sum(saved.values())
