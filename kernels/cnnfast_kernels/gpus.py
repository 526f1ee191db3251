"""GPUs that can be spoken of without being here: what CUDA calls them, and what they are compiled for.

Pure Python: imports neither torch nor triton.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Bytes of shared memory that one program may have, by architecture: 90 for sm_90.
SHARED_LIMITS = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}


class KnownGpu(NamedTuple):
    """name: what people type. cuda: the name that CUDA gives it, by which its table is found. arch: 90 for sm_90."""

    name: str
    cuda: str
    arch: int


KNOWN = (
    KnownGpu("b200", "NVIDIA B200", 100),
    KnownGpu("h200", "NVIDIA H200", 90),
    KnownGpu("h100", "NVIDIA H100 80GB HBM3", 90),
    KnownGpu("a100", "NVIDIA A100-SXM4-80GB", 80),
    KnownGpu("l40s", "NVIDIA L40S", 89),
    KnownGpu("rtx-4090", "NVIDIA GeForce RTX 4090", 89),
    KnownGpu("rtx-3090", "NVIDIA GeForce RTX 3090", 86),
)


def named(text: str) -> KnownGpu:
    """The GPU that `text` names, in either of its names and in letters of either case.

    Raises ValueError, which lists what there is.
    """
    for gpu in KNOWN:
        if text.lower() in (gpu.name, gpu.cuda.lower()):
            return gpu
    raise ValueError(f"{text!r} is none of {', '.join(gpu.name for gpu in KNOWN)}")


def capability_of(arch: str) -> int:
    """90 of "sm_90", "sm_90a" and "90". Raises ValueError, which names the choices, for an architecture that is not
    known here, and says which one a GPU's name stands for.
    """
    match = re.fullmatch(r"(?:sm_)?(\d+)a?", arch)
    if not match or int(match[1]) not in SHARED_LIMITS:
        known = ", ".join(f"sm_{c}" for c in SHARED_LIMITS)
        try:
            meant = f". Did you mean 'sm_{named(arch).arch}'?"
        except ValueError:
            meant = ""
        raise ValueError(f"arch={arch!r} is not known here: use one of {known}{meant}")
    return int(match[1])
