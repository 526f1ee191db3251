"""The surroundings of a run: one thread on a CPU, empty caches, and a garbage collector that is quick."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory

import torch

from .. import dispatch
from ..measuring.timing import cudnn_benchmark


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU one thread computes, so that times do not depend on who else uses the cores. On a GPU cuDNN may try all
    its algorithms.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        with cudnn_benchmark(True):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def empty_caches(compiling: bool) -> Iterator[None]:
    """Compilers find nothing on disk, so that the first result is a cold one. What this process has compiled before
    stays. compiling: whether torch.compile is to find nothing, too.
    """
    with ExitStack() as stack:
        if dispatch.launch is not None:
            from triton import knobs

            stack.enter_context(knobs.cache.scope())
            knobs.cache.dir = stack.enter_context(TemporaryDirectory(prefix="cnnfast-"))
        if compiling:
            from torch._inductor.utils import fresh_cache

            stack.enter_context(fresh_cache())
        yield


@contextmanager
def quick_collections() -> Iterator[None]:
    """Python's collector does not look through the objects that are there already. PyTorch has so many that this takes
    a seventh of a second, and each job collects several times.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
