"""What a training step of ResNet-50 launches and keeps for backward, with all of it trained and with a frozen backbone.

    python benchmarks/frozen_backbone.py > benchmarks/results/frozen_backbone.txt

Nothing is computed: the step runs on meta tensors that stand for a GPU's (cnnfast/bench/step_counts.py), once as calls
are served that nobody has measured, where convolutions are cuDNN's, and once by kernels of ours alone. The step is
forward, cross-entropy and backward of a batch that is augmented already; the optimizer comes on top, whose work is in
proportion to what is trained. Fails if a frozen backbone launches a kernel of backward or of statistics, or keeps more
than a fiftieth of the bytes.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import cnnfast
import cnnfast.nn as cnn
from cnnfast.bench.step_counts import StepCount, count_step
from cnnfast.dispatch import Backend
from cnnfast.torchvision_import import torchvision
from cnnfast.training import Module

BATCH, SIZE, CLASSES = 64, 224, 10
SERVED: dict[Backend, str] = {"auto": "convolutions by cuDNN", "kernels": "all by kernels of ours"}


def loss(logits: Tensor) -> Tensor:
    return functional.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.int64, device=logits.device))


def step(frozen: tuple[str, ...], backend: Backend) -> StepCount:
    models: Any = torchvision().models
    converted = cnnfast.convert(models.resnet50(num_classes=CLASSES), memory_format=torch.channels_last)
    module = Module(converted, classes=CLASSES, augment=cnn.Augment(SIZE), frozen=frozen)
    x = torch.empty(BATCH, 3, SIZE, SIZE, device="meta").to(memory_format=torch.channels_last)
    return count_step(module, x, loss, backend)


def line(name: str, *values: int) -> str:
    return f"{name:<36}" + "".join(f"{value:>18,}" if value else f"{'-':>18}" for value in values)


def main() -> int:
    print(f"ResNet-50, a training step of {BATCH} images of {SIZE} x {SIZE}, float32; torch {torch.__version__}")
    wrong = 0
    for backend, who in SERVED.items():
        steps = [step(frozen, backend) for frozen in ((), ("backbone",))]
        print(f"\n{who:<36}{'all is trained':>18}{'frozen backbone':>18}")
        print(line("launches", *(found.launches for found in steps)))
        print(line("bytes kept for backward", *(found.saved_bytes for found in steps)))
        for part in ("kernels", "operators"):
            counts: list[Counter[str]] = [getattr(found, part) for found in steps]
            print("launches of kernels of ours" if part == "kernels" else "calls of PyTorch's operators")
            for name in sorted({*counts[0], *counts[1]}):
                print(line(f"  {name}", *(count[name] for count in counts)))
        whole, part = steps
        unwanted = [
            name for name in part.kernels if re.search("backward|gradient|dgrad|wgrad|moments|combine|running", name)
        ]
        wrong += part.saved_bytes * 50 > whole.saved_bytes or bool(unwanted)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
