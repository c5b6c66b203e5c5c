"""Gin files: read without executing, checked whole, then bound. `load`, `operative`, `unused`."""

from moe.settings.load import load, operative, record, refuse_ignored, replaced_by_runs, unused

__all__ = ["load", "operative", "record", "refuse_ignored", "replaced_by_runs", "unused"]
