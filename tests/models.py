"""Small transformers and their tokens, for the tests of models and of the MoE layer."""

import dataclasses
import functools

import jax
import numpy as np

from layers.moe_layer import MoELayer
from moe.model import functional
from moe.model.transformer import Transformer
from routing import Tokens, TopK

B, T, V, D = 2, 6, 11, 16


def moe(router=TopK, **options):
    return functools.partial(MoELayer, router=router, num_experts=4, d_ff=8, **options)


def model(**options):
    options = {"d_model": D, "num_layers": 2, "num_heads": 2} | options
    return Transformer(V, **options)


def tokens(train=False, seed=0, **changes):
    token_BT = np.random.default_rng(seed).integers(0, V, (B, T))
    return dataclasses.replace(Tokens.of(token_BT, train), **changes)


@functools.cache
def runner(**options):
    """Jitted logits and router outputs of a model with first values."""
    graph, *abstract = functional.abstract(lambda: model(**options))
    params, state = jax.jit(lambda: functional.initial_values(graph, *abstract, 0))()

    @jax.jit
    def run(tokens):
        built = graph.merge(params, state)
        out = built(tokens)
        return built.logits(out.hidden_BTD), out.routers

    return run
