"""What each token's routing may depend on: the future, the text's length, the order, the ids.

B sequences (each a group), T tokens, D model width.
"""

from collections.abc import Callable, Iterator
import dataclasses

import jax.numpy as jnp
import numpy as np

from moe.conformance.harness import B, Bench, D, T, Verdict, draw, each_tokens, tokens
from routing import Causality

RTOL, ATOL = 1e-5, 1e-6


def causality(bench: Bench) -> Iterator[Verdict]:
    """Everything from a random cut on is changed; did anything before it move?"""
    declared = bench.router.causality
    for train, mode in ((True, "training"), (False, "evaluation")):
        moved_B, reached = moved_by_the_future(bench.run(train), train)
        moved = int(moved_B.sum())
        causal = declared is Causality.CAUSAL
        causal |= declared is Causality.CAUSAL_AT_EVALUATION and not train
        seen = f"declared {declared.value}; a changed future moved {moved} of {B} prefixes"
        if not reached:
            seen = "nothing moved at all: the output does not depend on the tokens"
        elif moved and causal:
            seen = f"leaks the future: {seen}"
        elif not moved and not causal:
            seen = f"declares a leak that is not there: {seen}"
        yield Verdict(f"causality in {mode}", reached and bool(moved) != causal, seen)


def moved_by_the_future(run: Callable, train: bool) -> tuple[np.ndarray, bool]:
    """For B trials: did anything before a random cut change when all from the cut on changed?

    And whether anything from the cut on did.
    """
    later_BT = np.arange(T)[None] >= np.random.default_rng(5).integers(1, T, (B, 1))
    first, other = tokens(train=train), tokens(train=train, seed=1)
    mixed_BT = jnp.where(later_BT, other.token_BT, first.token_BT)
    x_BTD = draw(0, B, T, D)
    mixed_BTD = np.where(later_BT[..., None], draw(1, B, T, D), x_BTD)
    one = each_tokens(run(x_BTD, first))
    two = each_tokens(run(mixed_BTD, dataclasses.replace(first, token_BT=mixed_BT)))
    different_BT = [(a != b).reshape(B, T, -1).any(-1) for a, b in zip(one, two, strict=True)]
    moved_B = (np.any(different_BT, axis=0) & ~later_BT).any(1)
    return moved_B, bool((different_BT[0] & later_BT).any())


def length(bench: Bench) -> Iterator[Verdict]:
    """A text's length is a part of its future, too: at evaluation nothing may depend on it."""
    moved = int(moved_by_the_length(bench.evaluate()).sum())
    causal = bench.router.causality is not Causality.NEVER
    seen = f"a text that goes on moved {moved} of {B} beginnings"
    if moved and causal:
        seen = f"leaks the future's length: {seen}"
    elif not moved and not causal:
        seen = f"declares a leak that is not there: {seen}"
    yield Verdict("causality by length", bool(moved) != causal, seen)


def moved_by_the_length(run: Callable) -> np.ndarray:
    """For B texts that end somewhere: does anything in them differ from the same text that goes on?

    At evaluation; the rest of the array is padding.
    """
    before_BT = np.arange(T)[None] < np.random.default_rng(6).integers(1, T, (B, 1))
    x_BTD = draw(0, B, T, D)
    whole = each_tokens(run(x_BTD, tokens(train=False)))
    part = each_tokens(run(x_BTD, tokens(train=False, valid_BT=before_BT)))
    same_BT = [
        np.isclose(a, b, RTOL, ATOL).reshape(B, T, -1).all(-1)
        for a, b in zip(whole, part, strict=True)
    ]
    return (~np.all(same_BT, axis=0) & before_BT).any(1)


def order(bench: Bench) -> Iterator[Verdict]:
    """Tokens permuted inside their groups; then other ids for the same vectors. At evaluation."""
    run, x_BTD, batch = bench.evaluate(), draw(0, B, T, D), tokens(train=False)
    order_BT = np.argsort(np.random.default_rng(2).random((B, T)), axis=1)
    token_BT = jnp.take_along_axis(batch.token_BT, order_BT, axis=1)
    permuted_BTD = np.take_along_axis(x_BTD, order_BT[..., None], axis=1)
    moved = each_tokens(run(permuted_BTD, dataclasses.replace(batch, token_BT=token_BT)))
    plain = each_tokens(run(x_BTD, batch))
    back = [np.take_along_axis(a, order_BT.reshape(B, T, *[1] * (a.ndim - 2)), 1) for a in plain]
    same = all(np.allclose(a, b, RTOL, ATOL) for a, b in zip(moved, back, strict=True))
    yield declared("places of tokens", bench.router.order_matters, not same)

    other = each_tokens(run(x_BTD, tokens(train=False, seed=9)))[1:]
    same = all(np.array_equal(a, b) for a, b in zip(other, plain[1:], strict=True))
    yield declared("token ids", bench.router.needs_token_ids, not same)


def declared(what: str, says: bool, does: bool) -> Verdict:
    """Whether the decision depends on something and declares it, or neither."""
    seen = f"they {'decide, too' if does else 'change nothing'}, as declared"
    if says != does:
        seen = f"they {'decide' if does else 'change nothing'}, and {says} is declared"
    return Verdict(what, says == does, seen)
