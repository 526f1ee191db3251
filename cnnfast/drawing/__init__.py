"""The numbers of an augmentation, drawn by the rules of torchvision's transforms from uniform numbers that a counter
names: maps, colours, erased boxes, partners. nn.Augment holds one object of each kind.

A draw has its number (counters.Draw) and its place, so that no option changes what another one draws. All of it is
float64 in numpy, from operations that every machine rounds alike (elementary).
"""

from .colours import Jitter
from .counters import Dice, Draw
from .erasing import Erasing
from .frames import CentreCrop, PaddedCrop, ResizedCrop
from .maps import IDENTITY, Flips, Turn, onto
from .mixing import Mixing, label_weights, mix_labels

__all__ = [
    "IDENTITY",
    "CentreCrop",
    "Dice",
    "Draw",
    "Erasing",
    "Flips",
    "Jitter",
    "Mixing",
    "PaddedCrop",
    "ResizedCrop",
    "Turn",
    "label_weights",
    "mix_labels",
    "onto",
]
