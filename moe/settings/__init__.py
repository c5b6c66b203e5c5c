"""Gin files: read without executing anything, checked as a whole, then bound."""

from moe.settings.aside import aside, imported
from moe.settings.load import load, operative, record, refuse_ignored, replaced_by_runs, unused

__all__ = [
    "aside",
    "imported",
    "load",
    "operative",
    "record",
    "refuse_ignored",
    "replaced_by_runs",
    "unused",
]
