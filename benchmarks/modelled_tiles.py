"""What the tiles that are chosen today cost on GPUs that are not here, by the model of cnnfast_kernels/costs.py.

    python benchmarks/modelled_tiles.py
    python benchmarks/modelled_tiles.py --against benchmarks/results/modelled/first.csv

writes benchmarks/results/modelled/tiles.txt and tiles.csv: of each network the sum over its convolutions, by
operation, beside the roofline, under which a kernel only multiplies, or only moves each of its tensors once; and
ResNet-50's layers one by one. With --against it compares with what an earlier run wrote as CSV: each sum, and the
layer that has lost the most. Tensors are bfloat16 and channels_last, tiles are those that run where no row was
measured, and the first layer has no gradient of its input. "stats" is the forward pass of training, which leaves the
statistics of a batch norm, and combines them. Nothing here was measured: times are modelled, from numbers of GPUs of
which many are assumed (gpus.py), and from registers and instructions of kernels that were compiled.
"""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from cnnfast.torchvision_import import torchvision
from cnnfast_kernels import devices
from cnnfast_kernels.choosing import default_tile
from cnnfast_kernels.choosing_costs import cost_of, roofline_of
from cnnfast_kernels.costs import TileCost
from cnnfast_kernels.gpus import KnownGpu, named
from cnnfast_kernels.layout import dense
from cnnfast_kernels.questions import Geometry, Question, Tile, dgrad_question, fprop_question, wgrad_question
from cnnfast_kernels.resource_keys import resource_key
from cnnfast_kernels.resources import Resources, resources_of

FILE = Path(__file__).parent / "results" / "modelled" / "tiles.txt"
NETWORKS = ("resnet50", "mobilenet_v2", "efficientnet_b0", "densenet121", "convnext_tiny")
BATCHES = (1, 8, 32, 256)
GPUS = ("h200", "a100")
IMAGE = (3, 224, 224)
DTYPE, LAST = torch.bfloat16, torch.channels_last
OPERATIONS = ("fprop", "stats", "dgrad", "wgrad")
WIDTH = 160
KEY = ("network", "batch", "gpu", "operation", "layer")
Recorded = dict[str, Any]


