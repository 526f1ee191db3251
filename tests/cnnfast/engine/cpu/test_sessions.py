"""A graph run by onnxruntime, against the same graph in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from cnnfast.engine.capture import capture
from cnnfast.engine.cpu import sessions

pytest.importorskip("onnxruntime", reason="onnxruntime is what is tested")
pytest.importorskip("onnx", reason="onnxruntime reads ONNX")


def test_a_whole_network(torchvision):
    model = torchvision.models.resnet18(weights=None).eval()
    graph = capture(model, (torch.randn(2, 3, 64, 64),), sizes=False).graph
    session = sessions.build(graph, [(2, 3, 64, 64)])
    for batch in (3, 1, 0):
        x = torch.randn(batch, 3, 64, 64)
        (y,) = session([x])
        torch.testing.assert_close(y, graph.run([x])[0], rtol=1e-4, atol=1e-4)
