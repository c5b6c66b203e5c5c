"""The type checker of the tests: beartype, by annotations.

It looks at the files that pyproject.toml names: those that arrays pass through. Not at constructors
of layers and routers: gin calls them, and its messages about missing settings are tested.

An int may stand where a float is asked for, as PEP 484 has it. A choice among words (`Literal`) is
left to the code, which refuses a wrong one with a message of its own that the tests look at.
"""

import typing

from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
    """The function with its arguments and results checked against their annotations."""
    hints = getattr(function, "__annotations__", {})
    function.__annotations__ = {
        name: typing.Any if _is_choice(hint) else hint for name, hint in hints.items()
    }
    return _beartype(function)


def _is_choice(hint) -> bool:
    options = (hint, *typing.get_args(hint))
    return any(typing.get_origin(option) is typing.Literal for option in options)
