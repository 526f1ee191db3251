"""What somebody probably meant by a word that is not known: "did you mean", wherever names are given.

    >>> near("LeakyReLU", ["relu", "leaky_relu"])
    ['leaky_relu']
    >>> did_you_mean("im2cols", ["auto", "direct", "im2col", "torch"])
    ". Did you mean 'im2col'?"

The words are those of Python's own errors, and end a message that has said what was given and what would be right.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# What other libraries call arguments of ours, folded as `fold` does it.
KEYWORDS = {
    "actlayer": "activation",
    "nonlinearity": "activation",
    "negativeslope": "activation_arg",
    "slope": "activation_arg",
    "ksize": "kernel_size",
    "filters": "out_channels",
    "classes": "num_classes",
    "epsilon": "eps",
}


def fold(word: str) -> str:
    """The word without what people spell differently: capitals, underscores, hyphens and spaces."""
    return word.lower().replace("_", "").replace("-", "").replace(" ", "")


def near(word: str, known: Iterable[str], most: int = 1) -> list[str]:
    """The known words that `word` is probably meant to be, the nearest first, and at most so many.

    Spelling counts only as `fold` leaves it. A word that others begin with, of three letters or more, is taken for
    their abbreviation: "act" is near "activation".
    """
    folded: dict[str, str] = {}
    for name in known:
        folded.setdefault(fold(name), name)
    wanted = fold(word)
    found = difflib.get_close_matches(wanted, folded, n=most, cutoff=0.7)
    if len(wanted) >= 3:
        found += [name for name in folded if name.startswith(wanted) and name not in found]
    return [folded[name] for name in found[:most]]


def did_you_mean(word: str, known: Iterable[str], synonyms: Mapping[str, object] | None = None) -> str:
    """The end of a message about an unknown word: ". Did you mean 'silu'?", or nothing where no word is near.

    synonyms: other words, folded as `fold` does it, and the value that each stands for; they come before words that are
    near.
    """
    if synonyms and fold(word) in synonyms:
        return f". Did you mean {synonyms[fold(word)]!r}?"
    found = near(word, known)
    return f". Did you mean {found[0]!r}?" if found else ""


def word_for(value: object) -> str:
    """A string or None itself; of a class or a function its name, and of anything else the name of its class: whoever
    gives nn.SiLU, nn.SiLU() or F.silu for a name means 'silu'.
    """
    if value is None or isinstance(value, str):
        return str(value)
    return getattr(value, "__name__", type(value).__name__)


def quoted(known: Iterable[object]) -> str:
    """Values as somebody would write them in a call: None, 'relu' or 'silu'."""
    *first, last = map(repr, known)
    return f"{', '.join(first)} or {last}" if first else last


def unknown_value(
    function: str, name: str, value: object, known: Sequence[object], synonyms: Mapping[str, object] | None = None
) -> ValueError:
    """The error for an argument that has a value which is none of the known ones. synonyms: as `did_you_mean` has
    them.
    """
    advice = did_you_mean(word_for(value), [one for one in known if isinstance(one, str)], synonyms)
    return ValueError(f"{function}(): {name} must be {quoted(known)}, but got {name}={value!r}{advice}")


def refuse_unknown_keywords(function: Callable[..., Any], keywords: Iterable[str]) -> None:
    """Raises TypeError, in Python's words, if one of these keywords is none of the arguments of `function`.

    To be asked once a call has failed, so that calls that succeed do not pay for it.
    """
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    names = [
        name for name, p in parameters.items() if name != "self" and p.kind not in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY)
    ]
    for keyword in keywords:
        if keyword not in names:
            meant = {other: name for other, name in KEYWORDS.items() if name in names}
            advice = did_you_mean(keyword, names, meant) or f". Its arguments are {', '.join(names)}"
            name = function.__qualname__.removesuffix(".__init__")
            raise TypeError(f"{name}() got an unexpected keyword argument {keyword!r}{advice}") from None


def keywords_explained(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function, or an __init__: who misspells one of its keywords is told which one is near."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError:
            refuse_unknown_keywords(function, kwargs)
            raise

    return call
