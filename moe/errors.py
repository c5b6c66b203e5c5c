"""Errors that users can mend: printed in one line, with exit status 2 and no traceback."""

from collections.abc import Callable, Iterable
import difflib
import re
from typing import Any

# C0 and C1 controls, and those that reorder letters of both directions of writing.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class UserError(ValueError):
    """A user's mistake: what was given, what is expected and the nearest choice, in one line.

    Attributes:
        status: the exit status of a program that it ends.
    """

    status = 2


class Problems(UserError):
    """Several mistakes, a line each."""

    def __init__(self, lines: Iterable[str]):
        self.lines = tuple(lines)
        super().__init__("\n".join(self.lines))


def nearest(name: str, valid: Iterable[str], *, most: int = 3) -> str:
    """A hint such as ``; did you mean 'TopK'?``, or an empty string where nothing is near."""
    valid = list(valid)
    close = [choice for choice in valid if choice.casefold() == name.casefold()][:most]
    close = close or difflib.get_close_matches(name, valid, n=most, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """The text with control characters written as escapes, such as \\x1b.

    It can't steer a terminal then. Line ends and tabs stay.
    """
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def attempted(what: str, say: Callable[[str], None], call: Callable, *given: Any) -> Any:
    """call(*given), or None where it fails, with a line that says so.

    what: the result of the call in words.
    """
    try:
        return call(*given)
    except Exception as error:  # decoration is never worth a run
        say(f"no {what}: {type(error).__name__}: {first_line(error)[:160]}")
        return None
