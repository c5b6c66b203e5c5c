"""Loads a gin configuration after checking all of it, and writes it so that a run can be repeated.

`load` replaces the whole configuration; `operative` is the text that repeats a run; `unused` names
the settings that a run would ignore. gin's registry has no public reader, so the modules of
moe/settings read the private `_REGISTRY`, `_CONFIG` and `_OPERATIVE_CONFIG` of gin 0.5.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
import importlib
import math
import os
from pathlib import Path
import sys
import traceback

import gin
from gin import config as gin_config
from gin import config_parser

from moe.errors import Problems, UserError
from moe.settings import check, read

HEADER = """\
# The whole configuration of a run. To run it again, with this file as config.gin:
#   moe train --gin_file=config.gin --workdir=NEW_FOLDER
"""
OURS = ("moe", "layers", "routing")  # packages whose modules any config may import
Bindings = dict[tuple[str, str], dict[str, object]]  # (scope, selector) -> parameter -> value
_by_hand: set[str] = set()  # settings that came with --gin_bindings


def load(
    gin_files: Sequence[str],
    gin_bindings: Sequence[str] = (),
    say: Callable[[str], None] = print,
    received: bool = False,
    imports: Sequence[str] = (),
    trusting: str = "name it: --import={module}",
) -> None:
    """Replace the configuration by the files and then the bindings; later settings win.

    Args:
        gin_files: names of configs.
        gin_bindings: settings of the command line.
        say: prints a warning for settings that look meant to win and don't.
        received: the files are data, as in a run folder, and not the user's own: they import no
            module but ours and those of `imports` and bindings, and choose no folder to write to.
        imports: modules that the user names; they are imported first.
        trusting: how a user names a module, for the message on one that isn't named.

    Raises:
        UserError: with a line for each mistake. The configuration is then unchanged, but modules
            that the files import stay imported, with the configurables that they define.
    """
    reading = read.read(gin_files, gin_bindings, received)
    if received:
        reading.settings = [s for s in reading.settings if _by_flag(s) or not _writes(s)]
    problems = [*reading.problems, *_refused_imports(reading, received, imports, trusting)]
    if not (problems and reading.imports):  # nothing is imported for a config that is refused
        problems += [*_import(reading, received, imports), *check.problems(reading.settings)]
    if problems:
        raise Problems(problems)
    for line in replaced_by_runs(reading):
        say(line)
    gin.clear_config()
    _by_hand.clear()
    for _, statement in reading.imports:
        gin.parse_config(statement.format())  # recorded for `operative`
    for setting in reading.settings:
        target = (setting.scope, setting.selector, setting.parameter)
        key = target if setting.parameter else (setting.key, check.MACRO, "value")
        gin.bind_parameter(key, _gin_value(setting.value))
        if setting.parameter and _by_flag(setting):
            selector = check.resolve(setting.selector)
            _by_hand.add(_name(setting.scope, str(selector), setting.parameter))


def replaced_by_runs(reading: read.Reading) -> Iterator[str]:
    """A warning for each file of a whole run that replaces settings of a file before it.

    A file that changes a run, such as a router's, belongs after the run's file.
    """
    for at, (name, first, last) in enumerate(reading.files):
        own = {setting.key: setting for setting in reading.settings[first:last]}
        if "train.data" not in own:
            continue
        for before, start, end in reading.files[:at]:
            lost = [
                f"{s.key} = {s.value!r} by {own[s.key].value!r}"
                for s in reading.settings[start:end]
                if s.key in own and own[s.key].value != s.value
            ]
            if lost:
                yield (
                    f"{name} is a whole run, comes after {before} and replaces its "
                    f"{'; '.join(lost)}; name it first if {before} is to change it"
                )


def _by_flag(setting: read.Setting) -> bool:
    return setting.where.startswith("--gin_bindings")


def _writes(setting: read.Setting) -> bool:
    """Whether a setting says where this machine keeps files."""
    return setting.parameter == "cache_dir"


def _refused_imports(
    reading: read.Reading, received: bool, imports: Sequence[str], trusting: str
) -> Iterator[str]:
    """A line for each import that is not carried out."""
    named = {*imports, *(s.module for w, s in reading.imports if w.startswith("--gin_bindings"))}
    for where, statement in reading.imports:
        module, line = statement.module, f"{where}: {statement.format()}"
        if module.split(".")[0] == read.FEATURE.rstrip("."):
            yield f"{line}: import the module that defines the configurable"
        elif received and module not in named and module.split(".")[0] not in OURS:
            yield (
                f"{line}: a run folder's config runs no code by itself; if you trust this module, "
                f"{trusting.format(module=module)}"
            )


def _import(reading: read.Reading, received: bool, imports: Sequence[str]) -> Iterator[str]:
    """Import the modules that the texts name, also from beside a user's file; yields mistakes."""
    for folder in (Path.cwd(), *(() if received else reading.folders)):
        if (reading.imports or imports) and str(folder) not in sys.path:
            sys.path.append(str(folder))  # last, so that it shadows no installed package
    for module in imports:
        try:
            importlib.import_module(module)
        except Exception as error:
            yield f"--import={module}: {_cause(error)}"
    for where, statement in reading.imports:
        try:
            _import_one(statement)
        except Exception as error:
            yield f"{where}: {statement.format()}: {_cause(error)}"


