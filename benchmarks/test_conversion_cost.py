"""What conversion costs where it cannot help: ResNet-50 on CPU tensors, served by PyTorch, converted and as it was.

    pytest benchmarks/test_conversion_cost.py

Nine interleaved rounds, one image of 224 x 224 in eval and two in training, on one thread; the ratio of the medians of
processor time.
"""

from __future__ import annotations

import time
from statistics import median

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast.torchvision_import import torchvision

ROUNDS = 9
BOUND = 1.03
ATTEMPTS = 3  # a busy machine's rounds are noise; a cost is there every time


def step(model: nn.Module, x: torch.Tensor, training: bool) -> None:
    model.train(training)
    if training:
        model(x).sum().backward()
    else:
        with torch.inference_mode():
            model(x)


def ratio(original: nn.Module, converted: nn.Module, x: torch.Tensor, training: bool) -> float:
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(ROUNDS):
        for i, model in enumerate((original, converted)):
            began = time.process_time()
            step(model, x, training)
            seconds[i].append(time.process_time() - began)
    return median(seconds[1]) / median(seconds[0])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_resnet50(training):
    original = torchvision().models.resnet50()
    converted = cnnfast.convert(original)
    x = torch.randn(2 if training else 1, 3, 224, 224)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for model in (original, converted):
            step(model, x, training)
        ratios = []
        while len(ratios) < ATTEMPTS and (not ratios or ratios[-1] > BOUND):
            ratios.append(ratio(original, converted, x, training))
    finally:
        torch.set_num_threads(threads)
    print(f"converted / original, {'training' if training else 'eval'}: " + ", ".join(f"{r:.4f}" for r in ratios))
    assert min(ratios) <= BOUND
