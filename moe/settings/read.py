"""Reads gin files as data: what they include, import and set. Nothing of them is executed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
import os
from pathlib import Path
import re
import tokenize

from gin import config as gin_config
from gin import config_parser

from moe.errors import Problems, UserError, nearest

PACKAGE = Path(__file__).resolve().parents[1]
SUBFOLDERS = ("runs", "models", "routers", "sweeps")  # of the shipped configs, searched by name
DEFAULTS = "# Defaults in force:"  # begins the last part of a run's recorded config
FEATURE = "__gin__."  # imports that switch gin's own features on
# Far above any real configuration; a file made to hang or to fill memory ends here.
MOST_BYTES, MOST_TEXTS, MOST_DEPTH = 2**20, 256, 16


DEEP = (RecursionError, MemoryError)  # Python's parser raises either for nested brackets


@dataclass(frozen=True)
class Reference:
    """`@scope/Name` or, called, `@scope/Name()`."""

    name: str
    called: bool

    def __repr__(self) -> str:
        return f"@{self.name}()" if self.called else f"@{self.name}"


@dataclass(frozen=True)
class Macro:
    """`%name`, which stands for the value of a macro or a constant."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Setting:
    """One binding of a parameter or a macro.

    Attributes:
        where: the file and line, or the flag.
        text: the number of the text that it stands in, in the order of reading.
        line: in that text.
        scope, selector, parameter: its target, scope/selector.parameter; a macro has no parameter.
        value: with `Reference` and `Macro` inside.
    """

    where: str
    text: int
    line: int
    scope: str
    selector: str
    parameter: str
    value: object

    @property
    def key(self) -> str:
        scope = f"{self.scope}/" if self.scope else ""
        return f"{scope}{self.selector}" + (f".{self.parameter}" if self.parameter else "")


@dataclass
class Reading:
    """The content of all texts, in the order in which it takes effect.

    Attributes:
        settings: all bindings.
        imports: import statements, each with its place.
        folders: of the files that were read.
        problems: a line for each mistake.
        files: (name, first, end) for each given file, whose settings are settings[first:end].
        texts: how many texts were read.
        size: of all of them, in bytes.
        roots: folders that an included file has to be in.
    """

    settings: list[Setting] = field(default_factory=list)
    imports: list[tuple[str, config_parser.ImportStatement]] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    files: list[tuple[str, int, int]] = field(default_factory=list)
    texts: int = 0
    size: int = 0
    roots: tuple[Path, ...] = ()

    def problem(self, line: str) -> None:
        """Add a mistake, once."""
        if line not in self.problems:
            self.problems.append(line)


def shipped() -> Path:
    """The folder of shipped configs: inside the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def shipped_names() -> list[str]:
    """The names of all shipped configs, such as `routers/switch.gin`."""
    root = shipped()
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.gin"))


def find(name: str, beside: Path | None = None) -> Path:
    """The path of a config by its name: in the current folder, in `beside`, or among those shipped.

    Raises:
        UserError: no such file, with the nearest shipped names; or several shipped ones.
    """
    home = Path(os.path.expanduser(name))
    for path in (home, *([beside / name] if beside else [])):
        if os.path.isfile(path):  # Path.is_file raises for names that are too long
            return path.absolute()
    root = shipped()
    if os.path.isfile(root / name):
        return root / name
    hits = [f"{folder}/{name}" for folder in SUBFOLDERS if os.path.isfile(root / folder / name)]
    if len(hits) > 1:
        raise UserError(f"{name}: several shipped files have this name; write {' or '.join(hits)}")
    if hits:
        return root / hits[0]
    raise UserError(f"{name}: no such file here or among the shipped configs{_hint(name)}")


def _hint(name: str) -> str:
    names = shipped_names()
    short = {Path(long).name: long for long in names}
    near = nearest(name, names) or nearest(Path(name).name, short)
    return near or (f"; shipped: {', '.join(names[:12])}" if names else "")


class _Delegate(config_parser.ParserDelegate):
    """Returns references and macros as data, where gin's own delegate looks them up."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        return Reference(scoped_configurable_name, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def read(gin_files: Sequence[str], gin_bindings: Sequence[str], received: bool = False) -> Reading:
    """Read the files, what they include, and bindings of the command line, with every mistake.

    A file may include what lies in its own folder, in the current one (unless `received`), among
    the shipped configs, or below one of these.
    """
    reading = Reading()
    for name in gin_files:
        try:
            path = find(name)
        except UserError as error:
            reading.problems.append(f"--gin_file={error}")
        else:
            first = len(reading.settings)
            here = () if received else (Path.cwd(),)
            reading.roots = (path.parent, *here, shipped())
            _read_file(reading, name, path, above=())
            reading.files.append((name, first, len(reading.settings)))
    reading.roots = (Path.cwd(), shipped())
    for binding in gin_bindings:
        flag = f'--gin_bindings="{binding}"'
        _read_text(reading, binding, name=flag, folder=None, above=(), numbered=False)
    return reading


