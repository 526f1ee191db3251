"""What a conversion did, module by module, read off the model as it is now."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.utils._pytree import tree_leaves

from cnnfast_kernels.problem import ConvProblem

from .. import dispatch
from .fusion import groups_in_force, plan_of, why_not_fused
from .grafts import base_of
from .leaves import is_norm, is_ours, replacement, why_left
from .planning import Group

if TYPE_CHECKING:
    from cnnfast_kernels.launch import Gpu

    from ..summary import Layer

FUSED, REPLACED, LEFT = "fused", "replaced", "left"
STYLES = {FUSED: "green", REPLACED: "green", LEFT: "yellow"}
WIDTH = 100  # of str(report)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Row:
    """One module. `status`: "fused" (`reason` says into what), "replaced" (its forward is ours), "left" (`reason` says why).

    flops: multiplications and additions of its forward, None where the model could not be run to find the sizes.
    """

    name: str
    kind: str
    status: str
    reason: str = ""
    flops: int | None = None
    convolution: bool = False


@dataclass
class Report:
    """The modules that cnnfast covers, or might. str() is a table; rich prints it at the width of its console.

    total_flops: of the whole model, None if unknown; input: the sizes that FLOPs are of; notes: what else a user should know.
    """

    rows: list[Row]
    total_flops: int | None
    input: str
    notes: list[str]

    def count(self, status: str) -> int:
        """How many convolutions have that status: "fused", "replaced" or "left"."""
        return sum(row.convolution and row.status == status for row in self.rows)

    @property
    def coverage(self) -> float | None:
        """Share of the model's FLOPs that modules with our forward have, 0 to 1."""
        if not self.total_flops:
            return None
        return sum(row.flops or 0 for row in self.rows if row.status != LEFT) / self.total_flops

    @property
    def summary(self) -> str:
        total = sum(row.convolution for row in self.rows)
        fused, replaced, left = map(self.count, (FUSED, REPLACED, LEFT))
        text = f"{fused} of {total} convolutions fused, {replaced} replaced, {left} left"
        return text if self.coverage is None else f"{text}; {self.coverage:.1%} of the FLOPs ({self.input})"

    def to_json(self) -> str:
        """An object with summary, coverage, total_flops, input, notes and rows."""
        head = {"summary": self.summary, "coverage": self.coverage, "total_flops": self.total_flops, "input": self.input}
        return json.dumps({**head, "notes": self.notes, "rows": [asdict(row) for row in self.rows]}, indent=1)

    def __rich__(self) -> RenderableType:
        table = Table()
        for heading in ("module", "class", "", "FLOPs", "into, or why"):
            table.add_column(heading, overflow="fold", justify="right" if heading == "FLOPs" else "left")
        for row in self.rows:
            flops = f"{row.flops / self.total_flops:.1%}" if row.flops and self.total_flops else ""
            table.add_row(Text(row.name), Text(row.kind), Text(row.status, STYLES[row.status]), flops, Text(row.reason))
        return Stack(table, *(Text(note, "yellow") for note in self.notes), Text(self.summary, "bold"))

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False).print(self)
        return text.getvalue().rstrip()


def report_on(model: nn.Module, example_inputs: tuple[Any, ...]) -> Report:
    modules = dict(model.named_modules())
    fused: dict[str, str] = {}
    for name, module in modules.items():
        fused |= _fused_members(name, module)
    found, sizes = _layers(model, example_inputs)
    costs = _flops(found)
    rows = []
    for name, module in modules.items():
        kind = base_of(type(module)).__name__
        convolution = isinstance(module, CONVOLUTIONS)
        if name in fused and (is_ours(module) or is_norm(module)):
            rows.append(Row(name, kind, FUSED, fused[name], costs.get(name), convolution))
        elif is_ours(module):
            rows.append(Row(name, kind, REPLACED, "", costs.get(name), convolution))
        elif reason := why_left(module) or _why_plain(module) or _why_not(module):
            rows.append(Row(name, kind, LEFT, reason, costs.get(name), convolution))
    total = sum(costs.values()) if found else None
    return Report(rows, total, sizes, list(_notes(model, found, sizes)))


def _fused_members(name: str, block: nn.Module) -> dict[str, str]:
    """Full name of each member of a group > what the group computes."""
    prefix = f"{name}." if name else ""
    return {prefix + member: _described(block, group) for group in groups_in_force(block) for member in group.members}