def _import_one(statement: config_parser.ImportStatement) -> None:
    """Import a statement's module as gin does: `from a import b` imports the module a.b."""
    importlib.import_module(statement.module)


def _cause(error: Exception) -> str:
    """The error in a user's module, with its line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error} beside this file, in the current folder or on PYTHONPATH"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    own = not frame.filename.startswith("<") and frame.filename != __file__
    where = f" ({os.path.relpath(frame.filename)}:{frame.lineno})" if own else ""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{where}"


def _gin_value(value: object) -> object:
    """The value as gin's own parser would have made it."""
    delegate = gin_config.ParserDelegate()
    match value:
        case read.Reference(name, called):
            return delegate.configurable_reference(name, called)
        case read.Macro(name):
            return delegate.macro(name)
        case dict():
            return {_gin_value(k): _gin_value(v) for k, v in value.items()}
        case list() | tuple():
            return type(value)(_gin_value(item) for item in value)
    return value


def operative() -> str:
    """The config text that repeats this run: every setting, used or not, and defaults in force.

    gin.operative_config_str() leaves out unused settings, infinities and objects bound from Python.
    Here unused settings and infinities are written. Macros that nothing reads any more are left
    out, since `load` refuses them.

    Raises:
        UserError: a setting was bound from Python to an object that has no gin text.
    """
    imports = sorted(statement.format() for statement in gin_config._IMPORTS)
    macros, settings = [], []
    for name, value in _rows(_without_dead_macros(gin_config._CONFIG)):
        if (text := _text(value)) is None:
            raise UserError(
                f"{name} = {value!r} has no gin text, so this run could not be repeated; bind a "
                "number, a string, a list, a dict or a @reference"
            )
        (settings if "." in name else macros).append(f"{name} = {text}")
    defaults = [f"{name} = {_text(value)}" for name, value in _rows(_defaults())]
    blocks = [imports, macros, settings, defaults and [read.DEFAULTS, *defaults]]
    return "\n".join([HEADER, *("\n".join([*block, ""]) for block in blocks if block)])


def record(say: Callable[[str], None]) -> str:
    """`operative` for a run whose data and model are built, after `refuse_ignored`."""
    refuse_ignored(say, later=("eval",))
    return operative()


def _rows(bindings: Bindings) -> list[tuple[str, object]]:
    """Sorted (name, value) pairs, with names such as `scope/Name.parameter` or `macro`."""
    rows = []
    for (scope, selector), values in bindings.items():
        for parameter, value in values.items():
            rows.append((_name(scope, selector, parameter), value))
    return sorted(rows, key=lambda row: row[0])


