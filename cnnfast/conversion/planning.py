"""Plans a fused forward: which modules of a container become one call, and the source that makes this call.

    convolution > batch norm > addition > activation

is one call of nn.conv_bn_act, and without the norm one of nn.conv_act, without the convolution one of nn.bn_act
(chains.py finds these groups, in which also the addition and the activation may be absent). A max pool that follows a
convolution and a norm at once is part of their call, for in training it may be one operator with them. Groups that make
up a residual block become one call (blocks.py). The members of a group are computed in the place of the last of them,
if nothing in between depends on their order (effects.py); otherwise the group ends earlier, or is not fused. Everything
else of the forward stays as it was and where it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from ..nn.residual import less_memory
from .blocks import is_one_block, join_blocks
from .calling import call, call_block, call_stages
from .chains import Chain, Chains
from .effects import Conduct, Effects, Traits, buffers, traits
from .grafts import own_class
from .leaves import is_convolution, is_norm, is_ours, normalizes_and_activates
from .refused import Refused
from .stages import join_stages
from .tracing import Traced, signatures, trace


@dataclass(frozen=True)
class Group:
    """The paths of the modules that one call computes. conv, norm: one of the two may be the empty string. activation:
    the path of a module, or the name of an activation that a function computes, or the empty string.
    """

    conv: str
    norm: str
    residual: bool
    activation: str
    members: tuple[str, ...]

    @property
    def first(self) -> str:
        return self.conv or self.norm


@dataclass(frozen=True)
class Variant:
    """A fused forward for arguments of certain kinds: "tensor", "list" (of tensors), or "any" of the two.

    It stands for the container's own forward as long as the modules at the paths of `members` are of these classes, and
    the modules at the paths of `crossed`, past which members were moved, have these traits. buffers: if members were
    moved, how many buffers all these modules have among them. If there are fewer now, two of them have come to share
    one, which may be the statistics of a norm that is no longer called at the same time.
    """

    kinds: tuple[str, ...]
    source: str
    members: tuple[tuple[tuple[str, ...], type], ...]
    crossed: tuple[tuple[tuple[str, ...], Traits], ...]
    buffers: int | None
    conduct: Conduct
    names: tuple[tuple[str, Any], ...] = field(compare=False)  # what the source's global names stand for
    whole: bool = field(compare=False)  # whether it is one residual block of its argument, and nothing else
    groups: tuple[Group, ...] = field(compare=False)
    sums: tuple[tuple[str, str], ...] = field(compare=False)  # of residuals, as blocks.join_blocks returns them

    def takes(self, args: tuple[Any, ...]) -> bool:
        return len(args) == len(self.kinds) and all(_is(a, kind) for a, kind in zip(args, self.kinds, strict=True))


def _is(argument: Any, kind: str) -> bool:
    if isinstance(argument, Tensor):
        return kind != "list"
    if (
        kind == "tensor"
        or not isinstance(argument, list | tuple)
        or not argument
        or (kind == "list" and type(argument) is not list)
    ):
        return False
    return all(isinstance(a, Tensor) for a in argument)


@dataclass(frozen=True)
class FusionPlan:
    """The fused forwards of a container whose children have these names; equal for containers of equal structure.

    left: for each convolution or norm that is not fused, or not with all that follows it, a sentence that says why.
    """

    children: tuple[str, ...]
    variants: tuple[Variant, ...]
    left: tuple[str, ...]


def plan(block: nn.Module) -> FusionPlan | None:
    """How `block` can be fused; None if there is nothing to fuse. Raises Refused."""
    if not _may_fuse(block):
        return None
    found = examine(block)
    return found if found.variants else None


def examine(block: nn.Module) -> FusionPlan:
    """How `block` can be fused, and what of it cannot; there may be nothing to fuse. Raises Refused."""
    found: list[tuple[Variant | None, list[str]]] = []
    refusals = []
    for arguments in signatures(type(block)):
        try:
            traced = trace(block, arguments)
            found.append(_variant(block, traced))
            if traced.asked:  # the forward asks whether an argument is a tensor or a list
                found.append(_variant(block, trace(block, arguments, lists=traced.asked)))
        except Refused as reason:
            refusals.append(reason)
    variants = tuple(variant for variant, _ in found if variant is not None)
    if refusals and not variants:
        raise refusals[0]
    left = dict.fromkeys(sentence for _, sentences in found for sentence in sentences)
    return FusionPlan(tuple(block._modules), variants, tuple(left))


def only_holds(block: nn.Module) -> bool:
    """Whether it has no forward: a list or dict of modules, or the module that torch.fx puts where a traced model had
    a container.
    """
    return getattr(type(block), "forward", None) is nn.Module.forward  # the class of a scripted module has none


def _may_fuse(block: nn.Module) -> bool:
    """Whether it is a container with a convolution or a batch norm somewhere below it."""
    if only_holds(block) or is_ours(block) or not block._modules:
        return False
    return any(is_convolution(m) or is_norm(m) for m in block.modules())


def _variant(block: nn.Module, traced: Traced) -> tuple[Variant | None, list[str]]:
    """(the fused forward, or None if there is nothing to fuse; sentences on what is not fused, and why)."""
    modules = dict(block.named_modules(remove_duplicate=False))
    rewriter = _Rewriter(traced.graph, modules, less_memory(block))
    conduct = rewriter.effects.conduct
    groups, left = rewriter.rewrite()
    if not groups:
        return None, left
    code = traced.graph.python_code("self")
    paths = dict.fromkeys(path for group in groups for path in group.members)
    crossed = [path for path in rewriter.crossed if path not in paths]
    involved = [modules[path] for path in paths] + [m for path in crossed for m in modules[path].modules()]
    variant = Variant(
        kinds=traced.kinds,
        source=code.src,
        members=tuple((tuple(path.split(".")), own_class(modules[path])) for path in paths),
        crossed=tuple((tuple(path.split(".")), traits(modules[path])) for path in crossed),
        buffers=buffers(involved) if rewriter.moved else None,
        conduct=conduct,
        names=tuple(code.globals.items()),
        whole=is_one_block(traced.graph, call_block),
        groups=tuple(groups),
        sums=tuple(rewriter.sums),
    )
    return variant, left


class _Rewriter:
    """Puts calls of groups into a graph.

    moved: whether other nodes stood between the members of a group. crossed: the paths of the modules that have to stay
    as they are for that (Effects.rests_on).
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], less_memory: bool) -> None:
        self.graph, self.modules, self.less_memory = graph, modules, less_memory
        self.effects = Effects(graph, modules)
        self.crossed: dict[str, None] = {}
        self.moved = False
        self.sums: list[tuple[str, str]] = []

    def rewrite(self) -> tuple[list[Group], list[str]]:
        """(the groups, sentences on what is not fused, and why)."""
        chains = Chains(self.effects, self.modules)
        found = []
        groups = []
        fused: set[fx.Node] = set()
        pools: list[fx.Node] = []
        for node in list(self.graph.nodes):
            chain = chains.find(node) if node not in fused else None
            if chain is not None:
                found.append(chain.said)
                if chain.is_fused and not self._fuses_itself(chain):
                    fused.update(chain.nodes)
                    pool = chains.pool(chain)
                    groups.append(self._replace(chain, [] if pool is None else [pool]))
                    pools += [] if pool is None else [pool]
        self.sums = join_blocks(self.graph, self.modules, call, call_block, self.less_memory)
        join_stages(self.graph, self.modules, call_stages)
        if self.moved:  # one group may stand past another now, and what is called of that
            self.crossed |= {str(pool.target): None for pool in pools}
        return groups, [sentence for sentence in found if sentence]

    def _fuses_itself(self, chain: Chain) -> bool:
        """Whether a chain is a call of a single module of ours, whose own forward is one step already."""
        return len(chain.nodes) == 1 and is_ours(self.modules[str(chain.nodes[0].target)])

    def _replace(self, chain: Chain, pools: list[fx.Node]) -> Group:
        """pools: the max pool that follows the chain, if it is part of the call. It is no member of the group: it is
        called by itself wherever something else than the whole in one operator is computed.
        """
        own = [*chain.nodes, *pools]
        first, last = own[0], own[-1]
        conv, norm = ("" if node is None else str(node.target) for node in (chain.conv, chain.norm))
        activation = chain.activation
        name, slope = activation if isinstance(activation, tuple) else (None, None)
        self.crossed |= dict.fromkeys(self.effects.rests_on(chain.nodes))
        self.moved = self.moved or bool(self.effects.passed(chain.nodes))
        with self.graph.inserting_before(last):
            act = self.graph.get_attr(activation) if isinstance(activation, str) else name
            modules = [self.graph.get_attr(path) if path else None for path in (conv, norm)]
            pool = [self.graph.get_attr(str(node.target)) for node in pools]
            source = (*first.args, *first.kwargs.values())[0]
            fused = self.graph.call_function(
                call, (*modules, source, chain.residual, chain.in_place, act, slope, *pool)
            )
        fused.meta["named"] = " with ".join(f"self.{path}" for path in (conv, norm) if path)
        last.replace_all_uses_with(fused)
        self.effects.replace(own, fused)
        for node in reversed(own):
            self.graph.erase_node(node)
        members = [str(node.target) for node in chain.nodes if node.op == "call_module"]
        if norm and normalizes_and_activates(self.modules[norm]):
            members += [f"{norm}.drop", f"{norm}.act"]
        path = activation if isinstance(activation, str) else name or ""
        return Group(conv, norm, chain.residual is not None, path, tuple(dict.fromkeys(members)))
