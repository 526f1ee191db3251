"""Folders of small images for tests of what reads labelled images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def noise(height: int, width: int, *channels: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, *channels]: random pixels, so that nothing smooth hides a shift by one."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def save_noise(file: Path, height: int = 8, width: int = 8, seed: int = 0) -> np.ndarray:
    """Writes an image of random colours there, in the format of the file's extension, and returns its pixels."""
    pixels = noise(height, width, 3, seed=seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return pixels


def class_folders(root: Path, **counts: int) -> Path:
    """A folder for each class, with so many PNGs of 8 x 8 pixels, 0.png, 1.png, ..., all different."""
    seed = 0
    for name, count in counts.items():
        for i in range(count):
            save_noise(root / name / f"{i}.png", seed=seed)
            seed += 1
    return root
