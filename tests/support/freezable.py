"""Small networks to freeze. With small integers as weights and inputs, every result is exact in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.agreement import integers


class Exact(nn.Module):
    """A stem, a block with a residual, a pool and a classifier, [N, 3, H, W] to [N, 5]: exact where H and W are 8 or
    16. Weights and statistics are small integers and powers of two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=0.0)
        self.inner = nn.Conv2d(8, 8, 1, bias=False)
        self.inner_norm = nn.BatchNorm2d(8, eps=0.0)
        self.fc = nn.Linear(8, 5)
        self.eval()
        with torch.no_grad():
            for seed, t in enumerate(self.parameters()):
                t.copy_(integers(*t.shape, seed=seed))
            for seed, norm in enumerate((self.norm, self.inner_norm)):
                norm.running_mean.copy_(integers(8, seed=seed))
                norm.running_var.copy_(4.0 ** integers(8, seed=seed + 2))
                norm.weight.copy_(2.0 ** integers(8, seed=seed + 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.stem(x)))
        y = self.inner_norm(self.inner(x))
        y += x
        return self.fc(torch.relu(y).mean((2, 3)))


def image(batch: int = 1, size: int = 8, width: int | None = None, seed: int = 7) -> Tensor:
    return integers(batch, 3, size, width or size, largest=2, seed=seed)


class Structured(nn.Module):
    """Several inputs, nested, with constants; results of all kinds: computed, an integer, an input, a view of an input,
    a parameter, one tensor twice, and a constant.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor([2.0, 4.0, 1.0, 0.5]))
        self.eval()
        with torch.no_grad():
            self.conv.weight.copy_(integers(4, 2, 3, 3, seed=1))
            self.conv.bias.copy_(integers(4, seed=2))

    def forward(self, x: Tensor, more: dict[str, Any], factor: float = 1.0) -> dict[str, Any]:
        y = self.conv(x) * self.scale.view(-1, 1, 1) * factor + more["shift"]
        flat = y.flatten(1)
        return {
            "maps": [y, (flat, y)],
            "best": flat.argmax(1),
            "input": x,
            "view": x.reshape(x.shape[0], -1),
            "scale": self.scale,
            "name": "structured",
        }

    @staticmethod
    def inputs(batch: int = 2) -> tuple[Any, ...]:
        return integers(batch, 2, 4, 4, largest=3, seed=3), {"shift": integers(batch, 4, 1, 1, seed=4)}, 2.0


class Branching(nn.Module):
    """What torch.export cannot capture: the way through it depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.conv(x))
        return (y if bool(y.sum() > 0) else -y), x
