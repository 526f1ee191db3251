"""What print(model) shows of a fused container: PyTorch's text, with a comment at each member that says in which step
it is computed, and at each layer of ours outside of any step.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import nn

from ..nn.fused import forward_replaced
from .grafts import base_of
from .leaves import is_ours
from .planning import Group

Steps = Callable[[nn.Module], list[tuple[Group, str]]]

ALONE = "cnnfast"  # the comment at a layer that is computed by itself


def described(block: nn.Module, group: Group) -> str:
    """What a group computes, by the names of its modules, or by their classes where the children are numbered."""

    def named(path: str) -> str:
        last = path.rpartition(".")[2]
        return base_of(type(block.get_submodule(path))).__name__ if last.isdecimal() else last

    parts = [*map(named, filter(None, (group.conv, group.norm))), "residual" * group.residual, named(group.activation)]
    return " + ".join(filter(None, parts))


def shown(block: Any, steps: Steps, outer: dict[str, str] | None = None) -> str:
    """The text of a container and all below it.

    steps: the groups of a container, each with the reason why it is not computed in one step now, or with the empty
    string. outer: comments at modules below `block` that a container above it calls, by their paths.
    """
    comments = _comments(block, [group for group, reason in steps(block) if not reason]) | (outer or {})
    children = {}
    for name, child in block._modules.items():
        below = {path.removeprefix(f"{name}."): said for path, said in comments.items() if path.startswith(f"{name}.")}
        children[name] = _Text(child, comments.get(name, ""), below, steps)
    # nn.Module's own text, of what stands in for the children
    view: Any = SimpleNamespace(extra_repr=block.extra_repr, _get_name=block._get_name, _modules=children)
    return nn.Module.__repr__(view)


def _comments(block: nn.Module, groups: list[Group]) -> dict[str, str]:
    """The comment at each module that is a member of a group, by its path."""
    firsts = {group.first: f"one step: {described(block, group)}" for group in groups}
    others: dict[str, list[str]] = {}
    for group in groups:
        for path in group.members:
            if path not in firsts and not path.startswith(f"{group.norm}."):
                others.setdefault(path, []).append(group.first)
    return firsts | {
        path: f"in the {'step' if len(found) == 1 else 'steps'} of {', '.join(found)}" for path, found in others.items()
    }


class _Text:
    """A child whose repr has a comment in its first line."""

    def __init__(self, module: nn.Module | None, comment: str, below: dict[str, str], steps: Steps) -> None:
        self.module, self.below, self.steps = module, below, steps
        ours = module is not None and is_ours(module) and not forward_replaced(module)
        self.comment = comment or (ALONE if ours else "")

    def __repr__(self) -> str:
        # A ModuleList, say, has a text of its own.
        plain = self.module is not None and base_of(type(self.module)).__repr__ is nn.Module.__repr__
        inner = plain and self.module._modules  # pyright: ignore[reportOptionalMemberAccess]
        text = shown(self.module, self.steps, self.below) if inner else repr(self.module)
        first, newline, rest = text.partition("\n")
        return f"{first}  # {self.comment}{newline}{rest}" if self.comment else text
