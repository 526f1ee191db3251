"""Planning a fused forward: which modules of a container become one call, and the source that makes it.

    convolution > batch norm (> addition) (> activation)

is one call of nn.conv_bn_act. Everything else of the forward stays as it was and where it was; only the members of a group
move, to the place of its last. That changes nothing unless something between writes into what the convolution reads, so a
group that would move across such a thing is cut short, or left.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import nn as cnn
from ..activations import activation_of
from ..dispatch import on_gpu
from ..nn.fused import forward_replaced
from .grafts import own_class
from .leaves import is_convolution, is_norm, is_ours, normalizes_and_activates
from .refused import Refused
from .tracing import Traced, signatures, trace

ADDITIONS = (operator.add, torch.add, "add")
IN_PLACE_ADDITIONS = (operator.iadd, "add_")
IN_PLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
RELU = (F.relu, torch.relu, "relu", "relu_")
FUNCTIONAL = {F.relu6: "relu6", F.silu: "silu", F.hardswish: "hardswish"}


@dataclass(frozen=True)
class Group:
    """Paths of the modules that one call computes; `activation` is the path of a module or the name of a function."""

    conv: str
    norm: str
    residual: bool
    activation: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """A fused forward for arguments of certain kinds: `kinds` has "tensor", "list" (of tensors) or "any" of the two for each.

    It stands for the container's own while the modules at the paths of `members` are of these classes.
    """

    kinds: tuple[str, ...]
    source: str
    members: tuple[tuple[tuple[str, ...], type], ...]
    names: tuple[tuple[str, Any], ...] = field(compare=False)  # what the source's global names stand for
    groups: tuple[Group, ...] = field(compare=False)
    writes: bool = field(compare=False)  # whether it may write into its arguments

    def takes(self, args: tuple[Any, ...]) -> bool:
        return len(args) == len(self.kinds) and all(_is(a, kind) for a, kind in zip(args, self.kinds, strict=True))


def _is(argument: Any, kind: str) -> bool:
    if isinstance(argument, Tensor):
        return kind != "list"
    if kind == "tensor" or not isinstance(argument, list | tuple) or not argument or (kind == "list" and type(argument) is not list):
        return False
    return all(isinstance(a, Tensor) for a in argument)


@dataclass(frozen=True)
class Plan:
    """The fused forwards of a container whose children have these names; equal for containers of equal structure."""

    children: tuple[str, ...]
    variants: tuple[Variant, ...]


def plan(block: nn.Module) -> Plan | None:
    """How `block` can be fused; None if there is nothing to fuse. Raises Refused."""
    if not _may_fuse(block):
        return None
    variants, refusals = [], []
    for arguments in signatures(type(block)):
        try:
            traced = trace(block, arguments)
            variants.append(_variant(block, traced))
            if traced.asked:  # the forward tells tensors from lists
                variants.append(_variant(block, trace(block, arguments, lists=traced.asked)))
        except Refused as reason:
            refusals.append(reason)
    found = tuple(v for v in variants if v is not None)
    if refusals and not found:
        raise refusals[0]
    return Plan(tuple(block._modules), found) if found else None


def only_holds(block: nn.Module) -> bool:
    """Whether it has no forward: a list or dict of modules, or what torch.fx puts where a traced model had a container."""
    return getattr(type(block), "forward", None) is nn.Module.forward  # a scripted module's class has none to read


def _may_fuse(block: nn.Module) -> bool:
    """Whether it is a container that may have both a convolution and a batch norm to call."""
    if only_holds(block) or is_ours(block) or not block._modules:
        return False
    below = list(block.modules())
    return any(is_convolution(m) for m in below) and any(is_norm(m) for m in below)


def _variant(block: nn.Module, traced: Traced) -> Variant | None:
    modules = dict(block.named_modules(remove_duplicate=False))
    rewriter = _Rewriter(traced.graph, modules)
    groups = rewriter.rewrite()
    if not groups:
        return None
    code = traced.graph.python_code("self")
    paths = dict.fromkeys(path for group in groups for path in group.members)
    return Variant(
        kinds=traced.kinds,
        source=code.src,
        members=tuple((tuple(path.split(".")), own_class(modules[path])) for path in paths),
        names=tuple(code.globals.items()),
        groups=tuple(groups),
        writes=any(rewriter.may_write(node) for node in traced.graph.nodes),
    )


def call(
    conv: Any, norm: Any, x: Tensor, residual: Tensor | None, in_place: bool, activation: nn.Module | str | None, slope: float | None
) -> Tensor:
    """What a generated forward calls for a group. in_place: the sum keeps the dtype of the norm's output, whatever the residual's."""
    if in_place and residual is not None:
        device = "cuda" if on_gpu(x) else x.device.type
        half = torch.is_autocast_enabled(device) and x.dtype != torch.float64
        residual = residual.to(torch.get_autocast_dtype(device) if half else x.dtype)
    if isinstance(activation, nn.Module):
        activation, slope = activation_of(activation)  # pyright: ignore[reportGeneralTypeIssues]
    return cnn.conv_bn_act(conv, norm, x, residual, activation, slope)


@dataclass
class _Chain:
    """The nodes of a group in order, the norm's among them; `activation`: a module's path, (name, slope) of a function, or None."""

    nodes: list[fx.Node]
    norm: fx.Node
    residual: fx.Node | None = None
    in_place: bool = False
    activation: str | tuple[str, float | None] | None = None


class _Rewriter:
    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self.graph, self.modules = graph, modules
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        # Tensors whose memory a result may share: those that nodes made, and "argument" for all that came from outside.
        self.roots: dict[fx.Node, frozenset[fx.Node | str]] = {}
        for node in graph.nodes:
            self.roots[node] = self._roots(node)
        self.writers = [node for node in graph.nodes if self.may_write(node)]

    def module(self, node: Any) -> nn.Module | None:
        return self.modules.get(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None

    def rewrite(self) -> list[Group]:
        chains = (self._chain(node) for node in list(self.graph.nodes) if is_convolution(self.module(node)))
        return [self._replace(chain) for chain in chains if chain is not None]

    def _chain(self, conv: fx.Node) -> _Chain | None:
        if len(conv.args) != 1 or conv.kwargs:
            return None
        nodes = self._skip_identities([conv])
        norm = self._only_user(nodes[-1])
        module = self.module(norm)
        if norm is None or module is None or not is_norm(module) or len(norm.args) != 1 or norm.kwargs or self._calls(module) > 1:
            return None
        if not self._may_move(conv, nodes, norm):
            return None
        chain = _Chain(self._skip_identities([*nodes, norm]), norm)
        if normalizes_and_activates(module):
            drop, act = module._modules["drop"], module._modules["act"]
            if type(drop) is not nn.Identity or not (type(act) is nn.Identity or (act is not None and activation_of(act))):
                return None
            if type(act) is not nn.Identity:
                chain.activation = f"{norm.target}.act"
                return chain
        user = self._only_user(chain.nodes[-1])
        if user is not None and (other := self._added(user, chain.nodes[-1])) is not None and self._may_move(conv, chain.nodes, user):
            chain.residual, chain.in_place = other, user.target in IN_PLACE_ADDITIONS
            chain.nodes = self._skip_identities([*chain.nodes, user])
            user = self._only_user(chain.nodes[-1])
        if user is not None and (activation := self._activation(user)) and self._may_move(conv, chain.nodes, user):
            chain.activation = activation
            chain.nodes.append(user)
        return chain

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _skip_identities(self, nodes: list[fx.Node]) -> list[fx.Node]:
        user = self._only_user(nodes[-1])
        while user is not None and type(self.module(user)) is nn.Identity:
            nodes = [*nodes, user]
            user = self._only_user(user)
        return nodes

    def _calls(self, module: nn.Module) -> int:
        """How often the forward calls a module: of a norm that is shared, the order of its updates matters."""
        return sum(self.module(node) is module for node in self.graph.nodes)

    def _added(self, user: fx.Node, last: fx.Node) -> fx.Node | None:
        """What `user` adds to `last`, if the sum is a new tensor or written into `last`."""
        if len(user.args) != 2 or user.kwargs or user.args[0] is user.args[1]:
            return None
        left, right = user.args
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return None
        if user.target in IN_PLACE_ADDITIONS:
            return right if left is last else None
        return (right if left is last else left) if user.target in ADDITIONS else None

    def _activation(self, user: fx.Node) -> Any:
        module = self.module(user)
        if module is not None:
            return user.target if len(user.args) == 1 and not user.kwargs and activation_of(module) else None
        if user.op not in ("call_function", "call_method"):
            return None
        options = {name: value for name, value in user.kwargs.items() if name != "inplace"}
        plain = len(user.args) == 1 and not options
        if user.target in RELU:
            return ("relu", None) if plain else None
        if user.target in FUNCTIONAL:
            return (FUNCTIONAL[user.target], None) if plain else None  # pyright: ignore
        if user.target is F.gelu and len(user.args) == 1:
            return {"none": ("gelu", None), "tanh": ("gelu_tanh", None)}.get(options.get("approximate", "none"))  # pyright: ignore
        if user.target is F.leaky_relu and len(user.args) <= 2:
            slope = user.args[1] if len(user.args) == 2 else options.get("negative_slope", 0.01)
            return ("leaky_relu", float(slope)) if isinstance(slope, int | float) else None
        return None

    # What may be in the way

    def _may_move(self, conv: fx.Node, own: list[fx.Node], last: fx.Node) -> bool:
        """Whether nothing between `conv` and `last`, but the group itself, may write into what `conv` reads."""
        source = self.roots[conv.args[0]]  # pyright: ignore[reportArgumentType]
        between = (node for node in self.writers if self.order[conv] < self.order[node] < self.order[last] and node not in own)
        return not any(self.roots[a] & source for node in between for a in node.all_input_nodes)

    def may_write(self, node: fx.Node) -> bool:
        """Whether a node may write into its arguments."""
        module = self.module(node)
        if module is not None:
            return any(_writes(m) for m in module.modules())
        if node.op == "call_method":
            return str(node.target).endswith("_")
        return node.target in IN_PLACE_OPERATORS or bool(node.kwargs.get("inplace"))

    def _roots(self, node: fx.Node) -> frozenset[fx.Node | str]:
        if node.op == "placeholder":
            return frozenset(["argument"])
        made: frozenset[fx.Node | str] = frozenset([node])
        module = self.module(node)
        fresh = isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) or type(module) is cnn.BatchNorm2d or node.target in ADDITIONS
        return made if fresh else made.union(*(self.roots[a] for a in node.all_input_nodes))

    # Rewriting

    def _replace(self, chain: _Chain) -> Group:
        conv, last = str(chain.nodes[0].target), chain.nodes[-1]
        norm, activation = str(chain.norm.target), chain.activation
        name, slope = activation if isinstance(activation, tuple) else (None, None)
        with self.graph.inserting_before(last):
            act = self.graph.get_attr(activation) if isinstance(activation, str) else name
            modules = self.graph.get_attr(conv), self.graph.get_attr(norm)
            fused = self.graph.call_function(call, (*modules, chain.nodes[0].args[0], chain.residual, chain.in_place, act, slope))
        last.replace_all_uses_with(fused)
        self.roots[fused], self.order[fused] = self.roots[last], self.order[last]
        for node in reversed(chain.nodes):
            self.graph.erase_node(node)
        members = [str(node.target) for node in chain.nodes if node.op == "call_module"]
        if normalizes_and_activates(self.modules[norm]):
            members += [f"{norm}.drop", f"{norm}.act"]
        path = activation if isinstance(activation, str) else name or ""
        return Group(conv, norm, chain.residual is not None, path, tuple(dict.fromkeys(members)))


def _writes(module: nn.Module) -> bool:
    """Whether a module, apart from its children, may write into its arguments; what is not known does."""
    if forward_replaced(module):
        return True
    found: Plan | None = getattr(type(module), "_cnnfast_plan", None)
    if found is not None:
        return any(variant.writes for variant in found.variants)
    return bool(getattr(module, "inplace", False)) or not type(module).__module__.startswith(("torch.nn.", "cnnfast.nn"))
