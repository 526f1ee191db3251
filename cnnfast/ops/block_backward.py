"""The gradients of a residual block, from its result down to x (block.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnnfast_kernels.layout import convolution_format

from . import conv_implementations as implementations
from .batchnorm import kernel_gradients, normalize, statistics_like
from .block_passes import activation_backward, apply_gradient_sums
from .block_positions import RELU, How, TrainedMember, trained_of
from .conv import conv_dgrad, conv_dgrad_below, conv_wgrad
from .gram import gram_gradients, gram_gradients_below
from .registry import Calling

Gradients = tuple[Tensor | None, ...]


class _Descent:
    """The gradients of a block, from its result down to x."""

    def __init__(
        self,
        calling: Calling,
        x: Tensor,
        words: Tensor | None,
        branch: list[TrainedMember],
        how: How,
        dx: bool,
        algorithm: str,
    ) -> None:
        self.calling, self.x, self.branch, self.how, self.algorithm = calling, x, branch, how, algorithm
        # The bits of x, by which its gradient is masked, and then the sums of that.
        self.words, self.sums = words, None
        self.grads: list[Gradients] = [(None, None, None)] * len(branch)
        # Of each layer, whether the gradient of its input is needed.
        self.goes_on = [dx or any(any(below.needs) for below in branch[:i]) for i in range(len(branch))]

    def input_of(self, i: int) -> Tensor:
        if i == 0:
            return self.x
        below = self.branch[i - 1]
        z, y = below.left.z, below.left.y
        if z is None:
            z = self.calling(normalize)(y, *below.norm, None, below.eps, *RELU, None, True)
            self.branch[i - 1] = below._replace(left=below.left._replace(z=z))
        return z

    def below(self, i: int) -> tuple[Any, ...]:
        """What the gradient of layer i's input is masked by: y, the norm and the activation of the layer below."""
        of = self.branch[i - 1]
        return of.left.y, None, *of.norm, of.eps, *RELU

    def from_y(self, i: int, dy: Tensor | None, residual: Tensor | None = None) -> Tensor | None:
        """Everything below dy, the gradient of what layer i's convolution gives: the gradient of x, to which `residual`
        is added.
        """
        layer, calling = self.branch[i], self.calling
        if dy is None:
            return residual
        image = image_like(self.x, self.branch, i)
        where = convolution_format(image, layer.w) == torch.channels_last, *layer.geometry, self.algorithm
        if layer.needs[0]:
            dw = calling(conv_wgrad)(self.input_of(i), dy, layer.w.shape, *where)
            self.grads[i] = dw, *self.grads[i][1:]
        if not self.goes_on[i]:
            return residual
        if i == 0:
            if self.how.fused and not (residual is None and self.words is None):
                mask = None, self.words, *[None] * 4, 0.0, None if self.words is None else "relu", 0.0
                dx, sums, _ = calling(conv_dgrad_below)(dy, layer.w, residual, *mask, image.shape, *where)
                self.sums = None if self.words is None else sums
                return dx
            dx = calling(conv_dgrad)(dy, layer.w, None, image.shape, *where)
            return dx if residual is None else dx.add_(residual)
        if self.how.fused:
            g, *sums = calling(conv_dgrad_below)(dy, layer.w, None, *self.below(i), image.shape, *where)
            return self.from_sums(i - 1, g, sums, residual)
        dz = calling(conv_dgrad)(dy, layer.w, None, image.shape, *where)
        return self.from_z(i - 1, dz, residual)

    def from_z(self, i: int, dz: Tensor, residual: Tensor | None) -> Tensor | None:
        """The same from the gradient of what the activation of an inner layer gives."""
        layer = self.branch[i]
        needs = layer.needs[0] or self.goes_on[i], *layer.needs[1:], False
        of_norm: tuple[Any, ...] = dz, layer.left.y, None, *layer.norm, None, layer.eps, *RELU, True
        dy, dgamma, dbeta, _ = kernel_gradients(*of_norm, needs=needs, calling=self.calling)
        self.grads[i] = None, dgamma, dbeta
        return self.from_y(i, dy, residual)

    def from_sums(self, i: int, g: Tensor, sums: Sequence[Tensor], residual: Tensor | None) -> Tensor | None:
        """The same from the gradient of what an inner layer's norm gives, and its two sums."""
        layer, (sum_g, sum_gx) = self.branch[i], sums
        dy = None
        if layer.needs[0] or self.goes_on[i]:
            mean, var, gamma, _ = layer.norm
            dy = self.calling(apply_gradient_sums)(g, layer.left.y, mean, var, gamma, layer.eps, sum_g, sum_gx)
        self.grads[i] = None, *_of_channels(layer, sum_gx, sum_g)
        return self.from_y(i, dy, residual)

    def from_gram(self, g: Tensor, sums: Tensor, residual: Tensor | None) -> Tensor | None:
        """Everything below the gradient of what the last layer's norm gives, by the Gram matrix of its input."""
        i = len(self.branch) - 1
        layer = self.branch[i]
        image, down = self.input_of(i), self.goes_on[i]
        grads: Sequence[Tensor] = ()
        of = _by_gram(g, sums, image, layer)
        if down and self.how.fused and all(step == 1 for step in layer.geometry[0]):
            below = self.branch[i - 1]
            dx, dw, dgamma, *grads = self.calling(gram_gradients_below)(
                *of, below.left.y, *below.norm, below.eps, layer.needs[0]
            )
        else:
            dx, dw, dgamma = self.calling(gram_gradients)(*of, (down, layer.needs[0]))
        self.grads[i] = dw if layer.needs[0] else None, *_of_channels(layer, dgamma, sums)
        if not down:
            return residual
        return self.from_sums(i - 1, dx, grads, residual) if grads else self.from_z(i - 1, dx, residual)


