"""What a conversion did, module by module, what it left to PyTorch, and the share that each has of the model's work:
what is planned in the model as it is now, corrected by what a run of it shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from cnnfast_kernels.problem import ConvProblem

from .. import dispatch
from ..nn.fused import forward_replaced
from ..nn.layers import SameConv2d
from .block_notes import blocks_told
from .costs import Spender, Spent
from .fusion import groups_of, plan_of, why_not_fused
from .grafts import base_of
from .leaves import is_norm, is_ours, replacement, stored_weight, why_left
from .observing import Observation, ObservedRun, look
from .planning import Group, only_holds
from .rows import FUSED, LEFT, REPLACED, ConversionReport, ConvolutionRow
from .showing import described
from .staying import collected, standardised

if TYPE_CHECKING:
    from cnnfast_kernels.devices import Gpu

REPLACED_ON_THE_INSTANCE = "its forward was replaced on the instance"
PRELU_IN_TRAINING = (
    "after the fused step, because gradients are recorded, and that of its slope has no kernel; without them it is part"
    " of the step"
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def report_on(model: nn.Module, example_inputs: tuple[Any, ...]) -> ConversionReport:
    modules = dict(model.named_modules())
    plans = {name: found for name, module in modules.items() if (found := groups_of(module))}
    run, seen, sizes = _look(model, example_inputs)
    spent = run.spent if run is not None else None
    members = _Members(modules, plans, seen if isinstance(seen, Observation) else None)
    rows = []
    for name, module in modules.items():
        status, reason = members.told(name) or _container(name, module, plans.get(name, []), members)
        if status:
            cost = None if spent is None else spent.get(Spender("module", name), Spent())
            rows.append(
                ConvolutionRow(
                    name,
                    base_of(type(module)).__name__,
                    status,
                    reason,
                    flops=cost and cost.flops,
                    convolution=isinstance(module, CONVOLUTIONS),
                    bytes=cost and cost.bytes,
                )
            )
    planned = [name for name, (_, _, idle) in members.planned.items() if not idle] if run is None else []
    notes = list(_notes(model, run, sizes))
    if members.seen is None and any(row.status == FUSED for row in rows):
        why = sizes
        if seen is not None:
            first_line = str(seen).strip().partition("\n")[0]
            why = f"in its present modes it raises {type(seen).__name__}: {first_line}"
        notes.insert(0, f"What is fused was planned, and not seen in a run: {why}")
    return ConversionReport(
        rows,
        collected(modules, [row.name for row in rows] + planned, spent),
        total_flops=None if spent is None else sum(cost.flops for cost in spent.values()),
        total_bytes=None if spent is None else sum(cost.bytes for cost in spent.values()),
        saved_bytes=None if spent is None else sum(cost.saved for cost in spent.values()),
        input=sizes,
        notes=notes,
    )


class _Members:
    """The statuses of convolutions, norms and pools: by what was seen of them in a run, or without a run by what was
    planned for them.
    """

    def __init__(
        self, modules: dict[str, nn.Module], plans: dict[str, list[tuple[Group, str]]], seen: Observation | None
    ) -> None:
        self.modules, self.seen = modules, seen
        # name of a member > (its container's name, what the group computes, why it is not computed so, or "")
        self.planned: dict[str, tuple[str, str, str]] = {}
        self.prelus: dict[str, str] = {}  # name of a member > that of the PReLU that ends its group
        for container, groups in plans.items():
            for group, reason in groups:
                text = described(modules[container], group)
                act = _joined(container, group.activation)
                if group.activation in group.members and isinstance(modules[act], nn.PReLU):
                    self.prelus |= {_joined(container, member): act for member in group.members}
                for name in (_joined(container, member) for member in group.members):
                    # Two containers, one inside the other, may both plan it: the one that does fuse counts.
                    if name not in self.planned or self.planned[name][2]:
                        self.planned[name] = container, text, reason

    def told(self, name: str) -> tuple[str, str] | None:
        """(status, reason) of a module; None if it is of no kind that cnnfast covers or could cover."""
        module = self.modules[name]
        if self.fused(name) and (is_ours(module) or is_norm(module)):
            return FUSED, self.into(name)
        if is_ours(module):
            return self._unfused(name, module)
        if members := [member for member, prelu in self.prelus.items() if prelu == name != member]:
            if any(map(self._prelu_is_apart, members)):
                return LEFT, PRELU_IN_TRAINING
            if all(map(self.fused, members)):
                return FUSED, self.into(name)
        reason = standardised(module) or why_left(module) or _why_plain(module)
        return (LEFT, reason) if reason else None

    def fused(self, name: str) -> bool:
        """Whether each call of the module is part of a fused step, as far as is known."""
        if self.seen is not None:
            return 0 < self.seen.fused[name] == self.seen.calls(name)
        return name in self.planned and not self.planned[name][2]

    def into(self, name: str) -> str:
        """What the fused step computes that a module is part of; the empty string if it is part of none."""
        if name not in self.planned:
            return self.seen.into[name] if self.seen else ""
        text = self.planned[name][1]
        return text.rpartition(" + ")[0] if self._prelu_is_apart(name) else text

    def _prelu_is_apart(self, name: str) -> bool:
        """Whether PyTorch computed the PReLU of the group that a module is a member of after the fused step."""
        into = self.seen.into.get(name, "") if self.seen is not None and name in self.prelus else ""
        return bool(into) and not into.endswith("prelu")

    def _unfused(self, name: str, module: nn.Module) -> tuple[str, str]:
        """(status, reason) of a module of ours that is not always fused; the reason says why, if that was planned."""
        if self.seen is None:
            if forward_replaced(module):
                return LEFT, REPLACED_ON_THE_INSTANCE
            return REPLACED, f"alone, because {reason}" if (reason := self.planned.get(name, ("", "", ""))[2]) else ""
        fused, calls = self.seen.fused[name], self.seen.calls(name)
        if not calls:
            return REPLACED, "no call of it was seen"
        if self.seen.elsewhere[name]:
            replaced = forward_replaced(module)
            return LEFT, REPLACED_ON_THE_INSTANCE if replaced else "our forward was not reached by its calls"
        parts = [f"{fused} of its {calls} calls fused into {self.into(name)}"] if fused else []
        if name in self.planned:
            parts.append(f"alone, because {self._why_alone(name)}")
        return REPLACED, "; the others ".join(parts)

    def _why_alone(self, name: str) -> str:
        container, _, reason = self.planned[name]
        called = container or base_of(type(self.modules[container])).__name__
        if not reason and self.seen and name in self.seen.outside:
            return f"{called} was not called, but its members"
        return reason or f"{called} was called with arguments that it has no fused forward for"


def _container(name: str, block: nn.Module, groups: list[tuple[Group, str]], members: _Members) -> tuple[str, str]:
    """(status, reason) of a container whose own children could be fused, and are not, or not all; of any other two
    empty strings.
    """
    convolutions = [_joined(name, group.first) for group, _ in groups] or [
        _joined(name, child) for child, module in block._modules.items() if isinstance(module, nn.Conv2d)
    ]
    idle = groups[0][1] if groups else ""
    if (idle or not groups) and any(map(members.fused, convolutions)):
        return "", ""
    reason = f"not fused: {idle}" if idle else _why_not(block)
    return (LEFT, reason) if reason else ("", "")


def _joined(container: str, path: str) -> str:
    return f"{container}.{path}" if container else path


def _why_plain(module: nn.Module) -> str:
    """The reason for a module that `convert` would replace, and has not; the empty string for any other."""
    return "not converted: it came later, or the model never was" if replacement(module) else ""


def _why_not(block: nn.Module) -> str:
    """Why a container is not fused, or not all of it, if its own children could be; otherwise the empty string."""
    if only_holds(block):
        return ""
    own = list(_own(block))
    if plan_of(block) is not None or (
        any(isinstance(m, nn.Conv2d) for m in own) and any(isinstance(m, nn.BatchNorm2d) for m in own)
    ):
        reasons = why_not_fused(block)
        return f"not fused: {'; '.join(reasons)}" if reasons else ""
    return ""


def _own(block: nn.Module) -> Iterator[nn.Module]:
    """The modules that a container's forward calls: its children, and those of children that have no forward."""
    for child in block.children():
        yield child
        if only_holds(child):
            yield from _own(child)


