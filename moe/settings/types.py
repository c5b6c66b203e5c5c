"""Whether a config's values fit the annotations of their parameters, without running anything."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import inspect
import types
import typing
from typing import Annotated, Any, Literal

from gin import config as gin_config

from moe.settings.read import Reference
from routing.ranges import Range

SCALARS = (int, float, bool, str, type(None))
NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    type(None): "None",
}
OURS = {"moe", "layers", "routing"}  # packages; none implements another's protocols
UNKNOWN = object()  # the class of what an unannotated function returns


def mismatch(value: object, annotation: Any) -> str | None:
    """Why a value does not fit an annotation, and what would; None where it fits.

    value: a scalar, a list, tuple or dict of values, or a `Reference`.
    """
    if fits(value, annotation):
        return None
    if isinstance(value, Reference):
        return _of_reference(value, annotation)
    if isinstance(value, list | tuple) and (items := items_of(annotation)) is not None:
        return next(f"item {i}: {why}" for i, v in enumerate(value) if (why := mismatch(v, items)))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    ranges = _ranges(annotation)
    if number and ranges and _is_kind(value, annotation):
        if typing.cast(float, value) > max(r.high for r in ranges):
            return f"expected at most {max(r.high for r in ranges):,.10g}, got {value:,}"
        return f"expected {described(annotation)}, got {value!r}"
    if isinstance(value, str):
        for candidate in _candidates(annotation):
            if value.removeprefix("@").removesuffix("()") == candidate.strip("@()"):
                return f"{value!r} is text; write {candidate}"
        if (items := items_of(annotation)) is not None and fits(value, items):
            return f"{value!r} is one text; write ({value!r},)"
    return f"expected {described(annotation)}, got {value!r} ({type(value).__name__})"


def fits(value: object, annotation: Any) -> bool:
    """Whether the value is of the annotated type and, for numbers, in its range."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        ranges = [meta for meta in arguments[1:] if isinstance(meta, Range)]
        if not fits(value, arguments[0]):
            return False
        return isinstance(value, Reference) or all(r.holds(typing.cast(Any, value)) for r in ranges)
    if annotation in (None, inspect.Parameter.empty, Any):
        return True if annotation is not None else value is None
    if _is_union(annotation):
        return any(fits(value, member) for member in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if isinstance(value, Reference):
        return _reference_fits(value, annotation)
    if annotation in SCALARS:
        return type(value) is annotation or (annotation is float and type(value) is int)
    if (items := items_of(annotation)) is not None:
        return isinstance(value, list | tuple) and all(fits(item, items) for item in value)
    kind = origin or annotation
    if inspect.isclass(kind) and kind not in (list, tuple, dict) and not issubclass(kind, Mapping):
        return False  # only a reference gives an instance or a callable
    return not inspect.isclass(kind) or isinstance(value, Mapping | list | tuple)


def _reference_fits(reference: Reference, annotation: Any) -> bool:
    """Whether a reference fits: `@X()` stands for what X makes, `@X` for X, to be called later."""
    return _made_fits(made_class(reference), reference.called, annotation)


def _made_fits(made: Any, called: bool, annotation: Any) -> bool:
    """The same for what the reference's configurable makes."""
    if _is_callable(annotation):
        wanted = typing.get_args(annotation)[1] if typing.get_args(annotation) else UNKNOWN
        if called:
            return made is UNKNOWN or _is_callable(made)
        return made is UNKNOWN or is_a(made, wanted)
    if not called:
        return False
    if made is UNKNOWN:
        return True
    return is_a(made, typing.get_origin(annotation) or annotation)


def made_class(reference: Reference) -> Any:
    """The class that a configurable makes when called; UNKNOWN without a return annotation."""
    name = reference.name.rsplit("/", 1)[-1]
    matches = tuple(gin_config._REGISTRY.matching_selectors(name))
    if len(matches) != 1:
        return UNKNOWN
    wrapped = gin_config._REGISTRY[matches[0]].wrapped
    if inspect.isclass(wrapped):
        return wrapped
    try:
        made = typing.get_type_hints(wrapped).get("return", UNKNOWN)
    except Exception:  # an annotation that only a type checker can read
        return UNKNOWN
    return UNKNOWN if made is Any else made


def is_a(made: Any, wanted: Any) -> bool:
    """Whether an object of class `made` fits the annotation `wanted`; true where unknown."""
    origin = typing.get_origin(wanted)
    if _is_union(wanted):
        return any(is_a(made, member) for member in typing.get_args(wanted))
    kind = origin or wanted
    if not inspect.isclass(kind) or not inspect.isclass(made):
        return True
    if getattr(kind, "_is_protocol", False):
        if {_package(made), _package(kind)} <= OURS and _package(made) != _package(kind):
            return False  # methods of the same names are a coincidence
        fields = getattr(made, "__dataclass_fields__", {})
        members = [name for name in _members(kind) if not name.startswith("_")]
        return all(hasattr(made, name) or name in fields for name in members)
    return issubclass(made, kind)


def _members(protocol: type) -> set[str]:
    own = {name for base in protocol.__mro__ for name in getattr(base, "__annotations__", {})}
    own |= {n for base in protocol.__mro__ if base is not object for n in vars(base)}
    return own - set(dir(typing.Protocol))


def _of_reference(reference: Reference, annotation: Any) -> str:
    """Why a reference does not fit, and what to write instead."""
    other = Reference(reference.name, not reference.called)
    if fits(other, annotation):
        why = "is made when it is needed" if reference.called else "has to be made here"
        return f"write {other!r}, not {reference!r}: it {why}"
    made = made_class(reference)
    found = f"{reference!r} is no such thing" if made is UNKNOWN else f"got {reference!r}"
    return f"expected {described(annotation)}, {found}"


def described(annotation: Any) -> str:
    """An annotation in words, such as "a number at least 1 or None" or "@Capacity()"."""
    return " or ".join(dict.fromkeys(_described(annotation)))


def _described(annotation: Any) -> Iterator[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        for words in _described(arguments[0]):
            yield f"{words} {' and '.join(str(m) for m in arguments[1:])}"
    elif _is_union(annotation):
        for member in arguments:
            yield from _described(member)
    elif origin is Literal:
        yield from map(repr, arguments)
    elif annotation in SCALARS:
        yield NAMES[annotation]
    elif (items := items_of(annotation)) is not None:
        yield f"a list of {described(items)}"
    elif candidates := _candidates(annotation):
        others = [*candidates[1:5], *(["..."] if candidates[5:] else [])]
        more = f" (or {', '.join(others)})" if others else ""
        yield f"{candidates[0]}{more}"
    elif _is_callable(annotation):
        yield "a class, or a function that makes an object"
    elif inspect.isclass(kind := origin or annotation):
        yield f"a {kind.__name__}"
    else:
        yield "another value"


def _candidates(annotation: Any) -> list[str]:
    """The references to configurables that fit the annotation, as a config writes them."""
    if _is_union(annotation):
        return [c for member in typing.get_args(annotation) for c in _candidates(member)]
    if annotation in SCALARS or not (_is_callable(annotation) or inspect.isclass(annotation)):
        return []
    called = not _is_callable(annotation)
    if not called and not any(map(_ours, typing.get_args(annotation)[1:])):
        return []  # it takes any module of Flax, or anything
    names = tuple(name for name, _ in gin_config._REGISTRY.items() if not name.startswith("gin."))
    makers = _makers(names)
    found = [
        repr(Reference(n, called)) for n, made in makers if _made_fits(made, called, annotation)
    ]
    return sorted(found, key=str.lower)


@functools.lru_cache(maxsize=1)
def _makers(names: tuple[str, ...]) -> list[tuple[str, type]]:
    """The configurables of these names that make objects of a known class: short name and class."""
    short = [gin_config._REGISTRY.minimal_selector(name) for name in names]
    made = [(name, made_class(Reference(name, False))) for name in short]
    return [(name, kind) for name, kind in made if inspect.isclass(kind)]


def _ours(made: Any) -> bool:
    kinds = typing.get_args(made) if _is_union(made) else (made,)
    return any(_package(kind) in OURS for kind in kinds)


def _package(kind: Any) -> str:
    return getattr(kind, "__module__", "").partition(".")[0]


def items_of(annotation: Any) -> Any:
    """The annotation of a list's items; None where the annotation is no list."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if _is_union(annotation):
        found = [items for member in arguments if (items := items_of(member)) is not None]
        return found[0] if found else None
    if not inspect.isclass(origin) or not issubclass(origin, Sequence) or not arguments:
        return None
    return arguments[0]


def _ranges(annotation: Any) -> list[Range]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return [meta for meta in arguments[1:] if isinstance(meta, Range)]
    if _is_union(annotation):
        return [r for member in arguments for r in _ranges(member)]
    return []


def _is_kind(value: object, annotation: Any) -> bool:
    """Whether a number has the annotated type, whatever its range."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return fits(value, arguments[0])
    if _is_union(annotation):
        return any(_is_kind(value, member) for member in arguments)
    return False


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _is_callable(annotation: Any) -> bool:
    return annotation is Callable or typing.get_origin(annotation) is Callable
