"""Beam search against all texts, scored one by one.

Broken on purpose and seen red: caches that stay with their rows, the end's probability left out.
"""

import functools
import itertools

import jax
import numpy as np
import pytest

from layers.moe_layer import MoELayer
from moe.errors import UserError
from moe.inference.beams import BeamSearch
from moe.inference.decoder import Decoder
from moe.model import functional
from moe.model.transformer import Transformer
from routing import Hash, TopK, initialize

V, END, PROMPT, N = 5, 4, [4, 1, 2], 3


@functools.cache
def decoder(router):
    """Over five tokens, far from even. The previous token's hash is a router with a state."""
    make = {"top_k": functools.partial(TopK, k=2), "hash": functools.partial(Hash, key="previous")}
    moe = functools.partial(MoELayer, router=make[router], num_experts=4, d_ff=8)
    model = initialize(Transformer(V, d_model=16, num_layers=2, num_heads=2, moe=moe), 3)
    graph, params, state = functional.split(model)
    return Decoder(graph, {name: 4 * a for name, a in params.items()}, state)


@functools.cache
def every_text(router):
    """The log-probability of each text of at most N tokens, with its end where it has one."""
    run, found = decoder(router), {}
    for length in range(N + 1):
        for text in itertools.product(range(V - 1), repeat=length):
            whole = [*PROMPT, *text]
            padded_1T = np.asarray([whole + [0] * (len(PROMPT) + N - len(whole))])
            logits_1V, _ = run.prefill(padded_1T, np.asarray([len(whole)], np.int32), 8)
            found[text] = np.asarray(jax.nn.log_softmax(logits_1V[0]))
    totals = {(): 0.0}
    for text in sorted(found, key=len):
        if text:
            totals[text] = totals[text[:-1]] + found[text[:-1]][text[-1]]
    ended = {text: totals[text] + found[text][END] for text in found if len(text) < N}
    return ended, {text: total for text, total in totals.items() if len(text) == N}


@pytest.mark.parametrize("router", ["top_k", "hash"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_with_beams_enough_it_finds_the_best_of_all_texts(router, alpha):
    search = BeamSearch(beams=64, alpha=alpha)
    ended, whole = every_text(router)
    scores = {text: total / search.length_penalty(len(text) + 1) for text, total in ended.items()}
    scores |= {text: total / search.length_penalty(N) for text, total in whole.items()}
    best = sorted(scores.items(), key=lambda item: -item[1])[:5]
    found = search(decoder(router), PROMPT, END, tokens=N, context=8)[:5]
    assert [h.tokens for h in found] == [text for text, _ in best]
    np.testing.assert_allclose([h.score for h in found], [score for _, score in best], rtol=1e-4)
    assert found[0].log_prob == pytest.approx((ended | whole)[found[0].tokens], rel=1e-4)


def test_one_beam_finds_a_text_and_its_own_probability():
    ended, whole = every_text("top_k")
    (found,) = BeamSearch(beams=1, alpha=0)(decoder("top_k"), PROMPT, END, tokens=N, context=8)
    assert found.log_prob == pytest.approx((ended | whole)[found.tokens], rel=1e-4)


def test_beyond_the_context_it_says_so():
    with pytest.raises(UserError, match="at most 5 more are within it"):
        BeamSearch()(decoder("top_k"), PROMPT, END, tokens=9, context=8)
