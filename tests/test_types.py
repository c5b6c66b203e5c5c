"""The tests' type checker: it sees wrong shapes in every package, and gin speaks for itself."""

import jax.numpy as jnp
from jaxtyping import TypeCheckError
import pytest

from layers.dispatch.gather_rows import sum_by_token
from layers.kernels.cross_entropy import cross_entropy_of_each
from moe.data.corpora.corpus import TextFiles
from moe.training.losses import policy_losses
from routing.algorithms.expert_choice import best_tokens
from routing.records import ExpertMerge, Policy

G, E, T, D, V = 2, 4, 6, 3, 5
zeros, ids, yes = jnp.zeros, lambda *shape: jnp.zeros(shape, jnp.int32), jnp.ones


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(
            lambda t: cross_entropy_of_each(zeros((D, V)), zeros((G, T, D)), ids(G, t)), id="layers"
        ),
        pytest.param(lambda t: sum_by_token(zeros((E, G, T, D)), ids(G, E, t), T), id="dispatch"),
        pytest.param(
            lambda t: policy_losses(
                Policy(zeros((1, G, T)), zeros((1, G, T))), zeros((G, T)), yes((G, t), bool)
            ),
            id="training",
        ),
        pytest.param(
            lambda t: best_tokens(zeros((G, E, T)), yes((G, t), bool), 1.0, E), id="routing"
        ),
        pytest.param(lambda t: ExpertMerge(zeros((G, t, E)), ids(G, T), 1, T), id="record"),
    ],
)
def test_a_wrong_shape_is_refused(call):
    call(T)
    with pytest.raises(TypeCheckError, match=str(T + 1)):
        call(T + 1)


def test_a_wrong_dtype_is_refused():
    with pytest.raises(TypeCheckError, match="weight_GSE"):
        ExpertMerge(ids(G, T, E), ids(G, T), 1, T)


def test_constructors_without_arrays_are_python_s_own():
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'paths?'"):
        TextFiles()  # pyright: ignore
