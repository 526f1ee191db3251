"""On a GPU the demo's kernels are compiled by several processes at once before it needs them, as warming.py does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from cnnfast.dispatch import backend, launch, why_torch
from cnnfast.dtypes import TF32, dtype_of
from cnnfast.precision import float32_products

Case = tuple[nn.Module, Tensor, bool]  # a network, its input, and whether it is trained


def launches(cases: Sequence[Case], dtypes: Sequence[str], gpu: Any) -> list[str]:
    """Descriptions, as warming.py has them, of the kernels of each case in each dtype on `gpu`, a devices.Gpu; each is
    listed once. A case that raises is skipped here: the demo's own call of it will report that.
    """
    from cnnfast import warming

    found: dict[str, None] = {}
    for name in dtypes:
        for network, x, train in cases:
            cast = copy.deepcopy(network).to(dtype_of(name))
            with suppress(RuntimeError), backend("kernels"), float32_products("tf32" if name == TF32 else "ieee"):
                found |= dict.fromkeys(warming.launches(cast, x.to(dtype_of(name)), train=train, gpu=gpu))
    return list(found)


def compile_ahead(
    cases: Sequence[Case], dtypes: Sequence[str], device: torch.device, progress: Callable[[int, int], None]
) -> None:
    """Compiles the kernels of each case in each dtype, if the device can run them. What does not compile is reported
    when it is launched.
    """
    if launch is None or launch.INTERPRETED or why_torch(cases[0][1].to(device)):
        return
    from cnnfast import workers
    from cnnfast_kernels import devices

    gpu = devices.gpu(device)
    with suppress(OSError):
        workers.compile_ahead(launches(cases, dtypes, gpu), gpu, progress=progress)
