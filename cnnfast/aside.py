"""Running a model for what can be learnt from it, and not for its caller."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def leaving_no_trace() -> Iterator[None]:
    """PyTorch's random numbers are afterwards as they were; what is compiled runs uncompiled."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    # Nothing is compiled before torch._dynamo is imported, and importing it takes seconds.
    uncompiled = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with torch.random.fork_rng(devices=cuda), uncompiled:
        yield
