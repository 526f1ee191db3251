"""Which tritons our kernels can be imported with, and why they cannot be here."""

from __future__ import annotations

import importlib.util
from importlib import metadata

# The tritons that the tests run on, as pyproject.toml requires them.
OLDEST_TRITON, NEWEST_TRITON = (3, 6), (3, 9)
SUPPORTED_TRITON = f"{OLDEST_TRITON[0]}.{OLDEST_TRITON[1]} to {NEWEST_TRITON[0]}.{NEWEST_TRITON[1]}"


def why_no_kernels(error: Exception) -> str:
    """The cause, in a few words, of an error that importing our kernels has raised."""
    if _is_missing():
        return "triton is not installed"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        version = "of unknown version"
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"cnnfast's kernels need triton {SUPPORTED_TRITON} and cannot be imported with triton {version} ({said})"


def _is_missing() -> bool:
    try:
        return importlib.util.find_spec("triton") is None
    except ValueError:  # a module without a specification, or None in its place, which hides it
        return True
