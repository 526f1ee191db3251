"""Starts processes of Python: fresh interpreters, which do not run the user's script again, as those of multiprocessing
would.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


def start(module: str, *arguments: str, environment: dict[str, str], **options: Any) -> subprocess.Popen[str]:
    """`python -m module arguments...`, which can import what this process can. Its environment is this one's and
    `environment`. options: as subprocess.Popen takes them.
    """
    importable = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    command = [sys.executable, "-P", "-m", module, *arguments]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": importable, **environment}, text=True, **options)
