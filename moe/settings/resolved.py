"""Every setting in force, of objects that no file has named, too: one row for each configurable."""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import inspect
from pathlib import Path
import textwrap

from gin import config as gin_config

WIDTH = 98
Table = dict[str, dict[str, object]]  # configurable -> setting -> value


def rows(*roots: object) -> Table:
    """Settings by configurable, in the order in which the roots reach them.

    An object of a configurable's class tells its own values; a parameter that it does not keep
    under its name is what gin gave, or else the default.
    """
    names = {
        configurable.wrapped: configurable.name
        for configurable in gin_config._REGISTRY._selector_map.values()
    }
    given: dict[str, dict[str, object]] = {}
    for (_, selector), values in gin_config._OPERATIVE_CONFIG.items():
        given.setdefault(selector.rsplit(".", 1)[-1], {}).update(values)
    found: Table = {}
    for value in _reached(roots):
        name = next((names[base] for base in type(value).__mro__ if base in names), None)
        if name is not None:
            found.setdefault(name, dict(_settings(value, given.get(name, {}))))
    return found


def text(table: Table, unset: bool = True) -> str:
    """A paragraph for each configurable: its settings as a config would have them.

    unset: with those that are None or empty.
    """
    lines = []
    for name, settings in table.items():
        told = [f"{k}={shown(v)}" for k, v in settings.items() if unset or v not in (None, (), [])]
        line = f"{name}: {', '.join(told)}" if told else name
        lines += textwrap.wrap(line, WIDTH, subsequent_indent="    ")
    return "\n".join(lines)


def shown(value: object) -> str:
    """Such as 0.1, @Cosine(), @TopK or [@BalanceLoss()]."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, Path):
        return repr(str(value))
    if isinstance(value, gin_config.ConfigurableReference):
        return repr(value)
    if inspect.isclass(value) or inspect.isfunction(value):
        return f"@{value.__name__}"
    if isinstance(value, functools.partial):
        return shown(value.func)
    return f"@{type(value).__name__}()"


def _reached(roots: object) -> Iterator[object]:
    """Objects with settings that can be reached, each once, those nearer first."""
    queue, seen = [roots], set()
    while queue:
        value = queue.pop(0)
        if (
            id(value) in seen
            or value is None
            or isinstance(value, bool | int | float | str | bytes)
        ):
            continue
        seen.add(id(value))
        if isinstance(value, list | tuple):
            queue += value
        elif isinstance(value, Mapping):
            queue += value.values()
        elif isinstance(value, functools.partial):
            queue += [value.func, *value.keywords.values()]
        elif hasattr(value, "__dict__") and not inspect.isclass(value):
            yield value
            queue += [v for key, v in vars(value).items() if not key.startswith("_")]


def _settings(value: object, given: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """What an object keeps, else what gin gave, else the default."""
    for name, parameter in inspect.signature(type(value).__init__).parameters.items():
        default = given.get(name, parameter.default)
        if default is parameter.empty or parameter.kind is parameter.VAR_KEYWORD:
            continue
        kept = getattr(value, name, default)
        plain = kept is None or isinstance(kept, bool | int | float | str | list | tuple)
        use = plain or default is None or dataclasses.is_dataclass(value)
        yield name, kept if use else default
