"""What the machine allows: the least time of a step, if its kernels are fused so far and no further.

A kernel takes max(FLOPs / matrix rate, bytes / bandwidth). It reads every value that it needs from memory, once, and
writes every value that another kernel needs, once. Kernels run one after the other, and each reads from memory what
those before it have written, so that a step whose values stay in the last-level cache may be faster. The levels differ
in which operators share a kernel:

    operators    Every operator is a kernel of its own, as in eager PyTorch.
    pointwise    Everything between two convolutions is one kernel, and in eval mode a batch norm is folded into the
                 weights of the convolution before it, as by a compiler around a library's convolutions.
    conv         There is one kernel for each convolution. What follows it (norm, activation, sum, pooling over windows,
                 and the sums that a norm needs in training) is done before it stores its result. The rest, which needs
                 those sums, is done when the next kernel loads that result.
    chains       The same, and a 1x1 convolution is part of the kernel that computes its input, or of the one that adds
                 its output. In inference only: in training the sums for a norm stand between.

The result of a map (an elementwise operator, or pooling over windows) is not stored where its readers can recompute it
from what is in memory, as ReLU's mask, or a norm, from the convolution's output. A sum of two tensors is stored.
Positions in pooling windows take one byte each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..measuring.machine import Peaks
from .graph import Node, WorkGraph

OPERATORS, POINTWISE, CONV, CHAINS = LEVELS = ("operators", "pointwise", "conv", "chains")
TWICE = 2  # a map is recomputed by its readers only if they read at most so many times its own bytes for it
# For each parameter, in float32, SGD with momentum reads it, its gradient and its momentum, and writes two of them.
OPTIMIZER_BYTES = 20


@dataclass(frozen=True)
class Kernel:
    """One kernel: the names of its operators, its FLOPs, and the bytes that it must move."""

    operators: tuple[str, ...]
    flops: int
    bytes: int

    def seconds(self, peaks: Peaks) -> float:
        return max(self.flops / peaks.flops, self.bytes / peaks.bytes)


@dataclass(frozen=True)
class Work:
    """A step at one level of fusion, as the kernels that it takes."""

    kernels: tuple[Kernel, ...]

    @property
    def flops(self) -> int:
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        return sum(kernel.bytes for kernel in self.kernels)

    def seconds(self, peaks: Peaks) -> float:
        """The least time: this level's ceiling."""
        return sum(kernel.seconds(peaks) for kernel in self.kernels)


def levels(graph: WorkGraph) -> dict[str, Work]:
    """The step at every level: without "chains" if it trains, but with a kernel for the optimizer."""
    names = LEVELS[:-1] if graph.parameters else LEVELS
    optimizer = [Kernel(("optimizer",), 0, OPTIMIZER_BYTES * graph.parameters)] if graph.parameters else []
    return {
        name: Work((*(_separate(graph) if name == OPERATORS else _Fused(graph, name).kernels()), *optimizer))
        for name in names
    }


def _separate(graph: WorkGraph) -> Iterator[Kernel]:
    """A kernel for each operator."""
    needed = graph.results.union(*(node.reads for node in graph.nodes))
    for node in graph.nodes:
        moved = [
            *(node.bytes_of(v, graph.sizes) for v in node.reads),
            *(graph.sizes[v] for v in node.writes if v in needed),
        ]
        yield Kernel((node.name,), node.flops, sum(moved))


