"""Models and layers in Python, without a run: filled in place, fed with ids, refused when empty."""

import functools

from goldens import inputs_of
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.moe_layer import MoELayer
from moe.model import functional
from moe.model.transformer import Transformer
from routing import Sizes, Switch, TopK, initialize
from routing.inputs import Tokens

IDS = np.random.default_rng(0).integers(0, 11, (2, 6))


def transformer():
    moe = functools.partial(MoELayer, num_experts=4, d_ff=8, router=TopK)
    return Transformer(11, d_model=16, num_layers=1, num_heads=2, moe=moe)


@pytest.fixture(scope="module")
def model():
    return initialize(transformer(), 0)


def test_a_module_is_filled_in_place():
    empty = transformer()
    assert initialize(empty, 0) is empty
    assert float(jnp.abs(empty.embedding_VD[...]).max()) > 0
    other = functional.split(initialize(transformer(), 0))[1]
    for name, value in functional.split(empty)[1].items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_what_has_no_values_is_refused():
    """Zeros would give the same logits for every text, and all tokens to the first expert."""
    with pytest.raises(ValueError, match=r"no values yet: call routing\.initialize"):
        transformer()(IDS)
    with pytest.raises(ValueError, match=r"no values yet"):
        jax.jit(lambda ids: transformer()(ids).hidden_BTD)(IDS)
    router = Switch(Sizes(3, 4, 11))
    with pytest.raises(ValueError, match=r"no values yet"):
        router(inputs_of(np.eye(3), "float32"))
    router.weight_DE.set_value(jnp.ones((3, 4)))  # values of one's own will do
    router(inputs_of(np.eye(3), "float32"))


def test_a_model_takes_ids(model):
    out = model(IDS).hidden_BTD
    np.testing.assert_array_equal(model(Tokens.of(IDS)).hidden_BTD, out)
    np.testing.assert_array_equal(model(IDS.tolist()).hidden_BTD, out)
    np.testing.assert_allclose(model(IDS[1]).hidden_BTD[0], out[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda ids: model(ids).hidden_BTD)(IDS), out, atol=1e-5)


def test_tokens_of_ids_are_whole_documents():
    tokens = Tokens.of(IDS, train=True)
    assert tokens.token_BT.tolist() == IDS.tolist() and tokens.train
    assert tokens.position_BT.tolist() == [list(range(6))] * 2
    assert (tokens.segment_BT == 1).all() and tokens.index_B.tolist() == [0, 1]


@pytest.mark.parametrize("wrong", [np.zeros((2, 3)), np.zeros((1, 2, 3), int), 7])
def test_what_are_no_ids_is_told(wrong):
    with pytest.raises(ValueError, match=r"token ids are .* they must be integers \(B, T\)"):
        Tokens.of(wrong)
