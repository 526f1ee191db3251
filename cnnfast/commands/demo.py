"""`cnnfast demo`: the whole story on this machine, on real images, GPU or not."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .console import JsonFile, announce, bars, printer, refuse_no_time, refuse_unwritable, write_text

EXAMPLES = ("cnnfast demo --quick", "cnnfast demo --out report --verbose")
# What the demo cannot do without, and the module that shows whether it is installed.
NEEDED = {
    "lightning": "lightning",
    "torchmetrics": "torchmetrics",
    "scikit-learn": "sklearn",
    "matplotlib": "matplotlib",
    "pillow": "PIL",
}


def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.md, report.json and demo.png.")] = Path("cnnfast-report"),
    quick: Annotated[bool, typer.Option("--quick", help="Less of each kind, in less than a minute.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print the tables of each layer too.")] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of the split, the weights and the training.")
    ] = 0,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the training images.", show_default="30; 15 with --quick")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Seconds for timing ResNet-50's convolutions on a GPU, the costliest first.",
            show_default="30; 10 with --quick",
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Train a small residual network on real digits, then run the kernels on real images and judge every error.

    The network is built of cnnfast.nn's layers and trained by cnnfast.training.fit on scikit-learn's 1,797 handwritten
    digits. Then the kernels run, forward and backward, on a photograph through a ResNet's first layers, through one
    layer of each kind, and on held-out digits through the trained network, each call against float64 and beside
    PyTorch. A model in plain torch.nn is converted, and the costs of ResNet-50's layers are counted. Without a GPU the
    kernels run in Triton's interpreter, in float32, which takes about two minutes. On a GPU they run in float32, tf32,
    float16 and bfloat16, and ResNet-50's convolutions are timed too, as long as --budget lasts: the report names what
    it left out. Ends with exit code 0 only if everything holds.
    """
    refuse_no_time(budget)
    refuse_unwritable(json_file)
    refuse_folder(out)
    console = printer(json_file)
    missing = [name for name, module in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        from rich.console import Console

        message = f'The demo needs {", ".join(missing)}, not installed here: pip install ".[demo]" brings all'
        Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2)

    import torch

    from .. import training
    from ..demo import findings, story
    from ..demo.effort import effort_for
    from ..demo.markdown import markdown
    from ..demo.picture import draw

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    effort = effort_for(device.type == "cuda", quick)
    effort = replace(effort, epochs=epochs or effort.epochs, budget=budget or effort.budget)
    console.print(effort.duration, highlight=False, soft_wrap=True)
    shown = bars(console, disable=not console.is_terminal)
    shown.live.transient = True  # what is done is told in sentences
    try:
        with shown:
            telling = story.Telling(shown, verbose)
            results, images = story.tell(effort, seed, telling, device)
            draw(results, images, out / "demo.png")
    except training.Interrupted as error:
        announce(json_file, str(error))
        raise typer.Exit(128 + error.number) from None
    (out / "report.md").write_text(markdown(results, "demo.png"))
    for file in (out / "report.json", json_file):
        write_text(file, results.to_json())
    telling.say(*findings.of_end(results, out))
    raise typer.Exit(0 if results.ok else 1)


def refuse_folder(folder: Path) -> None:
    """Ends the command with exit code 2, before any work, if the folder cannot be made or the files not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise typer.BadParameter(f"{folder} is a file: name a folder, or a new one", param_hint="--out") from None
    except OSError as error:
        raise typer.BadParameter(f"{folder} cannot be made: {error.strerror}", param_hint="--out") from None
    for name in ("report.md", "report.json", "demo.png"):
        refuse_unwritable(folder / name, "--out")
