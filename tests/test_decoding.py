"""Cached decoding is the forward pass, for every router and layer of the framework.

Broken on purpose and seen red: the slot of a key (with ALiBi), a window's mask, segments that begin
one token late (Lory, Soft MoE), a bigram's previous token, draws by place, Balanced's count,
Mixture-of-Depths' tokens that pass by kept as keys, prefill's last token.

B sequences, T tokens, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from marks import mainly
import numpy as np
import pytest
from rows import ROUTERS, TEXT, V

from layers.attention import Attention
from layers.block import Block
from layers.experts.latent import LatentExperts
from layers.experts.shared import SharedExpert
from layers.moe_layer import MoELayer
from moe.inference.decoder import Decoder, reason_to_recompute
from moe.model import functional
from moe.model.transformer import Transformer
from routing import Balanced, Capacity, MixtureOfDepths, TopK, initialize

T = 11
LENGTH_B = np.array([5, 2, 4], np.int32)
SLOTS, PADDED = 12, 6
top2 = functools.partial(MoELayer, router=functools.partial(TopK, k=2), num_experts=4, d_ff=8)
MODELS = {
    "dense": {},
    "alibi, grouped": {
        "positions": "alibi",
        "attention": functools.partial(Attention, num_kv_heads=1, qk_norm=True),
    },
    "window": {"attention": functools.partial(Attention, window=3)},
    "learned, parallel": {
        "positions": "learned",
        "max_length": 16,
        "block": functools.partial(Block, parallel=True),
    },
    "dense and sparse": {"moe": top2, "moe_every": 2, "positions": "sinusoidal"},
    "companions": {
        "moe": functools.partial(top2, experts=LatentExperts, companions=(SharedExpert,))
    },
}
through = functools.partial(MixtureOfDepths, capacity=0.5)
MODELS |= {
    "depths": {"depth_router": through, "depth_every": 1},
    "depths of experts": {"moe": top2, "depth_router": through},
    "depths, in turn": {
        "moe": functools.partial(top2, router=functools.partial(Balanced, k=1)),
        "depth_router": through,
        "depth_every": 1,
    },
}


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A small model, its logits at evaluation, and its decoder, compiled once."""

    model: Transformer
    split: tuple
    decoder: Decoder
    logits: object

    def steps(self, token_BT, length_B=LENGTH_B, steps=6):
        """Logits and experts used at each step, after prompts of these lengths."""
        padded_BT = np.where(np.arange(PADDED)[None] < length_B[:, None], token_BT[:, :PADDED], 0)
        logits_BV, caches = self.decoder.prefill(padded_BT, length_B, SLOTS)
        found, used, row_B = [logits_BV], [], np.arange(len(length_B))
        for i in range(steps):
            at_B = length_B + np.int32(i)
            logits_BV, caches, layers = self.decoder.step(caches, token_BT[row_B, at_B], at_B)
            found.append(logits_BV)
            used.append(layers)
        return np.stack(found, axis=1), jax.tree.map(np.asarray, used)


@functools.cache
def decoding_of(name) -> Decoding:
    """Of a router's row or of a model's; predictors of depths let about half of the tokens go."""
    if name in ROUTERS:
        row = ROUTERS[name]
        options = {"router": row.make, "num_experts": 4, "d_ff": 8, **row.layer}
        settings = {"moe": functools.partial(MoELayer, **options), "allow_leaks": True}
    else:
        settings = MODELS[name]
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "text": TEXT}
    graph, params, state = functional.split(initialize(Transformer(V, **sizes, **settings), 0))
    for each, values in ((n, params) for n in params if n.endswith("guess_H")):
        signs_H = (-1.0) ** np.arange(values[each].shape[-1], dtype=np.float32)
        values[each] = jnp.broadcast_to(signs_H, values[each].shape)

    @jax.jit
    def logits(token_BT):
        model = graph.merge(params, state)
        return model.logits(model(token_BT).hidden_BTD)

    split = graph, params, state
    return Decoding(graph.merge(params, state), split, Decoder(*split), logits)


