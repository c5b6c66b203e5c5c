"""Finds the mistakes in a set of gin settings, before any of them takes effect."""

from collections.abc import Iterator, Mapping, Sequence
import inspect
import typing

from gin import config as gin_config

from moe.errors import nearest
from moe.settings import types
from moe.settings.read import Macro, Reference, Setting

MACRO = "gin.macro"


def configurables() -> dict[str, str]:
    """The shortest name that a config may use for each configurable, by its complete selector."""
    registry = gin_config._REGISTRY
    names = [name for name, _ in registry.items() if not name.startswith("gin.")]
    return {name: registry.minimal_selector(name) for name in names}


def parameters(selector: str) -> dict[str, inspect.Parameter] | None:
    """A configurable's parameters that a config may set, by name; None if it takes any keyword."""
    item = gin_config._REGISTRY[selector]
    function = item.wrapped.__init__ if inspect.isclass(item.wrapped) else item.wrapped
    found = dict(inspect.signature(function).parameters)
    if inspect.isclass(item.wrapped):
        found.pop(next(iter(found), ""), None)  # self
    if any(p.kind is p.VAR_KEYWORD for p in found.values()):
        return None
    allowed = set(item.allowlist or found) - set(item.denylist or ())
    return {n: p for n, p in found.items() if n in allowed and p.kind is not p.VAR_POSITIONAL}


def problems(settings: Sequence[Setting]) -> list[str]:
    """A line for each mistake in the settings: gin would refuse it later, or ignore it."""
    macros = {s.key: s for s in settings if not s.parameter}
    found = []
    for setting in settings:
        reasons = [*_target(setting), *_references(setting, macros), *_type(setting, macros)]
        found += [f"{setting.where}: {setting.key}: {reason}" for reason in reasons]
    for check in (_duplicates, _unused_macros, _circular_macros, _unset):
        found += check(settings, macros)
    return found


def resolve(selector: str) -> str | tuple[str, ...]:
    """The complete selector of a short one; a tuple of candidates where there is not one."""
    matches = tuple(sorted(gin_config._REGISTRY.matching_selectors(selector)))
    return matches[0] if len(matches) == 1 else matches


def _unknown(selector: str, matches: tuple[str, ...], mark: str = "") -> str:
    if matches:
        return f"{mark}{selector} may be {' or '.join(matches)}; write it in full"
    names = configurables()
    short = [mark + name for name in (*names.values(), *names) if not name.startswith("gin.")]
    return f"there is no configurable {mark}{selector}{nearest(mark + selector, short)}"


def _target(setting: Setting) -> Iterator[str]:
    """A mistake where the setting's configurable or its parameter does not exist."""
    if not setting.parameter:
        return
    selector = resolve(setting.selector)
    if not isinstance(selector, str):
        yield _unknown(setting.selector, selector)
        return
    valid = parameters(selector)
    if valid is not None and setting.parameter not in valid:
        hint = nearest(setting.parameter, valid) or f"; it has {', '.join(valid) or 'none'}"
        yield f"{setting.selector} has no parameter {setting.parameter!r}{hint}"


