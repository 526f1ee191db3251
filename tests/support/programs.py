"""Random straight-line forwards, made of what people write around convolutions and norms, in orders that they had
better not.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.blocks import CHANNELS
from tests.support.model_zoo import randomise

CONVOLUTIONS, NORMS = 3, 3


class Scales(nn.Module):
    """Writes into what it is given, and returns it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.9)


class ScalesTheOther(nn.Module):
    """Writes into one of its two arguments, and returns the other."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y.mul_(0.9)
        return x


class Keeps(nn.Module):
    """Keeps what it was given, and changes it at the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is not None:
            self.kept.mul_(0.9)
        self.kept = x.detach()
        return x + 1


class Holds(nn.Module):
    """Calls a norm of its container's, which it has as a child, or hidden in a list."""

    def __init__(self, norm: nn.Module, hidden: bool) -> None:
        super().__init__()
        self.held: Any = [norm] if hidden else nn.ModuleList([norm])

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0](x)


class Trains(nn.Module):
    """Changes a parameter that it has in common with a norm of its container's."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.scale = parameter

    def forward(self, x: Tensor) -> Tensor:
        self.scale.data.mul_(0.9)
        return x * 1


class Members(nn.Module):
    """What a forward of `program` calls."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(CONVOLUTIONS):
            setattr(
                self, f"conv{i}", nn.Conv2d(CHANNELS, CHANNELS, 3 if i == 1 else 1, padding=int(i == 1), bias=i != 2)
            )
        for i in range(NORMS):
            setattr(self, f"bn{i}", nn.BatchNorm2d(CHANNELS))
        self.relu, self.inplace, self.identity = nn.ReLU(), nn.ReLU(inplace=True), nn.Identity()
        self.silu, self.pool, self.prelu = nn.SiLU(inplace=True), nn.MaxPool2d(3, 1, 1), nn.PReLU()
        self.dropout = nn.Dropout(0.0)
        self.shortcut = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True))
        self.scales, self.scales_other, self.keeps = Scales(), ScalesTheOther(), Keeps()

    def share(self) -> None:
        """Adds the children that have something in common with others; after .double(), which would make two buffers of
        one.
        """
        self.registers, self.hides = Holds(self.bn0, hidden=False), Holds(self.bn1, hidden=True)
        self.trains = Trains(self.bn1.weight)
        self.tied = nn.BatchNorm2d(CHANNELS).to(self.bn2.weight)
        self.tied.running_mean = self.bn2.running_mean


STATEMENTS = [
    "{new} = self.conv{c}({a})",
    "{new} = self.bn{n}({a})",
    "{new} = {a} + {b}",
    "{new} = {a} * 0.5",
    "{new} = self.relu({a})",
    "{new} = self.inplace({a})",
    "{new} = self.silu({a})",
    "{new} = F.relu({a}, True)",
    "{new} = self.prelu({a})",
    "{new} = self.pool({a})",
    "{new} = self.identity({a})",
    "{new} = self.dropout({a})",
    "{new} = self.shortcut({a})",
    "{new} = self.scales({a})",
    "{new} = self.scales_other({a}, {b})",
    "{new} = self.keeps({a})",
    "{new} = self.registers({a})",
    "{new} = self.hides({a})",
    "{new} = self.trains({a})",
    "{new} = self.tied({a})",
    "{new} = {a}[:, :]",
    "{new} = {a}.contiguous()",
    "{new} = {a}.view(1, -1, 3, 3)",
    "{new} = {a}.flatten(2).reshape(1, -1, 3, 3)",
    "{new} = torch.cat({a}.chunk(2, 1), 1)",
    "{new} = torch.mul({a}, 0.5, out={b})",
    "{a} += {b}",
    "{a} -= 0.1",
    "{a}.mul_(0.5)",
    "{a}.chunk(2, 1)[1].mul_(0.5)",
    "{a}[:, 1:3].add_(1.0)",
    "{a}.relu_()",
    "some.append({a})",
    "some += [{a}]",
    "some[-1].mul_(0.9)",
    "{new} = sum(some)",
    "{new} = torch.cat(some[-1:], 1)",
    "slots[0].mul_(0.5)",
    "slots += [{a}]",
    "slots[-1].add_(1.0)",
    "{new} = (slots + [{a}])[-1]",
    "{new} = slots[-1]",
]

