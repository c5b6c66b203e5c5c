"""`moe check`: judges the properties of any router, and prints a line for each."""

import functools
import importlib
import inspect
import json
import os
from pathlib import Path
import sys
import time
import traceback
from types import ModuleType
from typing import Any

from moe.errors import UserError, first_line, nearest
from moe.machine import xla_flags

MARK = {True: "ok", False: "FAILS", None: "-"}


def run(flags) -> int:
    """Print a verdict for each property; returns 1 if one fails, else 0. `--json` writes them."""
    started = time.monotonic()
    xla_flags.prepare(devices=8)  # before jax is imported
    router = _maker(flags.router)

    from moe.cli import config
    from moe.conformance.properties import check

    config.bind([], flags.gin_bindings)
    found, width = [], 0
    title = getattr(router, "__name__", flags.router)
    print(f"{title} with {flags.experts} experts")
    try:
        for verdict in check(router, flags.experts):
            width = max(width, len("precision in a bfloat16 layer"))
            print(
                f"  {MARK[verdict.holds]:<6}{verdict.property:<{width}}  {verdict.seen}", flush=True
            )
            found.append(vars(verdict))
    except UserError:
        raise
    except Exception as error:  # of the router's code
        text = first_line(error)
        place = _line_of(error, router)
        raise UserError(
            f"{flags.router} can't be checked: {type(error).__name__}: {text}{place}"
        ) from error
    failed = sum(verdict["holds"] is False for verdict in found)
    seconds = time.monotonic() - started
    print(f"{'all hold' if not failed else f'{failed} fail'}; {seconds:.0f} s")
    if flags.json:
        Path(flags.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


def _maker(name: str) -> Any:
    """What `find` finds; UserError unless it can be called."""
    found = find(name)
    if not callable(found):
        kind = type(found).__name__
        raise UserError(
            f"{name} is of type {kind}; expected a class or function that makes a router"
        )
    return found


def find(name: str) -> Any:
    """What `MODULE:NAME`, `FILE.py:NAME` or, of the routers, `NAME` names.

    Raises:
        UserError: there is none; with the nearest name.
    """
    module_name, _, attribute = name.rpartition(":")
    if not module_name and name.endswith((".py", ".gin")):
        raise UserError(
            f"{name}: name a class, as my_router.py:MyRouter, or one that is there, as Switch"
        )
    module = _module(module_name or "routing")
    if not hasattr(module, attribute):
        names = [n for n, value in vars(module).items() if isinstance(value, type)]
        raise UserError(f"{module.__name__} has no {attribute!r}{nearest(attribute, names)}")
    return getattr(module, attribute)


def _module(name: str) -> ModuleType:
    """The module of this name, or in this file."""
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise UserError(f"{name}: no such file")
        sys.path.insert(0, str(path.resolve().parent))
        name = path.stem
    else:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0] and error.name != name:  # an import inside it
            raise UserError(f"{name} can't be imported: {error}{_line_of(error)}") from error
        raise UserError(
            f"no module {error.name!r} in the current folder or on PYTHONPATH; a file is named as "
            "my_router.py:MyRouter"
        ) from error
    except SyntaxError as error:
        place = f" ({os.path.relpath(error.filename)}:{error.lineno})" if error.filename else ""
        raise UserError(f"{name} can't be imported: {error.msg}{place}") from error
    except Exception as error:  # of the module's code
        text = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{name} can't be imported: {text}{_line_of(error)}") from error


def _line_of(error: Exception, router=None) -> str:
    """The last line in the router's own file of the error's traceback; empty if it has none.

    Without a router the last line that no import machinery has.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if router is None:
        own = {f.filename for f in frames if not f.filename.startswith("<")} - {__file__}
        own -= {importlib.__file__}
    else:
        while isinstance(router, functools.partial):
            router = router.func
        own = {inspect.getsourcefile(inspect.unwrap(router))}
    frames = [f for f in frames if f.filename in own]
    if not frames:
        return ""
    return f" ({os.path.relpath(frames[-1].filename)}:{frames[-1].lineno}: {frames[-1].line})"
