"""What of a model stays PyTorch's although it is no convolution, batch norm or pooling: norms of other kinds, linear
layers, attention, activations that stand alone, and what forwards compute between the calls of modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .costs import Spender, Spent
from .grafts import base_of
from .observing import is_unit
from .planning import only_holds
from .rows import LEFT, REPLACED, CollectedRow

# By the file of torch.nn that defines a module's class, or one that it inherits from.
NORM = "cnnfast has kernels for batch norm only; BatchNorm2d in its place would be fused, but has to be trained"
REASONS = {
    "normalization": NORM,
    "instancenorm": NORM,
    "linear": "a matrix product, which PyTorch's library serves",
    "upsampling": "cnnfast has no kernel for interpolation",
    "padding": "a padding of its own: zeros around a convolution cost nothing if they are its `padding`",
    "pixelshuffle": "moves pixels only, and cnnfast has no kernel for that",
    "pooling": "cnnfast has kernels for max, average and adaptive average pooling of images only",
    "rnn": "recurrent, which PyTorch's library serves",
    "sparse": "a look-up in a table",
}
ACTIVATION = "no convolution or norm to fuse it with; if one is right before it, its container's line says why not"
DROPOUT = {
    False: "does nothing in eval mode",
    True: "draws PyTorch's random numbers, as in the model before conversion",
}
STANDARDISED = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")  # timm's
ATTENTION = "attention, by PyTorch's functions"
UNKNOWN = "runs as it is: conversion replaces convolutions, batch norms and pools of torch.nn"
# Modules that return what they were given, perhaps in another shape.
SILENT = (nn.Identity, nn.Flatten, nn.Unflatten)


def standardised(module: nn.Module) -> str:
    """Why a convolution that standardises its weight at each call is left; the empty string for any other module."""
    if base_of(type(module)).__name__ not in STANDARDISED:
        return ""
    return (
        "standardises its weight at each call, in a forward of its own. For inference it can be replaced by a Conv2d"
        " with the standardised weight, before conversion"
    )


def collected(
    modules: Mapping[str, nn.Module], listed: Iterable[str], spent: Mapping[Spender, Spent] | None
) -> list[CollectedRow]:
    """Rows for what `spent` has of others than the modules that are `listed` already, largest share of bytes first; if
    nothing was run (None), rows for the modules that a run would show, without numbers.
    """
    listed = set(listed)
    if spent is None:
        names = [name for name, m in modules.items() if is_unit(m) and not only_holds(m) and not isinstance(m, SILENT)]
        spent = {Spender("module", name): Spent(calls=1) for name in names}
        unknown = True
    else:
        unknown = False
    groups: dict[tuple[str, str, str], list[tuple[Spender, Spent]]] = {}
    for spender, cost in spent.items():
        if spender.what == "module" and (
            spender.name in listed or not (unknown or _counts(modules[spender.name], cost))
        ):
            continue
        groups.setdefault(_group(modules, spender), []).append((spender, cost))
    rows = [_row(*group, members, unknown) for group, members in groups.items()]
    return sorted(rows, key=lambda row: -(row.bytes or 0))


def _counts(module: nn.Module, cost: Spent) -> bool:
    return bool(cost.flops or cost.bytes) or isinstance(module, nn.modules.dropout._DropoutNd)


def _group(modules: Mapping[str, nn.Module], spender: Spender) -> tuple[str, str, str]:
    """(kind, status, reason) of the row that a spender belongs to."""
    if spender.what == "module":
        module = modules[spender.name]
        return base_of(type(module)).__name__, LEFT, _why(module)
    if spender.what == "attention":
        return base_of(type(modules[spender.name])).__name__, LEFT, ATTENTION
    return {
        "function": ("functions of cnnfast", REPLACED, "called by forwards"),
        "product": ("matrix products", LEFT, "called by forwards as functions, not as modules"),
        "operation": ("tensor operations", LEFT, "between modules"),
    }[spender.what]


def _row(kind: str, status: str, reason: str, members: list[tuple[Spender, Spent]], unknown: bool) -> CollectedRow:
    calls = Counter({spender.name: cost.calls for spender, cost in members})
    by_module = members[0][0].what in ("module", "attention")
    if not by_module:
        reason += ": " + ", ".join(f"{number} {name}" for name, number in calls.most_common())
    return CollectedRow(
        kind=kind,
        count=len(members) if by_module else calls.total(),
        names=list(calls),
        status=status,
        reason=reason,
        flops=None if unknown else sum(cost.flops for _, cost in members),
        bytes=None if unknown else sum(cost.bytes for _, cost in members),
    )


def _why(module: Any) -> str:
    """Why a module stays PyTorch's, and what its user can do, if anything."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return DROPOUT[module.training]
    files = [
        cls.__module__.rpartition(".")[2] for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn.m")
    ]
    if isinstance(module, nn.MultiheadAttention):
        return ATTENTION
    reason = next((REASONS[file] for file in files if file in REASONS), "")
    return reason or (ACTIVATION if "activation" in files else UNKNOWN)
