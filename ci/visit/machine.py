"""python -m ci.visit.machine: what a visit is made on, as one line of JSON; {} where there is no GPU.

A process of its own, so that the one which runs the parts never touches the GPU.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict

PATIENCE = 120  # seconds


def told() -> dict[str, str]:
    import torch

    from cnnfast.measuring.machine import this_machine

    if not torch.cuda.is_available():
        return {}
    return {
        **asdict(this_machine(torch.device("cuda", torch.cuda.current_device()))),
        "python": platform.python_version(),
    }


def ask(environment: Mapping[str, str]) -> dict[str, str]:
    """What such a process tells. Raises RuntimeError, with the last that it said, if it fails or takes PATIENCE
    seconds.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-m", __name__],
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the GPU did not say within {PATIENCE} s what it is") from None
    if child.returncode:
        raise RuntimeError(
            f"PyTorch could not be asked for the GPU: {' '.join(child.stderr.strip().splitlines()[-1:])}"
        )
    return json.loads(child.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(told()))
