"""What a step costs: as data, as JSON, as a table and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cnnfast_kernels.gpus import KnownGpu

from .rows import ForeignWork, Operation, OperationTotal

MODEL = "a model: nothing here was measured"


@dataclass(frozen=True)
class Explanation:
    """The operations of a step on a GPU, in the order of their calls, and what PyTorch's own operators do besides.

    model: the name of its class. str() is a table; rich prints it at the width of its console.
    """

    model: str
    gpu: KnownGpu
    train: bool
    rows: Sequence[Operation]
    foreign: Sequence[ForeignWork]

    @property
    def totals(self) -> dict[str, OperationTotal]:
        """By operation, in the order of their first calls."""
        found: dict[str, OperationTotal] = {}
        for row in self.rows:
            before = found.get(row.operation, OperationTotal(0.0, 0.0))
            found[row.operation] = OperationTotal(
                before.modelled_us + row.modelled_us, before.roofline_us + row.roofline_us
            )
        return found

    @property
    def bytes(self) -> int:
        """That our kernels read and write in the step."""
        return sum(row.bytes for row in self.rows)

    @property
    def launches(self) -> int:
        """Of our kernels in the step."""
        return sum(row.launches for row in self.rows)

    def to_json(self) -> str:
        """An object with model, gpu, arch, mode, note, rows, totals, bytes, launches and pytorch."""
        data = {
            "model": self.model,
            "gpu": self.gpu.cuda,
            "arch": self.gpu.arch,
            "mode": "train" if self.train else "infer",
            "note": MODEL,
            "rows": [asdict(row) for row in self.rows],
            "totals": {operation: asdict(total) for operation, total in self.totals.items()},
            "bytes": self.bytes,
            "launches": self.launches,
            "pytorch": [asdict(work) for work in self.foreign],
        }
        return json.dumps(data, indent=1, allow_nan=False)
