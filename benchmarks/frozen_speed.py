"""How fast a CPU runs networks that cnnfast.freeze made, beside PyTorch in channels_last and onnxruntime.

    python benchmarks/frozen_speed.py

writes benchmarks/results/<the CPU's name>/frozen_speed.txt. All take turns in nine rounds or more, in one process, on
as many threads as PyTorch has, and the times are medians. "onnxruntime" runs what torch.onnx exports. A network is
frozen twice: by onnxruntime where that is installed, and by PyTorch's oneDNN operators, as where it is not. Weights are
random: times do not depend on them. "built" is a second freeze of the network in the process, self-check included.
"""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import cnnfast
from cnnfast.bench.engines import by_onnxruntime, unavailable
from cnnfast.bench.job import Job
from cnnfast.engine.cpu import onednn
from cnnfast.engine.planning.planning import plan
from cnnfast.measuring.machine import this_machine
from cnnfast.measuring.timing import HostClock, Times, measure
from cnnfast.torchvision_import import torchvision

NETWORKS = ("resnet50", "resnet18", "mobilenet_v2", "efficientnet_b0", "densenet121")
BATCHES = (1, 8)
EAGER, EXPORTED, OURS, PLAIN = "PyTorch", "onnxruntime", "frozen, onnxruntime", "frozen, oneDNN"
# What each has to reach at batch 1, by the speed of PyTorch in channels_last, and by that of onnxruntime.
GOALS = {
    OURS: {"resnet50": 1.5, "resnet18": 1.4, "mobilenet_v2": 2.5, "efficientnet_b0": 2.0, "densenet121": 1.6},
    PLAIN: {"resnet50": 1.3, "mobilenet_v2": 1.9},
}
AGAINST_EXPORTED = 0.97
BUILT = {"resnet50": 4.0}  # seconds
WIDTH = 120
CPU = torch.device("cpu")


def steps(name: str, batch: int) -> tuple[dict[str, Callable[[], Any]], float]:
    """What takes turns, by its name, and the seconds of a second freeze."""
    model = getattr(torchvision().models, name)(weights=None).eval()
    images = torch.randn(batch, 3, 224, 224)
    cnnfast.freeze(model, images)
    began = time.perf_counter()
    frozen = cnnfast.freeze(model, images)
    built = time.perf_counter() - began
    graph = frozen.network.graph
    by_onednn = onednn.build(plan(graph, [tuple(images.shape)]), graph.constants)
    last, laid_out = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)

    def eager() -> Any:
        with torch.inference_mode():
            return last(laid_out)

    made: dict[str, Callable[[], Any]] = {EAGER: eager, PLAIN: lambda: by_onednn([images])}
    job = Job(name, model, (tuple(images.shape),), "infer", torch.float32, CPU)
    if not unavailable("onnxruntime", job):
        made |= {EXPORTED: by_onnxruntime(job), OURS: lambda: frozen(images)}
    return made, built


def losses(name: str, batch: int, speeds: dict[str, float], built: float) -> list[str]:
    """What does not reach its goal, or is slower than what it is compared with."""
    found = []
    for who in (OURS, PLAIN):
        if who not in speeds:
            continue
        goal = GOALS[who].get(name, 1.0) if batch == 1 else 1.0
        if speeds[who] < goal:
            found.append(
                f"{name}, batch {batch}: {who}: {speeds[who]:.2f} of PyTorch's speed, and {goal:g} is the goal"
            )
    if OURS in speeds and speeds[OURS] < AGAINST_EXPORTED * speeds[EXPORTED]:
        ratio = speeds[OURS] / speeds[EXPORTED]
        found.append(f"{name}, batch {batch}: {OURS}: {ratio:.2f} of onnxruntime's speed on torch.onnx's export")
    if batch == 1 and built > BUILT.get(name, float("inf")):
        found.append(f"{name}: built in {built:.1f} s, and {BUILT[name]:g} is the goal")
    return found


def main(
    out: Annotated[Path | None, typer.Option(help="Write there instead.")] = None,
    network: Annotated[list[str] | None, typer.Option(help="Only this one; repeat it for several.")] = None,
) -> None:
    """Time frozen networks on this CPU beside PyTorch and onnxruntime."""
    machine = this_machine(CPU)
    table = Table(box=None)
    for heading in ("network", "batch", EAGER, *(f"{who}" for who in (EXPORTED, OURS, PLAIN)), "built"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    lost = []
    for name in network or NETWORKS:
        for batch in BATCHES:
            print(name, batch, file=sys.stderr)
            made, built = steps(name, batch)
            times = {who: t.median for who, t in measure(made, HostClock(), seconds=2).items() if isinstance(t, Times)}
            speeds = {who: times[EAGER] / median for who, median in times.items()}
            cells = [f"{speeds[who]:.2f}" if who in speeds else "" for who in (EXPORTED, OURS, PLAIN)]
            table.add_row(name, str(batch), f"{times[EAGER] * 1e3:.1f} ms", *cells, f"{built:.1f} s")
            lost += losses(name, batch, speeds, built)
    printed = io.StringIO()
    console = Console(file=printed, width=WIDTH, color_system=None, force_terminal=False)
    console.print(
        f"{machine.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {machine.commit}"
    )
    console.print(f"Times of {EAGER} (eager, channels_last), and the others' speeds as multiples of its.")
    console.print("Losses:" if lost else "No losses.")
    for line in lost:
        console.print(f"  {line}", highlight=False)
    console.print(table)
    text = "\n".join(line.rstrip() for line in printed.getvalue().splitlines()) + "\n"
    folder = Path(__file__).parent / "results" / re.sub(r"\W+", "_", machine.device.lower()).strip("_")
    file = out or folder / "frozen_speed.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
