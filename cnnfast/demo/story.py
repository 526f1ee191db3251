"""The demo itself: training, proof and times, one after the other, told on a console while they run."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.console import RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import cnnfast
from cnnfast import __version__
from cnnfast.checking import check
from cnnfast.checking.judge import compare
from cnnfast.dispatch import backend, launch, prefer_kernels
from cnnfast.measuring.budget import Budget
from cnnfast.models import resnet50
from cnnfast.precision import float32_products
from cnnfast.recording import Trace, trace
from cnnfast.torchvision_import import torchvision

from . import ahead, assortment, augmented, by_kernels, costs, digits, findings, photograph, plain, timing
from .effort import Effort
from .findings import Told
from .picture import Images
from .results import Conversion, Known, Maps, Proof, Results, Training

if TYPE_CHECKING:
    from cnnfast.training.samples import ImageSet

OURS = "our kernels"
RESNET = "through a ResNet's stem and first block, in training"
SMALL = 96  # pixels of each side of the photograph, of which pieces are judged in the interpreter
KNOWN = "torchvision's ResNet-50"


@dataclass(frozen=True)
class Telling:
    """Where the story is told: bars of progress, and the console below them; `verbose` shows tables too."""

    bars: Progress
    verbose: bool = False

    def say(self, *said: Told) -> None:
        for each in said:
            for line in each.lines():
                self.bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, title: str, *tables: RenderableType) -> None:
        if self.verbose:
            self.bars.console.print(Text(f"\n{title}", "bold"), *tables)


def tell(effort: Effort, seed: int, telling: Telling, device: torch.device) -> tuple[Results, Images]:
    """Does as much as `effort` says, and tells it."""
    began = time.perf_counter()
    place = environment(device)
    telling.say(findings.of_machine(place))

    network = digits.make_network(seed).to(device)
    training_part, held_out = digits.load_digits(seed)
    image = photograph.load_photograph(effort.photograph)
    layers = photograph.make_layers(seed).to(device)
    x = photograph.normalized(image).to(device)
    some = held_out.images[: effort.digits].to(device)
    others = assortment.make_assortment(seed).to(device)
    small = photograph.normalized(photograph.load_photograph(SMALL)).to(device)
    piece = photograph.centre(small, assortment.SIZE)
    source = augmented.load_source().to(device)
    if device.type == "cuda":
        cases = [(layers, x, True), (network, some, True), (network, some, False), (others, piece, True)]
        compile_kernels(cases, effort.dtypes, device, telling.bars)
    training, read = learn(network, training_part, held_out, effort.epochs, seed, telling.bars)
    results = Results(place, training, effort)
    telling.say(findings.of_training(training), findings.of_accuracy(training))

    converted = held_out.images[: effort.converted].to(device)
    with float32_products("ieee"):
        computed = compute(layers, x, network, converted, augmented.Views(effort.views, seed), source)

    if launch is not None:
        for dtype in effort.dtypes:
            for size, backward in ((effort.forward, False), (effort.backward, True)):
                if size != 0:
                    part = x if size is None else photograph.centre(small, size)
                    title = f"photograph, {pixels(part)}, {RESNET}"
                    results.proofs.append(prove(title, "photograph", layers, part, dtype, telling, backward))
            title = f"one of each kind of layer, on {pixels(piece)} of the photograph"
            results.proofs.append(prove(title, "each kind", others, piece, dtype, telling))
            if effort.digits:
                title = f"{len(some)} held-out digits through the trained network"
                results.proofs.append(prove(title, "digits", network, some, dtype, telling))
    results.maps, results.conversion, maps, run = computed()
    telling.show("the digits' network in plain torch.nn, converted", results.conversion.report)
    results.augmentation, views = augmented.augmentation_of(source, seed, run, launch is not None)
    images = Images(image[0], *maps, views, held_out, read)
    telling.say(findings.of_maps(results), findings.of_augmentation(results))
    telling.say(*findings.of_errors(results))

    results.known = convert_known(telling)
    results.costs = costs.costs_of(resnet50, "ResNet-50")
    telling.say(findings.of_conversion(results), findings.of_costs(results))
    if device.type == "cuda":
        results.timed = timing.CONDITIONS
        results.timings = measure(device, Budget(effort.budget), telling)
        telling.show(results.left_out)
        telling.say(findings.of_times(results))
    if effort.left_out:
        telling.say(findings.of_left_out(effort))
    results.seconds = time.perf_counter() - began
    return results, images


def compile_kernels(cases: list[ahead.Case], dtypes: tuple[str, ...], device: torch.device, bars: Progress) -> None:
    bar = bars.add_task("compiling kernels", total=None, note="")
    ahead.compile_ahead(cases, dtypes, device, lambda done, total: bars.update(bar, completed=done, total=total))


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
    training_part: ImageSet,
    held_out: digits.Digits,
    epochs: int,
    seed: int,
    bars: Progress,
) -> tuple[Training, Tensor]:
    """Trains, then reads the held-out part. Returns what was learned, and the digit read in each image."""
    bar = bars.add_task("training on digits", total=epochs, note="")
    gpu = next(network.parameters()).is_cuda
    # Without a GPU the kernels could only be interpreted, which would take hours.
    with prefer_kernels() if gpu else backend("torch"):
        run = digits.train(
            network, training_part, epochs, seed, lambda loss: bars.update(bar, advance=1, note=f"loss {loss:.3f}")
        )
        with trace() as calls:
            read = digits.predict(network, held_out)
    wrong = (read != held_out.labels).nonzero().flatten()
    mistakes = [(int(held_out.rows[i]), int(held_out.labels[i]), int(read[i])) for i in wrong]
    by = served_by(calls) if gpu else "PyTorch"
    losses = [epoch.loss for epoch in run.history]
    return Training(seed, len(training_part), len(held_out), losses, mistakes, by, run.seconds), read


def pixels(image: Tensor) -> str:
    return " x ".join(map(str, image.shape[2:]))


def compute(
    layers: photograph.StemAndBlock,
    x: Tensor,
    network: digits.DigitNet,
    images: Tensor,
    views: augmented.Views,
    source: Tensor,
) -> Callable[[], tuple[Maps, Conversion, tuple[Tensor, Tensor], by_kernels.KernelRun]]:
    """Begins to compute the photograph's maps, what the network in plain torch.nn, converted, reads in the images, and
    views of the source, by our kernels. The result waits for them, and sets the first two beside PyTorch's; the maps
    [64, H/2, W/2] and [64, H/4, W/4] come third, the views last.
    """
    original = plain.plain_twin(network)
    converted = cnnfast.convert(original, memory_format=torch.channels_last)
    report = cnnfast.report(converted, images[:1])
    shown = photograph.BothMaps(copy.deepcopy(layers))
    with torch.no_grad(), backend("torch"):
        theirs = [maps.cpu() for maps in copy.deepcopy(shown)(x)]
        exact = [maps.cpu() for maps in copy.deepcopy(shown).double()(x.double())]
        wanted = original(images).argmax(1).tolist()
    running = by_kernels.start([(shown, x), (converted, images), (views, source)])

    def wait() -> tuple[Maps, Conversion, tuple[Tensor, Tensor], by_kernels.KernelRun]:
        seen, read, run = running()
        comparisons = [
            compare(name, ours, pytorchs, pytorchs, best, precision="float32")
            for name, ours, pytorchs, best in zip(("stem", "block"), seen.output, theirs, exact, strict=True)
        ]
        same = sum(a == b for a, b in zip(read.output.argmax(1).tolist(), wanted, strict=True))
        stem, block = seen.output
        return (
            Maps(pixels(x), comparisons, seen.launches),
            Conversion(len(images), same, read.launches, report, kernels=launch is not None),
            (stem[0], block[0]),
            run,
        )

    return wait


def prove(
    title: str, subject: str, module: nn.Module, x: Tensor, name: str, telling: Telling, backward: bool = True
) -> Proof:
    """Checks every call of `module(x)` in the dtype of that name, by default forward and backward."""
    title += ", forward and backward" if backward else ", forward"
    bar = telling.bars.add_task(title.partition(" through")[0], total=None, note=name)
    began = time.perf_counter()
    report = check(
        module,
        x,
        backward=backward,
        dtype=name,
        progress=lambda done, total, call: telling.bars.update(bar, completed=done, total=total, note=f"{name} {call}"),
    )
    proof = Proof(title, subject, name, report, time.perf_counter() - began)
    telling.show(f"{title}, {name}", report, launch_table(proof.launches.items()))
    return proof


def convert_known(telling: Telling) -> Known | None:
    """torchvision's ResNet-50, converted on the meta device, where nothing is computed; None without torchvision."""
    try:
        library = torchvision()
    except ImportError:
        return None
    with torch.device("meta"):
        model, image = library.models.resnet50(), torch.empty(1, *costs.IMAGE)
    report = cnnfast.report(cnnfast.convert(model, memory_format=torch.channels_last), image)
    telling.show(f"{KNOWN}: cnnfast.convert(model)", report)
    return Known(KNOWN, report)


def measure(device: torch.device, budget: Budget, telling: Telling) -> list[timing.Timing]:
    """Times ResNet-50's convolutions."""
    bar = telling.bars.add_task("ResNet-50's convolutions", total=None, note="")
    timings = timing.time_layers(
        device, budget, lambda done, total, note: telling.bars.update(bar, completed=done, total=total, note=note)
    )
    table = Table(*timing.HEADING, title=timing.CONDITIONS)
    for found in timings:
        if found.timed or found.problem:
            table.add_row(*found.cells)
    telling.show("ResNet-50's convolutions", table)
    return timings


def launch_table(launches: Iterable[tuple[str, int]]) -> Table:
    table = Table("kernel launched", "in calls")
    for kernel, calls in launches:
        table.add_row(Text(kernel), str(calls))
    return table
