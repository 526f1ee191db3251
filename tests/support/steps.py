"""One step of a model, and everything that it leaves: what two models must have in common to be the same to
their user.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import cnnfast
from cnnfast.recording import Trace
from tests.support.told import FUSED, MODES, Mode, assert_report_is_true, seed


def noise(like: Tensor) -> Tensor:
    """Numbers that depend on the size of `like` only."""
    generator = torch.Generator().manual_seed(like.numel())
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def step(
    model: nn.Module, inputs: tuple[Any, ...], mode: Mode, keywords: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Calls `model` and, unless under no_grad, differentiates what it returns.

    Returns by name: what the call returned, what it left of the inputs, gradients of the inputs and the parameters, and
    the buffers, and the types of what was raised. The same random numbers on every call; training modes and gradients
    are left as they were.
    """
    leaves = [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in inputs]
    training = {m: m.training for m in model.modules()}
    left: dict[str, Any] = {}
    seed()
    with torch.set_grad_enabled(mode != "no_grad"):
        # may be changed in place
        given = [x * 1 if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
        try:
            outputs = tree_leaves(model.train(mode == "train")(*given, **keywords or {}))
        except Exception as error:
            outputs, left["raised"] = [], type(error)
    left |= {f"output {i}": y.detach() if isinstance(y, Tensor) else y for i, y in enumerate(outputs)}
    left |= {f"input {i}": x.detach() for i, x in enumerate(given) if isinstance(x, Tensor)}
    differentiable = [y for y in outputs if isinstance(y, Tensor) and y.requires_grad]
    left["differentiable"] = len(differentiable)
    try:
        if differentiable:
            torch.autograd.backward(differentiable, [noise(y) for y in differentiable])
        left |= {f"gradient of input {i}": x.grad for i, x in enumerate(leaves) if isinstance(x, Tensor)}
        left |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    except (
        RuntimeError
    ) as error:  # something that backward needs was changed in place; what it had done until then is nobody's
        left["raised in backward"] = type(error)
    model.zero_grad()
    left |= {f"buffer {name}": t.detach().clone() for name, t in model.named_buffers()}
    for module, was in training.items():
        module.training = was
    return left


def difference(mine: Any, right: Any, tolerance: float) -> str:
    """In words, or the empty string: dtype, size and strides must be the same, numbers within tolerance * the largest
    one, at least 1.
    """
    if not isinstance(right, Tensor) or not isinstance(mine, Tensor):
        return "" if type(mine) is type(right) and mine == right else f"{mine!r} instead of {right!r}"
    for what in (lambda t: t.dtype, lambda t: t.shape, lambda t: t.stride()):
        if what(mine) != what(right):
            return f"{what(mine)} instead of {what(right)}"
    if not right.numel():
        return ""
    if not torch.equal(mine.isfinite(), right.isfinite()):
        return "NaN or infinity elsewhere"
    mine, right = (
        t.to(torch.complex128 if t.is_complex() else torch.float64).nan_to_num(0, 0, 0) for t in (mine, right)
    )
    error, scale = (mine - right).abs().max().item(), right.abs().max().item()
    return "" if error <= tolerance * max(scale, 1.0) else f"off by {error:.2g}, where the largest is {scale:.2g}"


def assert_same_steps(
    ours: nn.Module,
    theirs: nn.Module,
    *inputs: Any,
    modes: tuple[Mode, ...] = MODES,
    tolerance: float = 1e-10,
    keywords: dict[str, Any] | None = None,
    fused: int | None = None,
    may_raise: bool = False,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[Mode, Trace]:
    """In every mode a step of ours leaves what a step of theirs leaves, and `fused` convolutions are computed with
    their norm.

    `within` makes a context around each step; may_raise: theirs may fail, and ours then fails alike. Returns the traces
    of ours.
    """
    traces: dict[Mode, Trace] = {}
    for mode in modes:
        with within():
            right = step(theirs, inputs, mode, keywords)
        assert may_raise or not [name for name in right if name.startswith("raised")], f"{mode}: the original fails"
        with within(), cnnfast.trace() as traces[mode]:
            mine = step(ours, inputs, mode, keywords)
        assert list(mine) == list(right), mode
        wrong = {name: text for name in right if (text := difference(mine[name], right[name], tolerance))}
        assert not wrong, f"{mode}: {wrong}"
        assert fused in (None, fusions(traces[mode])), mode
    return traces


def converted(model: nn.Module, *inputs: Any, told: bool = True, **options: Any) -> nn.Module:
    """cnnfast.convert(model), in eval, after both have left the same in every step. The options are assert_same_steps'.

    told: what a report says of it is compared with a run, which needs members that are called by what they are, not by
    their `forward`.
    """
    original = copy.deepcopy(model)
    ours = cnnfast.convert(model)
    assert_same_steps(ours, original, *inputs, **options)
    if told and not options.get("keywords") and not options.get("may_raise"):  # a report takes no arguments by keyword
        with torch.no_grad(), options.get("within", nullcontext)():
            assert_report_is_true(ours.eval(), *inputs)
    return ours


def fusions(trace: Trace) -> int:
    """The convolutions that were computed together with their norm."""
    return sum(call.operation in FUSED for call in trace)


def converted_and_original(
    model: nn.Module, change: Callable[[nn.Module], None], when: str
) -> tuple[nn.Module, nn.Module]:
    """(ours, original), both changed: ours "before" its conversion or "after" it."""
    original = copy.deepcopy(model)
    change(original)
    if when == "before":
        change(model)
    ours = cnnfast.convert(model)
    if when == "after":
        change(ours)
    return ours, original
