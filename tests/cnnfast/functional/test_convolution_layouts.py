"""How the results and gradients of convolutions lie in memory, and what becomes of empty ones: as PyTorch has it, on
the CPU.

There all results and gradients of one call are in one format. Two things PyTorch's own kernels do not agree on, and
they are not asked here: the strides of a weight gradient along axes of one element, where those that multiply an
explicit im2col lay it out by its columns, and oneDNN's and cuDNN's as torch.empty would; and float64, which cuDNN alone
never lays out channels_last.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as theirs

import cnnfast
import cnnfast.functional as ours
from cnnfast import dispatch
from tests.support.agreement import integers, leaf

launch = pytest.importorskip("cnnfast_kernels.launch")


def permuted(shape: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    """Zeros whose axes are in this order in memory, from the one with the largest stride on."""
    return torch.zeros([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))])


def channels_adjacent(shape: tuple[int, ...]) -> torch.Tensor:
    """channels_last, of three axes too."""
    return permuted(shape, (0, *range(2, len(shape)), 1))


def repeated(shape: tuple[int, ...], axes: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros([1 if i in axes else n for i, n in enumerate(shape)]).expand(shape)


def inner(shape: tuple[int, ...], lay: Callable[[tuple[int, ...]], torch.Tensor]) -> torch.Tensor:
    """Cut out of a tensor that is two elements longer along every axis."""
    return lay(tuple(n + 2 for n in shape))[tuple(slice(1, 1 + n) for n in shape)]


LAYOUTS: dict[str, Callable[[tuple[int, ...]], torch.Tensor]] = {
    "contiguous": torch.zeros,
    "channels adjacent": channels_adjacent,
    "batch adjacent": lambda shape: permuted(shape, (*range(1, len(shape)), 0)),
    "last axes exchanged": lambda shape: permuted(shape, (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)),
    "one item repeated": lambda shape: repeated(shape, (0,)),
    "one channel repeated": lambda shape: repeated(shape, (1,)),
    "one number repeated": lambda shape: repeated(shape, tuple(range(len(shape)))),
    "cut out of contiguous": lambda shape: inner(shape, torch.zeros),
    "cut out of channels adjacent": lambda shape: inner(shape, channels_adjacent),
    "every second element": lambda shape: torch.zeros([2 * n for n in shape])[tuple(slice(0, 2 * n, 2) for n in shape)],
}
DENSE = ("contiguous", "channels adjacent")


class Program(NamedTuple):
    function: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    arguments: dict

    def __str__(self) -> str:
        return (
            f"{self.function} {'x'.join(map(str, self.x))} {'x'.join(map(str, self.w))} {self.arguments or ''}".strip()
        )

    @property
    def filters(self) -> int:
        return self.w[1] * self.arguments.get("groups", 1) if self.function == "conv_transpose2d" else self.w[0]


def programs() -> Iterator[Program]:
    """One channel, one filter, one pixel, one row, one column, one image and one tap make strides ambiguous."""
    for C, K in ((4, 6), (1, 6), (4, 1), (1, 1)):
        for N, taps in ((2, (1, 1)), (1, (3, 2)), (2, (3, 2))):
            for size in ((5, 4), (1, 1), (1, 4)):
                yield Program("conv2d", (N, C, *size), (K, C, *taps), {"padding": 1})
                yield Program("conv_transpose2d", (N, C, *size), (C, K, *taps), {})
            for length in (5, 1):
                yield Program("conv1d", (N, C, length), (K, C, taps[1]), {"padding": 1})
    for K in (4, 8):
        yield Program("conv2d", (2, 4, 5, 4), (K, 1, 3, 3), {"groups": 4, "padding": 1})
    yield Program("conv2d", (1, 4, 5, 4), (8, 2, 3, 3), {"groups": 2, "padding": 3, "dilation": (1, 2)})
    yield Program("conv2d", (4, 5, 4), (8, 2, 3, 3), {"groups": 2, "padding": 1})
    yield Program("conv_transpose2d", (2, 4, 5, 4), (4, 2, 3, 3), {"groups": 2, "stride": 2})
    yield Program("conv_transpose2d", (4, 5, 4), (4, 1, 3, 3), {"groups": 4})
    yield Program("conv1d", (2, 4, 5), (4, 1, 3), {"groups": 4, "padding": 1})
    yield Program("conv1d", (4, 5), (6, 4, 3), {})


class Laid(NamedTuple):
    """A tensor's size and strides. of_axes: only those of axes of more than one element."""

    shape: tuple[int, ...]
    strides: tuple[int | None, ...]
    dtype: torch.dtype


def laid(t: torch.Tensor, of_axes: bool = False) -> Laid:
    strides = tuple(None if of_axes and n == 1 else step for step, n in zip(t.stride(), t.shape, strict=True))
    return Laid(tuple(t.shape), strides, t.dtype)


