"""A process that compiles into Triton's cache what another one asks for: python -m cnnfast_kernels.aot.worker sm_90

It reads descriptions of launches (specialisations.py) from standard input, one a line, and answers each with a line of JSON: why it cannot
be compiled, or null. No GPU is touched, and none need be there: the architecture is all that a binary follows from.
"""

from __future__ import annotations

import json
import signal
import sys

from triton.backends.nvidia import driver as nvidia

from .compiling import reason, stderr_captured, target
from .specialisations import Described

# Up to version 3.6 Triton compiles C code for each signature of a kernel, which it keeps in the same cache.
LAUNCHERS_ARE_COMPILED = hasattr(nvidia, "make_launcher")


def compiled(line: str, arch: str) -> str | None:
    """Why a description's launch cannot be compiled for `arch`; None once it is in Triton's cache, with its launcher."""
    with stderr_captured() as said:
        try:
            with target(arch):
                kernel = Described.of(line).compile()
                if LAUNCHERS_ARE_COMPILED:
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
