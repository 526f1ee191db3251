"""What gather/im2col.py prepares. Its results are judged in tests/cnnfast/functional/test_conv2d.py."""

from __future__ import annotations

import torch

from cnnfast_kernels import launch
from cnnfast_kernels.gather import im2col
from tests.support.convolutions import STRIDED, assert_exact, dense_output, operands, output, reference


def test_launches_are_prepared_once(device, launches, monkeypatch):
    """Pieces of one size share them, and so do later calls with tensors that are laid alike."""
    prepared = []

    class Counted(launch.Launch):
        def __init__(self, kernel, *arguments, **options):
            prepared.append(kernel.__name__)
            super().__init__(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "Launch", Counted)
    g = STRIDED.problem
    monkeypatch.setattr(im2col, "MAX_WORKSPACE", g.P * g.Q * g.R * g.S * g.C * 4)  # one of the two images
    launch.forget_plans()
    x, w, dy = operands(STRIDED, torch.float32, device)
    for _ in range(2):
        y = dense_output(STRIDED.y, torch.float32, device)
        dx, dw = output(STRIDED.x, torch.float32, device), output(STRIDED.w, torch.float32, device)
        im2col.im2col_fprop(g, "ieee", x, w, y)
        im2col.im2col_dgrad(g, "ieee", dy, w, dx)
        im2col.im2col_wgrad(g, "ieee", x, dy, dw)
        for ours, exact in zip((y, dx, dw), reference(STRIDED, x, w, dy), strict=True):
            assert_exact(ours, exact)
    launch.forget_plans()
    assert sorted(prepared) == [
        "col2im_kernel",
        "conv_dgrad_kernel",
        "conv_fprop_kernel",
        "conv_wgrad_kernel",
        "conv_wgrad_reduce_kernel",
        "im2col_kernel",
    ]
    assert [event.kernel for event in launches].count("im2col_kernel") == 8
