"""Batch norm in training whose batch lies in parts on the ranks of a process group: the statistics, and the sums that
the gradient takes, are those of the whole batch.

Forward, one all-gather of (mean, variance, count) stands between a part's statistics and the normalisation; backward,
one all-reduce between the sums of a part and dy. Nothing that a rank does, or leaves out, depends on whether its part
is empty, or on which gradients it wants, and nothing is raised after the first collective. All ranks have to be served
by our kernels: PyTorch's SyncBatchNorm tells other numbers.

What differs from PyTorch's (torch/nn/modules/_functions.py):
- A rank whose input wants no gradient joins the all-reduce all the same, if anything else here wants one. PyTorch's
  leaves it out, and so waits for ever where the input wants a gradient on another rank. Within one network that costs
  at most the first trained norm of it two sums a channel: the input of every later one wants a gradient.
- dgamma and dbeta of a rank without rows are zeros, where PyTorch's has none.
- Running statistics stay as they are where the whole batch has fewer than two values a channel. PyTorch's become NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from cnnfast_kernels import batchnorm

from ..dispatch import transformed
from .batchnorm import dense_like, kept_for_activation, normalize, statistics_like
from .registry import register


def gather(told: Tensor, group: Any) -> Tensor:
    """[ranks, n]: what each rank of the group told, [n], in the order of the ranks. Of meta tensors nothing is sent."""
    gathered = told.new_empty(dist.get_world_size(group), *told.shape)
    if not told.is_meta:
        # torch 2.13 has a new name for it, and warns of the old one
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(gathered.view(-1), told, group)
    return gathered


def add_over_ranks(sums: Tensor, group: Any) -> None:
    """In place: the sum over all ranks of the group."""
    if not sums.is_meta:
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)


class _NormalizeOverRanks(torch.autograd.Function):
    """As batchnorm.py's _Normalize with the statistics of all ranks; count [1] is that of all rows."""

    @staticmethod
    def forward(ctx, y, mean, var, count, gamma, beta, residual, eps, activation, slope, slopes, group):
        z = normalize(y, mean, var, gamma, beta, residual, eps, activation, slope, slopes, True)
        of_u = kept_for_activation(z, True, beta, residual, activation, slope)
        ctx.save_for_backward(y, mean, var, count, gamma, *of_u)
        ctx.options, ctx.group = (eps, activation, slope), group
        ctx.dtypes = [None if t is None else t.dtype for t in (gamma, beta)]
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):  # pyright: ignore[reportIncompatibleMethodOverride]
        if transformed():
            raise RuntimeError(
                "the gradient of a synchronised batch norm cannot be taken under a functorch transform: no rule says"
                " what the ranks would exchange"
            )
        y, mean, var, count, gamma, beta, residual, z = ctx.saved_tensors
        need_y, _, _, _, need_gamma, need_beta, need_residual = ctx.needs_input_grad[:7]
        norm = (gamma, beta, residual)
        sums = gradient_sums(dz, y, z, mean, var, *norm, *ctx.options)
        dbeta, dgamma = (
            total.to(dtype, copy=True) if need else None
            for total, dtype, need in zip(sums, reversed(ctx.dtypes), (need_beta, need_gamma), strict=True)
        )
        add_over_ranks(sums, ctx.group)
        activation = ctx.options[1]
        needs = need_y, need_residual and activation is not None
        dy, dresidual = apply_sums(dz, y, z, mean, var, count, *norm, sums, *ctx.options, needs)
        return (
            dy if need_y else None,
            *(None, None, None),
            dgamma,
            dbeta,
            (dz if activation is None else dresidual) if need_residual else None,
            *(None, None, None, None, None),
        )


@_disable_dynamo  # what ranks exchange is not traced; torch.compiler.disable would import torch._dynamo, for a second
def normalize_over_ranks(
    y: Tensor,
    statistics: tuple[Tensor, Tensor],
    gamma: Tensor | None,
    beta: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    momentum: float,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    slopes: Tensor | None,
    group: Any,
) -> Tensor:
    """act(batch_norm(y) + residual) by the statistics of the whole batch, of which y [N, C, *spatial] is this rank's
    part and `statistics`, mean and biased variance [C], are those of y. It updates the running ones, if there are any.

    Every rank of the process group `group` has to call this; y may be empty. There are no second derivatives:
    autograd raises RuntimeError. torch.compile breaks the graph here.
    """
    mean, var = statistics
    rows = mean.new_full((1,), y.numel() // y.shape[1])
    gathered = gather(torch.cat((mean, var, rows)), group)
    of_all = combine_ranks(gathered, *running, momentum)
    end = residual, eps, activation, slope, slopes
    return _NormalizeOverRanks.apply(y, *of_all, gamma, beta, *end, group)  # pyright: ignore[reportReturnType]


def _fake_ranks(gathered: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    C = gathered.shape[1] // 2
    return gathered.new_empty(C), gathered.new_empty(C), gathered.new_empty(1)


def _fake_sums(dz: Tensor, *rest: Any) -> Tensor:
    mean = statistics_like(dz)
    return mean.new_empty(2, mean.shape[0])


def _apply_sums(dz: Tensor, y, z, mean, var, count, *rest: Any) -> tuple[Tensor, Tensor]:
    found = batchnorm.apply_sums(dz, y, z, (mean, var, count), *rest)
    dy, dresidual = (dz.new_empty(0) if t is None else t for t in found)
    return dy, dresidual


def _fake_apply(dz: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dy, dresidual = (dense_like(y) if need else dz.new_empty(0) for need in rest[-1])
    return dy, dresidual


combine_ranks = register(
    "combine_ranks(Tensor gathered, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum)"
    " -> (Tensor, Tensor, Tensor)",
    batchnorm.combine_ranks,
    _fake_ranks,
)
gradient_sums = register(
    "gradient_sums(Tensor dz, Tensor y, Tensor? z, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta,"
    " Tensor? residual, float eps, str? activation, float slope) -> Tensor",
    batchnorm.gradient_sums,
    _fake_sums,
)
apply_sums = register(
    "apply_sums(Tensor dz, Tensor y, Tensor? z, Tensor mean, Tensor var, Tensor count, Tensor? gamma, Tensor? beta,"
    " Tensor? residual, Tensor sums, float eps, str? activation, float slope, bool[2] needs) -> (Tensor, Tensor)",
    _apply_sums,
    _fake_apply,
)