def outcome(call: Callable[..., torch.Tensor], tensors: list[torch.Tensor], dy_layout: str | None) -> list[Laid]:
    """Of the result and the gradients of (x, w, bias). dy_layout None: dy is laid out as the result."""
    leaves = [leaf(t) for t in tensors]
    y = call(*leaves)
    dy = torch.zeros_like(y) if dy_layout is None else LAYOUTS[dy_layout](tuple(y.shape)).to(y)
    dx, dw, db = torch.autograd.grad(y, leaves, dy)
    return [laid(y), laid(dx), laid(dw, of_axes=True), laid(db)]


@pytest.fixture
def nothing_runs(device: torch.device) -> Iterator[None]:
    # asks once, by a launch, what the interpreter makes of it
    dispatch.why_torch(torch.zeros(1, dtype=torch.bfloat16, device=device))
    with launch.substituted(lambda *launched: None):
        yield


def assert_same_layouts(program: Program, dtype: torch.dtype, device: torch.device, dense_only: bool = False) -> None:
    for x_layout in DENSE if dense_only else LAYOUTS:
        for w_layout in DENSE if dense_only else LAYOUTS:
            both = x_layout in DENSE and w_layout in DENSE
            for dy_layout in (None, *DENSE, "one number repeated") if both else (None,):
                tensors = [LAYOUTS[x_layout](program.x), LAYOUTS[w_layout](program.w), torch.zeros(program.filters)]
                mine, right = (
                    outcome(called(functions, program), [moved(t, where, dtype) for t in tensors], dy_layout)
                    for functions, where in ((ours, device), (theirs, torch.device("cpu")))
                )
                assert mine == right, f"x {x_layout}, weight {w_layout}, gradient {dy_layout}"


