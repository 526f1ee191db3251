"""The demo itself: training, proof and times, one after the other, told on a console while they run."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable

import torch
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import cnnfast
from cnnfast import __version__
from cnnfast.checking import check
from cnnfast.dispatch import backend, launch, prefer_kernels
from cnnfast.dtypes import TF32
from cnnfast.measuring.budget import Budget
from cnnfast.recording import Trace, trace

from . import ahead, digits, photograph, plain, timing
from .picture import Images
from .results import Conversion, Proof, Results, Training

# As much as Triton's interpreter can do in the time that a demo may take.
INTERPRETED_SIZE = 96
INTERPRETED_BACKWARD_SIZE = 32  # the stem's two gradients, of 49 taps, take longest
INTERPRETED_DIGITS = 4
INTERPRETED_CONVERTED = 64  # digits for the converted network: forward alone
GPU_DIGITS = 64
GPU_DTYPES = ("float32", TF32, "float16", "bfloat16")

OURS = "our kernels"
PHOTOGRAPH_PATH = "through a ResNet's stem and first block, in training"


def tell(seed: int, epochs: int, bars: Progress, budget: float) -> tuple[Results, Images]:
    """Runs everything, on a GPU if there is one, and tells it on the console of `bars`. budget: seconds for the timing
    on a GPU.
    """
    began, console = time.perf_counter(), bars.console
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    place = environment(device)
    console.print(", ".join(f"{name} {value}" for name, value in place.items()), highlight=False, soft_wrap=True)

    network = digits.make_network(seed).to(device)
    training_part, held_out = digits.load_digits(seed)
    image = photograph.load_photograph(None if gpu else INTERPRETED_SIZE)
    layers = photograph.make_layers(seed).to(device)
    x = photograph.normalized(image).to(device)
    some = held_out.images[: GPU_DIGITS if gpu else INTERPRETED_DIGITS].to(device)
    if gpu:
        compile_kernels([(layers, x, True), (network, some, True), (network, some, False)], device, bars)
    training, read = learn(network, training_part, held_out, epochs, seed, bars)
    right = f"{training.accuracy:.1%} ({training.held_out - len(training.mistakes)} of {training.held_out})"
    spent = f"{training.seconds:.0f} s of training, served by {training.served_by}"
    console.print(f"held-out digits read right: {right}; {spent}", highlight=False, soft_wrap=True)
    results = Results(place, training)

    with torch.no_grad(), prefer_kernels(), trace() as calls:
        features = layers(x)
    by = OURS if served_by(calls) == OURS else "PyTorch"
    images = Images(image[0], features[0].float().cpu(), by, held_out.images[:, 0], held_out.labels, read)

    if launch is None:
        console.print("triton is not installed here: no kernel can run")
    else:
        for dtype in GPU_DTYPES if gpu else GPU_DTYPES[:1]:
            if not gpu:
                results.proofs.append(
                    prove(f"photograph, {sizes(x)}, {PHOTOGRAPH_PATH}", layers, x, dtype, bars, backward=False)
                )
                x = centre(x, INTERPRETED_BACKWARD_SIZE)
            results.proofs.append(prove(f"photograph, {sizes(x)}, {PHOTOGRAPH_PATH}", layers, x, dtype, bars))
            results.proofs.append(
                prove(f"{len(some)} held-out digits through the trained network", network, some, dtype, bars)
            )
        results.conversion = convert_digits(
            network, held_out.images[: len(held_out) if gpu else INTERPRETED_CONVERTED].to(device), bars
        )
    if gpu:
        results.timed = timing.CONDITIONS
        results.timings = measure(device, Budget(budget), bars)
        console.print(results.left_out, highlight=False, soft_wrap=True)
    results.seconds = time.perf_counter() - began
    return results, images


def compile_kernels(cases: list[ahead.Case], device: torch.device, bars: Progress) -> None:
    bar = bars.add_task("compiling kernels", total=None, note="")
    ahead.compile_ahead(cases, GPU_DTYPES, device, lambda done, total: bars.update(bar, completed=done, total=total))


def environment(device: torch.device) -> dict[str, str]:
    place = {"cnnfast": __version__, "torch": torch.__version__, "Python": platform.python_version()}
    if launch is not None:
        import triton

        place["triton"] = triton.__version__
    if device.type == "cuda":
        return {**place, "kernels": "compiled", "GPU": torch.cuda.get_device_name(device)}
    return {**place, "kernels": "in Triton's interpreter" if launch else "none", "GPU": "none"}


def served_by(calls: Trace) -> str:
    """Who served these calls, in words."""
    reasons = {call.reason for call in calls if call.served_by != "kernels"}
    return f"PyTorch, because {' and '.join(sorted(reasons))}" if reasons else OURS


def learn(
    network: digits.DigitNet,
    training_part: digits.Digits,
    held_out: digits.Digits,
    epochs: int,
    seed: int,
    bars: Progress,
) -> tuple[Training, Tensor]:
    """Trains, then reads the held-out part. Returns what was learned, and the digit read in each image."""
    bar = bars.add_task("training on digits", total=epochs, note="")
    began = time.perf_counter()
    gpu = next(network.parameters()).is_cuda
    # Without a GPU the kernels could only be interpreted, which would take hours.
    with prefer_kernels() if gpu else backend("torch"):
        losses = digits.train(
            network, training_part, epochs, seed, lambda loss: bars.update(bar, advance=1, note=f"loss {loss:.3f}")
        )
        seconds = time.perf_counter() - began
        with trace() as calls:
            read = digits.predict(network, held_out)
    wrong = (read != held_out.labels).nonzero().flatten()
    mistakes = [(int(held_out.rows[i]), int(held_out.labels[i]), int(read[i])) for i in wrong]
    by = served_by(calls) if gpu else "PyTorch, as always on a CPU"
    return Training(seed, len(training_part), len(held_out), losses, mistakes, by, seconds), read


def sizes(image: Tensor) -> str:
    return " x ".join(map(str, image.shape[2:]))


def centre(image: Tensor, size: int) -> Tensor:
    top, left = ((extent - size) // 2 for extent in image.shape[2:])
    return image[:, :, top : top + size, left : left + size]


def prove(title: str, module: nn.Module, x: Tensor, name: str, bars: Progress, backward: bool = True) -> Proof:
    """Checks every call of `module(x)` in the dtype of that name, by default forward and backward, and prints what was
    found.
    """
    title += ", forward and backward" if backward else ", forward"
    bar = bars.add_task(title.partition(" through")[0], total=None, note=name)
    began = time.perf_counter()
    report = check(
        module,
        x,
        backward=backward,
        dtype=name,
        progress=lambda done, total, call: bars.update(bar, completed=done, total=total, note=f"{name} {call}"),
    )
    proof = Proof(title, name, report, time.perf_counter() - began)
    bars.console.print(Text(f"\n{title}, {name}", "bold"), report, launch_table(proof.launches.items()))
    return proof


def convert_digits(network: digits.DigitNet, images: Tensor, bars: Progress) -> Conversion:
    """Writes the network in plain torch.nn, converts it, and compares what both read in `images`."""
    bar = bars.add_task("the network in plain torch.nn, converted", total=1, note=f"{len(images)} digits")
    began = time.perf_counter()
    original = plain.plain_twin(network)
    converted = cnnfast.convert(original, memory_format=torch.channels_last)
    report = cnnfast.report(converted, images[:1])
    with torch.no_grad():
        wanted = original(images).argmax(1).tolist()
    read, launches = plain.read(converted, images)
    same = sum(a == b for a, b in zip(read, wanted, strict=True))
    found = Conversion(len(images), same, launches, report, time.perf_counter() - began)
    bars.update(bar, advance=1)
    bars.console.print(
        Text("\nthe same network in plain torch.nn: cnnfast.convert(model)", "bold"), report, Text(found.summary)
    )
    return found


def measure(device: torch.device, budget: Budget, bars: Progress) -> list[timing.Timing]:
    """Times ResNet-50's convolutions and prints what was found."""
    bar = bars.add_task("ResNet-50's convolutions", total=None, note="")
    timings = timing.time_layers(
        device, budget, lambda done, total, note: bars.update(bar, completed=done, total=total, note=note)
    )
    table = Table(*timing.HEADING, title=timing.CONDITIONS)
    for found in timings:
        if found.timed or found.problem:
            table.add_row(*found.cells)
    bars.console.print(table)
    return timings


def launch_table(launches: Iterable[tuple[str, int]]) -> Table:
    table = Table("kernel launched", "in calls")
    for kernel, calls in launches:
        table.add_row(Text(kernel), str(calls))
    return table