def texts(seed, sequences=3):
    return np.random.default_rng(seed).integers(0, V, (sequences, T)).astype(np.int32)


NEVER = ("hash_future", "expert_choice", "soft_moe", "soft_moe_raw", "smear", "soft_choice")
CAUSAL = [name for name in ROUTERS if name not in NEVER] + list(MODELS)
KEPT = ("top2", "hash_bigram", "lory", "soft_moe_causal", "window", "depths of experts")


@pytest.mark.parametrize("name", mainly(KEPT, CAUSAL))
def test_a_step_is_the_forward_pass_whoever_is_beside_it(name):
    """Prompts of three lengths; then the same text among others: its logits and its experts."""
    decoding, token_BT = decoding_of(name), texts(0)
    found_BTV, used = decoding.steps(token_BT)
    full_BTV = np.asarray(decoding.logits(token_BT))
    for found_TV, full_TV, length in zip(found_BTV, full_BTV, LENGTH_B, strict=True):
        told_TV = full_TV[length - 1 : length + 6]
        np.testing.assert_allclose(found_TV, told_TV, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found_TV.argmax(-1), told_TV.argmax(-1))
    others_BT = texts(1)
    others_BT[0] = token_BT[0]
    again_BTV, again = decoding.steps(others_BT, LENGTH_B[[0, 2, 1]])
    np.testing.assert_allclose(again_BTV[0], found_BTV[0], rtol=1e-6, atol=1e-6)
    for one, other in zip(jax.tree.leaves(used), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one[0], other[0])


IN_PIECES = ("top2", "window", "alibi, grouped", "learned, parallel", "depths of experts")


@pytest.mark.parametrize("name", mainly(IN_PIECES[:2], IN_PIECES))
def test_a_long_prompt_is_read_in_pieces(name):
    """Of two tokens, where one text ends with the first piece and one amid the last."""
    decoding, token_BT = decoding_of(name), texts(0)
    in_pieces = Decoder(*decoding.split, chunk=2)
    found_BTV, _ = dataclasses.replace(decoding, decoder=in_pieces).steps(token_BT)
    np.testing.assert_allclose(found_BTV, decoding.steps(token_BT)[0], rtol=1e-5, atol=1e-5)
    assert in_pieces.pieces(7) == [0, 2, 4, 6] and decoding.decoder.pieces(7) == [0]


@pytest.mark.parametrize("name", mainly((), CAUSAL))
def test_one_sequence_alone(name):
    decoding, token_BT = decoding_of(name), texts(0)
    alone_BTV, _ = decoding.steps(token_BT[:1], LENGTH_B[:1])
    np.testing.assert_allclose(alone_BTV[0], decoding.steps(token_BT)[0][0], rtol=1e-5, atol=1e-5)


def test_every_router_has_a_rule_or_says_why_not():
    """A router that sees the future, one that a user wrote for whole texts, a capacity."""
    for name in NEVER:
        row = ROUTERS[name]
        moe = functools.partial(top2, router=row.make, **row.layer)
        model = Transformer(V, d_model=16, num_heads=2, moe=moe, allow_leaks=True)
        assert "is not causal at evaluation" in reason_to_recompute(model)
    for settings in ({"moe": top2}, {}):
        assert reason_to_recompute(Transformer(V, d_model=16, num_heads=2, **settings)) is None

    class InTurn(Balanced):
        steps = False

    def why(**options):
        moe = functools.partial(top2, **options)
        return reason_to_recompute(Transformer(V, d_model=16, num_heads=2, moe=moe))

    assert why(router=InTurn) == "InTurn depends on earlier tokens and has no rule for one more"
    assert "eval_factor=1.0 drops" in why(capacity=Capacity(eval_factor=1.0))
