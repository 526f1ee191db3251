"""After a step that raised: whether the GPU still answers, and the error as one line of a report."""

from __future__ import annotations

import torch


def wait(device: torch.device) -> None:
    """Until a GPU has done all that it was given; raises what went wrong in that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def lost(device: torch.device) -> bool:
    """Whether the process can no longer use its GPU: after some errors of CUDA every later call fails too."""
    try:
        wait(device)
    except RuntimeError:
        return True
    return False


def in_a_line(error: BaseException) -> str:
    """The kind of the error, and the first line of what it says."""
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])