def _described(block: nn.Module, group: Group) -> str:
    """Names of what a group computes; classes where children are numbered."""

    def named(path: str) -> str:
        return base_of(type(block.get_submodule(path))).__name__ if path.rpartition(".")[2].isdecimal() else path

    parts = [named(group.conv), named(group.norm), "residual" * group.residual, named(group.activation)]
    return " + ".join(filter(None, parts))


def _why_plain(module: nn.Module) -> str:
    """Whether it is a module that `convert` would take, but has not."""
    return "not converted: it came later, or the model never was" if replacement(module) else ""


def _why_not(block: nn.Module) -> str:
    """Why a container whose own children could be fused is not, or not all of it."""
    if plan_of(block) is not None and not groups_in_force(block):
        return "not fused any more: it has changed; convert again"
    lists = [m for m in block.children() if isinstance(m, nn.ModuleList | nn.ModuleDict)]
    own = [m for container in (block, *lists) for m in container.children()]
    if plan_of(block) is not None or (any(isinstance(m, nn.Conv2d) for m in own) and any(isinstance(m, nn.BatchNorm2d) for m in own)):
        reasons = why_not_fused(block)
        return f"not fused: {'; '.join(reasons)}" if reasons else ""
    return ""


def _layers(model: nn.Module, example_inputs: tuple[Any, ...]) -> tuple[list[Layer], str]:
    """(the model's layers, what input they are of). Without inputs an image as large as ImageNet's is tried; none if it does not run."""
    from ..summary import layers

    inputs = example_inputs
    if not inputs:
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        if first is None:
            return [], ""
        inputs = (torch.empty(1, first.in_channels, 224, 224, device="meta", dtype=first.weight.dtype),)
    try:
        return layers(model, *inputs), f"for an input of {_sizes(inputs)}"
    except Exception as error:  # whatever a foreign forward raises
        if example_inputs:
            raise
        return [], f"the model does not take {_sizes(inputs)}: {type(error).__name__}"


def _flops(found: list[Layer]) -> Counter[str]:
    """Of each module by name."""
    costs: Counter[str] = Counter()
    for layer in found:
        costs[layer.name] += layer.flops
    return costs


def _sizes(inputs: tuple[Any, ...]) -> str:
    return ", ".join("x".join(map(str, t.shape)) for t in tree_leaves(inputs) if isinstance(t, torch.Tensor))


def _notes(model: nn.Module, found: list[Layer], sizes: str) -> Iterator[str]:
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and is_ours(m)]
    if not weights:
        return
    with dispatch.backend("auto"):
        reason = dispatch.why_torch(weights[0])
    if reason:
        yield f"PyTorch serves this model as it is now, because {reason}."
    elif weights[0].is_cuda:
        yield from _unmeasured(model, dispatch.launch.gpu(weights[0].device), found, sizes)
    strided = sum(w.shape[1] > 1 and w[0, 0].numel() > 1 and not w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    if strided:
        yield (
            f"{strided} convolutions have NCHW weights. With an NCHW input our kernels read single elements, not vectors, and on a GPU"
            " they serve only where they were measured to be faster all the same. convert(model, memory_format=torch.channels_last), and"
            " channels_last inputs, avoid that."
        )


def _unmeasured(model: nn.Module, gpu: Gpu, found: list[Layer], sizes: str) -> Iterator[str]:
    """One line, if some convolutions were not measured on the GPU."""
    from cnnfast_kernels import tables

    call = "cnnfast tune MODEL, or cnnfast.tune(model, *inputs), measures them."
    if not found:
        yield f"Which convolutions are unmeasured on this GPU ({gpu.name}) is not known, for {sizes}. {call}"
        return
    problems = [problem for layer in found if (problem := _problem(model.get_submodule(layer.name), layer.input_shape))]
    missing = sum(not tables.was_measured(*gpu, problem) for problem in problems)
    if missing:
        yield f"{missing} of {len(problems)} convolutions are unmeasured on this GPU ({gpu.name}) {sizes}. {call}"


def _problem(module: nn.Module, input_shape: tuple[int, ...]) -> ConvProblem | None:
    """What a module that is ours convolves; None for any other."""
    if not isinstance(module, nn.Conv2d) or not is_ours(module) or len(input_shape) != 4:
        return None
    left, right, top, bottom = module._reversed_padding_repeated_twice
    where = tuple(module.weight.shape), module.stride, (top, bottom, left, right), module.dilation, module.groups
    return ConvProblem.of(input_shape, *where)  # pyright: ignore[reportArgumentType]
