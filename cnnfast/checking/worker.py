"""The child process of check, in which Triton interprets: judges what a file holds, and prints a line of JSON for each
row.

    python -m cnnfast.checking.worker FILE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from .capture import Captured
from .judge import judge
from .report import NOT_JUDGED, NOTE_MARK, ROW_MARK, CheckRow
from .whole import STATE, judge_conversion


def rows(path: str) -> Iterator[CheckRow]:
    try:
        data: dict[str, Any] = torch.load(path, weights_only=False)  # the parent process has just written it
    except Exception as error:
        reason = f"the process that interprets kernels cannot load it: {type(error).__name__}: {error}"
        yield CheckRow("", STATE, "", "", NOT_JUDGED, reason)
        return
    if "model" in data:
        yield from judge_conversion(**data, watch=lambda text: print(NOTE_MARK + text, flush=True))
    else:
        for call in data["calls"]:
            yield judge(Captured(**call), data["backward"], data["tf32"])


def main(path: str) -> None:
    for row in rows(path):
        print(ROW_MARK + json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
