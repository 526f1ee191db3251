"""Judges training by kernels: the gradients of a whole network, and where a few steps of SGD lead, beside PyTorch's.

One network is trained three times from the same weights, on the same numbers: as conversion made it, by kernels of
ours; by PyTorch in the same dtype; and by PyTorch in float64, from which the distance of the other two is their error.
In half precision weights of convolutions and linear layers are of the dtype, norms are float32, and the optimizer keeps
all weights in float32, as training in half precision does: weights that are only half precise would hide how far
gradients err. Each step starts backward from noise, the same in all three.

The rule, for every tensor: root mean square of our error <= 2 x that of PyTorch's own + 1 unit in the last place, of
the tensor's own dtype, which is float32 for what a norm or the optimizer keeps. It is judge.py's rule for the root mean
square with the smallest of its floors, without what it grants to sums.

Where an activation passes the kink of a ReLU by rounding, gradients jump, and which one does is chance: of two networks
that round equally well one may have a jump in a small tensor and the other none. So PyTorch's own error is the middle
one of several trainings, the further ones (DRAWS) on images that are moved by a unit in the last place and with a
float64 training of their own, all of which take little time beside the interpreter's. The largest of them would be no
measure: in float32, where jumps are rare, it is that of the one training that has a jump, thousands of times the
others'. For the same reason a tensor of ours that is beyond its limit may be looked at again: then ours is trained on
the moved images too, and PyTorch's on more of them (LOOKED_AT). Where a jump is neither rare nor common, as in a norm
with four pixels a channel, the middle errors of both are a matter of chance still. So each training of ours is compared
with each of PyTorch's, and judged is the middle one of all the ratios of their errors: what Hodges and Lehmann estimate
by (Estimates of location based on rank tests, 1963), of logarithms. An error that is always three times PyTorch's is
three times it here too. The largest error of a tensor is told and not judged: errors of single elements are judged call
by call (cnnfast.check).
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import dispatch
from ..conversion import convert
from ..dtypes import name_of
from ..precision import float32_products
from ..recording import trace
from .judge import compare
from .moving import Mover
from .report import Comparison

RATE, MOMENTUM = 2.0**-9, 0.9
DRAWS = 4  # of PyTorch's own error, beside the one on the images as they are
LOOKED_AT = 20  # as many, where a tensor is looked at again: they take little time beside DRAWS of ours
Tensors = dict[str, Tensor]


class TrainingRow(NamedTuple):
    """All tensors of a training, judged; how many kernels ours launched; and the names of those that were looked at
    again.
    """

    comparisons: list[Comparison]
    launches: int
    looked_again: tuple[str, ...] = ()

    @property
    def beyond(self) -> list[Comparison]:
        """Those that break the rule."""
        return [c for c in self.comparisons if not within(c)]


def within(c: Comparison) -> bool:
    """Whether a tensor keeps the rule: of finite numbers where they should be, and of an error within the limit."""
    return not c.message and c.rms <= c.rms_limit


def judge_training(
    model: nn.Module, x: Tensor, dtype: torch.dtype, steps: int, look_again: bool = False
) -> TrainingRow:
    """Judges `steps` steps of `model`, rounded to `dtype`, on the images `x` [N, C, H, W]. `model` stays as it is.

    Of the first step the output, the gradients of x and of all parameters and the buffers are judged; if there are
    more, parameters and buffers after the last too, each and all parameters together. look_again: where some are beyond
    their limits, for those. Raises RuntimeError where PyTorch would have to serve a call of the converted model.
    """
    model, x = prepared(model, dtype), x.to(dtype).contiguous(memory_format=torch.channels_last)
    with trace() as calls:
        ours = by_kernels(model, x, steps)
    judged = [by_the_middle(*draws) for draws in compared(model, drawn(x, DRAWS), steps, [ours]).values()]
    row = TrainingRow(judged, len(calls.launches))
    if not (look_again and row.beyond):
        return row
    names = tuple(c.tensor for c in row.beyond)
    steps = steps if any(" after " in name for name in names) else 1
    mine = [by_kernels(model, images, steps) for images in drawn(x, DRAWS)]
    again = compared(model, drawn(x, LOOKED_AT), steps, mine)
    judged = [by_all_ratios(again[c.tensor], len(mine)) if c.tensor in names else c for c in judged]
    return TrainingRow(judged, row.launches, names)


def drawn(x: Tensor, draws: int) -> Iterator[Tensor]:
    """`x`, and as many times as `draws` says `x` moved by a unit in the last place."""
    yield x
    for draw in range(1, 1 + draws):
        yield Mover(torch.finfo(x.dtype).eps, 0.0, draw).moved(x.double()).to(x.dtype)


def by_kernels(model: nn.Module, x: Tensor, steps: int) -> Tensors:
    with float32_products("ieee"), dispatch.backend("kernels"):
        return trained(convert(copy.deepcopy(model)), x, steps)


def compared(
    model: nn.Module, images: Iterable[Tensor], steps: int, ours: Sequence[Tensors]
) -> dict[str, list[Comparison]]:
    """Of every tensor, the comparison on each of the images: with ours where there is one, else with itself."""
    found: dict[str, list[Comparison]] = {name: [] for name in ours[0]}
    with float32_products("ieee"), dispatch.backend("torch"):
        for draw, x in enumerate(images):
            theirs = trained(copy.deepcopy(model), x, steps)
            exact = trained(copy.deepcopy(model).double(), x.double(), steps)
            assert ours[0].keys() == theirs.keys() == exact.keys()
            for name, t in theirs.items():
                mine = ours[draw][name] if draw < len(ours) else t
                own = compare(name, mine, t, exact[name], exact[name], precision=name_of(t.dtype))
                found[name].append(own)
    return found


def by_the_middle(judged: Comparison, *others: Comparison) -> Comparison:
    """`judged`, with limits by the middle one of PyTorch's errors in it and the others."""
    error, rms = (statistics.median(getattr(c, n) for c in (judged, *others)) for n in ("torch_error", "torch_rms"))
    return beside(judged, error, rms)


