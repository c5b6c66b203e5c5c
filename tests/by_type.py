"""The type checker of the tests: beartype, by annotations, on every function of the packages.

Constructors are checked where they take arrays. Gin calls the others, and its messages about
settings that are missing or wrong are tested: nothing may stand between the two.

An int may stand where a float is asked for, as PEP 484 has it. A choice among words (`Literal`) is
left to the code, which refuses a wrong one with a message of its own that the tests look at.

A fit of a scaling law calls functions of some microseconds a million times: there the checker would
take most of the time, and is left out.

The import hook of jaxtyping (`--jaxtyping-packages`) writes `@jaxtyping.jaxtyped` over every
function and class; what stands here under that name is asked from the import of this module on.
"""

import dataclasses
import inspect
import typing

from beartype import BeartypeConf, beartype
import jaxtyping

UNCHECKED = "moe.scaling"
_jaxtyped = jaxtyping.jaxtyped
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
    """The function with its arguments and results checked against their annotations."""
    hints = getattr(function, "__annotations__", {})
    function.__annotations__ = {
        name: typing.Any if _is_choice(hint) else hint for name, hint in hints.items()
    }
    return _beartype(function)


def jaxtyped(*, typechecker):
    """`jaxtyping.jaxtyped`, but for constructors that take no arrays and what is unchecked."""
    decorate = _jaxtyped(typechecker=typechecker)
    return lambda thing: decorate(thing) if _is_checked(thing) else thing


def _is_checked(thing) -> bool:
    """False for a constructor without arrays: an `__init__`, or a dataclass with its own."""
    if thing.__module__.startswith(UNCHECKED):
        return False
    if inspect.isclass(thing):
        fields = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
        return any(_has_array(field.type) for field in fields)
    if getattr(thing, "__name__", "") != "__init__":
        return True
    return any(_has_array(hint) for hint in thing.__annotations__.values())


def _has_array(hint) -> bool:
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_has_array(option) for option in typing.get_args(hint))


def _is_choice(hint) -> bool:
    options = (hint, *typing.get_args(hint))
    return any(typing.get_origin(option) is typing.Literal for option in options)


jaxtyping.jaxtyped = jaxtyped
