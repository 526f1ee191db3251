"""batch_norm, and what a batch norm takes, checked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm

from ..activations import ActivationName, activate
from ..dispatch import why_torch
from ..recording import record_torch
from .arguments import as_float, check_flag
from .entrance import operation
from .operators import ops

if TYPE_CHECKING:  # a build of torch without distributed has none
    from torch.distributed import ProcessGroup


# asks for a size first
@partial(operation, refusal=lambda given: AttributeError if given.get("training") else TypeError)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Batch normalisation, as torch.nn.functional.batch_norm: (input - mean) * weight / sqrt(var + eps) + bias.

    input [N, C] to [N, C, D, H, W], or empty; running_mean, running_var, weight, bias [C], of input's dtype or float32.
    In training mean and biased variance are input's own, and the running ones, if given, are updated in place (with the
    unbiased variance). Raises RuntimeError and ValueError where PyTorch does.

    process_group: in training, a group of torch.distributed on whose ranks the other parts of the batch are, as
    torch.nn.SyncBatchNorm has it: mean and variance are those of all parts, of which some may be empty. All ranks have
    to make this call. Gradients of weight and bias are those of a rank's own part, and there are no second derivatives.
    """
    group = None if process_group is None else check_group("batch_norm", process_group, training)
    if reason := why_torch(input, running_mean, running_var, weight, bias):
        record_torch("batch_norm", reason, input)
        return batch_norm_of_torch(input, running_mean, running_var, weight, bias, training, momentum, eps, group)
    norm = running_mean, running_var, weight, bias, training, momentum, eps
    return normalized("batch_norm", input, *norm, None, None, 0.0, None, group)


def normalized(
    function: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: ActivationName | None,
    slope: float,
    slopes: Tensor | None,
    group: ProcessGroup | None,
) -> Tensor:
    """act(batch_norm(input) + residual) by our operators, for `function`, which has checked what follows the norm.

    slope: leaky_relu's; slopes: prelu's. group: as `check_group` returned it.
    """
    if input.dim() == 0:
        raise (IndexError if training else RuntimeError)(f"{function}(): input must be of size [N, C, ...], but got []")
    group = group if input.dim() > 1 and input.shape[1] else None
    count = values_per_channel(function, input.shape, group) if training else 0
    # as PyTorch has it: nothing is normalised, nothing updated, and of the channels the first one counts
    if input.numel() == 0 and group is None:
        _check_numbers(function, training, momentum, eps)
        y = input.clone() if weight is None else input * weight[0]
        y = y if bias is None else y + bias[0]
        return activate(y if residual is None else y + residual, activation, slope if slopes is None else slopes)
    if input.dim() == 1:
        no_index = training and running_mean is weight is bias is None
        raise (IndexError if no_index else RuntimeError)(
            f"{function}(): input must be of size [N, C, ...], but got {list(input.shape)}"
        )
    gamma, beta, momentum, eps = check_norm(
        function, input.shape[1], input.dtype, running_mean, running_var, weight, bias, training, momentum, eps
    )
    end = residual, eps, activation, slope, slopes
    if not training:
        return ops.normalize(input, running_mean, running_var, gamma, beta, *end, False)
    statistics, running = ops.batch_moments(input.detach()), (running_mean, running_var)
    return normalize_batch(input, statistics, gamma, beta, running, momentum, *end, count, group)


def normalize_batch(
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
    count: int,
    group: ProcessGroup | None,
) -> Tensor:
    """What comes after the statistics of a batch in training, mean and biased variance of `count` values a channel: the
    running ones are updated, if there are any, and y is normalised, added to and activated. With a process group y is a
    part of the batch.
    """
    if group is not None and y.shape[1]:
        end = residual, eps, activation, slope, slopes
        return ops.normalize_over_ranks(y, statistics, gamma, beta, running, momentum, *end, group)
    if running[0] is not None and count > 0:  # an empty batch leaves them as they are
        ops.update_running(*running, *statistics, momentum, count)
    return ops.normalize(y, *statistics, gamma, beta, residual, eps, activation, slope, slopes, True)


def check_group(function: str, group: ProcessGroup, training: bool) -> ProcessGroup | None:
    """The process group, checked; None where it makes no difference."""
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"{function}(): process_group must be None or a group of torch.distributed to which this process belongs,"
            f" but got process_group={group!r}"
        )
    return group if training and torch.distributed.get_world_size(group) > 1 else None


