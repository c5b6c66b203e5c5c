"""Guards around the `tokenizers` library, which is given files that may come from elsewhere.

It is written in Rust, whose faults are no `Exception` and print a page of their own.
"""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import sys
import tempfile
import threading
from typing import Any

from moe.errors import UserError

MOST_GROWTH = 64  # of a text by a tokenizer's replacements

_held = threading.Lock()  # a second thread does without


class Panicked(Exception):
    """A fault of the library; the message is its own."""


@contextlib.contextmanager
def quiet_panics() -> Iterator[None]:
    """Raise Panicked for a fault of the library, and drop the page that it prints."""
    try:
        with _stderr_held():
            yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise Panicked(str(error)) from None


@contextlib.contextmanager
def _stderr_held() -> Iterator[None]:
    """Write what goes to stderr within only afterwards, and only where nothing is raised."""
    if not _held.acquire(blocking=False):
        yield
        return
    try:
        sys.stderr.flush()
        before = os.dup(2)
    except (OSError, ValueError, AttributeError):  # there is none
        _held.release()
        yield
        return
    try:
        with tempfile.TemporaryFile() as held:
            os.dup2(held.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(before, 2)
            held.seek(0)
            if text := held.read():
                os.write(2, text)
    finally:
        os.close(before)
        _held.release()


def refuse_growth(record: Any, path: Path) -> None:
    """UserError where replacements, one after another, may make a text many times longer."""
    parts = ("normalizer", "pre_tokenizer", "decoder")
    for name in parts if isinstance(record, dict) else ():
        if (times := growth(record.get(name))) > MOST_GROWTH:
            raise UserError(f"{path}: its {name} may make a text {times:,.0f} times longer")


def growth(part: Any) -> float:
    """How many times longer the replacements within a part may make a text, at most."""
    if isinstance(part, list):
        return product(map(growth, part))
    if not isinstance(part, dict):
        return 1.0
    inner = product(map(growth, part.values()))
    content, pattern = part.get("content"), part.get("pattern")
    if not isinstance(content, str) or not isinstance(pattern, dict):
        return inner
    short = pattern.get("String")
    least = len(short) if isinstance(short, str) and short else 1
    return inner * max(1.0, len(content) / least)


def product(values: Any) -> float:
    """The product of finite numbers of at least 1, bounded so that it stays finite."""
    found = 1.0
    for value in values:
        found = min(found * value, 1e30)
    return found
