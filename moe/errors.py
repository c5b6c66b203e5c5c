"""Errors that are the user's to mend: one clear line, exit status 2, no traceback."""

from collections.abc import Callable, Iterable
import difflib
from typing import Any


class UserError(ValueError):
    """What was given, what was expected and the nearest valid choice, in one line."""


class Problems(UserError):
    """Several mistakes at once, a line each."""

    def __init__(self, lines: Iterable[str]):
        self.lines = tuple(lines)
        super().__init__("\n".join(self.lines))


def nearest(name: str, valid: Iterable[str], *, most: int = 3) -> str:
    """A hint such as ``; did you mean 'TopK'?``, or an empty string where nothing is near."""
    valid = list(valid)
    close = [choice for choice in valid if choice.casefold() == name.casefold()][:most]
    close = close or difflib.get_close_matches(name, valid, n=most, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def attempted(what: str, say: Callable[[str], None], call: Callable, *given: Any) -> Any:
    """What a call returns; where it fails that is told, the results stand, and this is None."""
    try:
        return call(*given)
    except Exception as error:  # decoration is never worth a run
        first = (str(error).strip().splitlines() or [""])[0][:160]
        say(f"no {what}: {type(error).__name__}: {first}")
        return None
