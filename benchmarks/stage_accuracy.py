"""How far gradients and training err by our kernels, beside PyTorch's own error: of a whole stage of ResNet-50, and of
a whole ResNet-18.

    TRITON_INTERPRET=1 python -m tests.support.interpreter benchmarks/stage_accuracy.py \
        > benchmarks/results/stage_accuracy.txt

Triton's interpreter runs the kernels, as the tests mend it for bfloat16 (tests/support/interpreter.py). Networks are
torchvision's with random weights; what is judged, and by which rule, is cnnfast/checking/trained.py's: each tensor's
error against float64 is to be at most twice PyTorch's own in the same dtype (the middle one of five runs on images that
differ by a unit) and one unit in the last place, after one step, and after three of SGD. A tensor that is beyond is
looked at again: five trainings of ours beside 21 of PyTorch's, by the middle one of all ratios of their errors. Prints
the tensors that are nearest to their limits and exits with 1 where one is beyond.

It takes half an hour of a core. --network and --dtype take a part of it, whose text is the same: parts that ran side by
side make the same file. Float32 has tiles of 256 x 256 x 256 in ResNet-18, larger than any GPU's, because the
interpreter takes as long for a step of a small one, and hours for the whole.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
import typer
from torch import nn

from cnnfast.checking.report import Comparison
from cnnfast.checking.trained import TrainingRow, judge_training
from cnnfast.torchvision_import import torchvision
from cnnfast_kernels import tiling

SHOWN, STEPS = 6, 3
TILES = tiling.DEFAULT_TILES["ieee"]
DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Subject(NamedTuple):
    """size: of its input. tile: in float32, if it is not one of a GPU's."""

    title: str
    build: Callable[[], nn.Module]
    size: tuple[int, int, int, int]
    tile: tiling.TileConfig | None = None


SUBJECTS = {
    # 512 pixels, 8 for each channel of the third convolutions' inputs
    "layer1": Subject(
        "layer1 of ResNet-50, three blocks",
        lambda: torchvision().models.resnet50(weights=None).layer1,
        (2, 64, 16, 16),
    ),
    "resnet18": Subject(
        "ResNet-18, ten classes",
        lambda: torchvision().models.resnet18(weights=None, num_classes=10),
        (4, 3, 32, 32),
        tiling.TileConfig(256, 256, 256),
    ),
}


def ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}" if theirs else "-"


def line(c: Comparison) -> str:
    errors = f"{c.rms:>10.2e}{c.torch_rms:>10.2e}{ratio(c.rms, c.torch_rms):>8}{c.rms / c.rms_limit:>8.2f}"
    return f"  {c.tensor:<44}{errors}{ratio(c.error, c.torch_error):>9}{c.message and '  ' + c.message}"


def told(row: TrainingRow) -> str:
    """The tensors nearest to their limits, and of all together how many are where."""
    ranked = sorted(row.comparisons, key=lambda c: (not c.message, -c.rms / max(c.rms_limit, 1e-300)))
    head = f"  {'nearest to their limits':<44}{'ours':>10}{'PyTorch':>10}{'ratio':>8}{'/ limit':>8}{'largest':>9}"
    whole = [c for c in row.comparisons if c.tensor.startswith("all parameters") and c not in ranked[:SHOWN]]
    larger = sum(c.error > c.limit for c in row.comparisons)
    middle = sorted(c.rms / c.torch_rms for c in row.comparisons if c.torch_rms)[len(row.comparisons) // 2]
    again = "".join(f"  looked at again, 5 of ours by 21 of PyTorch's: {name}\n" for name in row.looked_again)
    counts = f"{len(row.comparisons)} tensors, {len(row.beyond)} beyond the limit; the median ratio is {middle:.2f};"
    return again + "\n".join(
        [head, *map(line, [*ranked[:SHOWN], *whole]), f"  {counts} largest errors beyond it: {larger} (not judged)"]
    )


def main(
    network: Annotated[list[str] | None, typer.Option(help="Only this one; repeat it for several.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only this one; repeat it for several.")] = None,
) -> None:
    """Judge gradients and training of whole networks by kernels in Triton's interpreter."""
    torch.set_num_threads(1)
    beyond = 0
    for name in network or SUBJECTS:
        subject = SUBJECTS[name]
        for kind in dtype or DTYPES:
            torch.manual_seed(0)
            model, x = subject.build(), torch.randn(subject.size)
            began = time.perf_counter()
            tiling.DEFAULT_TILES["ieee"] = (subject.tile,) * 2 if subject.tile else TILES
            row = judge_training(model, x, DTYPES[kind], STEPS, look_again=True)
            size = " x ".join(map(str, subject.size))
            print(f"{subject.title}, [{size}], {kind}, steps: {STEPS}, kernels launched: {row.launches}")
            print(told(row), flush=True)
            print(f"{name} {kind}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
            beyond += len(row.beyond)
    raise typer.Exit(bool(beyond))


if __name__ == "__main__":
    typer.run(main)
