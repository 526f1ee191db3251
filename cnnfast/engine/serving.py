"""A network and its runners: inputs in, results of the caller's own out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .accepting import accept, misfits
from .network import Network
from .planning.conditions import violated
from .runtime import Runners, Shapes, address, own

AGAIN = "freeze the model again, on an example of this size"


class Serving:
    """A network and its runners. It never changes, so that calls in several threads see one or the other."""

    def __init__(self, network: Network, runners: Runners | None = None) -> None:
        self.network = network
        self.runners = runners or Runners(network.graph, network.dtype)
        self.constants = set(map(address, network.graph.constants.values()))

    def fixed(self, reason: str) -> Serving:
        return Serving(replace(self.network, fixed=reason), self.runners)

    def refusal(self, shapes: Shapes) -> str:
        """Why inputs of these shapes cannot be served; the empty string if they can."""
        graph = self.network.graph
        if problem := misfits(graph.inputs, shapes):
            return f"{problem}; {self.network.fixed}; {AGAIN}" if self.network.fixed else problem
        problem = violated(graph.conditions, shapes)
        return f"{problem}; {AGAIN}" if problem else ""

    def __call__(self, leaves: Sequence[Tensor]) -> Any:
        results = self.flat(leaves)
        cast = [t.to(dtype) for t, dtype in zip(results, self.network.result_dtypes, strict=True)]
        return self.network.result.build(cast)

    def flat(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        with plainly():
            results = self.runners.runner(shapes_of(leaves))(leaves)
        return own(results, leaves, self.constants)

    def on(self, *inputs: Any) -> list[Tensor]:
        """The flat results, in the dtype of the network, of inputs that nobody else has checked."""
        network = self.network
        return self.flat(accept(inputs, network.arguments, network.graph.inputs, network.dtype))


def shapes_of(leaves: Sequence[Tensor]) -> Shapes:
    return tuple(tuple(t.shape) for t in leaves)


@contextmanager
def plainly() -> Iterator[None]:
    """Without gradients and without autocast, whatever the caller has set: the network's dtypes are decided."""
    uncast = torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
    with torch.no_grad(), uncast:
        yield
