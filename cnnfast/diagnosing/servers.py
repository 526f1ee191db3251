"""Who serves typical calls in this process with its present settings. The code that decides is asked; its rules are not
repeated here.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .. import dispatch
from ..dtypes import SHORT, name_of
from ..precision import allow_tf32
from .finding import Finding

if TYPE_CHECKING:
    from cnnfast_kernels.questions import Question

TOPIC = "Who serves"
LAST, NCHW = torch.channels_last, torch.contiguous_format
HALF = torch.bfloat16


@dataclass(frozen=True)
class TypicalConvolution:
    """A convolution of stride 1 that keeps the image's size. fused: a batch norm in eval and a ReLU follow."""

    name: str
    dtype: torch.dtype
    layout: torch.memory_format
    channels: int
    filters: int
    taps: int
    groups: int = 1
    fused: bool = False

    def __str__(self) -> str:
        short = next(short for short, name in SHORT.items() if name == name_of(self.dtype))
        return f"{self.name}, {short}, {'channels_last' if self.layout == LAST else 'NCHW'}"


BATCH, SIZE = 64, 56  # of the images: ResNet-50's first stage
CONVOLUTIONS = (
    TypicalConvolution("3x3 convolution, norm, ReLU", HALF, LAST, 64, 64, 3, fused=True),
    TypicalConvolution("3x3 convolution", HALF, LAST, 64, 64, 3),
    TypicalConvolution("1x1 convolution", HALF, LAST, 256, 64, 1),
    TypicalConvolution("3x3 convolution", HALF, NCHW, 64, 64, 3),
    TypicalConvolution("depthwise 3x3", HALF, LAST, 96, 96, 3, groups=96),
    TypicalConvolution("3x3 convolution", torch.float32, LAST, 64, 64, 3),
)
PASSES = ("batch norm", "pooling")
SETTING = "torch.backends.cudnn.conv.fp32_precision"


def question(convolution: TypicalConvolution, device: torch.device) -> Question:
    """What the operator would ask for such tensors on `device`; they are not made."""
    from cnnfast_kernels import devices
    from cnnfast_kernels.layout import dense
    from cnnfast_kernels.questions import Geometry, Statistics, fprop_question

    c = convolution
    x = dense((BATCH, c.channels, SIZE, SIZE), c.dtype, c.layout)
    w = dense((c.filters, c.channels // c.groups, c.taps, c.taps), c.dtype, c.layout)
    pad = c.taps // 2
    geometry = Geometry((1, 1), (pad, pad, pad, pad), (1, 1), c.groups)
    statistics: Statistics = "norm" if c.fused else ""
    activation = "relu" if c.fused else None
    tf32 = allow_tf32(torch.empty(0, dtype=c.dtype, device=device))
    gpu = devices.gpu(device)
    return fprop_question(x, w, geometry, gpu, statistics=statistics, activation=activation, tf32=tf32)


def of_convolution(convolution: TypicalConvolution, device: torch.device) -> str:
    """Who serves the convolution on `device`, and why, in one sentence."""
    reason = dispatch.why_torch(torch.empty(0, dtype=convolution.dtype, device=device))
    if reason:
        return f"PyTorch, because {reason}."
    from cnnfast_kernels import devices
    from cnnfast_kernels.choosing import choose, measured

    from ..ops import serving

    q = question(convolution, device)
    row = measured(q)
    decision = serving.decide(q, row, devices.type_of(device) in serving.LIBRARY_FIRST)
    if decision.library and dispatch.library_allowed():
        after = ", and one pass of ours for norm and ReLU" if convolution.fused else ""
        return f"the library{' (cuDNN)' if device.type == 'cuda' else ''}{after}, because {decision.reason}."
    why = f": {decision.reason}" if decision.reason and not decision.library else ""
    return f"our kernel, with tile {choose(q, row)}{why}."


def who(device: torch.device) -> list[Finding]:
    """Who serves each typical call on `device`; one finding if PyTorch serves all of them for the same reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a launcher cannot be built: the reason says so too
            found = {str(c): of_convolution(c, device) for c in CONVOLUTIONS}
            reason = dispatch.why_torch(torch.empty(0, dtype=HALF, device=device))
    except RuntimeError as error:  # under backend("kernels"), if only PyTorch could serve
        return [Finding(TOPIC, "every call", "note", f"Raises an error: {error}.")]
    found |= {
        f"{name}, bf16": f"PyTorch, because {reason}." if reason else "our kernel, one pass over memory."
        for name in PASSES
    }
    answers = set(found.values())
    if len(answers) == 1 and (reason := answers.pop()).startswith("PyTorch"):
        return [Finding(TOPIC, "every call", "ok", reason)]
    return [Finding(TOPIC, name, "ok", text) for name, text in found.items()]


def float32_products(device: torch.device) -> Finding:
    """How convolutions of float32 tensors are multiplied on a GPU, by PyTorch's settings in this process."""
    if allow_tf32(torch.empty(0, device=device)):
        text = "Convolutions of float32 tensors multiply TF32 numbers, of 10 bits, ours and the library's:"
        text += " PyTorch's default on a GPU."
        advice = f'For IEEE products set {SETTING} = "ieee"; cnnfast tune measures either (--dtype).'
        return Finding(TOPIC, "float32", "ok", text, advice)
    text = "Convolutions of float32 tensors multiply them as they are (IEEE), by PyTorch's settings here:"
    text += " exact, and without tensor cores."
    return Finding(TOPIC, "float32", "ok", text, f'{SETTING} = "tf32" is faster, and rounds to 10 bits first.')