def batch_norm_of_torch(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    group: ProcessGroup | None,
) -> Tensor:
    """By PyTorch's own operators. With a process group that is what torch.nn.SyncBatchNorm calls, which
    takes no tensor of the CPU; a meta tensor has no numbers that other ranks would need.
    """
    if group is None or input.is_meta:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if input.is_cpu:
        raise ValueError("SyncBatchNorm expected input tensor to be on GPU or XPU, where PyTorch serves it")
    ranks = torch.distributed.get_world_size(group)
    return SyncBatchNorm.apply(  # pyright: ignore[reportReturnType]
        input, weight, bias, running_mean, running_var, eps, momentum, group, ranks
    )


def check_norm(
    function: str,
    channels: int,
    dtype: torch.dtype,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor | None, Tensor | None, float, float]:
    """(gamma, beta, momentum, eps) checked, the first two as vectors."""
    momentum, eps = _check_numbers(function, training, momentum, eps)
    if not training and (running_mean is None or running_var is None):
        raise RuntimeError(f"{function}(): running_mean and running_var must be defined in evaluation mode")
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{function}(): running_mean and running_var must either both be None or neither be None")
    if torch.is_grad_enabled():
        for name, t in (("running_mean", running_mean), ("running_var", running_var)):
            if t is not None and t.requires_grad:
                raise RuntimeError(
                    f"{function}(): {name} must not require a gradient, as nothing is differentiated by it"
                )
    vectors, size = (running_mean, running_var, gamma, beta), (channels,)
    usual = (
        dtype if dtype == torch.float64 or (running_mean is not None and running_mean.dtype == dtype) else torch.float32
    )
    for t in vectors:
        if t is not None and (t.dtype != usual or t.shape != size):
            gamma, beta = _check_vectors(function, channels, dtype, *vectors)
            break
    return gamma, beta, momentum, eps


def _check_numbers(function: str, training: bool, momentum: float, eps: float) -> tuple[float, float]:
    """(momentum, eps), checked."""
    check_flag(function, "training", training)
    if type(momentum) is not float or type(eps) is not float:
        momentum, eps = as_float(function, "momentum", momentum), as_float(function, "eps", eps)
    if eps < 0 or (training and eps == 0):
        rule = "positive in training" if training else "non-negative"
        raise ValueError(f"{function}(): eps must be {rule}, but got eps={eps}")
    return momentum, eps


def _check_vectors(
    function: str,
    channels: int,
    dtype: torch.dtype,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(gamma, beta) as vectors, where not all tensors are vectors of the usual dtype already."""
    own = "bn_" if function == "conv_bn_act" else ""  # there weight and bias are the convolution's
    given = {"running_mean": running_mean, "running_var": running_var, f"{own}weight": gamma, f"{own}bias": beta}
    first = next((t.dtype for t in given.values() if t is not None), dtype)
    for name, t in given.items():
        if t is None:
            continue
        if t.numel() != channels or (t.dim() != 1 and name.startswith("running")):
            raise RuntimeError(
                f"{function}(): {name} must have size [{channels}], one value a channel, but got {list(t.shape)}"
            )
        if t.dtype not in (dtype, torch.float32) or (dtype == torch.float64 and t.dtype != dtype):
            narrower = "" if dtype in (torch.float32, torch.float64) else " or float32"
            raise RuntimeError(f"{function}(): {name} must have input's dtype {dtype}{narrower}, but got {t.dtype}")
        if t.dtype != first and function != "conv_bn_act":  # which takes any mixture
            raise RuntimeError(
                f"{function}(): {', '.join(given)} must have one dtype, but got {name} of {t.dtype} beside {first}"
            )
    return None if gamma is None else gamma.reshape(-1), None if beta is None else beta.reshape(-1)


def values_per_channel(function: str, size: Sequence[int], group: ProcessGroup | None = None) -> int:
    """Raises ValueError if it is one, and no other rank of a process group has more of them."""
    count = size[0] * prod(size[2:])
    if count == 1 and group is None:
        raise ValueError(
            f"{function}(): expected more than 1 value per channel when training, but got size {list(size)}"
        )
    return count
