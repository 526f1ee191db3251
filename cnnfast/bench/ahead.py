"""Kernels are compiled before they are launched, by several processes at once, as cnnfast.warm does for its users
(warming.py).

Triton compiles a kernel when it is first launched, one after the other. For a ResNet-50 that takes a minute, and for
all single layers longer.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn

from .. import dispatch
from .job import AUTOCAST, MODELS, STEP, Job, channels_last_of

# What models in this process have launched: Triton keeps it in memory, and compiles none of it again in any cache.
_launched: set[str] = set()


def launches(job: Job, network: nn.Module, input_gradient: bool = False) -> list[str]:
    """Descriptions (aot/specialisations.py) of the kernels that a step of the job launches if `network` computes it.
    There are none where PyTorch serves.

    Of a single layer they are the kernels of all its modes; the input's gradient is among them if input_gradient.
    Raises what the network raises, and under backend("kernels") RuntimeError where PyTorch would have to serve.
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
    if job.mode in MODELS:  # on real inputs: under autocast, and if it branches on values, a model is run with numbers
        inputs = job.inputs()
    else:
        described = (torch.empty(shape, dtype=job.dtype, device="meta") for shape in job.shapes)
        inputs = [channels_last_of(t).requires_grad_(input_gradient or job.mode == STEP) for t in described]
    with torch.autocast("cuda", job.dtype, enabled=job.mode == "train" and job.dtype in AUTOCAST):
        return warming.launches(network, *inputs, train=job.mode != "infer", gpu=devices.gpu(job.device))


def compile_for(job: Job, network: nn.Module) -> None:
    """Compiles what a model will launch and this process has not launched before. Raises nothing: what cannot be found
    or compiled now is compiled when it is launched, or raises then.
    """
    new: list[str] = []
    if job.mode in (*MODELS, STEP):
        with suppress(Exception):
            new = [line for line in launches(job, network) if line not in _launched]
    if new:
        from cnnfast_kernels import devices

        from .. import workers

        with suppress(OSError):  # no process can be started
            workers.compile_ahead(new, devices.gpu(job.device))
        _launched.update(new)
