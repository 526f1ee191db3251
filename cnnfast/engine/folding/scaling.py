"""Batch norms, and all else that multiplies each channel by a constant and adds one to it.

They are folded, in float64, into the weights of the convolution or the matrix product before them or after them, and
what remains becomes one call of the engine's `affine`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..graph import Graph
from .constants import exactly, fits
from .forms import AFFINE, BIAS, CONVOLUTION, LINEAR, TRANSPOSED, WEIGHT, arguments
from .sizes import Sizes

aten = torch.ops.aten


class Scaling(NamedTuple):
    """A call that gives source * scale + shift. scale, shift: float64, [C] or []."""

    source: fx.Node
    scale: Tensor
    shift: Tensor

    def then(self, other: Scaling) -> Scaling:
        return Scaling(self.source, self.scale * other.scale, self.shift * other.scale + other.shift)


ONE, ZERO = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)


def scaling(graph: Graph, sizes: Sizes, node: fx.Node, axis: int) -> Scaling | None:
    """What a call does to the channels of a floating value; None if it does anything else. axis: that of channels."""
    if node.op != "call_function" or not hasattr(node.target, "_schema"):
        return None
    given = arguments(node)
    if node.target is aten.batch_norm.default:
        return norm(graph, node) if axis == 1 else None
    if node.target is aten.neg.default:
        return Scaling(given["self"], -ONE, ZERO)
    packet, overload = node.target.overloadpacket, node.target._overloadname  # type: ignore[union-attr]
    if packet not in (aten.mul, aten.div, aten.add, aten.sub, aten.rsub) or overload not in ("Tensor", "Scalar"):
        return None
    left, right = given["self"], given["other"]
    turned = graph.constant(left) is not None or not isinstance(left, fx.Node)
    source, other = (right, left) if turned else (left, right)
    constant = _of_each_channel(graph, sizes, source, other, axis)
    if constant is None or sizes.dtype(source) != sizes.dtype(node):
        return None
    if packet is aten.mul:
        return Scaling(source, constant, ZERO)
    if packet is aten.div:
        return None if turned else Scaling(source, 1 / constant, ZERO)
    alpha = given["alpha"]
    if not isinstance(alpha, int | float):
        return None
    # The factors of what stands on the left and on the right.
    factors = {aten.add: (1, alpha), aten.sub: (1, -alpha), aten.rsub: (-alpha, 1)}[packet]
    of_source, of_constant = reversed(factors) if turned else factors
    return Scaling(source, ONE * of_source, constant * of_constant)


def norm(graph: Graph, node: Any) -> Scaling | None:
    """A batch norm by statistics that are constants."""
    if not isinstance(node, fx.Node) or node.target is not aten.batch_norm.default:
        return None
    given = arguments(node)
    gamma, beta, mean, var = (
        exactly(graph.constant(given[name])) for name in ("weight", "bias", "running_mean", "running_var")
    )
    if given["training"] or mean is None or var is None:
        return None
    scale = (var + given["eps"]).rsqrt() * (ONE if gamma is None else gamma)
    return Scaling(given["input"], scale, (ZERO if beta is None else beta) - mean * scale)


def _of_each_channel(graph: Graph, sizes: Sizes, source: Any, value: Any, axis: int) -> Tensor | None:
    """A constant as float64, [C] or [], if it has one number for each channel of the source, or one for all."""
    rank, dtype = sizes.rank(source), sizes.dtype(source)
    if rank is None or dtype is None or not dtype.is_floating_point or not -rank <= axis < rank:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return ONE * value
    constant = graph.constant(value)
    if constant is None or constant.dim() > rank:
        return None
    if constant.numel() == 1:
        return constant.double().reshape(())
    shape = [1] * (rank - constant.dim()) + list(constant.shape)
    channels = shape.pop(axis)
    if any(size != 1 for size in shape) or channels != sizes.size(source, axis):
        return None
    return constant.double().reshape(-1)


# ----------------------------------------------------------------------------------------------------------------------
# Into weights


def fold_into_what_stands_before(graph: Graph, sizes: Sizes, dtype: torch.dtype) -> None:
    """Scalings after a convolution, transposed or not, or a matrix product. Permutations between them stay."""
    for node in list(graph.calls.nodes):
        if not _has_weights(graph, node):
            continue
        axis = (sizes.rank(node) or 0) - 1 if node.target is LINEAR else 1
        whole, taken, last = Scaling(node, ONE, ZERO), [], node
        while len(last.users) == 1:
            (user,) = last.users
            moved = _axis_after(sizes, user, axis)
            found = None if moved is not None else scaling(graph, sizes, user, axis)
            if moved is not None:
                axis = moved
            elif found is not None and found.source is last:
                whole = whole.then(found)
                taken.append((user, found.source))
            else:
                break
            last = user
        weight, bias = weights(graph, node)
        if taken and replace_weights(graph, dtype, node, *_scaled_outputs(node, weight, bias, whole)):
            for user, source in reversed(taken):
                user.replace_all_uses_with(source)
                graph.calls.erase_node(user)
                node.meta["fused"] += user.meta["fused"]


def fold_into_what_stands_after(graph: Graph, sizes: Sizes, dtype: torch.dtype) -> None:
    """Scalings of which every user is a convolution or a matrix product that can take them up: zeros around an image
    stay zeros where nothing is added.
    """
    for node in reversed(list(graph.calls.nodes)):
        users = list(node.users)
        if not users or not all(takes_scaled_input(graph, user, node) for user in users):
            continue
        found = {u: scaling(graph, sizes, node, _axis_before(sizes, node, u)) for u in users}
        if not all(s is not None and (not s.shift.any() or not _padded(u)) for u, s in found.items()):
            continue
        scaled = {u: scaled_inputs(u, *weights(graph, u), s) for u, s in found.items() if s is not None}
        if all(fits(value, dtype) for pair in scaled.values() for value in pair):
            for user, pair in scaled.items():
                replace_weights(graph, dtype, user, *pair)
                user.meta["fused"] = node.meta["fused"] + user.meta["fused"]
            source = next(s.source for s in found.values() if s is not None)
            node.replace_all_uses_with(source)
            graph.calls.erase_node(node)


def use_affine(graph: Graph, sizes: Sizes, dtype: torch.dtype) -> None:
    """What remains of batch norms, and of two scalings of an image or more, becomes one call."""
    for node in list(graph.calls.nodes):
        first = scaling(graph, sizes, node, 1)
        if first is None or len(node.users) == 0:
            continue
        whole, taken = first, [node]
        while len(taken[-1].users) == 1:
            (user,) = taken[-1].users
            found = scaling(graph, sizes, user, 1)
            if found is None or found.source is not taken[-1]:
                break
            whole = whole.then(found)
            taken.append(user)
        rank, channels = sizes.rank(first.source), sizes.size(first.source, 1)
        norms = any(n.target is aten.batch_norm.default for n in taken)
        if rank is None or channels is None or not (norms or (rank == 4 and len(taken) > 1)):
            continue
        shape = (channels, *(1,) * (rank - 2))
        scale, shift = (t.expand(channels).reshape(shape) for t in whole[1:])
        if fits(scale, dtype) and fits(shift, dtype):
            last = taken[-1]
            with graph.calls.inserting_before(last):
                last.args = (whole.source, graph.new_constant(scale), graph.new_constant(shift), None, None, ())
            last.target, last.kwargs = AFFINE, {}
            last.meta["fused"] = tuple(name for n in taken for name in n.meta["fused"])
            for n in reversed(taken[:-1]):
                graph.calls.erase_node(n)


def weights(graph: Graph, node: fx.Node) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in float64."""
    bias = node.args[BIAS] if len(node.args) > BIAS else None
    return exactly(graph.constant(node.args[WEIGHT])), exactly(graph.constant(bias))


