"""The child process of check, in which Triton interprets: judges the calls of a file, one line of JSON a row.

python -m cnnfast.checking.worker calls.pt
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

from .capture import Captured
from .judge import judge
from .report import ROW_MARK


def main(path: str) -> None:
    data = torch.load(path, weights_only=True)
    for call in data["calls"]:
        row = judge(Captured(**call), data["backward"])
        print(ROW_MARK + json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
