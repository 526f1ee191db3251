"""How many bytes a training step of ResNet-50 and of ResNet-18 moves, how many it keeps for backward, and how many
kernels it launches.

    python benchmarks/training_traffic.py > benchmarks/results/training_traffic.txt

Nothing is computed: the step, forward and backward of 256 images, runs on meta tensors that stand for an H200's
(cnnfast/bench/training_traffic.py): by PyTorch's operators; as cnnfast serves it on a GPU where nothing was measured,
with PyTorch's library for convolutions; and by kernels of ours wherever there is one. Parameters and images are
bfloat16 and channels_last. Loss and optimizer are left out. What an image keeps is the difference of 512 and 256
images, over 256; the image itself is a part of it. Of torch.compile only that is counted. Fails if our kernels move or
keep as much as PyTorch does.

Of ResNet-50 a step's time is printed too, by a model alone: each launch of ours and each operator of PyTorch's takes as
long as its products or as what it reads and writes, at an H200's highest rates (cnnfast/explaining/steps.py).
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from cnnfast import explain
from cnnfast.bench.training_traffic import TrainingTraffic, training_traffic
from cnnfast.explaining import TrainingStep
from cnnfast.torchvision_import import torchvision
from cnnfast_kernels import gpus
from cnnfast_kernels.devices import Gpu

NETWORKS = ("resnet50", "resnet18")
BATCH, SIZE, GPU = 256, 224, "h200"
STEPS = {"PyTorch eager": "eager", "cnnfast, unmeasured": "unmeasured", "cnnfast, kernels": "kernels"}
# (GB that a step of ResNet-50 of this batch moves, ms that it takes at least) by a model that was made before its
# kernels were written, of kernels that reach 790 TFLOPS and 4.3 TB/s.
MODELLED = {
    "PyTorch eager": (121, 31.3),
    "norms, additions and activations fused, as a compiler does it": (85, 23.0),
    "S: a norm's statistics in the convolution before it": (81, 22.1),
    "D: S, and the mask and sums of a norm's gradients in the next convolution's": (73, 19.8),
    "P: D, and norms applied as operands are loaded, where that pays": (62, 17.2),
    "J: P, and both gradients of a convolution in one kernel in stage 1": (58, 16.2),
    "G: D, and statistics by Gram matrices": (50, 14.6),
    "H: G, and a block's last convolution with the next one's first": (47, 13.8),
    "K: H, and a block's end with the gradients of both in one kernel": (45, 13.4),
}


def counted(name: str, batch: int) -> TrainingTraffic:
    models: Any = torchvision().models
    known = gpus.named(GPU)
    with torch.device("meta"):
        model, x = getattr(models, name)(), torch.empty(batch, 3, SIZE, SIZE)
    return training_traffic(model, (x,), gpu=Gpu(known.cuda, known.arch), dtype=torch.bfloat16)


def explained(name: str) -> TrainingStep:
    models: Any = torchvision().models
    with torch.device("meta"):
        model, x = getattr(models, name)(), torch.empty(BATCH, 3, SIZE, SIZE)
    step = explain(model, x, gpu=GPU, train=True, dtype=torch.bfloat16).training
    assert step is not None
    return step


def line(name: str, *cells: str) -> str:
    return f"{name:<24}" + "".join(f"{cell:>14}" for cell in cells).rstrip()


def main() -> int:
    wrong = 0
    print(f"A training step of {BATCH} images of {SIZE} x {SIZE}, bfloat16, on an H200; torch {torch.__version__}")
    print("Counted from shapes, each tensor of a launch once. An operator of PyTorch's may launch several kernels.")
    for name in NETWORKS:
        one, two = counted(name, BATCH), counted(name, 2 * BATCH)
        print(f"\n{line(name, 'our kernels', 'operators', 'forward GB', 'backward GB', 'GB', 'MB an image')}")
        saved = {}
        for who, key in STEPS.items():
            step = getattr(one, key)
            saved[key] = getattr(two, key).saved_bytes - step.saved_bytes
            moved = (f"{n / 1e9:.1f}" for n in (step.forward_bytes, step.backward_bytes, step.moved_bytes))
            counts = (f"{counter.total():,}" for counter in (step.kernels, step.operators))
            print(line(who, *counts, *moved, f"{saved[key] / BATCH / 1e6:.1f}"))
        if one.compiled_bytes is not None and two.compiled_bytes is not None:
            print(line("torch.compile", *"-----", f"{(two.compiled_bytes - one.compiled_bytes) / BATCH / 1e6:.1f}"))
        wrong += one.kernels.moved_bytes >= one.eager.moved_bytes or saved["kernels"] >= saved["eager"]
    print(f"\n{'ResNet-50: GB a step, and ms by a model at the highest rates, which nothing reaches':<88}GB     ms")
    print("Counted, and that model of what was counted:")
    ours = explained("resnet50")
    for what, step in (("PyTorch eager", ours.eager), ("cnnfast, kernels", ours.ours)):
        print(f"  {what:<84}{step.bytes / 1e9:4.0f}{step.us / 1e3:7.1f}")
    print("Not counted: kernels of a design, each tensor as often as it would be read and written:")
    for what, (gigabytes, ms) in MODELLED.items():
        print(f"  {what:<84}{gigabytes:>4}{ms:>7}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
