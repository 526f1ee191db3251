"""What generated forwards call: a group of modules in one step, and groups that make up a residual block."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as cnn
from ..activations import LEAKY_SLOPE, ActivationName, activate
from ..dispatch import on_gpu
from ..functional.blocks import Link
from ..nn.fused import takes
from ..nn.pooled import conv_bn_act_pool
from ..nn.residual import layer_of, residual_block
from ..nn.stages import through
from ..patterns import activation_of
from .leaves import normalizes_and_activates

# Convolution, norm, activation (a module or a name), slope, and the identities that are called before.
Step = tuple[Any, Any, Any, Any, tuple[nn.Module, ...]]


def call(
    conv: Any,
    norm: Any,
    x: Tensor,
    residual: Tensor | None,
    in_place: bool,
    activation: nn.Module | ActivationName | None,
    slope: float | None,
    pool: nn.Module | None = None,
) -> Tensor:
    """What a generated forward calls for a group. conv, norm: one of the two may be None. in_place: the sum was written
    into what stands before it, and so it has that dtype, whatever the residual's is. pool: what is called of the
    result, or computed with it.
    """
    if pool is not None:
        if isinstance(activation, nn.Module):
            activation, slope = activation_of(activation)  # pyright: ignore
        if takes(conv, x):
            return conv_bn_act_pool(conv, norm, x, pool, activation, slope)
        return pool(call(conv, norm, x, residual, in_place, activation, slope))
    if not takes(norm if conv is None else conv, x):
        return _one_by_one(conv, norm, x, residual, in_place, activation, slope)
    if in_place and isinstance(residual, Tensor):
        device = "cuda" if on_gpu(x) else x.device.type
        casts = device != "meta" and torch.is_autocast_enabled(device)  # which raises for meta: that has no autocast
        half = conv is not None and casts and x.dtype != torch.float64
        residual = residual.to(torch.get_autocast_dtype(device) if half else x.dtype)
    if isinstance(activation, nn.Module):
        activation, slope = activation_of(activation)  # pyright: ignore
    if conv is None:
        return cnn.bn_act(norm, x, residual, activation, slope)
    if norm is None:
        return cnn.conv_act(conv, x, residual, activation, slope)
    return cnn.conv_bn_act(conv, norm, x, residual, activation, slope)


def _one_by_one(conv, norm, x, residual, in_place, activation, slope) -> Tensor:
    """The same by the modules themselves, as the container's own forward calls them, for an input that the fused call
    does not take: an unbatched image, or one that PyTorch refuses.
    """
    y = x if conv is None else conv(x)
    y = y if norm is None else norm(y)
    if residual is not None:
        y = operator.iadd(y, residual) if in_place else y + residual
    if norm is not None and normalizes_and_activates(norm):
        return y
    return (
        activation(y)
        if isinstance(activation, nn.Module)
        else activate(y, activation, LEAKY_SLOPE if slope is None else slope)
    )


def call_block(x: Tensor, steps: tuple[Step, ...], shortcut: Any, in_place: bool, less_memory: bool) -> Tensor:
    """What a generated forward calls for a residual block: in training one operator, else its groups one after the
    other. shortcut: None, a Sequential of a convolution and a norm, or these two. in_place: of the sum, as `call` has
    it. less_memory: as convert was told.
    """
    return _call_block(x, steps, shortcut, in_place, less_memory, None, False)[0]


def call_linked_block(
    of: tuple[Tensor, Link | None], steps: tuple[Step, ...], shortcut: Any, in_place: bool, less_memory: bool
) -> tuple[Tensor, Link | None]:
    """The same of a block that may be linked (nn/stages.py), and what it hands over. of: (x, what the block below
    handed over).
    """
    x, below = of
    return _call_block(x, steps, shortcut, in_place, less_memory, below, True)


def _call_block(
    x: Tensor,
    steps: tuple[Step, ...],
    shortcut: Any,
    in_place: bool,
    less_memory: bool,
    below: Link | None,
    hands_over: bool,
) -> tuple[Tensor, Link | None]:
    projection: Any = shortcut
    others = [m for *_, activation, _, before in steps for m in (activation, *before) if isinstance(m, nn.Module)]
    if isinstance(shortcut, nn.Module):
        projection, others = layer_of(shortcut), [*others, shortcut]
    if shortcut is None or projection is not None:
        branch = [step[:2] for step in steps]
        how: Any = {"less_memory": less_memory, "below": below, "hands_over": hands_over}
        found = residual_block(x, branch, projection, *others, **how)
        if found is not None:
            return found
    z = x
    for conv, norm, activation, slope, before in steps[:-1]:
        z = call(conv, norm, _through(before, z), None, False, activation, slope)
    residual = x
    if shortcut is not None:
        if isinstance(shortcut, nn.Module):
            residual = shortcut(x)
        else:
            conv, norm = shortcut
            residual = call(conv, norm, x, None, False, None, None)
    conv, norm, activation, slope, before = steps[-1]
    return call(conv, norm, _through(before, z), residual, in_place, activation, slope), None


def call_stages(stages: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    """What a generated forward calls for modules that may be linked, one after another."""
    return through(stages, x)[0]


def _through(identities: tuple[nn.Module, ...], z: Tensor) -> Tensor:
    """They are called for the hooks that they may have."""
    for identity in identities:
        z = identity(z)
    return z
