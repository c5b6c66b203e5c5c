"""What must not change a result: keys, neighbours, padding, the way that tokens move.

B sequences (each a group), T tokens, D model width.
"""

from collections.abc import Iterator
import dataclasses

import jax
import numpy as np

from layers.dispatch import Dispatcher, OneHotEinsum, SlotGather
from moe.conformance.harness import (
    B,
    Bench,
    D,
    T,
    Verdict,
    differences,
    draw,
    each_tokens,
    tokens,
    told,
)
from routing.inputs import Tokens

GROW = ((0, 2), (0, 3), (0, 0))  # two sequences and three positions of padding


def determinism(bench: Bench) -> Iterator[Verdict]:
    """Two keys, at evaluation: the same bits."""
    batch, x_BTD = tokens(train=False), draw(2, B, T, D)
    one = bench.evaluate()(x_BTD, batch)
    two = bench.evaluate()(x_BTD, dataclasses.replace(batch, key=jax.random.key(9)))
    same = all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    )
    seen = "two keys, the same result" if same else "still random: another key, another result"
    yield Verdict("deterministic evaluation", same, seen)


def neighbours(bench: Bench) -> Iterator[Verdict]:
    """Sequence 0 at place 7, under another number, among others of other lengths."""
    run, x_BTD, batch = bench.evaluate(), draw(2, B, T, D), tokens(train=False)
    valid_BT = np.arange(T)[None] < np.random.default_rng(3).integers(1, T, B)[:, None]
    valid_BT[7] = True
    others = tokens(train=False, seed=8, valid_BT=valid_BT)
    others = dataclasses.replace(others, token_BT=others.token_BT.at[7].set(batch.token_BT[0]))
    strange_BTD = 3 * draw(4, B, T, D)
    strange_BTD[7] = x_BTD[0]
    one, moved = each_tokens(run(x_BTD, batch)), each_tokens(run(strange_BTD, others))
    same = all(np.allclose(b[7], a[0], 1e-5, 1e-6) for a, b in zip(one, moved, strict=True))
    seen = "alone and among others the same" if same else "the other sequences change it"
    yield Verdict("independence of the batch", same, seen)


def with_padding(train: bool) -> tuple[Tokens, np.ndarray]:
    """The batch of `tokens()` with padded positions and whole padded groups; what is valid."""
    valid_BT = np.pad(np.ones((B, T), bool), GROW[:2])
    padded = tokens(*valid_BT.shape, train=train, seed=6, valid_BT=valid_BT)
    token_BT = padded.token_BT.at[:B, :T].set(tokens().token_BT)
    return dataclasses.replace(padded, token_BT=token_BT), valid_BT


def plain(bench: Bench) -> dict:
    """Gradients, output and what the router says of a batch without padding, moved by gathers."""
    args = draw(0, B, T, D), tokens(), draw(1, B, T, D)
    of_params, of_x_BTD, y_BTD, output = bench.train()(bench.params, *args)
    return {"gradients": (of_params, of_x_BTD), "output": y_BTD, **told(output)}


def padded(bench: Bench, dispatcher: Dispatcher) -> dict:
    """The same of a batch with padding that is full of NaN, cut to the part that is not."""
    batch, valid_BT = with_padding(True)
    x_BTD = np.pad(draw(0, B, T, D), GROW, constant_values=np.nan)
    weight_BTD = np.pad(draw(1, B, T, D), GROW)
    run = bench.train(dispatcher)
    of_params, of_x_BTD, y_BTD, output = run(bench.params, x_BTD, batch, weight_BTD)
    return {
        "gradients": (of_params, of_x_BTD[:B, :T]),
        "output": y_BTD[:B, :T],
        **told(output),
        "padding": (of_x_BTD[~valid_BT], y_BTD[~valid_BT]),
    }


def of_padding(result: dict) -> str:
    """What became of the padding itself, where it is not zero."""
    wrong = [np.asarray(a).any() for a in result.pop("padding")]
    return "padding is not zero" if any(wrong) else ""


def padding(bench: Bench) -> Iterator[Verdict]:
    """Outputs, losses, counts and the gradients to everything, with padding and without.

    In training the padded batch moves by the reference einsum, so that one program tells of padding
    and of movement; where they differ, a further one tells which of the two it is.
    """
    wrong = counts_padding(bench, OneHotEinsum())
    wrong = wrong and counts_padding(bench, SlotGather())
    yield said_of_padding("training", wrong)

    batch, valid_BT = with_padding(False)
    full_BTD = np.pad(draw(0, B, T, D), GROW, constant_values=np.nan)
    y_BTD, output = bench.evaluate()(full_BTD, batch)
    one_BTD, one = bench.evaluate()(draw(0, B, T, D), tokens(train=False))
    wrong = of_padding({"padding": [y_BTD[~valid_BT]]})
    wrong = wrong or differences((y_BTD[:B, :T], told(output)), (one_BTD, told(one)))
    yield said_of_padding("evaluation", wrong)


def counts_padding(bench: Bench, dispatcher: Dispatcher) -> str:
    """What padding changes; empty where it changes nothing."""
    found = padded(bench, dispatcher)
    return of_padding(found) or differences(found, plain(bench))


def said_of_padding(mode: str, wrong: str) -> Verdict:
    seen = "padding changes nothing" if not wrong else f"counts padding: {wrong}"
    return Verdict(f"padding in {mode}", not wrong, seen)


def movement(bench: Bench) -> Iterator[Verdict]:
    """One-hot einsums and gathers: the same output and gradients."""
    wrong = counts_padding(bench, OneHotEinsum())
    if wrong:  # perhaps it is the padding
        found, expected = padded(bench, OneHotEinsum()), padded(bench, SlotGather())
        wrong = differences(found, expected)
    seen = "gathers and one-hot einsums agree" if not wrong else f"the dispatchers differ: {wrong}"
    yield Verdict("movement", not wrong, seen)
