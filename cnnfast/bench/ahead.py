"""Kernels compiled before they are launched, by several processes at once, as cnnfast.warm does for its users
(warming.py).

Triton compiles a kernel at its first launch, one after the other: of a ResNet-50 for a minute, of all single layers for
longer.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn

from .. import dispatch
from .job import AUTOCAST, MODELS, Job, channels_last_of

_launched: set[str] = set()  # by models in this process, which compiles none of them again, wherever its cache is


def launches(job: Job, network: nn.Module, input_gradient: bool = False) -> list[str]:
    """Descriptions of what a step of the job launches where `network` computes it; none where PyTorch serves.

    Of a single layer they are those of all its modes, with input_gradient that of its input too. Raises RuntimeError
    under backend("kernels") where PyTorch would have to serve, and what the network raises.
    """
    if job.device.type != "cuda":
        return []
    held = next(network.parameters(), None)
    if dispatch.why_torch(torch.empty(0, dtype=job.dtype, device=job.device) if held is None else held):
        return []
    from cnnfast_kernels import devices, launch

    from .. import warming

    if launch.INTERPRETED:
        return []
    if job.mode in MODELS:  # with numbers: under autocast, or if it branches on them, a model is run where it lies
        inputs = job.inputs()
    else:
        described = (torch.empty(shape, dtype=job.dtype, device="meta") for shape in job.shapes)
        inputs = [channels_last_of(t).requires_grad_(input_gradient) for t in described]
    with torch.autocast("cuda", job.dtype, enabled=job.mode == "train" and job.dtype in AUTOCAST):
        return warming.launches(network, *inputs, train=job.mode != "infer", gpu=devices.gpu(job.device))


def compile_for(job: Job, network: nn.Module) -> None:
    """What a model will launch, unless this process has launched it before. Raises nothing: whatever cannot be found or
    compiled now is compiled, or raises, when it is launched.
    """
    new: list[str] = []
    if job.mode in MODELS:
        with suppress(Exception):
            new = [line for line in launches(job, network) if line not in _launched]
    if new:
        from cnnfast_kernels import devices

        from .. import warming

        with suppress(OSError):  # no process can be started
            warming.compile_ahead(new, devices.gpu(job.device))
        _launched.update(new)