def by_all_ratios(draws: Sequence[Comparison], mine: int) -> Comparison:
    """One comparison of the errors of ours in the first `mine` draws with those of PyTorch in all of them. Ours is the
    middle one; PyTorch's is what that one is the middle ratio of.
    """
    first, middle = draws[0], {}
    for name in ("error", "rms"):
        theirs = [getattr(c, f"torch_{name}") for c in draws]
        found = [getattr(c, name) for c in draws[:mine]]
        middle[name] = ours = statistics.median(found)
        ratios = [a / b if b else math.inf if a else 1.0 for a in found for b in theirs]
        middle[f"torch_{name}"] = ours / (statistics.median(ratios) or 1.0)
    first = dataclasses.replace(first, error=middle["error"], rms=middle["rms"])
    return beside(first, middle["torch_error"], middle["torch_rms"])


def beside(c: Comparison, torch_error: float, torch_rms: float) -> Comparison:
    """`c`, with limits by these errors of PyTorch's."""
    return dataclasses.replace(
        c,
        torch_error=torch_error,
        torch_rms=torch_rms,
        limit=c.limit + 2 * (torch_error - c.torch_error),
        rms_limit=c.rms_limit + 2 * (torch_rms - c.torch_rms),
    )


def prepared(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in training mode and channels_last, in `dtype` but for the batch norms, which are at least float32."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last).to(dtype).train()  # pyright: ignore[reportCallIssue]
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.to(torch.promote_types(dtype, torch.float32))
    return model


def trained(model: nn.Module, x: Tensor, steps: int) -> Tensors:
    """Trains `model` in place on `x`, of its dtype, in each step; returns by name what judge_training compares."""
    masters = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in model.parameters()]
    optimizer = torch.optim.SGD(masters, RATE, MOMENTUM)
    found: Tensors = {}
    for step in range(steps):
        x = x.detach().requires_grad_(step == 0)
        y = model(x)
        y.backward(noise(y, step))
        if step == 0:
            found = {"output": y.detach(), "grad of input": kept(x.grad)}
            found |= {f"grad of {name}": kept(p.grad) for name, p in model.named_parameters()}
            found |= buffers(model, "")
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad, parameter.grad = kept(parameter.grad).to(master.dtype), None
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
    if steps > 1:
        after = f" after {steps} steps"
        found |= {name + after: t for (name, _), t in zip(model.named_parameters(), masters, strict=True)}
        found |= buffers(model, after)
        found[f"all parameters{after}"] = torch.cat([t.flatten() for t in masters])
    return found


def noise(y: Tensor, step: int) -> Tensor:
    """A gradient for y [N, K, ...] that every dtype holds, of such a size that gradients of weights are about 1."""
    sixteenths = (torch.randn(y.shape, generator=torch.Generator().manual_seed(step)) * 16).round() / 16
    pixels = y.numel() // y.shape[1]
    return torch.empty_like(y).copy_(sixteenths * 0.5 ** ((pixels.bit_length() - 1) // 2))


def kept(t: Tensor | None) -> Tensor:
    assert t is not None, "every parameter has a gradient"
    return t.detach().clone()


def buffers(model: nn.Module, after: str) -> Tensors:
    return {name + after: kept(t) for name, t in model.named_buffers() if t.is_floating_point()}
