"""Speculative decoding: texts are the model's own, greedy ones token for token.

Broken on purpose and seen red: tokens that were taken back stay visible, a window's ring without
spare slots, the draft's last guess left out of its cache, the residual drawn by p.

B texts, T tokens, A ahead, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from marks import mainly
import numpy as np
import pytest
from test_decoding import LENGTH_B, PADDED, SLOTS, decoding_of, texts, top2

from layers.attention import Attention
from moe.errors import UserError
from moe.inference.decoder import Decoder, reason_to_go_one_by_one
from moe.inference.drafts import Jacobi, Lookahead, Lookup, ModelDraft
from moe.inference.sampling import Sampling
from moe.inference.speculative import Speculator, accepted
from moe.model import functional
from moe.model.transformer import Transformer
from routing import initialize

GREEDY = Sampling(temperature=0)


class Letters:
    """A tokenizer of 24 tokens: a to x, of which x ends a document."""

    document_id = 23

    def encode_batch(self, texts):
        return [[ord(letter) - ord("a") for letter in text] for text in texts]

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids)


@functools.cache
def decoder(seed, window=None, num_layers=2):
    attention = functools.partial(Attention, window=window)
    sizes = {"d_model": 16, "num_layers": num_layers, "num_heads": 2, "attention": attention}
    settings = {} if num_layers == 1 else {"moe": top2}
    model = initialize(Transformer(24, **sizes, **settings), seed)
    graph, params, state = functional.split(model)
    # Far from even: otherwise rounding would decide what is likeliest.
    return Decoder(graph, {name: 4 * a for name, a in params.items()}, state)


MANY = ("top2", "window", "alibi, grouped", "depths of experts")


@pytest.mark.parametrize("name", mainly(("top2", "window"), MANY))
def test_several_tokens_at_once_are_one_after_the_other(name):
    """Then three of them are taken back, and two others go on in their place."""
    decoding, token_BT = decoding_of(name), texts(0)
    run, row_B = decoding.decoder, np.arange(len(LENGTH_B))
    padded_BT = np.where(np.arange(PADDED)[None] < LENGTH_B[:, None], token_BT[:, :PADDED], 0)
    _, caches = run.prefill(padded_BT, LENGTH_B, SLOTS, 3)
    wrong_BT = (token_BT + 1) % 7
    index_BT = LENGTH_B[:, None] + np.arange(4)
    first_BT = np.concatenate(
        [token_BT[row_B, LENGTH_B][:, None], wrong_BT[row_B[:, None], index_BT[:, 1:]]], axis=1
    )
    _, caches, _ = run.extend(caches, first_BT, LENGTH_B)
    found_BTV, caches, used = run.extend(
        caches, token_BT[row_B[:, None], index_BT[:, 1:3]], LENGTH_B + np.int32(1)
    )
    expected_BTV, one_by_one = decoding.steps(token_BT)
    np.testing.assert_allclose(found_BTV, expected_BTV[:, 2:4], rtol=1e-5, atol=1e-5)
    for layer, used_BTE in enumerate(used):
        for i in range(2):
            np.testing.assert_array_equal(used_BTE[:, i], one_by_one[1 + i][layer])


@pytest.mark.parametrize("name", ["hash_bigram", "lory", "depths, in turn"])
def test_routers_that_carry_state_go_one_by_one(name):
    assert "from one token to the next" in reason_to_go_one_by_one(decoding_of(name).model)


PROMPTS = ["abcabcab", "q"]


@functools.cache
def greedy(window):
    """The model's own texts, step by step."""
    run, found = decoder(0, window), []
    for text in Letters().encode_batch(PROMPTS):
        ids = [23, *text]
        for _ in range(20):
            padded_1T = np.asarray([ids + [0] * (32 - len(ids))])
            logits_BV, _ = run.prefill(padded_1T, np.asarray([len(ids)]), 32)
            ids.append(int(np.argmax(logits_BV[0])))
        found.append(ids[1 + len(text) :])
    return found


DRAFTS = {
    "another model": lambda: ModelDraft(decoder(1, num_layers=1), GREEDY),
    "the model itself": lambda: ModelDraft(decoder(0, 4), GREEDY),
    "lookup": Lookup,
    "jacobi": Jacobi,
    "lookahead": Lookahead,
}


