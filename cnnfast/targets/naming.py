"""A name becomes a model.

A bare name is looked for in cnnfast.models, torchvision, timm and transformers, in this order and as far as they are
installed; SOURCE:NAME looks in one of them. FILE.py:NAME and package.module:NAME (or package.module.NAME) are the
user's own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .files import factory, load, missing_arguments, named_in, offers
from .libraries import SOURCES, WAYS, installed, looked_up
from .target import Target, TargetError

if TYPE_CHECKING:
    from torch import nn


def resolve(text: str) -> Target:
    """The module or function that `text` names. A class, or a function without required arguments, is called, and its
    result is taken.

    Raises TargetError, which says what is wrong and what would be right, and where the user's own code raised an error.
    """
    where, colon, name = text.rpartition(":")
    if colon and where in SOURCES:
        return looked_up(name, [where])
    if colon and where and name:
        return Target(text, where, named_in(load(where, list(SOURCES)), where, name))
    if not colon and text.endswith(".py"):
        raise TargetError(f"{text} names no model: write file.py:NAME; {offers(load(text), text)}")
    if colon or not text:
        raise TargetError(f"{text!r}: write {WAYS}")
    sys.path.insert(0, str(Path.cwd()))
    if "." in text and installed(text.partition(".")[0]):
        where, _, name = text.rpartition(".")
        return Target(text, where, named_in(load(where), where, name))
    return looked_up(text, list(SOURCES))


def resolve_module(text: str) -> tuple[Target, nn.Module]:
    """The same for callers that need a torch.nn.Module: a name that stands for anything else is a TargetError too."""
    from torch import nn

    target = resolve(text)
    if isinstance(target.value, nn.Module):
        return target, target.value
    if needs := missing_arguments(target.value):
        name = text.rpartition(":")[2]
        raise TargetError(f"{text} needs arguments ({', '.join(needs)}): {factory(name, needs)}")
    because = f"gives {type(target.value).__name__}, not a torch.nn.Module"
    raise TargetError(f"{text} {because}: name a module, or a function that builds one without arguments")
