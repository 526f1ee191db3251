"""Augmentation of a batch of images: warped, coloured, erased, mixed and normalised in one kernel, by numbers that the
caller gives for each image.
"""

from .batches import Augmenting, augment_batch
from .sources import ImageNumbers, ImageSource

__all__ = ["Augmenting", "ImageNumbers", "ImageSource", "augment_batch"]