def replace_weights(graph: Graph, dtype: torch.dtype, node: fx.Node, weight: Tensor, bias: Tensor) -> bool:
    """Gives a call other weights, in float64; not if rounding to `dtype` would lose them."""
    if not (fits(weight, dtype) and fits(bias, dtype)):
        return False
    with graph.calls.inserting_before(node):
        rest = node.args[BIAS + 1 :]
        node.args = (node.args[0], graph.new_constant(weight), graph.new_constant(bias), *rest)
    return True


def takes_scaled_input(graph: Graph, node: fx.Node, x: fx.Node) -> bool:
    """Whether a call is a convolution, or a product with a matrix, of x by constant weights."""
    return node.target in (CONVOLUTION, LINEAR) and node.args[0] is x and _has_weights(graph, node)


def scaled_inputs(node: fx.Node, weight: Tensor, bias: Tensor | None, by: Scaling) -> tuple[Tensor, Tensor]:
    """The weights that do to x what the node's do to x * scale + shift."""
    groups: Any = node.args[7] if node.target is CONVOLUTION else 1
    channels = weight.shape[1] * groups
    ones = [1] * (weight.dim() - 2)
    scale, shift = (t.expand(channels).reshape(groups, 1, -1, *ones) for t in by[1:])
    grouped = weight.unflatten(0, (groups, -1))
    more = (grouped * shift).flatten(2).sum(2).flatten()
    return (grouped * scale).flatten(0, 1), more if bias is None else bias + more


def _scaled_outputs(node: fx.Node, weight: Tensor, bias: Tensor | None, by: Scaling) -> tuple[Tensor, Tensor]:
    """The weights that give y * scale + shift where the node's give y."""
    ones = [1] * (weight.dim() - 2)
    if node.target in TRANSPOSED:  # [C, K / groups, *taps]
        groups = arguments(node)["groups"]
        filters = weight.shape[1] * groups
        scale, shift = by.scale.expand(filters), by.shift.expand(filters)
        scaled = (weight.unflatten(0, (groups, -1)) * scale.reshape(groups, 1, -1, *ones)).flatten(0, 1)
    else:
        scale, shift = by.scale.expand(weight.shape[0]), by.shift.expand(weight.shape[0])
        scaled = weight * scale.reshape(-1, 1, *ones)
    return scaled, shift if bias is None else bias * scale + shift


def _has_weights(graph: Graph, node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in (CONVOLUTION, LINEAR, *TRANSPOSED) or node.kwargs:
        return False
    bias = node.args[BIAS] if len(node.args) > BIAS else None
    return graph.constant(node.args[WEIGHT]) is not None and (bias is None or graph.constant(bias) is not None)


def _padded(node: fx.Node) -> bool:
    return node.target is CONVOLUTION and any(node.args[5])  # type: ignore[arg-type]


def _axis_before(sizes: Sizes, x: fx.Node, user: fx.Node) -> int:
    """The axis of x along which a convolution or a product takes its channels."""
    return (sizes.rank(x) or 0) - 1 if user.target is LINEAR else 1


def _axis_after(sizes: Sizes, node: fx.Node, axis: int) -> int | None:
    """Where a permutation puts an axis of its argument; None of any other call."""
    rank = sizes.rank(node)
    if rank is None or node.target not in (aten.permute.default, aten.transpose.int):
        return None
    dims: Any = node.args[1:] if node.target is aten.transpose.int else node.args[1]
    dims = [d % rank for d in dims]
    if node.target is aten.transpose.int:
        return {dims[0]: dims[1], dims[1]: dims[0]}.get(axis, axis)
    return dims.index(axis)
