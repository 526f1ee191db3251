"""Colours, boxes and noise of images in PyTorch's operators, as kernels/cnnfast_kernels/augment computes them.

Each function changes v, float32 [N, C, P, Q] and contiguous, of values within [0, 1]. Only operations that round once
are called, so that an image's bits do not depend on the images beside it: a sum's order or a fused multiply-add would.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..philox import key_of, philox

GREY = (0.2989, 0.587, 0.114)  # of red, green and blue, as torchvision rounds the weights of ITU-R BT.601


def recolour(v: Tensor, colours: Tensor) -> None:
    """Brightness, contrast, saturation, hue and grey, by the five numbers of each image, colours [N, 5] on the CPU."""
    factor = [column.view(-1, 1, 1, 1).to(v.device) for column in colours[:, :3].unbind(1)]
    changes = (colours[:, :3] != 1).any(0).tolist()
    v.mul_(factor[0]).clamp_(0, 1)
    if changes[1]:
        grey = _grey(v)
        mean = _mean(grey).mul_(1 - factor[1])
        unchanged = factor[1] == 1
        _blend(v, mean.masked_fill_(unchanged, 0), factor[1])
    if v.shape[1] != 3:
        return
    if changes[2]:
        _blend(v, _grey(v).mul_(1 - factor[2]), factor[2])
    for chosen, change in ((colours[:, 3] != 0, _turn_hue), (colours[:, 4] != 0, _to_grey)):
        if bool(chosen.any()):
            which = chosen.nonzero().flatten().to(v.device)
            changed = change(v[which], colours[chosen, 3].view(-1, 1, 1).to(v.device))
            v.index_copy_(0, which, changed)


def _grey(v: Tensor) -> Tensor:
    """[N, 1, P, Q]."""
    if v.shape[1] == 1:
        return v.clone()
    red, green, blue = v.split(1, 1)
    return (red * GREY[0]).add_(green * GREY[1]).add_(blue * GREY[2])


def _mean(grey: Tensor) -> Tensor:
    """[N, 1, 1, 1]: of each image, by a sum of halves and halves of halves, whose order follows from its size alone."""
    N, _, P, Q = grey.shape
    total = grey.reshape(N, P * Q)
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        folded = total[:, :half] + total[:, half : 2 * half]
        if total.shape[1] % 2:
            folded[:, 0] += total[:, -1]
        total = folded
    return total.div_(torch.full_like(total, P * Q)).view(N, 1, 1, 1)


def _blend(v: Tensor, rest: Tensor, factor: Tensor) -> None:
    """v = factor * v + rest, within [0, 1]."""
    v.mul_(factor).add_(rest).clamp_(0, 1)


def _to_grey(v: Tensor, turns: Tensor) -> Tensor:
    return _grey(v).expand_as(v)


def _turn_hue(v: Tensor, turns: Tensor) -> Tensor:
    """The colours with their hue shifted by `turns` [N, 1, 1], their largest and their smallest channel kept."""
    red, green, blue = v.unbind(1)
    value = v.amax(1)
    range_ = value - v.amin(1)
    divisor = range_.masked_fill(range_ == 0, 1)
    from_red = (green - blue).div_(divisor)
    from_green = (blue - red).div_(divisor).add_(2)
    from_blue = (red - green).div_(divisor).add_(4)
    sixths = torch.where(value == red, from_red, torch.where(value == green, from_green, from_blue)).add_(6 * turns)
    result = torch.empty_like(v)
    for channel, corner in enumerate((5, 3, 1)):  # HSV to RGB: https://en.wikipedia.org/wiki/HSL_and_HSV
        k = sixths + corner
        k.sub_((k * (1 / 6)).floor_().mul_(6))
        distance = torch.minimum(k, 4 - k).clamp_(0, 1)
        torch.sub(value, distance.mul_(range_), out=result[:, channel])
    return result.clamp_(0, 1)


def pixels_of(box: list[float]) -> tuple[slice, slice]:
    """The rows and the columns whose pixels have their centres in a box of left, top, right, bottom."""
    left, top, right, bottom = (max(math.ceil(edge - 0.5), 0) for edge in box)
    return slice(top, max(bottom, top)), slice(left, max(right, left))


def erase(v: Tensor, boxes: Tensor, noise: Tensor | None, mean: Tensor, std: Tensor) -> None:
    """Fills boxes [N, B, 4 + C] on the CPU with their values, or [N, B, 4] with noise of the seeds [N]."""
    filled = ((boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])).nonzero().tolist()
    for n, b in filled:
        rows, columns = pixels_of(boxes[n, b, :4].tolist())
        part = v[n, :, rows, columns]
        if not part.numel():
            continue
        if noise is None:
            part.copy_(boxes[n, b, 4:].view(-1, 1, 1).to(v.device).expand_as(part))
        else:
            part.copy_(_noise(noise[n], rows, columns, v.shape).to(v.device).mul_(std).add_(mean))


def _noise(seed: Tensor, rows: slice, columns: slice, shape: torch.Size) -> Tensor:
    """Normal numbers [C, rows, columns] of a result [N, C, P, Q], by Box and Muller's transform of Philox's bits of the
    counter (p * Q + q, 0, 0, 0) at pixel (p, q).
    """
    p, q = torch.arange(rows.start, rows.stop)[:, None], torch.arange(columns.start, columns.stop)
    pixel = p * shape[3] + q
    counter = torch.stack([pixel, *[torch.zeros_like(pixel)] * 3], -1)
    a, b, c, d = ((word.float() + 0.5) * 2**-32 for word in philox(counter, key_of(seed)).unbind(-1))
    radius, angle = torch.log(a).mul_(-2).sqrt_(), b * math.tau
    normal = [radius * torch.cos(angle), radius * torch.sin(angle)]
    if shape[1] == 3:
        normal.append(torch.log(c).mul_(-2).sqrt_().mul_(torch.cos(d * math.tau)))
    return torch.stack(normal[: shape[1]])