def test_lookahead_keeps_what_the_model_said_after_guesses_too():
    """The rows of one text by hand: its prompt's pairs, then what followed refused guesses."""
    draft = Lookahead()
    draft.start(np.asarray([[5, 1, 2, 3, 1, 2]]), np.asarray([6]), 32, 3)

    def guess(text):
        return draft.guess([text], 3, jax.random.key(0))[0].tolist()[0]

    assert guess([5, 1, 2, 3, 1, 2]) == [3, 1, 2]
    # Of these guesses the first holds. After 3 the model says 7; after the refused 1 and 2: 8, 9.
    draft.verified(np.asarray([[3, 7, 8, 9]]), np.asarray([1]))
    # Nothing is known of 3, 7: its own likeliest tokens after the refused guesses, as Jacobi's.
    assert guess([5, 1, 2, 3, 1, 2, 3, 7]) == [8, 9, 7]
    draft.verified(np.asarray([[2, 3, 1, 4]]), np.asarray([0]))
    # Jacobi's 3 after 7, 2; then 7 follows 2, 3, and 2 follows 3, 7.
    assert guess([5, 1, 2, 3, 1, 2, 3, 7, 2]) == [3, 7, 2]


@pytest.mark.parametrize("draft", mainly(["the model itself", "lookahead"], DRAFTS))
def test_greedy_texts_are_the_same_token_for_token(draft):
    run = Speculator(decoder(0, 4), Letters(), 64, DRAFTS[draft](), ahead=3, sampling=GREEDY)
    pieces = []
    found = run.continuations(PROMPTS, tokens=20, say=pieces.append)
    for own, expected in zip(found.tokens, greedy(4), strict=True):
        end = expected.index(23) if 23 in expected else len(expected)
        assert own == expected[:end]
    assert "".join(pieces) == found.texts[0]
    if draft == "the model itself":
        assert found.held == 3 and found.steps <= 20 / 4 + 1
    assert all(2 <= count <= 4 for count in found.experts)


def test_first_tokens_are_drawn_by_the_models_distribution():
    """A hundred thousand draws of one guess and what follows: chi-square by p of both tokens."""
    rng, draws, vocab = np.random.default_rng(0), 100_000, 4
    p_TV = rng.dirichlet(np.ones(vocab), 3)  # does not depend on the tokens before, here
    q_AV = rng.dirichlet(np.ones(vocab), 2)
    guess_key, key = jax.random.split(jax.random.key(0))
    shape = (draws, 2, vocab)
    q_BAV = jnp.broadcast_to(jnp.asarray(q_AV, jnp.float32), shape)
    token_BA = jax.random.categorical(guess_key, jnp.log(q_BAV))
    p_BTV = jnp.broadcast_to(jnp.asarray(p_TV, jnp.float32), (draws, 3, vocab))
    count_B, next_B = map(np.asarray, jax.jit(accepted)(p_BTV, q_BAV, token_BA, key))
    first_B = np.where(count_B > 0, np.asarray(token_BA)[:, 0], next_B)
    for seen_B, expected_V in (
        (first_B, p_TV[0]),
        (np.where(count_B > 1, np.asarray(token_BA)[:, 1], next_B)[count_B > 0], p_TV[1]),
        (next_B[count_B == 2], p_TV[2]),
    ):
        observed_V = np.bincount(seen_B, minlength=vocab)
        chi = ((observed_V - len(seen_B) * expected_V) ** 2 / (len(seen_B) * expected_V)).sum()
        assert chi < 16.3, (chi, observed_V)  # 0.1 % of chi-square with 3 degrees of freedom
    held = 1 - 0.5 * np.abs(p_TV[0] - q_AV[0]).sum()  # 1 - TV(p, q)
    assert np.mean(count_B > 0) == pytest.approx(held, abs=0.005)


def test_what_can_not_be_is_told():
    with pytest.raises(UserError, match="beyond the context of 16"):
        Speculator(decoder(0, 4), Letters(), 16, Lookup(), sampling=GREEDY).continuations(
            PROMPTS, tokens=10
        )
    with pytest.raises(UserError, match="leave one out"):
        penalty = Sampling(repetition_penalty=1.1)
        Speculator(decoder(0, 4), Letters(), 16, Lookup(), sampling=penalty)
    with pytest.raises(UserError, match="Lory carries what it needs"):
        Speculator(decoding_of("lory").decoder, Letters(), 16, Lookup())
    with pytest.raises(UserError, match="could not be taken back: Lory"):
        ModelDraft(decoding_of("lory").decoder, GREEDY)
