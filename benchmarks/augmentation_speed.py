"""How fast a batch of images is augmented, beside torchvision.transforms.v2 and kornia, and what that launches.

    python benchmarks/augmentation_speed.py

writes benchmarks/results/<the device's name>/augmentation_speed.txt: what `cnnfast bench augment` prints of 64 images
of either layout on a GPU, or of 16 on a CPU, by one thread. All take turns in nine rounds or more, in one process, and
the times are medians. kornia takes part where it can be imported: pip install kornia.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from cnnfast.bench.report import report
from cnnfast.bench.series import Series
from cnnfast.bench.surroundings import one_thread
from cnnfast.commands.bench_augmentation import augmentation_tasks
from cnnfast.measuring.budget import Budget
from cnnfast.measuring.machine import measure_peaks, this_machine

BATCH = {"cuda": 64, "cpu": 16}
DTYPE = {"cuda": "bfloat16", "cpu": "float32"}
SIZE = 224
WIDTH = 120


def main(
    out: Annotated[Path | None, typer.Option(help="Write there instead.")] = None,
    seconds: Annotated[float, typer.Option(help="How long one timing takes.")] = 0.5,
) -> None:
    """Time the recipes of `cnnfast bench augment` on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPE[device.type]
    torch.manual_seed(0)
    with one_thread(device):
        tasks = list(augmentation_tasks([], [BATCH[device.type]], [], SIZE, dtype, device))
        machine = this_machine(device)
        series = Series(tasks, machine, measure_peaks(device, getattr(torch, dtype)))
        series.run(seconds, Budget(), lambda done, total, text: print(text, file=sys.stderr))
    printed = io.StringIO()
    console = Console(file=printed, width=WIDTH, color_system=None, force_terminal=False)
    console.print(report(series.rows, WIDTH))
    text = "\n".join(line.rstrip() for line in printed.getvalue().splitlines()) + "\n"
    folder = Path(__file__).parent / "results" / re.sub(r"\W+", "_", machine.device.lower()).strip("_")
    file = out or folder / "augmentation_speed.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
