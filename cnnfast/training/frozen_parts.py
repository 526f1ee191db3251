"""Parts of a network that are not trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ..spelling import did_you_mean

BACKBONE = "backbone"
# What torchvision, timm and transformers call the layer that classifies, and most people, too.
HEADS = ("fc", "classifier", "head", "heads", "logits", "last_linear")


def freeze(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Lets the parameters of the modules of these names, as in `model.named_modules()`, require no gradient; "backbone"
    is all but the head. Returns the modules.

    Raises ValueError for a name that is none.
    """
    modules = dict(model.named_modules())
    parts: list[nn.Module] = []
    for name in names:
        if name == BACKBONE and BACKBONE not in modules:
            head = head_of(model)
            trained = {id(p) for p in head.parameters()}
            still, parameters = [*_all_but(model, head)], [p for p in model.parameters() if id(p) not in trained]
        elif name and name in modules:
            still, parameters = [modules[name]], [*modules[name].parameters()]
        else:
            children = [child for child, _ in model.named_children()]
            known = f"backbone, or a part such as {', '.join(children)}"
            raise ValueError(f"frozen names no part {name!r}: there is {known}{did_you_mean(name, children)}")
        parts += still
        for parameter in parameters:
            parameter.requires_grad_(False)
    return parts


def head_of(model: nn.Module) -> nn.Module:
    """The last layer that classifies: of the last child that has a name of HEADS, or else of the whole, the last
    module that has parameters of its own.

    Raises ValueError if the model has no parameters.
    """
    named = [child for name, child in model.named_children() if name in HEADS and _has_parameters(child)]
    layers = [m for m in (named or [model])[-1].modules() if _has_parameters(m, recurse=False)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no parameters: there is nothing to train")
    return layers[-1]


def keep_still(parts: Sequence[nn.Module]) -> None:
    """Puts them in eval: batch norms then use, and leave, the statistics that they have, and nothing is dropped."""
    for part in parts:
        part.eval()


def _has_parameters(module: nn.Module, recurse: bool = True) -> bool:
    return next(module.parameters(recurse), None) is not None


def _all_but(model: nn.Module, kept: nn.Module) -> Iterator[nn.Module]:
    """The largest modules that `kept` is no part of."""
    for child in model.children():
        if child is kept:
            continue
        if any(module is kept for module in child.modules()):
            yield from _all_but(child, kept)
        else:
            yield child
