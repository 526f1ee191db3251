"""One spelling for arithmetic and activations."""

from __future__ import annotations

from typing import Any

from torch import fx

from .rules import SpelledCall, aten, rule

# Other names, and other overloads, of the same operators.
SAME: dict[Any, Any] = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.divide.Tensor: aten.div.Tensor,
    aten.true_divide.Tensor: aten.div.Tensor,
}


@rule(*SAME, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
def _arithmetic(call: SpelledCall) -> fx.Node | None:
    """Without alpha, and with a number in place of a constant that is one."""
    target = SAME.get(call.target, call.target)
    alpha = call.arguments.pop("alpha", 1)
    call.keywords.discard("alpha")
    other = call["other"]
    if call.value(call.first).dtype.is_floating_point and call.value(call.first).dim():
        other = call.number(other)
    if alpha != 1:
        other = call.write(aten.mul.Tensor, other, alpha) if isinstance(other, fx.Node) else other * alpha
    if target is call.target and other is call["other"]:
        return None
    return call.write(target, call["self"], other)


@rule(aten.rsub.Tensor)
def _reversed_subtraction(call: SpelledCall) -> fx.Node | None:
    return call.write(aten.sub.Tensor, call["other"], call["self"]) if call["alpha"] == 1 else None


@rule(aten.square.default)
def _square(call: SpelledCall) -> fx.Node:
    return call.write(aten.mul.Tensor, call.first, call.first)


@rule(aten.relu6.default)
def _relu6(call: SpelledCall) -> fx.Node:
    return call.write(aten.hardtanh.default, call.first, 0.0, 6.0)


@rule(aten.clamp.default, aten.clip.default, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(call: SpelledCall) -> fx.Node | None:
    low, high = call.arguments.get("min"), call.arguments.get("max")
    floating = call.value(call.first).dtype.is_floating_point
    if floating and low == 0 and high is None:
        return call.write(aten.relu.default, call.first)
    if floating and low is not None and high is not None:
        return call.write(aten.hardtanh.default, call.first, float(low), float(high))
    return None if call.target is aten.clamp.default else call.write(aten.clamp.default, call.first, low, high)


@rule(aten._softmax.default, aten._log_softmax.default)
def _softmax(call: SpelledCall) -> fx.Node | None:
    target = aten.softmax.int if call.target is aten._softmax.default else aten.log_softmax.int
    return None if call["half_to_float"] else call.write(target, call.first, call["dim"], None)


@rule(aten.special_expit.default)
def _sigmoid(call: SpelledCall) -> Any:
    return call.write(aten.sigmoid.default, call.first)