def image_like(x: Tensor, branch: list[TrainedMember], i: int) -> Tensor:
    """A tensor of the size and layout of what layer i takes: of an inner activation's result its y."""
    image = x if i == 0 else branch[i - 1].left.y
    assert image is not None  # every layer but the last leaves its y
    return image


def _of_channels(layer: TrainedMember, dgamma: Tensor, dbeta: Tensor) -> Gradients:
    """Those that are needed, in the dtypes of gamma and beta, of memory of their own."""
    return tuple(
        found.to(t.dtype, copy=True) if need and t is not None else None
        for found, t, need in ((dgamma, layer.gamma, layer.needs[1]), (dbeta, layer.beta, layer.needs[2]))
    )


def _by_gram(g: Tensor, sums: Tensor, image: Tensor, layer: TrainedMember) -> tuple[Any, ...]:
    """The first positions of gram_gradients."""
    left = layer.left
    return g, sums, image, layer.w, left.mu, left.products, left.var, layer.gamma, layer.eps, layer.geometry[0]


def backward(calling: Calling, *arguments: Any) -> tuple[Tensor | None, ...]:
    """(dx, its sums if it is masked by words of bits of x, and dw, dgamma and dbeta of each layer of the branch and of
    the shortcut), None where not needed.
    """
    dout, x, words_below, result, branch, projection, how, dx_needed, algorithm = trained_of(arguments)
    descent = _Descent(calling, x, words_below, branch, how, dx_needed, algorithm)
    last = branch[-1]
    for_projection = projection is not None and (dx_needed or any(projection.needs))
    g: Any = None
    sums: Any = None
    dy = None
    if result.sums is not None:
        g, sums = dout, result.sums
    elif result.words is not None or how.gram or (for_projection and how.projection_by_gram):
        g, sums = calling(activation_backward)(dout, result.out, result.words, *RELU)
    if not how.gram:
        needs = last.needs[0] or descent.goes_on[-1], *last.needs[1:], g is None and (for_projection or dx_needed)
        masked = (dout, last.left.y, result.out) if g is None else (g, last.left.y, None)
        act = RELU if g is None else (None, 0.0)
        of_norm: tuple[Any, ...] = *masked, *last.norm, None, last.eps, *act, True
        dy, dgamma, dbeta, of_residual = kernel_gradients(*of_norm, needs=needs, calling=calling)
        descent.grads[-1] = None, dgamma, dbeta
        g = of_residual if g is None else g
    residual, of_shortcut = g if dx_needed else None, (None, None, None)
    if for_projection:
        assert projection is not None
        residual, of_shortcut = _of_projection(calling, g, sums, x, projection, how, dx_needed, algorithm)
    dx = descent.from_gram(g, sums, residual) if how.gram else descent.from_y(len(branch) - 1, dy, residual)
    return dx if dx_needed else None, descent.sums, *(grad for of in (*descent.grads, of_shortcut) for grad in of)


def _of_projection(
    calling: Calling,
    g: Any,
    sums: Tensor | None,
    x: Tensor,
    layer: TrainedMember,
    how: How,
    dx_needed: bool,
    algorithm: str,
) -> tuple[Tensor | None, Gradients]:
    """(the gradient of x, those of the layer) through the shortcut."""
    if how.projection_by_gram:
        assert sums is not None
        of = _by_gram(g, sums, x, layer)
        dx, dw, dgamma = calling(gram_gradients)(*of, (dx_needed, layer.needs[0]))
        return dx if dx_needed else None, (dw if layer.needs[0] else None, *_of_channels(layer, dgamma, sums))
    needs = layer.needs[0] or dx_needed, *layer.needs[1:], False
    of_norm: tuple[Any, ...] = g, layer.left.y, None, *layer.norm, None, layer.eps, None, 0.0, True
    dy, dgamma, dbeta, _ = kernel_gradients(*of_norm, needs=needs, calling=calling)
    dx = dw = None
    if dy is not None:
        where = convolution_format(x, layer.w) == torch.channels_last, *layer.geometry, algorithm
        dw = calling(conv_wgrad)(x, dy, layer.w.shape, *where) if layer.needs[0] else None
        dx = calling(conv_dgrad)(dy, layer.w, None, x.shape, *where) if dx_needed else None
    return dx, (dw, dgamma, dbeta)


def fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    dout, x, words_below, _, branch, projection, how, dx_needed, _ = trained_of(arguments)
    last = convolution_format(x, branch[0].w) == torch.channels_last
    grads = [implementations.fake_dgrad(dout, branch[0].w, None, x.shape, last) if dx_needed else dout.new_empty(0)]
    masked = how.fused and dx_needed and words_below is not None
    grads.append(statistics_like(x) if masked else dout.new_empty(0))
    images = [*(image_like(x, branch, i) for i in range(len(branch))), x]
    for image, layer in zip(images, [*branch, projection], strict=True):
        if layer is None:
            grads += [dout.new_empty(0) for _ in range(3)]
            continue
        of_w = convolution_format(image, layer.w) == torch.channels_last
        of = implementations.fake_wgrad(x, dout, layer.w.shape, of_w), layer.gamma, layer.beta
        for t, need in zip(of, layer.needs, strict=True):
            grads.append(torch.empty_like(t) if need and t is not None else dout.new_empty(0))
    return tuple(grads)
