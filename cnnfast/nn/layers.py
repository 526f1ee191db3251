"""torch.nn's layers, computed by cnnfast.functional.

No class adds anything to its instances: `module.__class__ = Conv2d` turns an existing torch.nn.Conv2d into ours, and
the reverse turns it back. A call that PyTorch serves runs torch.nn's own code after one question, so that it costs
hardly more than torch.nn's layer does. torch.fx traces each layer as it traces torch.nn's (symbolic.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..aside import is_aside
from ..dispatch import why_torch
from ..functional.arguments import Sides
from ..recording import record_torch
from .scripting import RevertToScript, TraceToScript
from .symbolic import call_or_record


def torch_serves(operation: str, input: Any, weight: Tensor | None = None) -> bool:
    """Whether PyTorch serves a call on `input`, which is then recorded. functional asks about the other tensors."""
    reason = why_torch(input) if isinstance(input, Tensor) else "input is not a Tensor"
    if not reason:
        return False
    record_torch(operation, reason, input, weight)
    return True


class Conv2d(torch.nn.Conv2d, RevertToScript):
    """torch.nn.Conv2d: [N, C, H, W] or [C, H, W] to [N, K, P, Q]; every padding_mode. Raises what torch.nn.Conv2d
    raises.
    """

    _call_impl = call_or_record

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch_serves("conv2d", input, weight):
            return super()._conv_forward(input, weight, bias)
        if self.padding_mode == "zeros":
            return functional.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return functional.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


class Conv1d(torch.nn.Conv1d, RevertToScript):
    """torch.nn.Conv1d: [N, C, L] or [C, L] to [N, K, M]; every padding_mode. Raises what torch.nn.Conv1d raises."""

    _call_impl = call_or_record

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch_serves("conv1d", input, weight):
            return super()._conv_forward(input, weight, bias)
        if self.padding_mode == "zeros":
            return functional.conv1d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return functional.conv1d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


class ConvTranspose2d(torch.nn.ConvTranspose2d, RevertToScript):
    """torch.nn.ConvTranspose2d: [N, C, H, W] or [C, H, W] to [N, K, P, Q]. Raises what torch.nn.ConvTranspose2d
    raises.
    """

    _call_impl = call_or_record

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        # _parameters: a parametrized weight is computed at every access of self.weight
        if self.padding_mode != "zeros" or torch_serves("conv_transpose2d", input, self._parameters.get("weight")):
            return super().forward(input, output_size)
        assert not isinstance(self.padding, str)  # which a convolution that is not transposed may have
        extra = self._output_padding(input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation)  # pyright: ignore
        return functional.conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation
        )


class SameConv2d(Conv2d):
    """A torch.nn.Conv2d that pads as TensorFlow's "SAME" does, whatever its `padding` says: [N, C, H, W] or [C, H, W]
    to ceil(H / stride) rows and ceil(W / stride) columns. Of an odd number of zeros, the end of an axis gets one more.

    Conversion grafts it on timm's Conv2dSame. The input is not padded first: our convolutions take four paddings.
    """

    def sides(self, image: Sequence[int]) -> Sides:
        """The zeros around an image of so many rows and columns."""
        ends: list[int] = []
        for n, taps, step, dil in zip(image, self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((-(-n // step) - 1) * step + dil * (taps - 1) + 1 - n, 0)
            ends += [total // 2, total - total // 2]
        return Sides(*ends)

    def forward(self, input: Tensor) -> Tensor:
        padding: Any = self.sides(input.shape[-2:])
        return functional.conv2d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


def _normalize(self: torch.nn.modules.batchnorm._BatchNorm, input: Tensor) -> Tensor:
    """The forward of the three norms below."""
    if torch_serves("batch_norm", input):
        return torch.nn.modules.batchnorm._BatchNorm.forward(self, input)
    self._check_input_dim(input)
    mean, var, training, momentum = running_statistics(self)
    return functional.batch_norm(input, mean, var, self.weight, self.bias, training, momentum, self.eps)


class BatchNorm1d(torch.nn.BatchNorm1d, RevertToScript):
    """torch.nn.BatchNorm1d of [N, C] or [N, C, L], with its buffers, which change when torch.nn's do. Raises what
    torch.nn.BatchNorm1d raises.
    """

    _call_impl = call_or_record
    forward = _normalize


class BatchNorm2d(torch.nn.BatchNorm2d, RevertToScript):
    """torch.nn.BatchNorm2d of [N, C, H, W], with its buffers, which change when torch.nn's do. Raises what
    torch.nn.BatchNorm2d raises.
    """

    _call_impl = call_or_record
    forward = _normalize


class BatchNorm3d(torch.nn.BatchNorm3d, RevertToScript):
    """torch.nn.BatchNorm3d of [N, C, D, H, W], with its buffers, which change when torch.nn's do. Raises what
    torch.nn.BatchNorm3d raises.
    """

    _call_impl = call_or_record
    forward = _normalize


class SyncBatchNorm(torch.nn.SyncBatchNorm, RevertToScript):
    """torch.nn.SyncBatchNorm of [N, C] to [N, C, D, H, W]: in training mean and variance are those of the batches of
    all processes of its group, of which some may be empty; weight and bias get the gradients of their own batch.

    Where kernels serve, tensors may be on the CPU, and every process of the group has to use this class: PyTorch's own
    exchanges other numbers. There are no second derivatives, and torch.compile breaks the graph in training. Elsewhere
    PyTorch serves. Raises what torch.nn.SyncBatchNorm raises, before anything is exchanged.
    """

    _call_impl = call_or_record

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return super().forward(input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        mean, var, training, momentum = running_statistics(self)
        group = synchronising_group(self, input)
        return functional.batch_norm(
            input, mean, var, self.weight, self.bias, training, momentum, self.eps, process_group=group
        )


def synchronising_group(bn: torch.nn.Module, input: Tensor) -> Any:
    """The process group with whose other ranks this norm shares its statistics, by torch.nn.SyncBatchNorm's rules; None
    if it uses its own.

    What runs aside waits for nobody, and of meta tensors nothing is sent.
    """
    if not (isinstance(bn, torch.nn.SyncBatchNorm) and bn.training) or (is_aside() and not input.is_meta):
        return None
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    group = bn.process_group or torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None


def running_statistics(bn: torch.nn.Module) -> tuple[Tensor | None, Tensor | None, bool, float]:
    """(running_mean, running_var, training, momentum) as functional.batch_norm takes them, by torch.nn.BatchNorm2d's
    rules.

    Counts the batch in num_batches_tracked. A norm without an attribute `track_running_stats` is a frozen one, which
    normalises by its statistics.
    """
    mean: Any = bn.running_mean
    var: Any = bn.running_var
    tracks = getattr(bn, "track_running_stats", None)
    if tracks is None or not bn.training:
        return mean, var, mean is None and var is None, 0.0
    if not tracks:
        return None, None, True, 0.0
    momentum: Any = bn.momentum
    batches: Any = bn.num_batches_tracked
    if batches is not None:
        batches.add_(1)
        if momentum is None:  # the average of all batches so far
            momentum = 1.0 / float(batches)
    return mean, var, True, 0.0 if momentum is None else momentum


class MaxPool2d(torch.nn.MaxPool2d, RevertToScript):
    """torch.nn.MaxPool2d of [N, C, H, W] or [C, H, W]; with return_indices also the positions. Raises what
    torch.nn.MaxPool2d raises.
    """

    _call_impl = call_or_record

    def forward(self, input: Tensor) -> Any:
        if torch_serves("max_pool2d", input):
            return super().forward(input)
        return functional.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool2d(torch.nn.AvgPool2d, RevertToScript):
    """torch.nn.AvgPool2d of [N, C, H, W] or [C, H, W]. Raises what torch.nn.AvgPool2d raises."""

    _call_impl = call_or_record

    def forward(self, input: Tensor) -> Tensor:
        if torch_serves("avg_pool2d", input):
            return super().forward(input)
        return functional.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d, RevertToScript):
    """torch.nn.AdaptiveAvgPool2d of [N, C, H, W] or [C, H, W]. Raises what torch.nn.AdaptiveAvgPool2d raises."""

    _call_impl = call_or_record

    def forward(self, input: Tensor) -> Tensor:
        if torch_serves("adaptive_avg_pool2d", input):
            return super().forward(input)
        return functional.adaptive_avg_pool2d(input, self.output_size)


class GlobalAvgPool2d(TraceToScript):
    """The mean of each plane: [N, C, H, W] to [N, C, 1, 1], or to [N, C] with keepdim=False; [C, H, W] likewise."""

    _call_impl = call_or_record

    def __init__(self, keepdim: bool = True) -> None:
        super().__init__()
        self.keepdim = keepdim

    def forward(self, input: Tensor) -> Tensor:
        return functional.global_avg_pool2d(input, self.keepdim)

    def extra_repr(self) -> str:
        return f"keepdim={self.keepdim}"