def _look(
    model: nn.Module, example_inputs: tuple[Any, ...]
) -> tuple[ObservedRun | None, Observation | Exception | None, str]:
    """(a run of the model; what it showed of the model as it is now, or the error that this raised, or None; a text
    that says which input it is of, or why there is none).

    Without inputs an image as large as ImageNet's is tried. There is no run if the model does not take it.
    """
    inputs = example_inputs or _image(model)
    if not inputs:
        return None, None, ""
    try:
        return *look(model, inputs), f"for an input of {_sizes(inputs)}"
    except Exception as error:  # whatever a foreign forward raises
        if example_inputs:
            raise
        return None, None, f"the model does not take {_sizes(inputs)}: {type(error).__name__}"


def _image(model: nn.Module) -> tuple[Any, ...]:
    """An image of ImageNet's size with the channels of the first convolution, or with 3 if that is lazy; no input for a
    model without a convolution.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        return ()
    return (torch.empty(1, first.in_channels or 3, 224, 224, device="meta", dtype=stored_weight(first).dtype),)


def _sizes(inputs: tuple[Any, ...]) -> str:
    return ", ".join("x".join(map(str, t.shape)) for t in tree_leaves(inputs) if isinstance(t, torch.Tensor))


def _notes(model: nn.Module, run: ObservedRun | None, sizes: str) -> Iterator[str]:
    yield from blocks_told(model)
    weights = [stored_weight(m) for m in model.modules() if isinstance(m, nn.Conv2d) and is_ours(m)]
    if not weights:
        return
    with dispatch.in_this_thread("auto"):
        reason = dispatch.why_torch(weights[0])
    if reason:
        yield f"PyTorch serves this model as it is now, because {reason}."
    elif weights[0].is_cuda:
        from cnnfast_kernels import devices

        yield from _unmeasured(model, devices.gpu(weights[0].device), run, sizes)
    images = [w for w in weights if w.dim() == 4 and w.shape[1] > 1 and w[0, 0].numel() > 1]
    strided = sum(not w.is_contiguous(memory_format=torch.channels_last) for w in images)
    if strided:
        yield (
            f"{strided} convolutions have NCHW weights. With an NCHW input our kernels read single elements, not"
            " vectors, and on a GPU they serve only where they were measured to be faster all the same."
            " convert(model, memory_format=torch.channels_last), and channels_last inputs, avoid that."
        )


def _unmeasured(model: nn.Module, gpu: Gpu, run: ObservedRun | None, sizes: str) -> Iterator[str]:
    """A line that says how many convolutions were not measured on this GPU, if any were not."""
    from cnnfast_kernels import tables

    call = "cnnfast tune MODEL, or cnnfast.tune(model, *inputs), measures them."
    if run is None:
        yield f"Which convolutions are unmeasured on this GPU ({gpu.name}) is not known, for {sizes}. {call}"
        return
    problems = [problem for name, shape in run.shapes if (problem := _problem(model.get_submodule(name), shape))]
    missing = sum(not tables.was_measured(*gpu, problem) for problem in problems)
    if missing:
        yield f"{missing} of {len(problems)} convolutions are unmeasured on this GPU ({gpu.name}) {sizes}. {call}"


def _problem(module: nn.Module, input_shape: tuple[int, ...]) -> ConvProblem | None:
    """The convolution that a module of ours computes on an input of this shape; None for any other module."""
    if not isinstance(module, nn.Conv2d) or not is_ours(module) or len(input_shape) != 4:
        return None
    left, right, top, bottom = module._reversed_padding_repeated_twice
    sides = module.sides(input_shape[2:]) if isinstance(module, SameConv2d) else (top, bottom, left, right)
    where = tuple(module.weight.shape), module.stride, tuple(sides), module.dilation, module.groups
    return ConvProblem.of(input_shape, *where)  # pyright: ignore[reportArgumentType]