def walk(value: object) -> Iterator[object]:
    """The leaves of nested lists, tuples and dicts, keys included."""
    if isinstance(value, Mapping):
        for pair in value.items():
            yield from walk(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from walk(item)
    else:
        yield value


def _bound(name: str, macros: Mapping[str, Setting]) -> str | None:
    """The macro that `%name` reads, if any; `%a/b` falls back to `a`, as scopes do."""
    scopes = name.split("/")
    candidates = ["/".join(scopes[:n]) for n in range(len(scopes), 0, -1)]
    return next((key for key in candidates if key in macros), None)


def _references(setting: Setting, macros: Mapping[str, Setting]) -> Iterator[str]:
    """A mistake for each reference and macro of the value that does not exist."""
    for leaf in walk(setting.value):
        if isinstance(leaf, Reference):
            selector = leaf.name.rsplit("/", 1)[-1]
            if not isinstance(matches := resolve(selector), str):
                yield _unknown(selector, matches, mark="@")
        elif isinstance(leaf, Macro):
            constants = sorted(gin_config._CONSTANTS.matching_selectors(leaf.name))
            if len(constants) > 1:
                yield f"%{leaf.name} may be {' or '.join(constants)}; write it in full"
            elif not constants and _bound(leaf.name, macros) is None:
                valid = (*macros, *(name for name, _ in gin_config._CONSTANTS.items()))
                hint = nearest(f"%{leaf.name}", [f"%{name}" for name in valid])
                yield f"there is no macro %{leaf.name}{hint}"


def _type(setting: Setting, macros: Mapping[str, Setting]) -> Iterator[str]:
    """A mistake where the value does not fit its parameter's annotation and range."""
    selector = resolve(setting.selector)
    if not setting.parameter or not isinstance(selector, str):
        return
    parameter = (parameters(selector) or {}).get(setting.parameter)
    value = setting.value
    if isinstance(value, Macro) and (name := _bound(value.name, macros)):
        value = macros[name].value
    leaves = list(walk(value))
    unknown = [v for v in leaves if isinstance(v, Reference) and not _is_known(v)]
    if parameter is None or unknown or any(isinstance(leaf, Macro) for leaf in leaves):
        return
    why = types.mismatch(value, annotation_of(selector, parameter))
    if why is not None:
        yield why


def _is_known(reference: Reference) -> bool:
    return isinstance(resolve(reference.name.rsplit("/", 1)[-1]), str)


def annotation_of(selector: str, parameter: inspect.Parameter) -> object:
    """A parameter's annotation as a type; `empty` where only a type checker can read it."""
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    wrapped = gin_config._REGISTRY[selector].wrapped
    function = wrapped.__init__ if inspect.isclass(wrapped) else wrapped
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception:
        return inspect.Parameter.empty
    return hints.get(parameter.name, inspect.Parameter.empty)


def _duplicates(settings: Sequence[Setting], macros: Mapping[str, Setting]) -> Iterator[str]:
    """Mistakes for parameters that one text sets twice; in gin the second setting wins silently."""
    first: dict[tuple[object, ...], Setting] = {}
    for setting in settings:
        selector = resolve(setting.selector) if setting.parameter else setting.selector
        name = selector if isinstance(selector, str) else setting.selector
        other = first.setdefault((setting.text, setting.scope, name, setting.parameter), setting)
        if other is not setting:
            yield f"{setting.where}: {setting.key}: it is already set on line {other.line}"


def _unused_macros(settings: Sequence[Setting], macros: Mapping[str, Setting]) -> Iterator[str]:
    """Mistakes for macros that nothing reads: misspelt, or a setting without its configurable."""
    leaves = [leaf for setting in settings for leaf in walk(setting.value)]
    used = {_bound(leaf.name, macros) for leaf in leaves if isinstance(leaf, Macro)}
    for name, setting in macros.items():
        if name not in used:
            near = [s.key for s in settings if s.parameter == setting.selector]
            hint = nearest(name, [key for key in used if key], most=1)
            if near:
                hint = f"; did you mean {near[-1]!r}?"
            yield f"{setting.where}: {name}: no setting reads a macro %{name}{hint}"


def _circular_macros(settings: Sequence[Setting], macros: Mapping[str, Setting]) -> Iterator[str]:
    """Mistakes for macros defined by themselves, such as `a = %b` with `b = %a`."""

    def reads(name: str) -> list[str]:
        leaves = [leaf for leaf in walk(macros[name].value) if isinstance(leaf, Macro)]
        return [bound for leaf in leaves if (bound := _bound(leaf.name, macros))]

    for name, setting in macros.items():
        seen, ahead = set(), reads(name)
        while ahead:
            if (other := ahead.pop()) not in seen:
                seen.add(other)
                ahead += reads(other)
        if name in seen:
            yield f"{setting.where}: {name}: the macro %{name} is defined by itself"


def _unset(settings: Sequence[Setting], macros: Mapping[str, Setting]) -> Iterator[str]:
    """Mistakes for values left at `%gin.REQUIRED`, which a later file or binding has to replace."""
    final = {}
    for setting in settings:
        selector = resolve(setting.selector) if setting.parameter else setting.selector
        final[setting.scope, str(selector), setting.parameter] = setting
    for setting in final.values():
        if isinstance(setting.value, Macro) and setting.value.name in ("gin.REQUIRED", "REQUIRED"):
            flag = f'--gin_bindings="{setting.key} = ..."'
            yield f"{setting.where}: {setting.key}: give it a value: {flag}"
