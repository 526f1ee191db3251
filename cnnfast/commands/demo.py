"""`cnnfast demo`: the whole story on this machine, on real images, GPU or not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from .console import JsonFile, bars, printer, refuse_no_time, refuse_unwritable, write_text

EPOCHS = 30
# Seconds. Timing 46 directions of layers for 0.2 s each takes 9 s; the rest is for compiling and judging them.
BUDGET = 30.0


def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.md, report.json and demo.png.")] = Path("cnnfast-report"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split, the weights and the training.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = EPOCHS,
    budget: Annotated[
        float, typer.Option(help="Seconds for timing ResNet-50's convolutions on a GPU, the costliest first.")
    ] = BUDGET,
    json_file: JsonFile = None,
) -> None:
    """Train a small residual network on real digits, then run the kernels on real images and judge every error.

    The network is built of cnnfast.nn's layers and trained on scikit-learn's 1,797 handwritten digits. Then the kernels
    run, forward and backward, on a photograph through a ResNet's first layers, and on held-out digits through the
    trained network, each call against float64 and beside PyTorch. Without a GPU they run in Triton's interpreter, in
    float32. On a GPU they run in float32, tf32, float16 and bfloat16, and ResNet-50's convolutions are timed too, as
    long as --budget lasts: the report names what it left out. Takes a few minutes. Ends with exit code 0 only if
    everything holds.
    """
    refuse_no_time(budget)
    refuse_unwritable(json_file)
    console = printer(json_file)
    missing = [
        extra
        for extra, module in (("scikit-learn", "sklearn"), ("matplotlib", "matplotlib"))
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        from rich.console import Console

        message = f'The demo needs {" and ".join(missing)}: pip install ".[demo]"'
        Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2)

    from ..demo.markdown import markdown
    from ..demo.picture import draw
    from ..demo.story import tell

    with bars(console) as shown:
        results, images = tell(seed, epochs, shown, budget)
    out.mkdir(parents=True, exist_ok=True)
    draw(results, images, out / "demo.png")
    (out / "report.md").write_text(markdown(results, "demo.png"))
    for file in (out / "report.json", json_file):
        write_text(file, results.to_json())
    console.print(
        f"\nreport: {out / 'report.md'}, {out / 'report.json'}, {out / 'demo.png'} ({results.seconds:.0f} s)",
        soft_wrap=True,
    )
    console.print("[green]Everything holds.[/]" if results.ok else "[bold red]Something FAILED.[/]")
    raise typer.Exit(0 if results.ok else 1)