class LayerShapes(NamedTuple):
    """A convolution of a network: shapes of x and w, and whether it is the first."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    geometry: Geometry
    first: bool


@cache
def layers(network: str, batch: int) -> Counter[LayerShapes]:
    """The convolutions of a network of torchvision, and how many of each it has, in the order of their first."""
    model = getattr(torchvision().models, network)(weights=None).to("meta").eval()
    found: Counter[LayerShapes] = Counter()

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        assert isinstance(module, nn.Conv2d)
        (stride_h, stride_w), (dil_h, dil_w) = module.stride, module.dilation
        h, w = (int(p) for p in module.padding)
        geometry = Geometry((stride_h, stride_w), (h, h, w, w), (dil_h, dil_w), module.groups)
        found[LayerShapes(tuple(inputs[0].shape), tuple(module.weight.shape), geometry, not found)] += 1

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    model(torch.empty(batch, *IMAGE, device="meta"))
    return found


def questions(layer: LayerShapes, gpu: KnownGpu) -> Iterator[tuple[str, Question]]:
    """Each operation of a layer in training and inference."""
    on, g = devices.Gpu(gpu.cuda, gpu.arch), layer.geometry.problem(layer.x, layer.w)
    x, w, y = (dense(shape, DTYPE, LAST) for shape in (layer.x, layer.w, (g.N, g.K, g.P, g.Q)))
    yield "fprop", fprop_question(x, w, layer.geometry, on)
    yield "stats", fprop_question(x, w, layer.geometry, on, statistics="stats")
    if not layer.first:
        yield "dgrad", dgrad_question(y, w, layer.x, LAST, layer.geometry, on)
    yield "wgrad", wgrad_question(x, y, layer.w, LAST, layer.geometry, on)


class ModelledLayer(NamedTuple):
    operation: str
    question: Question
    tile: Tile
    resources: Resources
    cost: TileCost
    roofline: float
    times: int


@cache
def modelled(network: str, batch: int, gpu: KnownGpu) -> list[ModelledLayer]:
    found = []
    for layer, count in layers(network, batch).items():
        for operation, q in questions(layer, gpu):
            tile = default_tile(q)
            resources = resources_of(resource_key(q, tile))
            costs = cost_of(q, tile, gpu, packs=operation != "wgrad")  # a step packs an image once
            found.append(ModelledLayer(operation, q, tile, resources, costs, roofline_of(q, tile, gpu), count))
    return found


def limits(rows: Iterable[ModelledLayer]) -> str:
    """What limits the operations, by their share of the time."""
    times: dict[str, float] = defaultdict(float)
    for row in rows:
        times[row.cost.limiter] += row.times * row.cost.seconds
    total = sum(times.values())
    shares = sorted(times.items(), key=lambda item: -item[1])
    return ", ".join(f"{limiter} {100 * time / total:.0f} %" for limiter, time in shares if time >= 0.005 * total)


def totals(networks: Iterable[str], batches: Iterable[int], gpus: Iterable[KnownGpu]) -> Table:
    table, numbers = Table(box=None), ("batch", "us", "roofline", "share")
    for heading in ("network", "batch", "GPU", "operation", "us", "roofline", "share", "limited by"):
        table.add_column(heading, justify="right" if heading in numbers else "left", no_wrap=True)
    for network in networks:
        for batch in batches:
            for gpu in gpus:
                rows = modelled(network, batch, gpu)
                for operation in OPERATIONS:
                    own = [row for row in rows if row.operation == operation]
                    time, least = (
                        1e6 * sum(row.times * value for row, value in zip(own, values, strict=True))
                        for values in ([row.cost.seconds for row in own], [row.roofline for row in own])
                    )
                    share = f"{100 * least / time:.0f} %"
                    cells = str(batch), gpu.name, operation, f"{time:.0f}", f"{least:.0f}", share, limits(own)
                    table.add_row(network, *cells)
    return table


def layer_name(row: ModelledLayer) -> str:
    """What the convolution is of: channels, filters, and the image."""
    g = row.question.problem
    groups = f" in {g.groups} groups" if g.groups > 1 else ""
    return f"{g.C} > {g.K}, {g.R}x{g.S}/{g.stride_h} at {g.H}x{g.W}{groups}"


def key_of(row: Recorded) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def record(networks: Iterable[str], batches: Iterable[int], gpus: Iterable[KnownGpu]) -> list[Recorded]:
    """All rows as CSV has them."""
    return [
        {
            "network": network, "batch": batch, "gpu": gpu.name, "operation": row.operation, "layer": layer_name(row),
            "times": row.times, "tile": str(row.tile), "us": 1e6 * row.cost.seconds, "roofline_us": 1e6 * row.roofline,
        }
        for network in networks for batch in batches for gpu in gpus for row in modelled(network, batch, gpu)
    ]  # fmt: skip


def compared(now: Iterable[Recorded], before: Iterable[Recorded]) -> Table:
    """Each sum of `now` over that of `before`, of the rows that both have, and the layer that lost most."""
    known = {key_of(row): float(row["us"]) for row in before}
    groups: dict[tuple[Any, ...], list[Recorded]] = defaultdict(list)
    for row in now:
        if key_of(row) in known:
            groups[key_of(row)[:4]].append(row)
    table = Table(box=None, title="Compared with an earlier run, by the same model", title_justify="left")
    for heading in (*KEY[:4], "us before", "us", "ratio", "worst layer", "its ratio"):
        table.add_column(heading, justify="left" if heading in (*KEY[:4], "worst layer") else "right", no_wrap=True)
    for group, rows in groups.items():
        ratios = {row["layer"]: row["us"] / known[key_of(row)] for row in rows}
        worst = max(ratios, key=lambda layer: ratios[layer])
        first = sum(row["times"] * known[key_of(row)] for row in rows)
        last = sum(row["times"] * row["us"] for row in rows)
        cells = f"{first:.0f}", f"{last:.0f}", f"{last / first:.2f}", worst, f"{ratios[worst]:.2f}"
        table.add_row(*map(str, group), *cells)
    return table


def layer_by_layer(network: str, batch: int, gpu: KnownGpu) -> Table:
    """registers: of a thread, with "~" where no kernel of that kind was compiled, and they were estimated. live:
    programs on a multiprocessor. F/B: FLOPs for each byte from the second-level cache.
    """
    table = Table(box=None, title=f"{network}, batch {batch}, {gpu.cuda}", title_justify="left")
    left = ("operation", "layer", "tile", "limit")
    for heading in (
        *left[:2],
        "times",
        left[2],
        "registers",
        "live",
        "waves",
        "F/B",
        left[3],
        "us",
        "roofline",
        "share",
    ):
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    for row in sorted(modelled(network, batch, gpu), key=lambda row: OPERATIONS.index(row.operation)):
        cost = row.cost
        table.add_row(
            row.operation, layer_name(row), str(row.times),
            str(row.tile), f"{'' if row.resources.exact else '~'}{row.resources.registers}", str(cost.residents),
            str(cost.waves), f"{cost.intensity:.0f}", cost.limiter, f"{1e6 * cost.seconds:.1f}",
            f"{1e6 * row.roofline:.1f}", f"{100 * row.roofline / cost.seconds:.0f} %",
        )  # fmt: skip
    return table


def main(
    out: Annotated[Path, typer.Option(help="Write there instead.")] = FILE,
    network: Annotated[list[str] | None, typer.Option(help="Only this one; repeat it for several.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Only this one; repeat it for several.")] = None,
    gpu: Annotated[list[str] | None, typer.Option(help="Only this one; repeat it for several.")] = None,
    against: Annotated[Path | None, typer.Option(help="CSV of an earlier run to compare with.")] = None,
) -> None:
    """Model what today's tiles cost."""
    networks, batches, gpus = network or NETWORKS, batch or BATCHES, [named(name) for name in gpu or GPUS]
    printed = io.StringIO()
    console = Console(file=printed, width=WIDTH, color_system=None, force_terminal=False)
    console.print(
        "A model: nothing here was measured. bfloat16, channels_last, the tiles that are chosen without a row.\n"
    )
    rows = record(networks, batches, gpus)
    console.print(totals(networks, batches, gpus))
    if against:
        console.print()
        with against.open(newline="") as earlier:
            console.print(compared(rows, csv.DictReader(earlier)))
    for each in gpus:
        console.print()
        console.print(layer_by_layer(networks[0], batches[-1], each))
    text = "\n".join(line.rstrip() for line in printed.getvalue().splitlines()) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {name: f"{row[name]:.2f}" for name in ("us", "roofline_us")} for row in rows)
    print(text)


if __name__ == "__main__":
    typer.run(main)
