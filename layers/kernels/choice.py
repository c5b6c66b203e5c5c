"""What a kernel's choice comes to."""

from typing import NamedTuple


class Choice(NamedTuple):
    """A kernel, and why it is the one: words that follow its name in a run's first lines."""

    kernel: str
    reason: str
