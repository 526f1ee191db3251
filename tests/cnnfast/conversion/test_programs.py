"""Random forwards: converted, each leaves what the original leaves, whatever stands between a convolution and what
follows it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cnnfast
from tests.support.blocks import CHANNELS
from tests.support.programs import program
from tests.support.steps import Mode, difference, fusions, step

PROGRAMS = 60
BATCH = 6  # of programs to a test


def left_by(model: nn.Module, mode: Mode, device: torch.device) -> dict[str, Any]:
    """What a step of a program leaves, its list included; of a backward that raised nothing but that it did."""

    def image(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randn(1, CHANNELS, 3, 3, dtype=torch.float64, generator=generator).to(device)

    slots = [image(2), image(3)]
    left = step(model, (image(0), image(1), slots), mode)
    if "raised in backward" in left:
        left = {name: value for name, value in left.items() if not name.startswith("gradient")}
    return left | {f"slot {i}": slot.detach() for i, slot in enumerate(slots)}


@pytest.mark.parametrize("first", range(0, PROGRAMS, BATCH))
def test_random_programs(first, quick):
    """PyTorch has no gradients for some: then only what they compute without is compared. `fused`: lest nothing be
    tested.
    """
    fused = 0
    for seed in range(first, first + BATCH):
        source, model = program(seed)
        model = model.to(quick)
        original, ours = copy.deepcopy(model), cnnfast.convert(model)
        for mode in ("no_grad", "train"):
            right = left_by(original, mode, quick)
            if "raised" in right:
                assert mode != "no_grad", source
                break
            with cnnfast.trace() as trace:
                mine = left_by(ours, mode, quick)
            fused += fusions(trace)
            wrong = {name: text for name in right if (text := difference(mine.get(name), right[name], 1e-10))}
            assert not wrong, f"seed {seed}, {mode}: {wrong}\n{source}"
    assert fused
