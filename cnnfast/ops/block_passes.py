"""Passes over memory that residual blocks call, and layers that are trained by Gram matrices: a norm's pass that leaves
words of bits of its result, or its mean; an activation's gradient with its sums; a norm's gradient from such sums.

Nothing differentiates them: whoever calls them is differentiated as a whole (block.py, gram.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnfast_kernels import batchnorm
from cnnfast_kernels.words import WORD

from .batchnorm import dense_like, statistics_like
from .registry import register


def _normalize_words(y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(z, its words of bits)."""
    *how, _ = rest
    return batchnorm.normalize_words(y, *how)


def _fake_normalize_words(y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return dense_like(y), fake_words(y)


def fake_words(z: Tensor) -> Tensor:
    """Words of bits of z (cnnfast_kernels/words.py)."""
    pixels = z.numel() // z.shape[1] if z.shape[1] else 0
    return z.new_empty((-(-pixels // WORD), z.shape[1]), dtype=torch.int32)


def _fake_normalize_mean(y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return dense_like(y), statistics_like(y)


def _activation_backward(dz: Tensor, z: Tensor | None, words, activation, slope) -> tuple[Tensor, Tensor]:
    g, sums = batchnorm.activation_backward(dz, z, activation, slope, words)
    return dz.new_empty(0) if g is None else g, sums


def _fake_activation_backward(dz: Tensor, z: Tensor | None, words, activation, slope) -> tuple[Tensor, Tensor]:
    return dz.new_empty(0) if activation is None else dense_like(dz), statistics_like(dz)


def _apply_gradient_sums(g: Tensor, y: Tensor, mean: Tensor, var: Tensor, gamma, eps, sum_g, sum_gx) -> Tensor:
    """dy of batch_norm(y) in training, from the gradient g of its result and what it sums to."""
    statistics, sums, needs = (mean, var, None), (sum_g, sum_gx), (True, False)
    dy, _ = batchnorm.apply_sums(g, y, None, statistics, gamma, None, None, sums, eps, None, 0.0, needs)
    assert dy is not None
    return dy


normalize_words = register(
    "normalize_words(Tensor y, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, Tensor? residual, float eps,"
    " str? activation, float slope, Tensor? slopes, bool training) -> (Tensor, Tensor)",
    _normalize_words,
    _fake_normalize_words,
)
normalize_mean = register(
    "normalize_mean(Tensor y, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, str? activation,"
    " float slope) -> (Tensor, Tensor)",
    batchnorm.normalize_mean,
    _fake_normalize_mean,
)
activation_backward = register(
    "activation_backward(Tensor dz, Tensor? z, Tensor? words, str? activation, float slope) -> (Tensor, Tensor)",
    _activation_backward,
    _fake_activation_backward,
)
apply_gradient_sums = register(
    "apply_gradient_sums(Tensor g, Tensor y, Tensor mean, Tensor var, Tensor? gamma, float eps, Tensor sum_g,"
    " Tensor sum_gx) -> Tensor",
    _apply_gradient_sums,
    lambda g, y, *rest: dense_like(y),
)