class _Fused:
    """One level above `operators`: the kernels, and which values exist in memory."""

    def __init__(self, graph: WorkGraph, level: str) -> None:
        self.nodes, self.sizes, self.results = graph.nodes, graph.indices, graph.results
        self.prologues = level in (CONV, CHAINS)
        self.maker = {v: i for i, node in enumerate(self.nodes) for v in node.writes}
        self.readers: dict[int, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for v in node.reads:
                self.readers.setdefault(v, []).append(i)
        self.group = list(range(len(self.nodes)))
        self.members = {i: [i] for i in self.group}
        self.fold_norms()
        if self.prologues:
            self.add_epilogues()
        if level == CHAINS:
            self.chain()
        self.share_reductions()
        self.sources: dict[int, frozenset[int]] = {}
        # The results of loose maps that are in memory, and from which values there each is made.
        self.stored: dict[int, frozenset[int]] = {}
        for i, node in enumerate(self.nodes):
            if self.loose(i):
                for v in node.writes:
                    self.decide(node, v)

    def is_matrix(self, group: int) -> bool:
        return any(self.nodes[i].kind == "matrix" for i in self.members[group])

    def loose(self, i: int) -> bool:
        """Whether a node is a map that is in no convolution's kernel."""
        return self.nodes[i].kind == "map" and not self.is_matrix(self.group[i])

    # ------------------------------------------------------------------------------------------------------------------
    # Which nodes share a kernel

    def makers(self, reads: tuple[int, ...]) -> list[int]:
        """The nodes that compute these values."""
        return [self.maker[v] for v in reads if v in self.maker]

    def merge(self, i: int, j: int) -> bool:
        """Puts two nodes into one kernel, unless another node has to run after one part of it and before another.
        Returns whether that has made one kernel of two.
        """
        a, b = self.group[i], self.group[j]
        if a == b:
            return False
        end = max(*self.members[a], *self.members[b])
        together = {*self.members[a], *self.members[b]}
        ahead = [r for k in together for r in self.readers_of(k) if r not in together and r < end]
        seen: set[int] = set()
        while ahead:
            k = ahead.pop()
            if k in together:
                return False
            if k not in seen and k < end:
                seen.add(k)
                for same in self.members[self.group[k]]:
                    ahead += self.readers_of(same)
        for k in self.members.pop(b):
            self.group[k] = a
            self.members[a].append(k)
        return True

    def readers_of(self, i: int) -> list[int]:
        """The nodes that read what a node computes."""
        return [r for v in self.nodes[i].writes for r in self.readers.get(v, ())]

    def fold_norms(self) -> None:
        """Puts a batch norm in eval mode into the convolution before it, if nothing else reads that one's result."""
        for i, node in enumerate(self.nodes):
            before = self.makers(node.reads[:1])
            if (
                node.name == "batch_norm"
                and before
                and self.nodes[before[0]].kind == "matrix"
                and len(self.readers[node.reads[0]]) == 1
            ):
                self.merge(before[0], i)

    def add_epilogues(self) -> None:
        """Puts what follows convolutions into their kernels: of several into that of the latest, for what the others
        compute is there when it runs.
        """
        for i, node in enumerate(self.nodes):
            whole = node.kind == "reduce" and not any(word in node.name for word in ("statistics", "sums"))
            if node.kind == "matrix" or whole:
                continue
            makers = self.makers(node.reads)
            sums = {self.group[k] for k in makers if self.nodes[k].kind == "reduce"}
            for k in sorted(makers, reverse=True):
                if self.is_matrix(self.group[k]) and self.group[k] not in sums and self.merge(k, i):
                    break

    def chain(self) -> None:
        """Puts 1x1 convolutions into the kernels that add their results, or that compute their inputs."""
        for i, node in enumerate(self.nodes):
            if not node.pointwise:
                continue
            outside = {r for k in self.members[self.group[i]] for r in self.readers_of(k)} - set(
                self.members[self.group[i]]
            )
            added = [r for r in outside if self.nodes[r].kind == "map" and self.is_matrix(self.group[r])]
            if len(outside) == len(added) == 1:
                self.merge(added[0], i)
            elif (
                set(node.pointwise) == {1}
                and (before := self.makers(node.reads[:1]))
                and self.is_matrix(self.group[before[0]])
            ):
                self.merge(before[0], i)
            else:
                for other in self.added_to(i):
                    self.merge(other, i)

    def added_to(self, i: int) -> list[int]:
        """The nodes of other convolutions' kernels whose results are added to that of this node, by the maps after it
        in its own kernel.
        """
        found: list[int] = []
        readers = self.readers_of(i)
        while len(readers) == 1 and self.nodes[readers[0]].kind == "map" and self.group[readers[0]] == self.group[i]:
            found += [k for k in self.makers(self.nodes[readers[0]].reads) if self.is_matrix(self.group[k])]
            readers = self.readers_of(readers[0])
        return found

    def share_reductions(self) -> None:
        """Puts reductions of the same value into one kernel."""
        for readers in self.readers.values():
            alike = [r for r in readers if self.nodes[r].kind == "reduce" and not self.is_matrix(self.group[r])]
            for other in alike[1:]:
                self.merge(alike[0], other)

    # ------------------------------------------------------------------------------------------------------------------
    # Which values are in memory

    def from_memory(self, v: int) -> frozenset[int]:
        """The values in memory from which v is recomputed, or v itself."""
        return self.sources.get(v, frozenset([v]))

    def decide(self, node: Node, v: int) -> None:
        """Decides for a result of a loose map whether it is stored, and what its readers read in its place."""
        made_from = frozenset().union(*(self.from_memory(u) for u in node.reads))
        large = [u for u in made_from if 8 * self.sizes[u] >= self.sizes[v]]
        readers = self.readers.get(v, [])
        passed_on = len(readers) == 1 and self.loose(readers[0])  # if anything is stored, it is that one's result
        a_sum = len(large) > 1 and not node.name.endswith("backward")
        too_much = sum(self.sizes[u] for u in large) > TWICE * self.sizes[v]
        alone = v in self.results or ((a_sum or too_much) and not passed_on)
        by_matrix = not self.prologues and any(self.nodes[r].kind == "matrix" for r in readers)
        if alone or by_matrix:
            self.stored[v] = made_from
        if not alone:
            self.sources[v] = made_from

    def kernels(self) -> Iterator[Kernel]:
        """The kernels of convolutions and of reductions, with all that is done in them, and then those that only store
        results of maps.
        """
        reads: dict[int, dict[int, int]] = {}  # group > value > bytes of it that are read
        own: dict[int, set[int]] = {}
        for group, members in self.members.items():
            if self.loose(members[0]):
                continue
            own[group] = {v for i in members for v in self.nodes[i].writes}
            reads[group] = {}
            for i in members:
                for v in self.nodes[i].reads:
                    direct = self.nodes[i].kind == "matrix" and not self.prologues
                    for u in {v} if direct else self.from_memory(v):
                        read = self.nodes[i].bytes_of(u, self.sizes)
                        reads[group][u] = max(read, reads[group].get(u, 0))
        for v, made_from in self.stored.items():
            if v not in self.readers and v not in self.results:
                continue
            group = self.group[min(self.readers.get(v, [-1]))]
            if v in self.sources or group not in reads or not (self.prologues or not self.is_matrix(group)):
                group = -1 - self.maker[v]  # a kernel of its own
                reads.setdefault(group, {})
                own.setdefault(group, set())
                self.members[group] = [self.maker[v]]
            reads[group] |= {u: self.sizes[u] for u in made_from}
            own[group].add(v)
        for group, values in reads.items():
            for v in own[group] & values.keys():
                del values[v]
        needed = self.results.union(*reads.values())
        for group, values in reads.items():
            nodes = [self.nodes[i] for i in sorted(self.members[group])]
            written = sum(self.sizes[v] for v in own[group] if v in needed)
            yield Kernel(
                tuple(node.name for node in nodes), sum(node.flops for node in nodes), sum(values.values()) + written
            )