def moved(t: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of that dtype on that device, in the same strides."""
    elements = t.untyped_storage().nbytes() // t.element_size()
    return torch.zeros(elements, dtype=dtype, device=device).as_strided(t.shape, t.stride(), t.storage_offset())


def called(functions: Any, program: Program, **more: Any) -> Callable[..., torch.Tensor]:
    """The program's function of these functions, ours or PyTorch's, of (x, weight, bias)."""
    function = getattr(functions, program.function)
    return lambda x, w, b: function(x, w, b, **program.arguments, **more)


@pytest.mark.parametrize("program", list(programs()), ids=str)
def test_layouts(program, nothing_runs, device):
    """Of operands that lie as they like, in every combination."""
    assert_same_layouts(program, torch.float32, device)


OF_EACH_DTYPE = (
    Program("conv2d", (2, 4, 5, 4), (6, 4, 3, 2), {}),
    Program("conv_transpose2d", (2, 4, 5, 4), (4, 6, 3, 2), {}),
    Program("conv1d", (2, 4, 5), (6, 4, 3), {}),
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("program", OF_EACH_DTYPE, ids=str)
def test_layouts_of_other_dtypes(program, dtype, nothing_runs, device):
    assert_same_layouts(program, dtype, device, dense_only=True)


# --- what is empty ----------------------------------------------------------------------------------------------------


def empty_programs() -> Iterator[Program]:
    for N, C in ((0, 4), (2, 0), (0, 0)):
        for padding in (0, 1, 2):
            yield Program("conv2d", (N, C, 5, 4), (6, C, 3, 2), {"padding": padding})
            yield Program("conv1d", (N, C, 5), (6, C, 3), {"padding": padding})
        yield Program("conv2d", (N, C, 0, 4), (6, C, 1, 2), {"padding": 1})
        yield Program("conv1d", (N, C, 0), (6, C, 2), {"padding": 1})
        yield Program("conv2d", (N, C, 5, 4), (6, C, 0, 2), {})
        yield Program("conv1d", (N, C, 5), (6, C, 0), {"padding": 1})
    yield Program("conv2d", (2, 0, 5, 4), (6, 0, 3, 2), {"groups": 2})
    yield Program("conv2d", (2, 4, 5, 4), (0, 4, 3, 2), {})
    yield Program("conv2d", (0, 5, 4), (6, 0, 3, 2), {})
    yield Program("conv1d", (0, 5), (6, 0, 3), {})
    for N in (2, 0):
        yield Program("conv2d", (N, 4, 5, 4), (6, 4, 0, 2), {})
        for H, taps, arguments in (
            (1, 2, {}),  # no row is left
            (1, 1, {"stride": 2, "output_padding": (1, 0)}),
            (1, 2, {"groups": 2}),
            (3, 2, {"padding": (2, 1), "groups": 4}),
            (1, 3, {"padding": (3, 0), "dilation": (3, 1)}),
            (1, 1, {}),  # less than none
        ):
            arguments = {"padding": (1, 0)} | arguments
            yield Program("conv_transpose2d", (N, 4, H, 3), (4, 2, taps, 2), arguments)
        yield Program("conv_transpose2d", (N, 4, 1, 1), (4, 2, 2, 2), {"padding": 1})  # neither row nor column
        yield Program("conv_transpose2d", (N, 4, 5, 4), (4, 6, 3, 2), {"stride": 2})
        yield Program("conv_transpose2d", (N, 4, 0, 4), (4, 6, 3, 2), {})
        yield Program("conv_transpose2d", (N, 4, 5, 4), (4, 0, 3, 2), {})
        yield Program("conv_transpose2d", (N, 4, 5, 4), (4, 2, 0, 2), {})
    yield Program("conv_transpose2d", (2, 0, 5, 4), (0, 6, 3, 2), {})


def outcome_of_empty(
    call: Callable[..., torch.Tensor],
    program: Program,
    layouts: tuple[str, str],
    dtype: torch.dtype,
    device: torch.device,
) -> list | Exception:
    """The layouts of the result and of all gradients, and how many elements are not zero; or the error."""
    makers = ((LAYOUTS[layouts[0]], program.x), (LAYOUTS[layouts[1]], program.w), (torch.zeros, (program.filters,)))
    leaves = [moved(lay(shape), device, dtype).requires_grad_() for lay, shape in makers]
    try:
        y = call(*leaves)
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    except Exception as error:
        return error
    return [laid(y), *(laid(g, of_axes=g.dim() > 1) for g in grads), *(int(t.count_nonzero()) for t in (y, *grads))]


def assert_same_outcome(
    program: Program, device: torch.device, call: Callable[..., torch.Tensor], layouts: tuple[str, str]
) -> None:
    """bfloat16, because PyTorch's kernels of other dtypes refuse some transposed convolutions whose result is empty,
    oneDNN's do not.
    """
    with cnnfast.backend("kernels"):
        mine = outcome_of_empty(call, program, layouts, torch.bfloat16, device)
    right = outcome_of_empty(called(theirs, program), program, layouts, torch.bfloat16, torch.device("cpu"))
    if isinstance(right, Exception):
        assert type(mine) is type(right)
        assert f"{program.function}(): " in str(mine)
        assert any(word in str(mine) for word in ("input", "weight", "padding"))
    else:
        assert mine == right


@pytest.mark.parametrize("layouts", list(itertools.product(DENSE, DENSE)), ids=", ".join)
@pytest.mark.parametrize("program", list(empty_programs()), ids=str)
def test_empty(program, layouts, device):
    assert_same_outcome(program, device, called(ours, program), layouts)


SOME_EMPTY = [
    Program("conv2d", (0, 4, 5, 4), (6, 4, 3, 2), {"padding": 1}),
    Program("conv2d", (2, 0, 5, 4), (6, 0, 3, 2), {}),
    Program("conv1d", (0, 4, 5), (6, 4, 3), {}),
    Program("conv1d", (2, 0, 5), (6, 0, 3), {}),
    Program("conv_transpose2d", (0, 4, 5, 4), (4, 6, 3, 2), {}),
    Program("conv_transpose2d", (2, 4, 1, 3), (4, 2, 2, 2), {"padding": (1, 0)}),
]


MIXED = ("contiguous", "channels adjacent")


@pytest.mark.parametrize("algorithm", ["direct", "im2col"])
@pytest.mark.parametrize("program", SOME_EMPTY, ids=str)
def test_empty_by_each_algorithm(program, algorithm, device):
    assert_same_outcome(program, device, called(ours, program, algorithm=algorithm), MIXED)


@pytest.mark.parametrize("program", SOME_EMPTY, ids=str)
def test_empty_compiled(program, device):
    torch._dynamo.reset()
    assert_same_outcome(
        program, device, torch.compile(called(ours, program), fullgraph=True, backend="aot_eager"), MIXED
    )


@pytest.mark.parametrize("program", SOME_EMPTY, ids=str)
def test_empty_is_served_on_the_kernels_path(program, device):
    x, w = integers(*program.x).to(device).requires_grad_(), integers(*program.w).to(device).requires_grad_()
    with cnnfast.backend("kernels"), cnnfast.trace() as calls:
        getattr(ours, program.function)(x, w, **program.arguments).sum().backward()
    assert {call.served_by for call in calls} == {"kernels"}
    assert x.grad is not None
    assert w.grad is not None
    assert not w.grad.any()


@pytest.mark.parametrize("program", SOME_EMPTY, ids=str)
def test_empty_results_are_ours_where_the_library_is_first(program, library_first, device):
    """PyTorch's own kernels refuse some of them."""
    x, w = integers(*program.x).to(device).requires_grad_(), integers(*program.w).to(device).requires_grad_()
    with cnnfast.trace() as calls:
        getattr(ours, program.function)(x, w, **program.arguments).sum().backward()
    assert {call.served_by for call in calls} == {"kernels"}
