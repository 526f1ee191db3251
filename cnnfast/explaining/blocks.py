"""Who serves the residual blocks of a training step, each of which is one operator: the step is run once more, for the
operations are told layer by layer.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from cnnfast_kernels import devices
from cnnfast_kernels.questions import BlockQuestion

from .. import dispatch
from ..calls import CallRecorder, OperatorCall, recorded_run
from ..ops.block_serving import asked_first, block_row
from .placing import Places
from .rows import BlockServed


class BlockFollower(CallRecorder):
    """found: the blocks of a step, in the order of their calls."""

    def __init__(self, model: nn.Module, with_numbers: bool) -> None:
        super().__init__(model, with_numbers)
        self.found: list[BlockServed] = []
        self.places = Places(model, links=False)
        self.stack = ExitStack()

    def __enter__(self) -> BlockFollower:
        self.stack.enter_context(self.places)
        self.stack.enter_context(asked_first(self.asked))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.stack.close()
        super().__exit__(*error)

    def record(self, call: OperatorCall) -> None:
        """The operators within blocks are told elsewhere."""

    def asked(self, block: BlockQuestion, less_memory: bool) -> bool:
        (module, *_), _ = self.places.now()
        row = None if less_memory else block_row(block)
        times = {} if row is None else row.microseconds
        ours = less_memory or (row is not None and row.winner == "kernels")
        self.found.append(
            BlockServed(
                layer=self.places.names[id(module)],
                shape="x".join(map(str, block.x_shape)),
                served="kernels" if ours else "library",
                by="less memory" if less_memory else "unmeasured" if row is None else "measured row",
                measured_us=times.get("kernels"),
                library_us=times.get("library"),
            )
        )
        return ours


def blocks_served(model: nn.Module, inputs: tuple[Any, ...], gpu: devices.Gpu, **how: Any) -> list[BlockServed]:
    """Of a training step on `gpu`. how: as calls.recorded_run has it."""
    with dispatch.backend("auto"):
        return recorded_run(BlockFollower, model, inputs, gpu=gpu, train=True, **how).found
