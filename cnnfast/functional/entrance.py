"""What every function of cnnfast.functional does first: it looks for captures and for __torch_function__, refuses
arguments that should be tensors and are none, and tells who misspells a keyword which one is near.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch.overrides import handle_torch_function, has_torch_function

from ..spelling import refuse_unknown_keywords

P = ParamSpec("P")
R = TypeVar("R")
Observer = Callable[[str, tuple[Any, ...], dict[str, Any]], AbstractContextManager[None]]
# Each with the thread whose calls it captures. Another thread's may go at any time: who goes through them all takes a
# copy first.
_captures: list[tuple[int, Observer]] = []


@contextmanager
def capture(observer: Observer) -> Iterator[None]:
    """Every call of a cnnfast.functional function by this thread runs within `observer(name, args, kwargs)`, a context
    manager.
    """
    entry = threading.get_ident(), observer
    _captures.append(entry)
    try:
        yield
    finally:
        _captures.remove(entry)


def captured() -> bool:
    """Whether this thread's calls are being captured."""
    return bool(_captures) and bool(_of_this_thread())


def _of_this_thread() -> list[Observer]:
    here = threading.get_ident()
    return [observer for thread, observer in tuple(_captures) if thread == here]


def _refuse_non_tensors(
    function: Callable[..., Any],
    refusal: Callable[[Mapping[str, Any]], type[Exception]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Raises if an argument is no tensor where `function` is annotated to take one."""
    signature = inspect.signature(function)
    given = signature.bind(*args, **kwargs).arguments
    for name, value in given.items():
        kinds = signature.parameters[name].annotation.split(" | ")
        takes_others = "float" in kinds or (value is None and "None" in kinds)
        if "Tensor" in kinds and not isinstance(value, torch.Tensor) and not takes_others:
            error = TypeError if "None" in kinds else refusal(given)
            raise error(f"{function.__name__}(): {name} must be a Tensor, not {type(value).__name__}") from None


def operation(
    function: Callable[P, R], refusal: Callable[[Mapping[str, Any]], type[Exception]] = lambda given: TypeError
) -> Callable[P, R]:
    """Marks a function of cnnfast.functional: its calls can be captured, and go to the __torch_function__ of arguments
    that have one; an argument that should be a tensor and is none is refused by its name.

    Type checkers and inspect.signature see the function's own signature. Only a call that failed looks for the argument
    that is to blame, by an attribute that a tensor would have or by an unknown keyword: other calls do not pay for it.
    `refusal` tells, from all arguments, which error PyTorch raises where a required tensor is none.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if has_torch_function(args) or (kwargs and has_torch_function(tuple(kwargs.values()))):
            return handle_torch_function(call, (*args, *kwargs.values()), *args, **kwargs)
        try:
            if not _captures:
                return function(*args, **kwargs)
            with ExitStack() as stack:
                for observer in _of_this_thread():
                    stack.enter_context(observer(function.__name__, args, kwargs))
                return function(*args, **kwargs)
        except AttributeError:
            _refuse_non_tensors(function, refusal, args, kwargs)
            raise
        except TypeError:
            refuse_unknown_keywords(function, kwargs)
            raise

    return call
