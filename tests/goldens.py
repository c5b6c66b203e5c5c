"""What the tests against worked examples share: the examples, and how close is equal."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from routing import RouterInputs, Sizes, initialize

FOLDER = Path(__file__).parent / "golden"


def golden(name):
    told = json.loads((FOLDER / f"{name}.json").read_text())
    return told["inputs"], told["outputs"]


def same(found, expected, dtype):
    found = np.asarray(found)
    if np.issubdtype(np.asarray(expected).dtype, np.floating):
        assert found.dtype == dtype
    tight = 1e-10 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(found, np.asarray(expected), rtol=tight, atol=tight / 10)


def inputs_of(x_TD, dtype, train=True, ids=None):
    """One group of T tokens."""
    x_GTD = jnp.asarray(x_TD, dtype)[None]
    row = jnp.arange(x_GTD.shape[1], dtype=jnp.int32)[None]
    return RouterInputs(
        x_GTD=x_GTD,
        valid_GT=jnp.ones(row.shape, bool),
        token_id_GT=row if ids is None else jnp.asarray(ids, jnp.int32)[None],
        position_GT=row,
        index_G=jnp.zeros(1, jnp.int32),
        key=jax.random.key(0),
        train=train,
    )


def on_logits(make, logits_TE, dtype):
    """The router of as many experts as logits, with the identity for weights."""
    logits_TE = np.asarray(logits_TE)
    width, experts = logits_TE.shape[1], logits_TE.shape[1]
    router = initialize(make(Sizes(width, experts, 10)), 0)
    router.weight_DE.set_value(jnp.eye(experts, dtype=dtype))
    return router, inputs_of(logits_TE, dtype)
