"""Whether Triton can launch kernels in this process at all, asked before the first one is.

Triton compiles C code when it first launches: its driver always, a launcher for each new signature of a kernel up to
version 3.6. Where there is no C compiler, no Python.h or no libcuda, as in PyTorch's runtime images, the first launch
raises, though PyTorch itself works.
"""

from __future__ import annotations

import subprocess
import sysconfig
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl

from . import launch

WHAT_IT_NEEDS = "install a C compiler (gcc or clang) or name one in CC"


@triton.jit
@no_type_check
def smallest(x_ptr):
    tl.store(x_ptr, 0.0)


_lock = threading.Lock()
_answer: str | None = None


def why_no_launch(device: torch.device) -> str:
    """Why Triton cannot launch kernels on `device`, with what to install, in one line; the empty string if it can.

    It compiles the smallest of kernels and builds its launcher: nothing is launched, and nothing waits for the GPU. The
    first call in a process pays for that, calls in the meantime wait, and all later ones get the same answer. While the
    current stream is being captured in a CUDA graph the answer is empty for now and is not kept, because loading a
    module would break the capture. Where Triton interprets kernels no launcher is needed.
    """
    global _answer
    if launch.INTERPRETED:
        return ""
    if _answer is None:
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return ""
        with _lock:
            if _answer is None:
                _answer = _ask(device)
    return _answer


def _ask(device: torch.device) -> str:
    try:
        # Triton compiles for, and loads to, the current device.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            # With enable_fp_fusion as launch.run has it, or Triton warns.
            compiled: Any = smallest.warmup(torch.float32, grid=(1,), enable_fp_fusion=True)
            _ = compiled.run  # this property builds the launcher, and loads the binary
    except Exception as error:  # whatever it is, every kernel would fail by it
        return f"Triton cannot launch kernels here: {reason(error)}"
    return ""


def reason(error: Exception) -> str:
    """One line that says what failed when Triton built a launcher, and what to install."""
    said = str(error)
    # Triton asks ldconfig for libcuda. The C compiler's command names libcuda too, and its failure is another one.
    if isinstance(error, subprocess.CalledProcessError) and "ldconfig" not in error.cmd[0]:
        headers = Path(sysconfig.get_path("include", "posix_prefix"))  # where Triton looks
        if not (headers / "Python.h").exists():
            return (
                f"there is no Python.h in {headers}, which its launcher is compiled with; install Python's headers "
                "(python3-dev)"
            )
        ended = f"the C compiler {error.cmd[0]} ended with {error.returncode} when it compiled the launcher"
        return f"{ended}; {WHAT_IT_NEEDS}"
    if "C compiler" in said:
        return f"it finds no C compiler, which it needs for its launcher; {WHAT_IT_NEEDS}"
    if "libcuda" in said or "ldconfig" in said:
        return (
            "it does not find libcuda.so.1; install NVIDIA's driver, or name the library's folder in "
            "TRITON_LIBCUDA_PATH"
        )
    if isinstance(error, OSError) and error.filename:
        purpose = (
            f"if this is the C compiler, {WHAT_IT_NEEDS}; if it is Triton's cache, name a folder in TRITON_CACHE_DIR"
        )
        return f"{error.strerror}: {error.filename} ({purpose})"
    return f"{type(error).__name__}: {' '.join(said.split())[:300]}"
