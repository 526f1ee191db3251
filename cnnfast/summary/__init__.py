"""The layers of a model: shapes, parameters, FLOPs and receptive fields, found by running a copy of it on meta tensors,
without computing anything.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..aside import does_not_run, meta, meta_copy, on_a_copy, run_aside
from .rows import Layer as Layer
from .rows import Summary as Summary
from .running import summary_of as summary_of
from .totals import KindTotal as KindTotal
from .totals import by_kind as by_kind
from .totals import to_depth as to_depth


def layers(model: nn.Module, *example_inputs: Any) -> list[Layer]:
    """The layers that `model(*example_inputs)` calls in eval mode, in the order of the calls: see `summarize`."""
    return summarize(model, *example_inputs).layers


def summarize(model: nn.Module, *example_inputs: Any) -> Summary:
    """One Layer for each call of a convolution, linear layer, norm, pooling or activation, of any other module with
    parameters of its own, and of any other that multiplies matrices itself.

    A copy of the model runs on meta tensors, in eval mode: nothing is computed, no weight is copied, and the model, its
    hooks and the random numbers stay as they are. A model that cannot run so, because it branches on values for
    example, runs on a real copy instead. Converted models are shown layer by layer, like their originals.

    example_inputs: tensors, of any device, meta too, or structures of them. Raises RuntimeError if the model does not
    run on them.
    """
    try:
        return on_a_copy(summary_of, model, example_inputs)
    except Exception as error:
        raise does_not_run(model, example_inputs, error) from error


def attempt(model: nn.Module, *example_inputs: Any) -> Summary | None:
    """The same, or None if the model does not run on meta tensors of these shapes."""
    try:
        return run_aside(summary_of, meta_copy(model), meta(example_inputs))
    except Exception:
        return None
