"""conv.conv_dgrad with an epilogue, by whichever kernels serve, against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from cnnfast_kernels import conv
from tests.support.convolutions import Case, arrange, draw, reference
from tests.support.gradient_epilogues import drawn
from tests.support.poison import poisoned_workspaces

DENSE = Case("", (2, 16, 6, 7), (16, 3, 3), padding=(1, 1, 1, 1))
DEPTHWISE = Case("", (2, 16, 6, 7), (16, 3, 3), padding=(1, 1, 1, 1), groups=16)


@pytest.mark.parametrize("mask", ["y", "z", "words"])
@pytest.mark.parametrize(("case", "algorithm"), [(DENSE, "auto"), (DENSE, "im2col"), (DEPTHWISE, "auto")])
def test_whoever_serves(case, algorithm, mask, device):
    x, w, dy = draw(case, torch.float32, device)
    judged = drawn(case.x, torch.float32, device, arrange, mask, also_y=True)
    g = case.problem
    geometry = conv.Geometry((1, 1), case.padding, (1, 1), g.groups)
    with poisoned_workspaces():
        ours = conv.conv_dgrad_sums(dy, w, case.x, geometry, judged.epilogue, algorithm=algorithm)
    for found, exact in zip(ours, judged.judge(reference(case, x, w, dy)[1]), strict=True):
        assert torch.equal(found.double(), exact)
