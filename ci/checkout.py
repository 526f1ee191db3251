"""The checkout that the scripts of this folder work on: where it is, and which commit and versions a result is of.

Importing this puts the checkout's packages and its tests in front of whatever is installed, so import it before them.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "ci" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit() -> str:
    """The short hash of HEAD, and whether a tracked file differs from it."""
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + (", with changes" if changed else "")


def versions(*packages: str) -> str:
    """The versions of installed `packages`, of Python, and the commit, for the first line of a result."""
    named = [f"{package} {version(package)}" for package in packages]
    return ", ".join([*named, f"Python {platform.python_version()}", f"commit {commit()}"])
