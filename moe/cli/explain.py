"""`moe help NAME`, `moe list KIND` and docs/settings.md: configurables and their settings."""

from collections.abc import Iterable, Iterator
from pathlib import Path
import re
import textwrap

from moe.cli import configurables
from moe.errors import UserError, nearest
from moe.settings import read, reference
from moe.settings.reference import Entry

assert configurables  # imported to be registered

WIDTH = 98
CONFIGS = "configs"
PAGE = """\
# Every setting

Made from the code by `python -m moe.cli.explain > docs/settings.md`; `moe help NAME` prints one of
them, `moe list KIND` a kind. A setting is written `Name.setting = value`, in a file or as
`--gin_bindings="Name.setting = value"`. `@Name` stands for a class, `@Name()` for an object of it.
"""


def help_of(name: str) -> str:
    """The help on a configurable, on one of its settings (`TopK.k`), or on a shipped config.

    Raises:
        UserError: there is nothing of this name.
    """
    given = name
    name, _, setting = name.removeprefix("@").removesuffix("()").partition(".")
    try:
        found = reference.entry(name)
    except KeyError:
        path = None if given in kinds() else config_named(given)
        if path is None:
            raise UserError(unknown(name)) from None
        text = path.read_text(encoding="utf-8").rstrip()
        return f"{flag_name(path)}\n\n{textwrap.indent(text, '  ')}"
    rows = {one.name: row for one, row in zip(found.settings, paragraphs(found), strict=True)}
    if setting:
        if setting not in rows:
            raise UserError(f"{name} has no setting {setting!r}{nearest(setting, list(rows))}")
        return f"{name}.{rows[setting]}"
    lines = [title(found), "", textwrap.indent(found.text, "  ")]
    if goes := reference.places(name):
        more = f", and {len(goes) - 4} more" if len(goes) > 4 else ""
        line = f"goes into  {', '.join(goes[:4])}{more}"
        lines += ["", *textwrap.wrap(line, WIDTH, subsequent_indent=" " * 11)]
    if rows:
        lines += ["", f"settings, such as {flag_of(found)} (in a file without the flag)"]
        lines += [textwrap.indent(row, "  ") for row in rows.values()]
    return "\n".join(lines)


def config_named(name: str) -> Path | None:
    """The path of a shipped config, named as --gin_file takes it or by its stem alone."""
    for path in shipped_files():
        full = path.relative_to(read.shipped()).as_posix()
        if name in (full, flag_name(path), path.name, path.stem):
            return path
    return None


def shipped_files() -> list[Path]:
    """The paths of all shipped gin files, sorted by name."""
    return [read.shipped() / name for name in read.shipped_names()]


def flag_name(path: Path) -> str:
    """The name of a shipped file for --gin_file."""
    return path.relative_to(read.shipped()).as_posix().removeprefix("runs/")


def flag_of(found: Entry) -> str:
    """A flag that sets one setting of a configurable, if possible one with a plain value."""
    valued = [
        one
        for one in found.settings
        if one.default not in (None, "None", "[]") and not one.meaning.startswith("given by")
    ]
    plain = [one for one in valued if not str(one.default).startswith(("@", "["))]
    one = next(iter([*plain, *valued, *found.settings]))
    return f'--gin_bindings="{found.name}.{one.name} = {one.default or "..."}"'


def title(found: Entry) -> str:
    """A configurable's name, kind and causality, such as "Switch (routers, causal)"."""
    more = f", {found.causality}" if found.causality else ""
    return f"{found.name} ({found.kind}{more})"


def paragraphs(found: Entry) -> Iterator[str]:
    """A paragraph for each setting: name and default, and below them type and meaning."""
    for head, meaning in reference.rows(found.settings):
        below = textwrap.wrap(meaning, WIDTH, initial_indent="    ", subsequent_indent="    ")
        yield "\n".join([head, *below])


def unknown(name: str) -> str:
    """The message on an unknown name, with the nearest command or configurable."""
    from moe.cli.commands import COMMANDS

    if name in (known := [*kinds(), CONFIGS]):
        return f"{name} is a kind of things: `moe list {name}` shows them"
    names = {command.name for command in COMMANDS} | {e.name for e in reference.entries()}
    hint = nearest(name, sorted(names)) or nearest(name, known)
    hint = hint or "; `moe list` shows what there is"
    return f"there is no command and nothing to configure named {name!r}{hint}"


def kinds() -> dict[str, list[Entry]]:
    """All configurables by kind."""
    found: dict[str, list[Entry]] = {}
    for one in reference.entries():
        found.setdefault(one.kind, []).append(one)
    return dict(sorted(found.items()))


def list_of(kind: str) -> str:
    """A line for each configurable of a kind; for an empty kind, a line for each kind.

    Raises:
        UserError: an unknown kind.
    """
    known = kinds()
    if not kind:
        rows = [(name, ", ".join(e.name for e in entries)) for name, entries in known.items()]
        return table([*rows, (CONFIGS, "the gin files that come with it")])
    if kind == CONFIGS:
        return table(shipped())
    if kind not in known:
        names = [*known, CONFIGS]
        hint = nearest(kind, names) or f"; there are {', '.join(names)}"
        raise UserError(f"moe list: there is no kind {kind!r}{hint}")
    return table(
        (e.name, f"{e.summary} [{e.causality}]" if e.causality else e.summary) for e in known[kind]
    )


def shipped() -> Iterator[tuple[str, str]]:
    """(name for --gin_file, first sentence of the opening comment) of each shipped file."""
    for path in shipped_files():
        comment = re.match(r"((?:#.*\n)+)", path.read_text(encoding="utf-8"))
        lines = (comment[1] if comment else "").splitlines()
        words = " ".join(
            line.strip("# ") for line in lines if not line.startswith(("#   ", "# moe"))
        )
        yield flag_name(path), re.split(r"(?<=[a-z)\d]\.) (?=[A-Z])", words)[0]


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Rows as a table of two columns, the second one wrapped."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows) + 2
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, WIDTH - width) or [""]
        lines.append(f"{name:<{width}}{wrapped[0]}".rstrip())
        lines += [" " * width + line for line in wrapped[1:]]
    return "\n".join(lines)


def page() -> str:
    """The content of docs/settings.md."""
    blocks = [PAGE]
    for kind, entries in kinds().items():
        if kind == reference.OTHERS:  # of modules outside the packages
            continue
        blocks.append(f"\n## {kind.replace('_', ' ')}\n")
        for one in entries:
            more = f" ({one.causality})" if one.causality else ""
            blocks.append(f"\n### {one.name}{more}\n\n{fenced(one.text)}\n")
            if one.settings:
                blocks.append("\n| setting | default | is | means |\n|---|---|---|---|\n")
            for s in one.settings:
                default = "" if s.default is None else f"`{s.default}`"
                cells = f"`{s.name}`", default, s.expected, s.meaning
                blocks.append(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |\n")
    return "".join(blocks)


def fenced(text: str) -> str:
    """A docstring as a block of text; in Markdown, formulas would lose underscores and stars."""
    return f"```text\n{text}\n```"


def run(flags) -> int:
    """`moe list`: print the configurables of a kind, or the kinds."""
    print(list_of(flags.kind))
    return 0


if __name__ == "__main__":
    print(page(), end="")
