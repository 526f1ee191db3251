"""How float32 numbers are multiplied: as they are (IEEE), or rounded to TF32 first, as a GPU's matrix units want them.

PyTorch's settings say which, of convolutions and of matrix products each; on a GPU convolutions are TF32 unless
somebody says otherwise. Our kernels read the same setting as PyTorch's (ops/conv.py), so that whoever compares the two
sets both here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from .dispatch import on_gpu

Products = Literal["ieee", "tf32"]

EXPLICIT_BITS = 10  # of a TF32 number's mantissa: as many as float16 stores
UNIT = 2.0**-EXPLICIT_BITS  # in the last place of a number in [1, 2): TF32's epsilon
DROPPED = 23 - EXPLICIT_BITS  # of the bits that float32 stores

_on_cpu_too = False


@contextmanager
def float32_products(products: Products) -> Iterator[None]:
    """All float32 convolutions, recurrent layers and matrix products of this process, PyTorch's and ours, multiply in
    this way while the context lasts.

    With "tf32" our convolutions round on CPU tensors too, where Triton interprets them; PyTorch's need a GPU, or a CPU
    with such a unit. PyTorch's settings are put back afterwards. Meanwhile PyTorch may refuse to read
    torch.backends.cudnn.allow_tf32, an older setting, which is not written along: that would fix convolutions for good,
    whatever torch.backends.fp32_precision is set to later.
    """
    global _on_cpu_too
    backends: Any = torch.backends
    settings = (
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.cuda.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.matmul,
    )
    before = [setting.fp32_precision for setting in settings]
    on_cpu_before, _on_cpu_too = _on_cpu_too, products == "tf32"
    older = _older_matmul_setting()
    try:
        with backends.flags(fp32_precision=products):  # reaches each operation that nobody has set by itself
            if older is not None:  # torch.compile still reads it, and PyTorch raises where it contradicts the newer one
                torch.set_float32_matmul_precision("high" if products == "tf32" else "highest")
            _set(settings, [products] * len(settings))
            yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        _set(settings, before)
        _on_cpu_too = on_cpu_before


def _older_matmul_setting() -> str | None:
    """None where it can no longer be read: PyTorch raises once somebody has set the newer one to something else."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _set(settings: Sequence[Any], values: Sequence[str]) -> None:
    """Writes only those that say something else: a setting that was once written no longer follows the general one."""
    for setting, value in zip(settings, values, strict=True):
        if setting.fp32_precision != value:
            setting.fp32_precision = value


def allow_tf32(x: Tensor) -> bool:
    """Whether a convolution of `x` multiplies TF32 numbers: on a GPU PyTorch's settings say so, and within
    float32_products they hold for any device.

    It reads PyTorch's newer settings, because the older ones raise once those are used.
    """
    if x.dtype != torch.float32 or not (on_gpu(x) or _on_cpu_too):
        return False
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore


def nearest_tf32(t: Tensor) -> Tensor:
    """A float32 tensor rounded to TF32, ties away from zero, as our kernels round their operands; NaN and infinities
    stay.
    """
    half, kept = 1 << (DROPPED - 1), -(1 << DROPPED)
    rounded = ((t.view(torch.int32) + half) & kept).view(torch.float32)
    return torch.where(t.isnan(), t, rounded)
