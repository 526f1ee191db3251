"""A container's forward is run to be traced, and leaves the container as it was."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy
from torch import nn

from .refused import Drew, Refused


@contextlib.contextmanager
def in_mode(block: nn.Module, training: bool) -> Iterator[None]:
    """`block` and all modules below it have this mode meanwhile. Their flags are set past `train` and `__setattr__`,
    which may be the user's and do more.
    """
    # A scripted module keeps its flag elsewhere, and has none in its dictionary.
    before = [(m, m.training) for m in block.modules() if "training" in m.__dict__]
    for m, _ in before:
        m.__dict__["training"] = training
    try:
        yield
    finally:
        for m, flag in before:
            m.__dict__["training"] = flag


class _Printed:
    """In the place of sys.stdout: notes whether this thread prints, and lets others print. here: whether it did."""

    def __init__(self, stdout: Any) -> None:
        self.stdout, self.thread, self.here = stdout, threading.get_ident(), False

    def write(self, text: str) -> int:
        if threading.get_ident() != self.thread:
            return self.stdout.write(text)
        self.here = True
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stdout, name)


@contextlib.contextmanager
def unchanged(block: nn.Module) -> Iterator[None]:
    """Puts back the attributes of all modules, the lists, dicts and sets among them, and the state of random numbers.
    Raises Refused if any of that had changed, or if this thread printed something; Drew if random numbers were drawn,
    which are those of all threads.
    """
    modules = list(block.modules())
    before = [(vars(m), _contents(vars(m))) for m in modules]
    inner = [[(v, _contents(v)) for v in vars(m).values() if isinstance(v, list | dict | set)] for m in modules]
    draws = random.getstate(), numpy.random.get_state()
    printed = _Printed(sys.stdout)
    try:
        with contextlib.redirect_stdout(printed):  # pyright: ignore[reportArgumentType]
            yield
    finally:
        changed = [_restore(*entry) for entry in (*before, *(e for entries in inner for e in entries))]
        drawn = random.getstate() != draws[0] or not all(map(numpy.array_equal, numpy.random.get_state(), draws[1]))
        random.setstate(draws[0])
        numpy.random.set_state(draws[1])
    if drawn:
        raise Drew("its forward draws random numbers")
    if any(changed):
        raise Refused("its forward changes attributes")
    if printed.here:
        raise Refused("its forward prints")


def _contents(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else list(value)


def _restore(value: Any, contents: Any) -> bool:
    """Gives a list, dict or set its former contents again; returns whether it had others."""
    now, then = _contents(value), contents
    if isinstance(value, dict):
        same = list(now) == list(then) and all(now[k] is then[k] for k in then)
    else:
        same = len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))
    if same:
        return False
    value.clear()
    value.extend(then) if isinstance(value, list) else value.update(then)
    return True
