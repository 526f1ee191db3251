"""What a report says of residual blocks: how many train as one operator, and which sums of a residual do not."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..nn.blocks import BasicBlock, Bottleneck
from .fusion import plan_of


def blocks_told(model: nn.Module) -> Iterator[str]:
    """Sentences on a converted model."""
    joined = sum(isinstance(module, BasicBlock | Bottleneck) for module in model.modules())
    apart: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        found = plan_of(module)
        ends = dict(end for variant in found.variants for end in variant.sums) if found is not None else {}
        joined += sum(not why for why in ends.values())
        for path, why in ends.items():
            if why:
                apart.setdefault(why, []).append(f"{name}.{path}" if name else path)
    if joined:
        yield (
            "1 residual block trains as one operator."
            if joined == 1
            else (f"{joined} residual blocks train as one operator each.")
        )
    for why, paths in apart.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        yield f"The sum after {paths[0]}{more} is not part of a residual block that trains as one operator: {why}."
