"""In-place operators: what a graph computes equals what the module computes, bit for bit, on small integers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast.engine.capturing.capture import CannotCapture, capture

N, C, H, W = 4, 4, 6, 6


class Function(nn.Module):
    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> object:
        return self.function(*inputs)


def integers(*shape: int, seed: int = 3) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def view_then_relu(x):
    y = x * 2
    z = y.view(y.shape[0], -1)
    z.relu_()
    return y, z


def relu_then_an_older_view(x):
    y = x * 2
    z = y.flatten(1)
    y.relu_()
    return z + 1, y


def a_base_read_before_and_after(x):
    y = x - 1
    before = y + 0
    y.flatten(1).mul_(3)
    return before, y


def chunk_then_add(x):
    y = x * 1
    a, b = y.chunk(2, 1)
    a.add_(b)
    b.mul_(2)
    return y, a - b


def slices_with_copy(x):
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    y[:, :1, 2:4] = 7
    y[:, :, -1] += 5
    return y


def a_temporal_shift(x):
    out = torch.empty_like(x)
    out[:-1, :1] = x[1:, :1]
    out[-1:, :1] = 0
    out[1:, 1:2] = x[:-1, 1:2]
    out[:1, 1:2] = 0
    out[:, 2:] = x[:, 2:]
    return out


def read_after_relu(x):
    y = x + 1
    z = F.relu_(y)
    return y - z, y, z


def the_residual_stream(x):
    identity = x - 2
    y = F.relu(identity, inplace=True)
    y = y * 2
    y += identity
    return F.relu_(y), identity


def two_residuals_in_a_row(x):
    shortcut = x * 3
    for _ in range(2):
        branch = F.relu(shortcut) - 1
        branch += shortcut
        shortcut = branch.relu_()
    return shortcut


def dropout_is_the_same_tensor(x):
    y = x * 2
    z = F.dropout(y, 0.5, False)
    z.add_(1)
    return y, z


def dropout_then_a_view(x):
    y = x * 2
    z = F.dropout2d(y, 0.5, False)
    z[:, 1].add_(1)
    return y + z


def detached(x):
    y = x * 2
    z = y.detach()
    y.neg_()
    return z


def transposed(x):
    y = x * 2
    y.transpose(1, 3).add_(torch.arange(C).float())
    return y


def expanded_reads(x):
    y = x.mean((2, 3), keepdim=True)
    z = y.expand(-1, -1, 2, 2)
    y.mul_(36)
    return z + 1


def squeezed_in_place(x):
    y = x[:, :1] * 2
    z = y.detach()
    y.squeeze_(1)
    y.add_(1)
    return z, y


def into_an_integer(x):
    y = torch.ones_like(x, dtype=torch.int64)
    y.mul_(3)
    y[:, 0] = x[:, 0]
    return y


def into_a_wider_dtype(x):
    y = x.double()
    y.add_(x)
    y.mul_(x > 0)
    return y


def contiguous_is_the_same_tensor(x):
    y = x * 2
    z = y.contiguous()
    z.add_(1)
    return y


def reshape_that_copies(x):
    y = x * 2
    z = y.transpose(1, 2).reshape(y.shape[0], -1)
    z.add_(1)
    return y, z


def fills_and_zeros(x):
    y = x * 2
    y[:, :2].zero_()
    y[:, 3:].fill_(4)
    return y


def masked(x):
    y = x * 2
    y.masked_fill_(x > 2, 9.0)
    y[:, 2:].clamp_(-1, 1)
    return y


def written_in_a_loop(x):
    parts = list((x * 2).split(1, 1))
    for i in range(1, len(parts)):
        parts[i] += parts[i - 1]
    return torch.cat(parts, 1)


# Every later read of the written memory goes through the write, so we need nothing of torch.export's.
PROVEN = [
    *(read_after_relu, the_residual_stream, two_residuals_in_a_row, dropout_is_the_same_tensor, detached),
    *(contiguous_is_the_same_tensor, reshape_that_copies),
]
# Another tensor in the written memory is read later, and nothing else is unusual.
VIEWS = [
    *(view_then_relu, relu_then_an_older_view, a_base_read_before_and_after, chunk_then_add, dropout_then_a_view),
    *(transposed, expanded_reads, written_in_a_loop),
]
OTHERS = [
    *(slices_with_copy, a_temporal_shift, squeezed_in_place, into_an_integer, into_a_wider_dtype, fills_and_zeros),
    masked,
]


class Traps(nn.Module):
    """All at once: a capture costs a second, or several where torch.export's functional form is needed."""

    def __init__(self, functions: list[Callable[..., object]]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor) -> dict[str, object]:
        return {function.__name__: function(x) for function in self.functions}


def fallen_into(functions: list[Callable[..., object]]) -> list[str]:
    captured = capture(Traps(functions).eval(), (integers(N, C, H, W),), sizes=False)
    assert captured.graph.inputs[0].shape == (None, C, H, W)
    wrong = []
    for batch, seed in ((N, 3), (7, 4)):
        x = integers(batch, C, H, W, seed=seed)
        results = captured.result.build(captured.graph.run([x]))
        wrong += [function.__name__ for function in functions if not same(results[function.__name__], function(x))]
        assert torch.equal(x, integers(batch, C, H, W, seed=seed))
    return wrong


def same(ours: object, theirs: object) -> bool:
    if isinstance(theirs, tuple):
        return isinstance(ours, tuple) and all(map(same, ours, theirs))
    assert isinstance(ours, Tensor)
    assert isinstance(theirs, Tensor)
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_traps_that_are_proven_harmless(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("torch.export's functional form takes seconds: not for what is common")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", refuse)
    with torch.no_grad():
        assert fallen_into(PROVEN) == []


@pytest.mark.parametrize("functions", [VIEWS, OTHERS], ids=["views", "others"])
def test_traps(functions):
    with torch.no_grad():
        assert fallen_into(functions) == []


def writes_into_its_input(x):
    x.relu_()
    return x + 1, x


def writes_into_a_view_of_its_input(x):
    x[:, :1].add_(3)
    return x * 2


@pytest.mark.parametrize("function", [writes_into_its_input, writes_into_a_view_of_its_input])
def test_a_frozen_network_leaves_its_inputs_alone(function):
    x = integers(N, C, H, W)
    graph = capture(Function(function).eval(), (x.clone(),), sizes=False).graph
    given = x.clone()
    results = graph.run([given])
    assert torch.equal(given, x)
    expected = function(x.clone())
    assert same(results, expected if isinstance(expected, tuple) else (expected,))


class Counting(nn.Module):
    def __init__(self, through_a_view: bool) -> None:
        super().__init__()
        self.calls = nn.Buffer(torch.zeros(2))
        self.through_a_view = through_a_view

    def forward(self, x: Tensor) -> Tensor:
        (self.calls[:1] if self.through_a_view else self.calls).add_(1)
        return x * self.calls.sum()


@pytest.mark.parametrize("through_a_view", [False, True])
def test_a_network_that_changes_itself(through_a_view):
    with pytest.raises(CannotCapture, match="calls is changed by the network itself while it runs"):
        capture(Counting(through_a_view).eval(), (integers(N, C, H, W),), sizes=False)
