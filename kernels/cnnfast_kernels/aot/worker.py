"""A process that compiles into Triton's cache what another one asks for: python -m cnnfast_kernels.aot.worker sm_90

It reads descriptions of launches (specialisations.py) from standard input, one a line, and answers each with a line of
JSON: why it cannot be compiled, or null. No GPU is touched, and none need be there: the architecture is all that a
binary follows from.
"""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
from contextlib import suppress

from triton.backends.nvidia import driver as nvidia

from .compiling import reason, stderr_captured
from .specialisations import Described
from .stub_driver import target


@functools.cache
def launchers_are_compiled() -> bool:
    """Whether Triton compiles C code for each signature of a kernel, as it does up to version 3.6, and keeps it in the
    same cache.

    It is linked with libcuda; where there is none, nothing will be launched either.
    """
    if not hasattr(nvidia, "make_launcher"):
        return False
    try:
        return bool(nvidia.libcuda_dirs())
    except (AssertionError, OSError, subprocess.CalledProcessError):
        return False


def compiled(line: str, arch: str) -> str | None:
    """Why a description's launch cannot be compiled for `arch`; None once it and its launcher are in Triton's cache."""
    with stderr_captured() as said:
        try:
            with target(arch):
                kernel = Described.of(line).compile()
                if launchers_are_compiled():
                    # it is in the cache before Triton loads it, and nothing is launched here
                    with suppress(ImportError):
                        nvidia.CudaLauncher(kernel.src, kernel.metadata)
        except Exception as error:  # whatever a compiler raises: the others shall be compiled all the same
            return reason(error, said())
    return None


def main(arch: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is for the process that asks, which then ends this one
    for line in sys.stdin:
        print(json.dumps(compiled(line, arch)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
