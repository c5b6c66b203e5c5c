"""Evaluation of a Mixture-of-Depths whose guess lets nothing through, and of nothing at all."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from layers.moe_layer import MoELayer
from moe.cli.eval import depths_of, loads_of
from moe.data.batches import Piece, ValidationBatches
from moe.errors import UserError
from moe.model import functional
from moe.model.sharding import MeshShape
from moe.model.transformer import Transformer
from moe.training.abstract_model import Vocabulary, abstract_model
from moe.training.evaluate import batch_scorer, evaluate
from moe.training.metrics import health
from moe.training.objective import NextToken
from routing import MixtureOfDepths, TopK

T, V = 8, 11


@pytest.fixture(scope="module")
def deep():
    """Two sparse layers, the second behind a router of depth whose guess is "no" at the start."""
    make = functools.partial(
        Transformer,
        d_model=8,
        num_layers=2,
        num_heads=1,
        moe=functools.partial(MoELayer, router=TopK, num_experts=4, d_ff=8),
        depth_router=functools.partial(MixtureOfDepths, capacity=0.25),
    )
    num_bytes_2V = np.array([[1] * (V - 1) + [0]] * 2, np.int32)
    vocabulary = Vocabulary(V, num_bytes_2V)
    model = abstract_model(make, NextToken(), vocabulary, batch_size=2, sequence_length=T)
    params, router_state = functional.initial_values(model.graph, *model.shapes, 0)
    mesh = MeshShape().build(jax.devices()[:1])
    score_batch = batch_scorer(model, mesh)
    values = types.SimpleNamespace(params=params, router_state=router_state)
    return model, lambda batches: evaluate(score_batch, values, batches, mesh)


def batches_of(*pieces: Piece) -> ValidationBatches:
    """One piece a row, of a document of 8 tokens of text."""
    token_N = np.array([V - 1, *range(T)], np.uint16)
    return ValidationBatches(token_N, [[piece] for piece in pieces], 2, T, T, [0])


@pytest.mark.thorough
def test_a_layer_without_choices_has_no_load_and_no_drops(deep):
    model, score = deep
    result = score(batches_of(Piece(0, T, 0)))
    assert result.bytes == T
    np.testing.assert_array_equal(result.routing.count_LE.sum(1), [2 * T, 0])
    told = loads_of(result.routing)
    first = float(result.routing.load_L[0])
    assert 1 <= first == told["max_over_mean_load"] == told["max_over_mean_load_worst"]
    assert told["dropped"] == told["dropped_worst"] == 0
    assert told["layers_without_choices"] == 1 and health(result.routing, model.kind) == "idle"
    only = dataclasses.replace(result.routing, count_LE=result.routing.count_LE[1:])
    assert loads_of(only)["max_over_mean_load"] is None and loads_of(only)["dropped"] is None


def test_the_router_of_depth_is_named_with_its_capacity_and_rule(deep):
    assert depths_of(deep[0]) == {
        "depth_router": "MixtureOfDepths",
        "depth_capacity": 0.25,
        "depth_evaluation_rule": "by a learned guess for each token",
    }


def test_nothing_scored_is_an_error_and_not_perfection(deep):
    with pytest.raises(UserError, match=r"nothing was scored .* give more text"):
        deep[1](batches_of(Piece(0, T, T)))