def bindings_of(text: str) -> dict[str, str]:
    """The settings of a config text by name, with values as text; the last of a name wins.

    Raises:
        Problems: a text that can't be read, which would otherwise look like one with less in it.
    """
    reading = Reading(roots=(shipped(),))
    _read_text(reading, text, name="", folder=None, above=(), numbered=True)
    if reading.problems:
        raise Problems(reading.problems)
    return {setting.key: repr(setting.value) for setting in reading.settings}


def defaults_of(text: str) -> set[str]:
    """The names of the settings that a recorded config text has as defaults in force."""
    _, _, defaults = text.partition(f"\n{DEFAULTS}\n")
    return {*bindings_of(defaults)}


def _read_file(reading: Reading, name: str, path: Path, above: tuple[Path, ...]) -> None:
    try:
        with open(path, "rb") as file:
            raw = file.read(max(MOST_BYTES + 1 - reading.size, 0))
        reading.size += len(raw)
        if reading.size > MOST_BYTES:
            reading.problem(f"{name}: a configuration has at most {MOST_BYTES:,} bytes in all")
            return
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file in UTF-8"
        reading.problems.append(f"{name}: {reason}")
        return
    _read_text(reading, text, name, path.parent, (*above, path.resolve()), numbered=True)


def _read_text(
    reading: Reading,
    text: str,
    name: str,
    folder: Path | None,
    above: tuple[Path, ...],
    numbered: bool,
) -> None:
    """Add a text to the reading.

    above: the files that include this text, then its own. numbered: whether places have lines.
    """
    reading.texts += 1
    number = reading.texts
    if folder is not None and folder not in reading.folders:
        reading.folders.append(folder)
    for line, statement in _statements(text):
        where = f"{name}:{line}" if numbered else name
        if isinstance(statement, str):
            reading.problems.append(f"{where}: {statement}")
        elif isinstance(statement, config_parser.ImportStatement):
            reading.imports.append((where, statement))
        elif isinstance(statement, config_parser.IncludeStatement):
            _include(reading, statement.filename, where, folder, above)
        elif isinstance(statement, config_parser.BindingStatement):
            scope, selector, parameter, value, _ = statement
            setting = Setting(where, number, line, scope, selector, parameter, value)
            reading.settings.append(setting)


def _include(
    reading: Reading, name: str, where: str, folder: Path | None, above: tuple[Path, ...]
) -> None:
    try:
        path = find(name, beside=folder)
    except UserError as error:
        reading.problems.append(f"{where}: include {error}")
        return
    if not any(path.resolve().is_relative_to(root.resolve()) for root in reading.roots):
        reading.problems.append(
            f"{where}: include {name}: it lies outside of the config's folder, the current one "
            "and the shipped configs; copy it beside the config"
        )
        return
    if path.resolve() in above:
        chain = [os.path.relpath(p) for p in (*above[above.index(path.resolve()) :], path)]
        reading.problems.append(f"{where}: include in a circle: {' -> '.join(chain)}")
    elif len(above) >= MOST_DEPTH or reading.texts >= MOST_TEXTS:
        reading.problem(f"a configuration has at most {MOST_TEXTS} files, {MOST_DEPTH} deep")
    else:
        _read_file(reading, name, path, above)


def _statements(text: str) -> Iterator[tuple[int, object]]:
    """(line, statement) pairs; for a text that can't be parsed, the last one is (line, mistake)."""
    parser = None
    try:
        parser = config_parser.ConfigParser(text, _Delegate())
        # Not `for statement in parser`, which ends silently where a text is cut off.
        while (statement := parser.parse_statement()) is not None:
            yield statement.location.line_num, statement
    except (SyntaxError, tokenize.TokenError, StopIteration, ValueError, *DEEP) as error:
        yield _explain(error, parser, text)


def _explain(
    error: Exception, parser: config_parser.ConfigParser | None, text: str
) -> tuple[int, str]:
    """The line of a syntax error, and a message for the config's author."""
    lines = text.splitlines() or [""]
    line = parser.current_token.start[0] if parser and parser.current_token else 1
    reason = "it ends too early"
    if isinstance(error, SyntaxError):
        line, reason = error.lineno or line, str(error.msg).rstrip(".")
    elif isinstance(error, tokenize.TokenError):
        line, reason = error.args[1][0], "a bracket or a quote is left open"
    elif isinstance(error, DEEP):
        reason = "it is nested too deeply"
    if token := re.search(r"Failed to parse token '(.*)'", reason, re.DOTALL):
        word = token[1].strip("'\"")
        way_out = f"text needs quotes: '{word}'"
        if gin_config._REGISTRY.matching_selectors(word):
            way_out = f"write @{word}, or @{word}() for one that is made here"
        reason = f"{token[1]} is no value ({way_out})"
    line = min(line, len(lines))
    shown = lines[line - 1].strip()
    return line, f"can't read {shown[:80]!r}: {reason}"
