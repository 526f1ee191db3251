"""Files of a run, each whole at any moment: written aside, then given its name."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors.torch import save
from torch import Tensor

ASIDE = ".part"  # the end of the name of a file that is being written


def write(file: Path, content: bytes) -> None:
    """Replaces `file` as a whole. Whoever reads it, also after a crash of the machine, finds its old or its new
    content.

    Raises OSError, on a full disk for example; `file` is then as it was, and nothing is left beside it.
    """
    aside = file.with_name(file.name + ASIDE)
    try:
        with aside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
        _sync_folder(file.parent)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def write_weights(file: Path, weights: Mapping[str, Tensor]) -> None:
    """A safetensors file; where keys share memory, each gets a copy. As `write`."""
    write(file, save({name: t.detach().cpu().clone().contiguous() for name, t in weights.items()}))


class WholeFiles(TorchCheckpointIO):
    """How lightning writes and reads its checkpoints here: as `write` does, and with weights_only=True."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        # By way of memory: torch.save to a full disk raises a RuntimeError that does not say so.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write(Path(path), content.getvalue())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Raises ValueError, which says why, for a file that is no checkpoint."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, KeyError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0] or "it is empty"
        raise ValueError(f"{file} is no checkpoint of a run, or damaged: {reason}") from None


def _sync_folder(folder: Path) -> None:
    """After this a new name outlasts a crash, where the system lets folders be synchronised (Windows does not)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
