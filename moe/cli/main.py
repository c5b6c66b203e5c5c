"""The program `moe`: help, flags and errors. Heavy modules are imported only by a command."""

from collections.abc import Sequence
import contextlib
import errno
import importlib
import io
import os
from pathlib import Path
import re
import sys
import traceback
from types import SimpleNamespace

from absl import flags as absl_flags

import moe
from moe.cli.commands import COMMANDS, Command, Flag
from moe.errors import Problems, UserError, nearest, printable
from moe.machine import accelerator, compile_cache, exits, signals
from moe.machine.allocator import keep_freed_memory

MISTAKE, INTERRUPTED, BROKEN_PIPE = exits.MISTAKE, 130, exits.BROKEN_PIPE
HELP = ("--help", "-h", "-help")
CONFIGURED = ("train", "eval")  # commands with settings in a config
PICTURES = (".png", ".pdf", ".svg")
DEFINE = {
    str: absl_flags.DEFINE_string,
    int: absl_flags.DEFINE_integer,
    float: absl_flags.DEFINE_float,
    bool: absl_flags.DEFINE_boolean,
    list: absl_flags.DEFINE_multi_string,
}
# Errors of the disk or the caller, not faults of the program.
DISK = {
    getattr(errno, name)
    for name in "EROFS EACCES EPERM ENOSPC EDQUOT EFBIG ENOTDIR EISDIR EEXIST ENAMETOOLONG".split()
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, which is 2 for a user's mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # letters that the terminal lacks become "?"
        sys.stdout.reconfigure(errors="replace")
    if argv[:1] == ["train"]:  # whose state is worth saving
        with signals.of_the_program() as caught:
            try:
                return exits.leave(_main(argv))
            except signals.Stopped:
                return exits.leave(exits.of_signal(caught.signal or 0))
            except Exception:
                if not exits.last_words:
                    raise
                with contextlib.suppress(OSError):  # nobody may read it any more
                    traceback.print_exc()
                return exits.leave(1)
    return _main(argv)


def _main(argv: list[str]) -> int:
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print("moe: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # as in `moe ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if (text := _users_mistake(error, argv)) is None:
            raise
        print(f"moe: error: {printable(shortened(text))}", file=sys.stderr)
        return error.status if isinstance(error, UserError) else MISTAKE


def shortened(text: str, most: int = 2000) -> str:
    """The text with its long lines cut: what it quotes of a file may have no end."""
    lines = (line if len(line) <= most else f"{line[:most]}..." for line in text.splitlines())
    return "\n".join(lines)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in (*HELP, "help"):
        if len(argv) > 2:
            raise UserError(f"moe help explains one name, not {', '.join(argv[1:])}")
        print(overview() if argv[1:] in ([], ["help"]) else _help(argv[1]))
        return 0 if argv else MISTAKE
    if argv[0] == "--version":
        print(f"moe {moe.__version__}")
        return 0
    command = _command(argv[0])
    if any(argument in HELP for argument in argv[1:]):
        print(usage(command))
        return 0
    flags = parse(command, argv[1:])
    keep_freed_memory()
    accelerator.prepare()
    compile_cache.prepare()
    return importlib.import_module(command.module).run(flags)


def _help(name: str) -> str:
    """The text of `moe help NAME`, for a command or a configurable."""
    command = usage(_command(name)) if name in [c.name for c in COMMANDS] else ""
    if command and name not in CONFIGURED:
        return command
    settings = importlib.import_module("moe.cli.explain").help_of(name)
    return f"{command}\n\n{settings}" if command else settings


def _command(name: str) -> Command:
    names = [command.name for command in COMMANDS]
    if name in names:
        return COMMANDS[names.index(name)]
    if name.startswith("-"):
        raise UserError(f"the command comes first: moe {'|'.join(names)} {name}")
    hint = nearest(name, names) or f"; there are {', '.join(names)}"
    raise UserError(f"unknown command {name!r}{hint}")


def overview() -> str:
    """The text of `moe --help`."""
    rows = "\n".join(f"  {command.name:<10}{command.summary}" for command in COMMANDS)
    return f"""\
usage: moe COMMAND [--FLAG=VALUE ...]

Train mixture-of-experts transformers and compare how they route.

commands:
{rows}

example:
  {COMMANDS[0].example}

`moe COMMAND --help` lists a command's flags, `moe help NAME` explains what a config names
(`moe help AdamW`), `moe list` shows what there is; `moe --version` names the version."""


def usage(command: Command) -> str:
    """The text of `moe COMMAND --help`."""
    forms = [form(flag) for flag in command.flags]
    width = max(map(len, forms), default=0) + 2
    required = [form for form, f in zip(forms, command.flags, strict=True) if f.required]
    rows = [
        f"  {form:<{width}}{flag.help}{' (required)' if flag.required else ''}"
        for form, flag in zip(forms, command.flags, strict=True)
    ]
    named = [command.form] if command.positional else []
    more = ["[--FLAG=VALUE ...]"] if forms else []
    words = [*named, *required, *more]
    if command.form.startswith("--"):  # after this command's own flags
        words = [*required, *more, *named]
    usage_line = " ".join(["usage: moe", command.name, *words])
    lines = [usage_line, "", command.summary, *(["", "flags:", *rows] if rows else [])]
    return "\n".join([*lines, "", "example:", f"  {command.example}"])


def form(flag: Flag) -> str:
    """The flag as it is written."""
    return f"--{flag.name}" if flag.kind is bool else f"--{flag.name}={flag.value}"


def parse(command: Command, arguments: Sequence[str]) -> SimpleNamespace:
    """The command's flags as attributes; a repeatable one is a list, an absent one its default.

    Raises:
        UserError: a flag is unknown, missing or has a wrong value.
    """
    values = absl_flags.FlagValues()
    for flag in command.flags:
        default = flag.default if flag.kind is not list else []
        DEFINE[flag.kind](flag.name, default, flag.help, flag_values=values)
    try:
        left = values(["moe", *arguments])[1:]
    except absl_flags.Error as error:
        raise UserError(f"moe {command.name}: {_flag_mistake(command, error)}") from None
    named = {}
    if command.positional:
        if not left and command.optional:
            left = [""]
        if not left or (left[1:] and not command.many):
            raise UserError(f"moe {command.name} needs one {command.form}, as {command.example!r}")
        named[command.positional] = left if command.many else left[0]
        left = []
    if left:
        hint = f"; did you mean --gin_file={left[0]}?" if left[0].endswith(".gin") else ""
        raise UserError(f"moe {command.name} takes flags only, got {left[0]!r}{hint}")
    found = {flag.name: values[flag.name].value for flag in command.flags}
    for flag in command.flags:
        _check(command, flag, found[flag.name])
    return SimpleNamespace(**found, **named)


def _check(command: Command, flag: Flag, value: object) -> None:
    if flag.required and not value:
        raise UserError(f"moe {command.name} needs --{flag.name}={flag.value} ({flag.help})")
    # Other paths may have any bytes, but below such a --workdir no checkpoint can be written.
    if (flag.value in ("TEXT", "SETTING") or flag.name == "workdir") and not _is_utf8(value):
        raise UserError(f"moe {command.name}: --{flag.name} holds bytes that are not UTF-8")
    if flag.name in ("json", "plot") and value:
        _check_output(f"moe {command.name}: --{flag.name}={value}", Path(str(value)), flag.name)
    if isinstance(value, int | float):
        low = float("-inf") if flag.low is None else flag.low
        high = float("inf") if flag.high is None else flag.high
        if not low <= value <= high or value == float("inf"):
            raise UserError(f"moe {command.name}: --{flag.name}={value}: expected {flag.expected}")


def _check_output(where: str, path: Path, kind: str) -> None:
    """Refuse a file that can't be written, before the command, which may take hours."""
    if kind == "plot" and path.suffix not in PICTURES:
        raise UserError(f"{where}: expected a name that ends in {', '.join(PICTURES)}")
    if path.is_dir():
        raise UserError(f"{where}: this is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{where}: there is no such folder")


def _is_utf8(value: object) -> bool:
    """Whether arguments are UTF-8; other bytes arrive as halves of surrogate pairs."""
    texts = value if isinstance(value, list) else [value]
    try:
        for text in texts:
            str(text).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _flag_mistake(command: Command, error: absl_flags.Error) -> str:
    """A message for absl's error."""
    names = [f"--{flag.name}" for flag in command.flags]
    if isinstance(error, absl_flags.UnrecognizedFlagError):
        name = f"--{error.flagname}"
        near = nearest(name, names, most=1)  # all are a little alike, by their dashes
        return f"unknown flag {name}{near or '; there are ' + ', '.join(names)}"
    text = str(error)
    if match := re.match(r"flag --(\w+)=(.*?): ", text, re.DOTALL):
        expected = {flag.name: flag.expected for flag in command.flags}[match[1]]
        return f"--{match[1]}={match[2]}: expected {expected}"
    if match := re.match(r"Missing value for flag -*(\w+)", text):
        return f"--{match[1]} has no value; write --{match[1]}=..."
    return text


def _users_mistake(error: Exception, argv: Sequence[str]) -> str | None:
    """The message for a user's mistake; None for a fault of the program, with a traceback."""
    # gin appends its call stack to the message, and drops errno and filename.
    text = re.split(r"\n +(?:In call to configurable|In file|In bindings string)", str(error))[0]
    if isinstance(error, Problems) and len(error.lines) > 1:
        return "\n  ".join([f"{len(error.lines)} problems", *error.lines])
    if isinstance(error, UserError):
        return "\n  ".join(text.splitlines())
    if isinstance(error, OSError):
        return _disk_mistake(error, text, argv)
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in text:
        return (
            f"out of memory ({text.splitlines()[0]}): try a smaller train.batch_size or "
            "train.sequence_length, more train.accumulate, or Transformer.remat = 'full'"
        )
    for reason in ("No space left on device", "Disk quota exceeded", "File too large"):
        if reason in str(error):  # from the libraries that write arrays
            return f"{_workdir(argv)}: {reason}; the same command goes on from what was saved"
    unset = _unset_parameter(text, str(error))
    return unset and unset + _missing_run(unset, argv)


def _missing_run(unset: str, argv: Sequence[str]) -> str:
    """A hint to name a run's config before a config that is only a part of one; else empty."""
    if "value for train" not in unset or "'data'" not in unset:
        return ""
    files = [a.split("=", 1)[1] for a in argv if a.startswith("--gin_file=")]
    run = "--gin_file=quickstart.gin"
    if not files:
        return f"; name a run's config, such as {run}"
    what = "are parts" if files[1:] else "is a part"
    return f"; {' and '.join(files)} {what} of a run: name the run before, such as {run}"


def _unset_parameter(text: str, whole: str) -> str | None:
    """The message for a configurable that lacks a required value, from gin's or Python's error."""
    required = r"Required bindings for `(.*)` not provided in config: \[(.*)\]"
    if match := re.match(required, text):
        return f"the config sets no value for {match[1]}: {match[2]}"
    missing = r"([\w.<>]+)\(\) missing \d+ required [a-z-]+ arguments?: (.*)"
    called = re.search(r"In call to configurable '(\w+)'", whole)
    if called and (match := re.match(missing, text)):
        name = match[1].removesuffix(".__init__").rsplit(".")[-1]
        if name == called[1]:  # else a call inside it failed: a fault of the program
            return f"the config sets no value for {name}: {match[2]}"
    return None


def _disk_mistake(error: OSError, text: str, argv: Sequence[str]) -> str | None:
    match = re.match(r"\[Errno (\d+)\] ([^:]*)(?:: (.*))?", text, re.DOTALL)
    number = error.errno or (int(match[1]) if match else None)
    if number is None or number not in DISK:
        return None
    quoted = match[3].strip("'\"") if match and match[3] else None
    path = error.filename or quoted or _workdir(argv)
    return f"{path}: {os.strerror(number)}"


def _workdir(argv: Sequence[str]) -> str:
    """The --workdir, for errors that name no path."""
    named = [a.split("=", 1)[1] for a in argv if a.startswith("--workdir=")]
    return named[-1] if named else "writing"
