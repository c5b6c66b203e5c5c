"""Does a router keep what it declares? Each property is a function from a bench to verdicts.

`moe check` and the tests judge by these alone.
"""

from collections.abc import Callable, Iterator

import numpy as np

from moe.conformance.causality import causality, length, order
from moe.conformance.harness import B, Bench, D, T, Verdict, draw, tokens
from moe.conformance.independence import determinism, movement, neighbours, padding
from moe.conformance.learning import coefficients, gradients, muon, precision, scale
from moe.conformance.training import (
    at_once,
    mesh,
    micro_batches,
    rematerialisation,
    reported_loss,
    router_state,
)
from routing import Router, Sizes, choices_GE


def load(bench: Bench) -> Iterator[Verdict]:
    """What it does with its first weights: nothing to hold, but worth a look."""
    output = bench.run(True)(draw(0, B, T, D), tokens())[1]
    stats = output.stats
    count_E = np.asarray(stats.count_E)
    skew = count_E.max() / max(count_E.mean(), 1e-9)
    dropped = 1 - np.asarray(stats.kept_E).sum() / max(count_E.sum(), 1)
    seen = f"max/mean load {skew:.2f}, {dropped:.0%} dropped at capacity 1.25, untrained"
    if bench.router.balanced:
        count_GE = np.asarray(choices_GE(output.decision))
        apart = int((count_GE.max(1) - count_GE.min(1)).max())
        seen = f"in no group are two experts more than {apart} apart; {seen}"
        yield Verdict("balance by construction", apart <= 1, seen)
    else:
        yield Verdict("load", None, seen)


Property = Callable[[Bench], Iterator[Verdict]]
# What is read off programs of one small layer, and what compiles steps of whole models.
OF_A_LAYER: tuple[Property, ...] = (
    *(causality, length, order, determinism, neighbours, padding, movement),
    *(gradients, coefficients, scale, precision, muon, load),
)
OF_A_MODEL: tuple[Property, ...] = (
    *(rematerialisation, micro_batches, mesh, at_once, reported_loss, router_state),
)


def check(make: Callable[[Sizes], Router], num_experts: int = 4) -> Iterator[Verdict]:
    """The verdicts, one after the other: some seconds each the first time a program compiles.

    Raises:
        ValueError: the router can't be built with so many experts.
    """
    bench = Bench(make, num_experts)
    for look in (*OF_A_LAYER, *OF_A_MODEL):
        yield from look(bench)
