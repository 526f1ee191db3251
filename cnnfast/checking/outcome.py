"""One run of a model: what it leaves, by name, and how far two runs are apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only

from .. import recording
from .capture import clone
from .randomness import reproducible


@dataclass
class RunOutcome:
    """Outputs, inputs, buffers and gradients after a run, by name, and the calls that were made. A gradient that does
    not exist is missing.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    forward: recording.Trace = field(default_factory=recording.Trace)
    backward: recording.Trace = field(default_factory=recording.Trace)


def outcome_of(model: nn.Module, inputs: Any, output_gradient: Callable[[Tensor, int], Tensor] | None) -> RunOutcome:
    """Runs `model` on copies of `inputs`, always with the same random numbers.

    output_gradient: makes the gradient that backward starts from, of an output and its number; None: no gradients.
    """
    backward = output_gradient is not None
    leaves = tree_map_only(Tensor, lambda t: clone(t).requires_grad_(backward and t.is_floating_point()), inputs)
    candidates = (*named_tensors("input", leaves).items(), *model.named_parameters())
    wanted = {name: t for name, t in candidates if t.requires_grad}
    outcome = RunOutcome()
    with reproducible(0), torch.set_grad_enabled(backward):
        given = tree_map_only(Tensor, Tensor.clone, leaves)  # the model may write into them
        with recording.trace() as outcome.forward:
            outputs = named_tensors("output", model(*given))
        after = {f"{name} afterwards": t for name, t in named_tensors("input", given).items()}
        kept = (*outputs.items(), *after.items(), *model.named_buffers())
        outcome.tensors = {name: t.detach().clone() for name, t in kept}
        differentiable = [t for t in outputs.values() if t.requires_grad]
        if differentiable and output_gradient is not None:
            dy = [output_gradient(t, i) for i, t in enumerate(differentiable)]
            with recording.trace() as outcome.backward:
                gradients = torch.autograd.grad(differentiable, list(wanted.values()), dy, allow_unused=True)
            named = zip(wanted, gradients, strict=True)
            outcome.tensors |= {f"grad of {name}": g for name, g in named if g is not None}
    return outcome


def named_tensors(name: str, tree: Any) -> dict[str, Tensor]:
    """The tensors of a structure, each under `name` and its path in the structure; a complex one as its real and
    imaginary parts.
    """
    found = [(path, t) for path, t in tree_flatten_with_path(tree)[0] if isinstance(t, Tensor)]
    found = [(path, torch.view_as_real(t) if t.is_complex() else t) for path, t in found]
    return {name + (keystr(path) if len(found) > 1 else ""): t for path, t in found}


def distance(t: Tensor, u: Tensor) -> float:
    return float((t - u).square().nansum())


def deviation(a: RunOutcome, b: RunOutcome) -> float:
    """The relative root mean square of the difference, for the output or buffer that differs most."""
    names = [
        name
        for name, t in a.tensors.items()
        if name in b.tensors and t.is_floating_point() and not name.startswith("grad")
    ]
    return max((_relative(a.tensors[name], b.tensors[name]) for name in names), default=0.0)


def _relative(t: Tensor, u: Tensor) -> float:
    """The relative root mean square of the difference where both are finite; infinite if the shapes differ."""
    if t.shape != u.shape:
        return math.inf
    t, u = (x.double().where(t.isfinite() & u.isfinite(), 0.0) for x in (t, u))
    return float((t - u).norm() / t.norm().clamp_min(1e-300))
