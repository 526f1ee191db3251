"""Depthwise convolution: every channel is convolved by itself, with one filter or MULTIPLIER of them."""

from .dgrad import depthwise_dgrad, plan_depthwise_dgrad
from .fprop import depthwise_fprop, moments_rows, plan_depthwise_fprop
from .strips import StripPlan, vector_length
from .wgrad import depthwise_wgrad, plan_depthwise_wgrad

__all__ = [
    "StripPlan",
    "depthwise_dgrad",
    "depthwise_fprop",
    "depthwise_wgrad",
    "moments_rows",
    "plan_depthwise_dgrad",
    "plan_depthwise_fprop",
    "plan_depthwise_wgrad",
    "vector_length",
]
