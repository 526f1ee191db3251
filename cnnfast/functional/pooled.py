"""A convolution, its batch norm, an activation and a max pool as one call: what networks begin with. It is none of the
public names: converted models and cnnfast.models call it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.overrides import _get_current_function_mode_stack, has_torch_function
from torch.utils._device import DeviceContext

from ..activations import LEAKY_SLOPE, ActivationName
from ..dispatch import PLAIN, why_torch
from .arguments import Size, autocast
from .convolution import conv_geometry, conv_output_size
from .entrance import captured
from .fused import conv_bn_act, wants_gradient
from .normalization import check_norm, values_per_channel
from .operators import ops
from .pooling import checked_window, max_pool2d

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Whose derivative is told from their output: leaky_relu's from a positive slope on.
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu")
SEES_NO_LAYER = "sees_no_layer"  # an attribute of modes that do nothing with the functions of layers
MOST_TAPS = 255  # that fit a byte


def conv_bn_act_pool(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    window: tuple[Size, Size | None, Size, Size, bool],
    *,
    bias: Tensor | None = None,
    activation: ActivationName | None = "relu",
    activation_arg: float | Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: ProcessGroup | None = None,
    **geometry: Any,
) -> Tensor:
    """max_pool2d(conv_bn_act(...), *window): the same bits. window: kernel_size, stride, padding, dilation, ceil_mode;
    geometry: stride, padding, dilation and groups of the convolution, as conv_bn_act has them.

    In training, where a gradient is wanted, the activation's derivative is told from its output and the window is not
    dilated and has at most 255 taps, it is one operator, which never writes what is pooled. Everywhere else, and where
    calls are captured, it is the two functions. Everything else as these have it.
    """
    norm = running_mean, running_var, bn_weight, bn_bias
    how: dict[str, Any] = {"bias": bias, "activation": activation, "activation_arg": activation_arg, **geometry}
    how |= {"training": training, "momentum": momentum, "eps": eps, "process_group": process_group}
    tensors = input, weight, bias, *norm
    if (
        not training
        or process_group is not None
        or activation not in ACTIVATIONS
        or isinstance(activation_arg, Tensor)
        or captured()
        or (has_torch_function(tensors) and seen_by_others(tensors))
        or input.dim() != 4
        or not wants_gradient(input, weight, bias, bn_weight, bn_bias)
        or why_torch(*tensors)
    ):
        return max_pool2d(conv_bn_act(input, weight, *norm, **how), *window)
    x, w, b = autocast(input, weight, bias)
    where = (
        geometry.get(name, usual) for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
    )
    of_convolution = conv_geometry("conv_bn_act", x, w, b, *where)
    size = conv_output_size(x, w, of_convolution)
    pool_size, pool_stride, pool_padding, pool_dilation, ceil_mode = checked_window("max_pool2d", size, *window)
    slope = LEAKY_SLOPE if activation_arg is None else float(activation_arg)
    unusual = pool_dilation != (1, 1) or pool_size[0] * pool_size[1] > MOST_TAPS
    if unusual or (activation == "leaky_relu" and slope <= 0):
        return max_pool2d(conv_bn_act(input, weight, *norm, **how), *window)
    gamma, beta, momentum, eps = check_norm("conv_bn_act", w.shape[0], x.dtype, *norm, True, momentum, eps)
    values_per_channel("conv_bn_act", size)
    of_pass = gamma, beta, eps, activation, slope, pool_size, pool_stride, pool_padding, ceil_mode
    return ops.conv_bn_act_pool_training(
        x, w, b, running_mean, running_var, momentum, *of_pass, *of_convolution, "auto"
    )[0]


def seen_by_others(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a tensor's class or a mode is to see the calls of public functions. A default device is a mode too, which
    looks at nothing that makes no tensor; and of ours there are some that say so.
    """
    modes = _get_current_function_mode_stack()
    return any(t is not None and type(t) not in PLAIN for t in tensors) or any(
        type(mode) is not DeviceContext and not getattr(mode, SEES_NO_LAYER, False) for mode in modes
    )
