"""Whether two models keep the same state: what checkpoints, optimizers and fine-tuning see of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .report import Comparison


def compare_states(original: nn.Module, converted: nn.Module) -> list[Comparison]:
    """Keys, order, shapes, dtypes and values of state_dict, each model loading the other's; names, order, sharing and
    requires_grad of the parameters; names, order and sharing of the buffers; training flags. A Comparison's message
    says what differs first.
    """
    return [
        Comparison(name, message=difference)
        for name, difference in (
            ("state_dict", _compare_state(converted.state_dict(), original.state_dict())),
            ("parameters", _compare_tensors(converted.named_parameters, original.named_parameters)),
            ("buffers", _compare_tensors(converted.named_buffers, original.named_buffers)),
            ("training flags", _compare_flags(converted, original)),
            ("loading into the converted model", _compare_loading(converted, original)),
            ("loading into the original", _compare_loading(original, converted)),
        )
    ]


def _compare_names(mine: list[str], right: list[str]) -> str:
    lacking, strange = ([n for n in a if n not in b] for a, b in ((right, mine), (mine, right)))
    if lacking or strange:
        found = (("lacks", lacking), ("has", strange))
        return "; ".join(
            f"{verb} {', '.join(names[:5])}{', ...' if names[5:] else ''}" for verb, names in found if names
        )
    return next((f"in another order: {a} where {b} was" for a, b in zip(mine, right, strict=True) if a != b), "")


def _compare_state(mine: dict[str, Any], right: dict[str, Any]) -> str:
    if names := _compare_names(list(mine), list(right)):
        return names
    for name, t in right.items():
        if isinstance(t, Tensor) and isinstance(mine[name], Tensor):
            if (mine[name].dtype, mine[name].shape) != (t.dtype, t.shape):
                return f"{name} is {mine[name].dtype} {list(mine[name].shape)}, not {t.dtype} {list(t.shape)}"
            if not torch.equal(mine[name].nan_to_num(), t.nan_to_num()):
                return f"{name} has other values"
        elif type(mine[name]) is not type(t):
            return f"{name} is {type(mine[name]).__name__}, not {type(t).__name__}"
    return ""


def _compare_tensors(mine: Callable[..., Any], right: Callable[..., Any]) -> str:
    """Compares the names and their order, which of them share a tensor, and which require gradients."""
    ours, theirs = (dict(named(remove_duplicate=False)) for named in (mine, right))
    if names := _compare_names(list(ours), list(theirs)):
        return names
    first: dict[int, str] = {}
    shared = [{name: first.setdefault(id(t), name) for name, t in tensors.items()} for tensors in (ours, theirs)]
    for name, t in theirs.items():
        if shared[0][name] != shared[1][name]:
            return f"{name} is {shared[0][name]}, not {shared[1][name]}: another tensor shared"
        if ours[name].requires_grad != t.requires_grad:
            return f"{name} has requires_grad={ours[name].requires_grad}"
    return ""


def _compare_flags(mine: nn.Module, right: nn.Module) -> str:
    flags = {name: module.training for name, module in mine.named_modules()}
    wrong = [name for name, module in right.named_modules() if flags.get(name, module.training) != module.training]
    return f"{wrong[0] or 'the model'} has training={flags[wrong[0]]}" if wrong else ""


def _compare_loading(into: nn.Module, source: nn.Module) -> str:
    """Compares a state_dict of `source`, with other numbers, with what loading it leaves in a copy of `into`."""
    state = {
        name: t + 1 if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in source.state_dict().items()
    }
    model = copy.deepcopy(into)
    try:
        model.load_state_dict(state)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return _compare_state(model.state_dict(), state)
