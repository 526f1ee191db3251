"""Parts of a network that are not trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor, nn

from ..spelling import did_you_mean
from .heads import heads_of

BACKBONE = "backbone"


def freeze(model: nn.Module, names: Sequence[str], images: Tensor) -> list[nn.Module]:
    """Lets the parameters of the modules of these names, as in `model.named_modules()`, require no gradient; "backbone"
    is all but the heads, which are found with `images` [N, C, H, W] (heads.py). Returns the modules.

    Raises ValueError for a name that is none, and heads.NoHead.
    """
    modules = dict(model.named_modules())
    parts: list[nn.Module] = []
    for name in names:
        if name == BACKBONE and BACKBONE not in modules:
            heads = {model.get_submodule(head) for head in heads_of(model, images)}
            trained = {id(p) for head in heads for p in head.parameters()}
            still, parameters = [*_all_but(model, heads)], [p for p in model.parameters() if id(p) not in trained]
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


def keep_still(parts: Sequence[nn.Module]) -> None:
    """Puts them in eval: batch norms then use, and leave, the statistics that they have, and nothing is dropped."""
    for part in parts:
        part.eval()


def _all_but(model: nn.Module, kept: Collection[nn.Module]) -> Iterator[nn.Module]:
    """The largest modules that no module of `kept` is a part of."""
    for child in model.children():
        if child in kept:
            continue
        if any(module in kept for module in child.modules()):
            yield from _all_but(child, kept)
        else:
            yield child
