"""Sheets: augmented images side by side in one picture, and what was drawn for each in words."""

from .composing import sheet
from .views import View, views

__all__ = ["View", "sheet", "views"]
