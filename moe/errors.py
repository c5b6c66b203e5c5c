"""Errors that are the user's to mend: one clear line, exit status 2, no traceback."""

from collections.abc import Iterable
import difflib


class UserError(ValueError):
    """What was given, what was expected and the nearest valid choice, in one line."""


class Problems(UserError):
    """Several mistakes at once, a line each."""

    def __init__(self, lines: Iterable[str]):
        self.lines = tuple(lines)
        super().__init__("\n".join(self.lines))


def nearest(name: str, valid: Iterable[str], *, most: int = 3) -> str:
    """A hint such as ``; did you mean 'TopK'?``, or an empty string where nothing is near."""
    close = difflib.get_close_matches(name, list(valid), n=most, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