WRITING = [
    form for form in STATEMENTS if ("_(" in form and "chunk" not in form) or "= 0.1" in form or "self.inplace" in form
]

SUMS = ["{new} = {z} + {r}", "{new} = {r} + {z}", "{new} = torch.add({z}, other={r})", "{z} += {r}; {new} = {z}",
        "{new} = {z}.add_({r})", "{r} += {z}; {new} = {r}", "{new} = {z}.add({r})"]  # fmt: skip
ACTIVATIONS = ["{new} = self.relu({z})", "{new} = self.inplace({z})", "{new} = F.relu({z}, inplace=True)",
               "{new} = self.silu({z})",
               "{new} = {z}.relu_()", "{new} = self.relu(input={z})", "{new} = torch.relu({z})"]  # fmt: skip


class _Writer:
    """Writes a forward of x, r and the list `slots`. Chains are in flight at once, with other statements between their
    members.
    """

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.lines = ["p = self.pool(x)", "q = self.pool(r)", "some = [q]"]  # p and q are in memory of their own
        self.names = ["x", "r", "p", "p", "q"]
        self.used = ["x", "p"]  # by the chains: what statements between like to write into
        self.count = 0

    def new(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def write(self, form: str, **given: Any) -> str:
        new = self.new()
        a, b = (self.draw.choice(self.draw.choice([self.names, self.used[-3:]])) for _ in "ab")
        given = {
            "a": a,
            "b": b,
            "c": self.draw.randrange(CONVOLUTIONS),
            "n": self.draw.randrange(NORMS),
            "new": new,
        } | given
        self.lines += form.format(**given).split("; ")
        return new

    def use(self) -> str:
        self.used.append(self.draw.choice(self.names))
        return self.used[-1]

    def chain(self) -> list[Callable[[], None]]:
        """The steps of one chain; what it makes on the way is its own."""
        made: list[str] = []
        steps: list[Callable[[], None]] = [
            lambda: made.append(self.write("{new} = self.conv{c}({a})", a=self.use())),
            lambda: made.append(
                self.write(self.draw.choice(["{new} = self.bn{n}({z})", "{new} = self.bn{n}(input={z})"]), z=made[-1])
            ),
        ]
        if self.draw.random() < 0.7:
            steps.append(lambda: made.append(self.write(self.draw.choice(SUMS), z=made[-1], r=self.use())))
        if self.draw.random() < 0.8:
            steps.append(lambda: made.append(self.write(self.draw.choice(ACTIVATIONS), z=made[-1])))
        steps.append(lambda: self.names.append(made[-1]))
        return steps

    def source(self) -> str:
        chains = [self.chain() for _ in range(self.draw.randint(1, 3))]
        while any(chains):
            if self.draw.random() < 0.35:
                form = self.draw.choice(self.draw.choice([STATEMENTS, WRITING]))
                new = self.write(form)
                if form.startswith("{new}"):
                    self.names.append(new)
            else:
                self.draw.choice([c for c in chains if c]).pop(0)()
        kept = [n for n in self.names if self.draw.random() < 0.7] or self.names
        return "\n    ".join(["def forward(self, x, r, slots):", *self.lines, f"return {', '.join(kept)}, slots"])


def program(seed: int) -> tuple[str, nn.Module]:
    """(the source of a forward, a module that has it); it takes two images and a list of images, of [1, CHANNELS, 3,
    3].
    """
    source = _Writer(seed).source()
    namespace: dict[str, Any] = {"torch": torch, "F": F, "__name__": __name__}
    exec(source, namespace)
    torch.manual_seed(seed)
    model: Any = randomise(type("Program", (Members,), {"forward": namespace["forward"]})()).double()
    model.share()
    return source, model.eval()
