"""Logical axes for activations: layers name them, whoever runs the model maps them to a mesh.

Layers call `constrain(x_GTD, "batch", None, None)`. Outside `with placing(rule):` it does nothing.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars

import jax

Rule = Callable[[tuple[str | None, ...], tuple[int, ...]], jax.sharding.Sharding]
_rule: contextvars.ContextVar[Rule | None] = contextvars.ContextVar("rule", default=None)


@contextlib.contextmanager
def placing(rule: Rule | None) -> Iterator[None]:
    """While this is open, `constrain` asks `rule` for the sharding of logical axes."""
    token = _rule.set(rule)
    try:
        yield
    finally:
        _rule.reset(token)


def is_placed() -> bool:
    """True where arrays are spread over several devices."""
    return _rule.get() is not None


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, placed as its logical axes say (one name, or None, per dimension)."""
    rule = _rule.get()
    if rule is None:
        return x
    assert len(axes) == x.ndim, (axes, x.shape)
    return jax.lax.with_sharding_constraint(x, rule(axes, x.shape))
