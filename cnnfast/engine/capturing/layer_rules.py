"""One spelling for each kind of layer: convolutions, norms, pools, padding, resizing, attention."""

from __future__ import annotations

from operator import getitem
from typing import Any

from torch import fx

from ..operators import CannotCapture
from .rules import SpelledCall, aten, repeated, rule

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


@rule(*CONVOLUTIONS)
def _convolution(call: SpelledCall) -> None:
    dimensions = CONVOLUTIONS.index(call.target) + 1
    for name in ("stride", "padding", "dilation"):
        call.arguments[name] = repeated(call[name], dimensions)


@rule(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def _convolution_with_a_word(call: SpelledCall) -> fx.Node:
    """padding="same" of PyTorch: where the sum of both sides is odd, one more at the end."""
    taps = call.value(call["weight"]).shape[2:]
    dimensions = len(taps)
    dilation = repeated(call["dilation"], dimensions)
    x, padding = call["input"], [0] * dimensions
    if call["padding"] == "same":
        both = [dilated * (size - 1) for dilated, size in zip(dilation, taps, strict=True)]
        padding = [total // 2 for total in both]
        odd = [total % 2 for total in both]
        if any(odd):
            x = call.write(
                aten.pad.default, x, [side for more in reversed(odd) for side in (0, more)], "constant", None
            )
    stride = repeated(call["stride"], dimensions)
    target = CONVOLUTIONS[dimensions - 1]
    return call.write(target, x, call["weight"], call["bias"], stride, padding, dilation, call["groups"])


@rule(*TRANSPOSED)
def _transposed_convolution(call: SpelledCall) -> None:
    dimensions = TRANSPOSED.index(call.target) + 1
    for name in ("stride", "padding", "output_padding", "dilation"):
        call.arguments[name] = repeated(call[name], dimensions)


@rule(aten.convolution.default, aten._convolution.default)
def _any_convolution(call: SpelledCall) -> fx.Node:
    dimensions = call.value(call["weight"]).dim() - 2
    x, weight, bias = call["input"], call["weight"], call["bias"]
    stride, padding, dilation, more = (
        repeated(call[name], dimensions) for name in ("stride", "padding", "dilation", "output_padding")
    )
    if call["transposed"]:
        target = TRANSPOSED[dimensions - 1]
        return call.write(target, x, weight, bias, stride, padding, more, call["groups"], dilation)
    return call.write(CONVOLUTIONS[dimensions - 1], x, weight, bias, stride, padding, dilation, call["groups"])


@rule(aten.batch_norm.default)
def _batch_norm(call: SpelledCall) -> None:
    if call["training"] or call["running_mean"] is None:
        constant = all(node.op == "get_attr" for node in call.node.all_input_nodes)
        if constant:  # weights standardised by a batch norm: evaluated once
            return
        raise CannotCapture(
            "a batch norm takes its mean and variance from the batch (training=True, or track_running_stats=False), so "
            "the result for an image depends on the others"
        )
    call.arguments["cudnn_enabled"] = False


@rule(aten.instance_norm.default)
def _instance_norm(call: SpelledCall) -> fx.Node | None:
    call.arguments["cudnn_enabled"] = False
    if call["use_input_stats"]:
        call.arguments.update(running_mean=None, running_var=None)
        return None
    names = ("input", "weight", "bias", "running_mean", "running_var")
    return call.write(aten.batch_norm.default, *(call[n] for n in names), False, call["momentum"], call["eps"], False)


@rule(aten.group_norm.default)
def _group_norm(call: SpelledCall) -> None:
    call.arguments["cudnn_enabled"] = False


@rule(aten.layer_norm.default)
def _layer_norm(call: SpelledCall) -> None:
    call.arguments["cudnn_enable"] = False


@rule(aten.native_layer_norm.default)
def _native_layer_norm(call: SpelledCall) -> Any:
    args = (call["input"], call["normalized_shape"], call["weight"], call["bias"], call["eps"], False)
    return _only_member(call, aten.layer_norm.default, *args)


@rule(aten.native_group_norm.default)
def _native_group_norm(call: SpelledCall) -> Any:
    args = (call["input"], call["group"], call["weight"], call["bias"], call["eps"], False)
    return _only_member(call, aten.group_norm.default, *args)


@rule(aten._native_batch_norm_legit_no_training.default)
def _native_batch_norm(call: SpelledCall) -> Any:
    names = ("input", "weight", "bias", "running_mean", "running_var")
    args = (*(call[name] for name in names), False, call["momentum"], call["eps"], False)
    return _only_member(call, aten.batch_norm.default, *args)


def _only_member(call: SpelledCall, target: Any, *args: Any) -> Any:
    """For an operator with several results of which a graph reads the first: the operator that has only that."""
    if any(user.target is not getitem or user.args[1] != 0 for user in call.node.users):
        return None
    written = call.write(target, *args)
    for user in list(call.node.users):
        written.meta = dict(user.meta)
        user.replace_all_uses_with(written)
        call.node.graph.erase_node(user)
    return written


MAX_POOLS = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
AVERAGE_POOLS = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)


@rule(*MAX_POOLS, *AVERAGE_POOLS)
def _pool(call: SpelledCall) -> None:
    pools = MAX_POOLS if call.target in MAX_POOLS else AVERAGE_POOLS
    _spell_window(call, pools.index(call.target) + 1)


@rule(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
def _max_pool_with_indices(call: SpelledCall) -> Any:
    dimensions = 2 if call.target is aten.max_pool2d_with_indices.default else 3
    _spell_window(call, dimensions)
    return _only_member(call, MAX_POOLS[dimensions - 1], *call.arguments.values())


def _spell_window(call: SpelledCall, dimensions: int) -> None:
    call.arguments["stride"] = call["stride"] or call["kernel_size"]
    for name in {"kernel_size", "stride", "padding", "dilation"} & set(call.arguments):
        call.arguments[name] = repeated(call[name], dimensions)


@rule(aten._adaptive_avg_pool2d.default)
def _adaptive_pool(call: SpelledCall) -> fx.Node:
    return call.write(aten.adaptive_avg_pool2d.default, *call.arguments.values())


@rule(aten.pad.default)
def _pad(call: SpelledCall) -> fx.Node | None:
    return call.first if not any(call["pad"]) else None


@rule(aten.constant_pad_nd.default)
def _constant_pad(call: SpelledCall) -> fx.Node:
    return call.write(aten.pad.default, call["self"], call["pad"], "constant", call["value"])


@rule(*(getattr(aten, f"{mode}_pad{n}d").default for mode in ("reflection", "replication") for n in (1, 2, 3)))
def _mirrored_pad(call: SpelledCall) -> fx.Node:
    mode = "reflect" if "reflection" in str(call.target) else "replicate"
    return call.write(aten.pad.default, call["self"], call["padding"], mode, None)


@rule(aten.scaled_dot_product_attention.default)
def _attention(call: SpelledCall) -> None:
    if call["dropout_p"]:
        raise CannotCapture("scaled_dot_product_attention draws random numbers, for dropout_p is not 0")
