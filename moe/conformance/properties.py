"""Does a router keep what it declares? Each property is a function from a bench to verdicts.

`moe check` and the tests judge by these alone.
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from moe.conformance.causality import causality, length, order
from moe.conformance.harness import B, Bench, D, T, Verdict, draw, tokens, told
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
from routing import Decision, ExpertChoice, Router, Sizes, TokenChoice, choices_GE


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


def decision(bench: Bench) -> Iterator[Verdict]:
    """What all else takes for granted: finite numbers, experts and tokens that are there, and no
    expert twice for a token."""
    for train, mode in ((True, "training"), (False, "evaluation")):
        result = bench.run(train)(draw(0, B, T, D), tokens(train=train))
        wrong = not_finite(result) or ill_formed(result[1].decision, bench)
        seen = wrong or "all numbers finite, every choice one of an expert and a token"
        yield Verdict(f"decision in {mode}", not wrong, seen)


def not_finite(result) -> str:
    """The first array of a layer's (y, output) that isn't finite, in words; empty where all are."""
    y_BTD, output = result
    arrays = {"decision": output.decision, **told(output), "output": y_BTD}
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.asarray(leaf)
        if array.dtype.kind == "f" and (count := int((~np.isfinite(array)).sum())):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            hint = ": are all scores at least 0?" if "entropy" in name else ""
            return f"{name} is not finite in {count} of {array.size} places{hint}"
    return ""


def ill_formed(decision: Decision, bench: Bench) -> str:
    """What makes it no choice of experts by tokens, or the reverse; empty where it is one."""
    if isinstance(decision, TokenChoice):
        keep_GTK = np.asarray(decision.keep_GTK)
        expert_GTK = np.where(keep_GTK, decision.expert_GTK, -1)
        chosen_N = expert_GTK[keep_GTK]
        if wrong := outside(chosen_N, bench.num_experts, "expert"):
            return wrong
        sorted_GTK = np.sort(expert_GTK, axis=-1)
        twice = (sorted_GTK[..., 1:] == sorted_GTK[..., :-1]) & (sorted_GTK[..., 1:] >= 0)
        if twice.any() and not bench.router.repeats_experts:
            count = int(twice.any(-1).sum())
            return f"{count} tokens chose an expert twice, and repeats_experts=False is declared"
    if isinstance(decision, ExpertChoice):
        token_N = np.asarray(decision.token_GEC)[np.asarray(decision.keep_GEC)]
        return outside(token_N, decision.num_tokens, "token")
    return ""


def outside(chosen_N: np.ndarray, size: int, what: str) -> str:
    """Which of some numbers lies outside of 0 to size - 1, in words; empty where none does."""
    wrong_N = chosen_N[(chosen_N < 0) | (chosen_N >= size)]
    if not wrong_N.size:
        return ""
    return f"{what} {wrong_N[0]} is chosen, and they are 0 to {size - 1}"


Property = Callable[[Bench], Iterator[Verdict]]
# What is read off programs of one small layer, and what compiles steps of whole models.
OF_A_LAYER: tuple[Property, ...] = (
    *(decision, causality, length, order, determinism, neighbours, padding, movement),
    *(gradients, coefficients, scale, precision, muon, load),
)
OF_A_MODEL: tuple[Property, ...] = (
    *(rematerialisation, micro_batches, mesh, at_once, reported_loss, router_state),
)


def check(make: Callable[[Sizes], Router], num_experts: int = 4) -> Iterator[Verdict]:
    """The verdicts, one after the other: some seconds each the first time a program compiles.

    Where a decision is none, nothing else is looked at: the other verdicts would say untrue things.

    Raises:
        ValueError: the router can't be built with so many experts.
    """
    bench = Bench(make, num_experts)
    for look in (*OF_A_LAYER, *OF_A_MODEL):
        failed = False
        for verdict in look(bench):
            failed = failed or verdict.holds is False
            yield verdict
        if failed and look is decision:
            yield Verdict("all else", None, "not looked at: it takes the above for granted")
            return
