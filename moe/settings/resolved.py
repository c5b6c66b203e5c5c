"""Every setting in force, also of objects that no config names: a row for each configurable."""

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
    """The settings of each configurable whose objects the roots reach, nearer objects first.

    A value is the object's attribute of the parameter's name, or without one what gin gave, or the
    default.
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
    """A paragraph for each configurable, with its settings as a config writes them.

    unset: include settings that are None or empty.
    """
    lines = []
    for name, settings in table.items():
        pairs = [f"{k}={shown(v)}" for k, v in settings.items() if unset or v not in (None, (), [])]
        line = f"{name}: {', '.join(pairs)}" if pairs else name
        lines += textwrap.wrap(line, WIDTH, subsequent_indent="    ")
    return "\n".join(lines)


def shown(value: object) -> str:
    """A value as a config writes it, such as 0.1, @Cosine(), @TopK or [@BalanceLoss()]."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{shown(k)}: {shown(v)}' for k, v in value.items())}}}"
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
    """All objects with attributes that the roots reach, each once, nearer ones first."""
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
    """Each parameter of the object's class with its value, as `rows` has it."""
    for name, parameter in inspect.signature(type(value).__init__).parameters.items():
        default = given.get(name, parameter.default)
        if default is parameter.empty or parameter.kind is parameter.VAR_KEYWORD:
            continue
        kept = getattr(value, name, default)
        plain = kept is None or isinstance(kept, bool | int | float | str | list | tuple)
        use = plain or default is None or dataclasses.is_dataclass(value)
        yield name, kept if use else default
