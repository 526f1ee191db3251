"""A residual block as one operator in training: relu(branch(x) + shortcut(x)), where the branch is two layers (a basic
block) or three (a bottleneck) of convolution, batch norm and, but for the last, ReLU; the shortcut is x, or a
convolution of x and a batch norm.

A block sees what no layer sees, and so it moves and saves less:

- FUSED: the gradient of an inner layer's convolution is masked, and the two sums of the norm below are taken, by the
  kernel that computes it (cnnfast_kernels/gradient_epilogue.py); the shortcut's gradient is added by the kernel that
  computes that of x. So all convolutions of the gradients are ours. Where the library serves, the norm's gradients are
  passes of their own, as those of a layer are (conv_norm.py).
- Saved are x, one bit of each element of the result (words.py in cnnfast_kernels), or the result itself where bits are
  not asked for, and of each layer what its convolution gave (y) and the statistics; what an inner activation gave (z)
  only if it is KEPT: else it is computed again in backward, to the same bits.
- LINKED: where a block's input is another block's result that nobody else sees, its last gradient is masked by the
  other's bits and summed, by the kernel that computes it: the other need not begin with a pass over it. For that the
  other hands over its bits and the mean of its last layer, which is differentiable then: in its gradient's place the
  sums come back, and what comes back to its result is the masked gradient.
- A 1x1 convolution whose input is narrower than its output is trained by its Gram matrix (gram.py), if so asked.

Running statistics are updated. A gradient that may itself be differentiated is computed by separate operators, from x
and the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from ..dispatch import transformed
from . import conv_implementations as implementations
from .batchnorm import dense_like, normalize, replayed, update_running
from .block_backward import backward, fake_backward
from .block_passes import fake_words, normalize_mean, normalize_words
from .block_positions import (
    OF_MEMBER,
    OF_RECORD,
    RELU,
    Member,
    Record,
    cut,
    flat_geometry,
    mean_of_last,
    members_of,
)
from .conv import conv_fprop, conv_stats
from .conv_norm import fused_bn_act, fused_bn_act_words
from .gram import gram_statistics
from .registry import Calling, register

LAYERS = {"basic_block": 2, "bottleneck": 3}  # of the branch

# ----------------------------------------------------------------------------------------------------------------------
# Forward


def _forward(calling: Calling, *arguments: Any) -> tuple[Tensor | None, ...]:
    """(the result, its words of bits, and a Record of each layer of the branch and of the shortcut)."""
    x, branch, projection, how, algorithm = members_of(arguments)
    z, of_z, records = x, None, []
    meets_all = all(step == 1 for step in branch[-1].geometry[0])  # the last layer, which is 1x1 where it is by Gram
    for i, member in enumerate(branch[:-1]):
        y, mean, var = _statistics(calling, z, member, algorithm)
        norm = mean, var, member.gamma, member.beta
        if how.gram and meets_all and i == len(branch) - 2:
            z, of_z = calling(normalize_mean)(y, *norm, member.eps, *RELU)
        else:
            z = calling(normalize)(y, *norm, None, member.eps, *RELU, None, True)
        records.append(Record(y, z if how.kept else None, mean, var))
    residual, of_shortcut = x, Record()
    if projection is not None:
        residual, _, of_shortcut = _layer(calling, x, projection, None, None, how.projection_by_gram, algorithm)
    last = z, branch[-1], residual, "relu", how.gram, algorithm, of_z, how.bits
    out, words, of_last = _layer(calling, *last)
    return out, words, *(t for record in (*records, of_last, of_shortcut) for t in record)


def _statistics(calling: Calling, x: Tensor, member: Member, algorithm: str) -> tuple[Tensor, Tensor, Tensor]:
    y, *own = calling(conv_stats)(x, member.w, None, *member.geometry, algorithm)
    _update(calling, member, own, y)
    return y, *own


def _update(calling: Calling, member: Member, own: Sequence[Tensor], result: Tensor) -> None:
    if member.mean is not None:
        count = result.shape[0] * result.shape[2] * result.shape[3]
        calling(update_running)(member.mean, member.var, *own, member.momentum, count)


def _layer(
    calling: Calling,
    x: Tensor,
    member: Member,
    residual: Tensor | None,
    activation: str | None,
    by_gram: bool,
    algorithm: str,
    of_x: Tensor | None = None,
    bits: bool = False,
) -> tuple[Tensor, Tensor | None, Record]:
    """(act(norm(conv(x)) + residual), its words of bits if asked for, what is left of it). of_x: the mean of each
    channel of x, if it is known.
    """
    end = member.gamma, member.beta, residual, member.eps, activation, 0.0, None
    if by_gram:
        mean, var, mu, products = calling(gram_statistics)(x, member.w, None, member.geometry[0], of_x)
        left = Record(None, None, mean, var, mu if of_x is None else of_x, products)
        operator, operands = (fused_bn_act_words if bits else fused_bn_act), (x, member.w, None, mean, var)
        rest: tuple[Any, ...] = *member.geometry, "direct"
    else:
        y, mean, var = _statistics(calling, x, member, algorithm)
        left = Record(y, None, mean, var)
        operator, operands, rest = (normalize_words if bits else normalize), (y, mean, var), (True,)
    z = calling(operator)(*operands, *end, *rest)
    z, words = z if bits else (z, None)
    if by_gram:
        _update(calling, member, (mean, var), z)
    return z, words, left


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    x, branch, projection, how, algorithm = members_of(arguments)
    records: list[Tensor] = []

    def nothing(count: int) -> list[Tensor]:
        return [x.new_empty(0) for _ in range(count)]  # results of an operator share no memory

    def record(image: Tensor, member: Member, by_gram: bool, kept: bool) -> tuple[Tensor, list[Tensor]]:
        y, mean, var = implementations.fake_stats(image, member.w, None, *member.geometry, algorithm)
        z = dense_like(y)
        K, C = member.w.shape[:2]
        gram = (x.new_empty(C, dtype=mean.dtype), x.new_empty((K, C), dtype=mean.dtype)) if by_gram else nothing(2)
        return z, [x.new_empty(0) if by_gram else y, z if kept else x.new_empty(0), mean, var, *gram]

    z = x
    for i, member in enumerate(branch):
        last = i == len(branch) - 1
        z, left = record(z, member, last and how.gram, how.kept and not last)
        records += left
    shortcut = nothing(OF_RECORD)
    if projection is not None:
        _, shortcut = record(x, projection, how.projection_by_gram, False)
    return z, fake_words(z) if how.bits else x.new_empty(0), *records, *shortcut


# ----------------------------------------------------------------------------------------------------------------------
# Derivatives


def _replay(members: Sequence[Any], tensors: Sequence[Tensor | None], algorithm: str) -> Tensor:
    """The block by operators that can be differentiated again. members: (eps, geometry) of each layer."""
    x, *of_layers = tensors
    layers = [(*of, *member) for of, member in zip(cut(of_layers, 3), members, strict=False)]
    branch = len(of_layers) // 3 - 1

    def normed(image: Any, residual: Any, activation: str | None, w, gamma, beta, eps, geometry) -> Tensor:
        y = conv_fprop(image, w, None, *geometry, algorithm)
        return replayed(y, y, None, gamma, beta, residual, eps, activation, 0.0, True)

    z = x
    for layer in layers[: branch - 1]:
        z = normed(z, None, "relu", *layer)
    residual = x if len(layers) == branch else normed(x, None, None, *layers[-1])
    return normed(z, residual, "relu", *layers[branch - 1])


def _again(dout: Tensor, ctx: Any, tensors: Sequence[Tensor | None], wanted: Sequence[int]) -> list[Tensor | None]:
    """The gradients of those `tensors` that are wanted, by differentiating a replay. To mask a gradient once more
    changes nothing.
    """

    def replay(*inputs: Tensor) -> Tensor:
        given = [inputs[wanted.index(i)] if i in wanted else t for i, t in enumerate(tensors)]
        return _replay(ctx.members, given, ctx.algorithm)

    inputs: Any = [tensors[i] for i in wanted]
    if torch._C._are_functorch_transforms_active():  # autograd.grad knows no tensor of an outer level
        found = torch.func.vjp(replay, *inputs)[1](dout)
    else:
        with torch.enable_grad():
            found = torch.autograd.grad(replay(*inputs), inputs, dout, create_graph=True)
    grads: list[Tensor | None] = [None] * len(tensors)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return grads


def _function(operators: dict[str, Any], name: str) -> type[torch.autograd.Function]:
    """What differentiates the operator of this name."""

    class Block(torch.autograd.Function):
        """Statistics are constants to autograd: the gradient goes through them by itself."""

        @staticmethod
        def forward(ctx, *arguments):
            x, branch, projection, how, algorithm = members_of(arguments)
            layers = [*branch, *([] if projection is None else [projection])]
            out, words, *records = operators[name](*arguments)
            ctx.set_materialize_grads(False)
            ctx.handed_over, ctx.seen = mean_of_last(len(branch)), False
            constant = [words, *records]
            if how.hands_over:
                del constant[1 + ctx.handed_over]
            ctx.mark_non_differentiable(*(t for t in constant if t is not None))
            ctx.members, ctx.how = [(layer.eps, layer.geometry) for layer in layers], how
            ctx.algorithm, ctx.layers = algorithm, len(branch) + 1
            parameters = [t for of in cut(arguments[3:-5], OF_MEMBER) for t in of[:3]]
            kept = [t if t is not None and t.numel() else None for t in records]
            left = (None, words) if how.bits else (out, None)
            ctx.save_for_backward(x, arguments[1], *left, *parameters, *kept)
            return out, words, *records

        @staticmethod
        def backward(ctx, dout, _, *others):  # pyright: ignore[reportIncompatibleMethodOverride]
            given, count = ctx.needs_input_grad, ctx.layers
            needs = [given[0], *(given[3 + OF_MEMBER * i + j] for i in range(count) for j in range(3))]
            x, words_below, out, words, *tensors = ctx.saved_tensors
            sums_below, words_below = None, None if ctx.seen else words_below
            parameters, records = tensors[: 3 * count], tensors[3 * count :]
            wanted = [i for i, need in enumerate(needs) if need]
            if dout is None:
                found: Sequence[Tensor | None] = [None] * len(needs)
            elif torch.is_grad_enabled() or transformed():
                ctx.seen = True  # what follows from the gradients now is a function of x too
                found = _again(dout, ctx, [x, *parameters], wanted)
            else:
                of_layers = zip(cut(parameters, 3), cut(records, OF_RECORD), strict=True)
                flat = (t for pair in of_layers for of in pair for t in of)
                eps, geometries = zip(*ctx.members, strict=True)
                numbers = tuple(n for geometry in geometries for n in flat_geometry(geometry))
                how = eps, numbers, tuple(ctx.how), tuple(needs), ctx.algorithm
                of_result = others[ctx.handed_over], x, words_below, out, words
                dx, sums_below, *found = operators[f"{name}_backward"](dout, *of_result, *flat, *how)
                found = dx, *found
                sums_below = sums_below if given[2] else None
            dx, *grads = (grad if need else None for grad, need in zip(found, needs, strict=True))
            return dx, None, sums_below, *(grad for of in cut(grads, 3) for grad in (*of, None, None)), *[None] * 5

    return Block


def _schemas(name: str, layers: int) -> tuple[str, str]:
    """Of the operator and of its backward."""
    letters = iter("abcdefgh")
    forward = ["Tensor x, Tensor? words_below, Tensor? mean_below"]
    backward = ["Tensor dout, Tensor? sums, Tensor x, Tensor? words_below, Tensor? out, Tensor? words"]
    for i in range(1, layers + 2):
        of, at = ("?", "_projection") if i > layers else ("", str(i))
        statistics = ", ".join(f"Tensor({next(letters)}!)? {t}{at}" for t in ("running_mean", "running_var"))
        parameters = f"Tensor{of} w{at}, Tensor? gamma{at}, Tensor? beta{at}"
        forward.append(f"{parameters}, {statistics}")
        backward.append(", ".join([parameters, *(f"Tensor? {t}{at}" for t in Record._fields)]))
    results = ", ".join(["Tensor"] * (2 + OF_RECORD * (layers + 1)))
    grads = ", ".join(["Tensor"] * (2 + 3 * (layers + 1)))
    how = "SymInt[] geometries, bool[6] how"
    return (
        f"{name}({', '.join(forward)}, float[] momenta, float[] eps, {how}, str algorithm) -> ({results})",
        f"{name}_backward({', '.join(backward)}, float[] eps, {how}, bool[] needs, str algorithm) -> ({grads})",
    )


def _register(name: str, layers: int) -> Any:
    of_forward, of_backward = _schemas(name, layers)
    operators: dict[str, Any] = {}
    operators[f"{name}_backward"] = register(of_backward, backward, fake_backward, composed=True)
    operators[name] = register(of_forward, _forward, _fake_forward, _function(operators, name), composed=True)
    return operators[name]


basic_block, bottleneck = starmap(_register, LAYERS.items())