def _name(scope: str, selector: str, parameter: str) -> str:
    if selector == check.MACRO:
        return scope
    short = gin_config._REGISTRY.minimal_selector(selector)
    return f"{scope}/{short}.{parameter}" if scope else f"{short}.{parameter}"


def _without_dead_macros(bindings: Bindings) -> Bindings:
    """The bindings without macros that no setting reads, not even through other macros."""
    while True:
        references = gin_config.iterate_references(bindings)
        read = ["/".join(r.scopes) for r in references if r.config_key[1] == check.MACRO]
        alive = {
            key: values
            for key, values in bindings.items()
            if key[1] != check.MACRO or any(f"{n}/".startswith(f"{key[0]}/") for n in read)
        }
        if len(alive) == len(bindings):
            return alive
        bindings = alive


def _defaults() -> Bindings:
    """The defaults that calls used for parameters without a setting."""
    found: Bindings = {}
    with gin_config._OPERATIVE_CONFIG_LOCK:
        calls = {key: dict(values) for key, values in gin_config._OPERATIVE_CONFIG.items()}
    for (scope, selector), values in calls.items():
        if selector.startswith("gin."):
            continue
        bound = {parameter for _, parameter in _effective(scope, selector)}
        free = {p: v for p, v in values.items() if p not in bound and _text(v) is not None}
        found[scope, selector] = free
    return found


def _effective(scope: str, selector: str) -> Iterator[tuple[str, str]]:
    """(scope of the setting, parameter) for each parameter that is set for a call in `scope`."""
    scopes = scope.split("/") if scope else []
    winners: dict[str, str] = {}
    for n in range(len(scopes) + 1):
        outer = "/".join(scopes[:n])
        winners |= dict.fromkeys(gin_config._CONFIG.get((outer, selector), {}), outer)
    return ((where, parameter) for parameter, where in winners.items())


def unused(later: Collection[str] = ()) -> list[str]:
    """Names of settings that no call has used: of objects never made, or overridden by the code.

    To be called once data and model are built. later: configurables that the run calls after that,
    such as `eval`.
    """
    used = set()
    for (scope, selector), values in gin_config._OPERATIVE_CONFIG.items():
        for where, parameter in _effective(scope, selector):
            if parameter in values:
                used.add((where, selector, parameter))
    waiting = {check.resolve(name) for name in later}
    return sorted(
        _name(scope, selector, parameter)
        for (scope, selector), values in gin_config._CONFIG.items()
        for parameter in values
        if (scope, selector, parameter) not in used
        and selector != check.MACRO
        and selector not in waiting
    )


def refuse_ignored(say: Callable[[str], None], later: Collection[str] = ()) -> None:
    """Raise UserError for `unused` settings from the command line; print those from files.

    Files may hold settings that another file makes useless, as when it replaces the router.
    """
    ignored = unused(later)
    wrong = [name for name in ignored if name in _by_hand]
    if wrong:
        raise UserError(
            f"this run would ignore {', '.join(wrong)}: nothing that it builds reads "
            f"{'them' if len(wrong) > 1 else 'it'}; take it out, or set what does"
        )
    if ignored:
        say(f"settings that this run does not use: {', '.join(ignored)}")


def _text(value: object) -> str | None:
    """The value as gin text, or None where it has none."""
    if isinstance(value, gin_config.ConfigurableReference):
        return repr(value)
    if type(value) is float and not math.isfinite(value):
        return None if math.isnan(value) else f"{'-' if value < 0 else ''}1e999"
    if value is None or type(value) in (bool, int, float, str, bytes):
        return repr(value)
    if isinstance(value, dict) and type(value) is dict:
        pairs = [(_text(k), _text(v)) for k, v in value.items()]
        whole = all(k is not None and v is not None for k, v in pairs)
        return "{" + ", ".join(f"{k}: {v}" for k, v in pairs) + "}" if whole else None
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        items = [_text(item) for item in value]
        if any(item is None for item in items):
            return None
        inner = ", ".join(str(item) for item in items)
        return f"[{inner}]" if type(value) is list else f"({inner}{',' if len(items) == 1 else ''})"
    return None
