"""JSON files: written whole or not at all, and null for the numbers that JSON lacks."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from moe.data.tokens.sealed import write_atomically


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; other processes see all of it or nothing."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def finite(value: Any) -> Any:
    """The value with None for NaN and infinities, and plain numbers in place of NumPy's."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    if isinstance(value, np.generic):
        return finite(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
