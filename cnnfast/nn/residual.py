"""relu(branch(x) + shortcut(x)) of existing modules: a residual block in training as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..functional.blocks import Link, NormedConv, block_serves
from ..functional.blocks import residual_block as computed
from .fused import fusable, is_batch_norm, is_conv2d
from .layers import SameConv2d, running_statistics, synchronising_group

# In a module's __dict__, where convert(memory="less") puts True: the blocks of its forward save less for backward.
LESS_MEMORY = "_cnnfast_less_memory"
Layer = tuple[nn.Module, nn.Module]  # a convolution and the norm of what it gives


def residual_block(
    x: Any,
    branch: Sequence[Layer],
    projection: Layer | None,
    *others: nn.Module,
    less_memory: bool = False,
    below: Link | None = None,
    hands_over: bool = False,
) -> tuple[Tensor, Link | None] | None:
    """(the block of these modules as one operator, what it hands over), or None where that does not compute what
    calling them would. below, hands_over: see functional/blocks.py.

    branch: two or three layers, each but the last followed by a ReLU; then projection(x), or x itself, is added, and
    ReLU follows. others: more modules whose calls this replaces. It is None where the modules do not train, no gradient
    is wanted, one of them has a hook, is parametrized or of another class, a convolution has a bias or pads in an
    unusual way, norms do not normalise by statistics of their own batch alone, or functional/blocks.py has it so.
    """
    layers = [*branch, *([] if projection is None else [projection])]
    modules = [module for layer in layers for module in layer]
    if not torch.is_grad_enabled() or not fusable(x, *modules, *others):
        return None
    if not all(_is_plain(conv) and _trains(bn, x) for conv, bn in layers):
        return None
    if len({id(module) for module in modules}) < len(modules):  # one that is called twice takes statistics twice
        return None
    taken = [_taken(conv, bn) for conv, bn in layers]
    if not block_serves(x, taken[: len(branch)], None if projection is None else taken[-1]):
        return None
    # These count the batch, and tell what share of the average it has.
    taken = [each._replace(momentum=running_statistics(bn)[3]) for each, (_, bn) in zip(taken, layers, strict=True)]
    return computed(x, taken[: len(branch)], None if projection is None else taken[-1], less_memory, below, hands_over)


def layer_of(module: nn.Module) -> Layer | None:
    """The convolution and the norm that a Sequential is made of, also one that conversion gave a fused forward; None of
    any other module.
    """
    kind = type(module)
    if kind.__dict__.get("_cnnfast_base", kind) is not nn.Sequential or len(module._modules) != 2:
        return None
    conv, norm = module.children()
    return conv, norm


def less_memory(module: nn.Module) -> bool:
    """Whether the residual blocks of a module's forward are to save less for backward."""
    return LESS_MEMORY in module.__dict__


def _is_plain(conv: Any) -> bool:
    return (
        is_conv2d(conv)
        and not is_parametrized(conv)  # who asks for its weight twice makes it compute that twice
        and not isinstance(conv, SameConv2d)
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def _trains(bn: Any, x: Tensor) -> bool:
    return (
        is_batch_norm(bn)
        and not is_parametrized(bn)
        and bn.training
        and getattr(bn, "track_running_stats", None) is not None
        and synchronising_group(bn, x) is None
    )


def _taken(conv: Any, bn: Any) -> NormedConv:
    """As functional takes them, but for the momentum."""
    tracked = bn.track_running_stats
    running = (bn.running_mean, bn.running_var) if tracked else (None, None)
    return NormedConv(
        conv.weight,
        *running,
        bn.weight,
        bn.bias,
        0.0,
        bn.eps,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
    )
