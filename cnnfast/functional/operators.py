"""The operators, for the functions to call; without triton there are none, and no call gets as far as one."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..dispatch import launch

ops: Any = import_module("..ops", __package__) if launch is not None else None
