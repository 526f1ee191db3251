"""Models moved about at random as far as honest rounding might move them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class Mover:
    """Moves a model in float64 as rounding in a smaller dtype may: each value by `unit` of itself and by `least`, in
    directions that depend on the seed.
    """

    def __init__(self, unit: float, least: float, seed: int) -> None:
        self.unit, self.least, self.seed = unit, least, seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def signs(self, t: Tensor) -> Tensor:
        if t.device not in self.generators:
            self.generators[t.device] = torch.Generator(t.device).manual_seed(self.seed)
        return torch.randint(0, 2, t.shape, generator=self.generators[t.device], device=t.device) * 2 - 1

    def moved(self, t: Tensor) -> Tensor:
        return t * (1 + self.unit * self.signs(t)) if t.is_floating_point() else t

    @torch.no_grad()
    def move(self, model: nn.Module) -> None:
        """Moves all parameters and buffers, and from now on the outputs of each leaf that has parameters."""
        for t in (*model.parameters(), *model.buffers()):
            t.copy_(self.moved(t))
        for module in model.modules():
            if module._parameters and not module._modules:
                module.register_forward_hook(lambda module, args, output: tree_map_only(Tensor, self.rounded, output))

    def rounded(self, t: Tensor) -> Tensor:
        """`t` with noise; the gradient that comes back to it gets noise, too."""
        if not t.is_floating_point():
            return t
        moved = t + self.noise(t)
        if moved.requires_grad:
            moved.register_hook(lambda g: g + self.noise(g))
        return moved

    def noise(self, t: Tensor) -> Tensor:
        """In proportion to the root mean square of `t`: a sum's error does not shrink where its terms cancel."""
        return (self.unit * t.detach().square().mean().sqrt() + self.least) * self.signs(t)
