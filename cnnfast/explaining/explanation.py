"""What a step costs: as data, as JSON, as a table and as a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult

from cnnfast_kernels.gpus import KnownGpu

from ..modes import INFER, TRAIN
from .rows import OPERATIONS, BlockServed, ForeignWork, Operation, OperationTotal
from .showing import MODEL, shown
from .steps import TrainingStep

WIDTH = 120  # of str(explanation)


@dataclass(frozen=True)
class Explanation:
    """The operations of a step on a GPU, in the order of their calls, what PyTorch's own operators do besides, and who
    serves the residual blocks of a training step.

    model: the name of its class. dtype: of the first convolution's or pass's operands, or "tf32". shapes: of the
    inputs. training: of a step of training, what its operators are that are composed of others, what its layers keep
    for backward, and how long it takes at the roofline's rates beside PyTorch's eager mode; else None. str() is a
    table, in which equal operations share a line; rich prints it at the width of its console.
    """

    model: str
    gpu: KnownGpu
    train: bool
    dtype: str
    shapes: Sequence[tuple[int, ...]]
    rows: Sequence[Operation]
    foreign: Sequence[ForeignWork]
    blocks: Sequence[BlockServed] = ()
    training: TrainingStep | None = None

    @property
    def mode(self) -> str:
        return TRAIN if self.train else INFER

    @property
    def totals(self) -> dict[str, OperationTotal]:
        """By operation, for those that there are."""
        groups = {operation: [row for row in self.rows if row.operation == operation] for operation in OPERATIONS}
        return {
            operation: OperationTotal(sum(row.modelled_us for row in rows), sum(row.roofline_us for row in rows))
            for operation, rows in groups.items()
            if rows
        }

    @property
    def bytes(self) -> int:
        """That our kernels read and write in the step."""
        return sum(row.bytes for row in self.rows)

    @property
    def launches(self) -> int:
        """Of our kernels in the step."""
        return sum(row.launches for row in self.rows)

    def to_json(self) -> str:
        """An object with note (that this is a model), model, gpu, arch, mode, dtype, inputs, rows, totals, bytes,
        launches, pytorch, blocks and training.
        """
        data = {
            "note": MODEL,
            "model": self.model,
            "gpu": self.gpu.cuda,
            "arch": self.gpu.arch,
            "mode": self.mode,
            "dtype": self.dtype,
            "inputs": self.shapes,
            "rows": [asdict(row) for row in self.rows],
            "totals": {operation: asdict(total) for operation, total in self.totals.items()},
            "bytes": self.bytes,
            "launches": self.launches,
            "pytorch": [asdict(work) for work in self.foreign],
            "blocks": [asdict(block) for block in self.blocks],
            "training": None if self.training is None else asdict(self.training),
        }
        return json.dumps(data, indent=1, allow_nan=False)

    def picture(self, path: str | Path) -> None:
        """Draws a bar for each layer into a file, its limiter by colour and the roofline as a line; the file's ending
        says in what format (.png, .svg, .pdf).

        Raises ImportError without matplotlib, ValueError for an ending that it does not know.
        """
        try:
            from .picturing import draw
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "matplotlib":
                raise
            raise ImportError(
                "a picture needs matplotlib, which is not installed: pip install '.[demo]' brings it"
            ) from None
        draw(self, Path(path))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield shown(self, options.max_width)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())
