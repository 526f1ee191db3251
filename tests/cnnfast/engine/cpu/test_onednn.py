"""A plan run by oneDNN and PyTorch's operators, against the reference runner and float64."""

from __future__ import annotations

import torch

from cnnfast.engine.capture import capture
from cnnfast.engine.cpu import onednn
from cnnfast.engine.folding import fold
from cnnfast.engine.planning import plan


def test_a_whole_network(torchvision):
    model = torchvision.models.resnet18(weights=None).eval()
    graph = fold(capture(model, (torch.randn(2, 3, 64, 64),), sizes=False).graph, torch.float32)
    for batch in (1, 2, 3, 8):
        x = torch.randn(batch, 3, 64, 64)
        (y,) = onednn.build(plan(graph, [x.shape]), graph.constants)([x])
        torch.testing.assert_close(y, graph.run([x])[0], rtol=1e-4, atol=1e-4)
