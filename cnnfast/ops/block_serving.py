"""Who serves a residual block in training: kernels of ours, all its convolutions, forward and backward; or the library.

A block is one problem, for what its kernels spare lies between its layers, and no row of a layer knows of it. The first
of these that applies decides:

1. It was asked for: backend("kernels"), or convert(memory="less"). Ours.
2. A measured row of this block for this GPU (cnnfast_kernels/tables.py): whoever was faster, as serving.py has it for
   a convolution. While torch.compile traces, and for tensors of other classes than PyTorch's own, no row is asked.
3. Where the library comes first, that is on a GPU: the library; each convolution is then served as everywhere.
4. Elsewhere, that is in the interpreter: ours.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from cnnfast_kernels import devices, launch, tables
from cnnfast_kernels.questions import BlockQuestion

from .. import dispatch
from ..precision import allow_tf32
from .serving import library_comes_first

Answer = Callable[[BlockQuestion, bool], bool | None]

_answers: dict[int, Answer] = {}  # by thread


def kernels_serve_block(x: Tensor, layers: Sequence[tuple[Any, Tensor, Any]], branch: int, less_memory: bool) -> bool:
    """Whether our kernels serve a block. layers: (what it takes, its filters, its geometry) of each, the `branch` first
    ones in the branch; the filters are of x's dtype.
    """
    asked = less_memory or not dispatch.library_allowed()
    if is_compiling() or any(type(t) not in dispatch.PLAIN for t in (x, *(w for _, w, _ in layers))):
        return asked or not library_comes_first(x.device)
    if asked and not _answers:
        return True
    question = tuple.__new__(BlockQuestion, (
        devices.gpu(x.device), x.dtype, allow_tf32(x), x.shape, x.stride(), branch,
        tuple([(w.shape, w.stride(), geometry) for _, w, geometry in layers]),
    ))  # fmt: skip
    if _answers and (answer := _answers.get(threading.get_ident())) is not None:
        answered = answer(question, less_memory)
        if answered is not None:
            return answered
    if asked:
        return True
    row = block_row(question)
    return not library_comes_first(x.device) if row is None else row.winner == "kernels"


@launch.planned
def block_row(question: BlockQuestion) -> tables.BlockRow | None:
    """The row that decides."""
    return tables.find_block(question.key)


@contextmanager
def asked_first(answer: Answer) -> Iterator[None]:
    """Of every block of this thread `answer(question, less_memory)` is asked first while the context lasts: True for
    our kernels, False for the library, None if it leaves that to the rules.
    """
    thread = threading.get_ident()
    before = _answers.get(thread)
    _answers[thread] = answer
    try:
        yield
    finally:
        if before is None:
            del _answers[thread]
        else:
            _answers[thread] = before
