"""What layers keep for the backward pass, and loops over layers with and without a scan.

Broken once, each seen red: a policy that keeps all matmuls; cuDNN's outputs without a policy;
gradients of slices that are added instead of written; a loop whose recomputation is compiled away;
a rule that asks for a scan everywhere.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import unrolled
from layers.attention import Attention
from layers.dispatch import SlotGather, Sorted
from layers.kernels import cross_entropy
from layers.kernels.attention import Pattern, attend
from layers.logical_axes import sharding_rules
from layers.moe_layer import MoELayer
from layers.remat import REMAT, rematerialised
from moe.model import functional
from moe.model.transformer import Transformer
from moe.planning import compilers
from moe.training.abstract_model import abstract_tokens
from routing import TopK

B, T, D, H, F, E = 2, 24, 16, 2, 40, 4


@functools.cache
def built(remat, scan=True, dispatcher=SlotGather(), chunk=None):
    """A model's graph, abstract parameters and router state."""
    moe = functools.partial(MoELayer, num_experts=E, d_ff=F, router=TopK, dispatcher=dispatcher)
    make = functools.partial(
        Transformer,
        vocab_size=32,
        d_model=D,
        num_layers=2,
        num_heads=H,
        moe=moe,
        moe_every=2,
        attention=functools.partial(Attention, chunk=chunk),
        remat=remat,
        scan=scan,
    )
    return functional.abstract(make)


def total(graph, params, state, tokens):
    return graph.merge(params, state)(tokens).hidden_BTD.sum()


@functools.cache
def residuals(remat, dispatcher, chunk):
    """The shapes of what the forward pass leaves to the backward pass."""
    graph, params, state = built(remat, True, dispatcher, chunk)

    def pull(params, state, tokens):
        return jax.vjp(lambda params: total(graph, params, state, tokens), params)[1]

    found = jax.eval_shape(pull, params, state, abstract_tokens((B, T)))
    return [leaf.shape for leaf in jax.tree.leaves(found)]


@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("chunk", [None, 12])
def test_no_scores_are_kept(remat, chunk):
    """An array with tokens along two axes, or a chunk's queries and its keys."""
    shapes = residuals(remat, SlotGather(), chunk)
    scores = [shape for shape in shapes if sum(n in (T, chunk) for n in shape) > 1]
    assert bool(scores) == (remat == "none" and chunk is None), scores


@pytest.mark.parametrize("dispatcher", [SlotGather(), Sorted(kernel="slot_blocks")], ids=str)
def test_each_setting_keeps_what_its_names_say(dispatcher):
    """Of a dense layer's hidden units (B * T, hidden), and of experts' (..., F)."""

    def kept(remat):
        shapes = residuals(remat, dispatcher, None)
        hidden = 48  # of the dense layer, 8 / 3 D
        dense = [s for s in shapes if s[-2:] == (B * T, hidden)]
        experts = [s for s in shapes if len(s) > 2 and s[-1] == F and s[-2] != D]
        return bool(dense), bool(experts)

    assert kept("full") == (False, False)
    assert kept("dots") == (True, False)
    assert kept("dots_with_batch") == (True, True)


@pytest.mark.parametrize(("remat", "passes"), [("full", 2), ("dots", 2), ("dots_with_batch", 1)])
def test_cudnn_runs_forward_once_where_attention_is_kept(remat, passes):
    shape = jax.ShapeDtypeStruct((1, 128, 2, 64), "bfloat16")
    ids = jax.ShapeDtypeStruct((1, 128), "int32")

    def attention(x, ids):
        return attend(x, x, x, ids, ids, Pattern(), "cudnn")

    def gradient(x, ids):
        body = rematerialised(lambda x: jnp.sin(attention(x, ids)), remat)
        return jax.grad(lambda x: body(x).astype(jnp.float32).sum())(x)

    with compilers.assuming_cudnn():
        text = str(jax.make_jaxpr(gradient)(shape, ids))
    assert text.count("dot_product_attention_fwd_wrapper") == passes
    assert text.count("dot_product_attention_bwd_wrapper") == 1


@functools.cache
def lowered(remat, scan):
    graph, params, state = built(remat, scan)
    gradient = jax.grad(lambda params, *rest: total(graph, params, *rest))
    return jax.jit(gradient).lower(params, state, abstract_tokens((B, T)))


def dots(remat, scan):
    """The matmuls that are left in the compiled program."""
    return lowered(remat, scan).compile().as_text().count(" dot(")


def test_an_unrolled_loop_computes_again_what_it_does_not_keep():
    """The barriers keep a GPU's compiler from finding that it repeats itself."""
    assert dots("full", False) > dots("dots", False) > dots("none", False)
    assert "optimization_barrier" in lowered("full", False).as_text()
    assert "optimization_barrier" not in lowered("full", True).as_text()


def test_unrolled_gradients_are_written_into_place():
    """Nothing puts gradients together: no concatenation, no padding, no sum of stacked arrays."""

    def layers(over, stacked, x):
        def body(x, weight):
            return jnp.tanh(x @ weight), None

        return over(body, x, stacked)[0].sum()

    stacked, x = jax.random.normal(jax.random.key(0), (3, 5, 5)), jnp.ones((2, 5))
    gradients = [jax.grad(layers, 1)(o, stacked, x) for o in (jax.lax.scan, unrolled.unrolled)]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-7)
    text = jax.jit(jax.grad(functools.partial(layers, unrolled.unrolled))).lower(stacked, x)
    text = text.as_text()
    assert text.count("dynamic_update_slice") == 3
    assert "concatenate" not in text and "stablehlo.pad" not in text
    assert not [s for s in text.splitlines() if "stablehlo.add" in s and "3x5x5" in s]


def test_both_loops_have_one_form_of_parameters():
    """So that a checkpoint of either restores into the other."""
    one, other = (built("none", scan)[1] for scan in (True, False))
    assert {n: (a.shape, a.dtype) for n, a in one.items()} == {
        n: (a.shape, a.dtype) for n, a in other.items()
    }


@pytest.mark.parametrize(
    ("platform", "repeats", "scan", "expected"),
    [
        ("cpu", 2, None, "scanned"),
        ("gpu", 4, None, "unrolled"),
        ("tpu", unrolled.FEW, None, "unrolled"),
        ("gpu", unrolled.FEW + 1, None, "scanned"),
        ("gpu", 4, True, "scanned"),
        ("cpu", 4, False, "unrolled"),
    ],
)
def test_layers_are_unrolled_where_they_are_few_on_an_accelerator(
    platform, repeats, scan, expected
):
    with sharding_rules(None, types.SimpleNamespace(platform=platform)):
        loop, reason = unrolled.loop_of(repeats, scan)
    assert loop == expected and reason


def test_layers_that_are_computed_again_are_scanned():
    """Or the barriers, without which a compiler undoes it, would copy every layer's slices."""
    with sharding_rules(None, types.SimpleNamespace(platform="gpu")):
        assert [unrolled.loop_of(4, None, remat)[0] for remat in ("none", "full")] == [
            "unrolled",
            "scanned",
        ]


def test_the_vocabulary_is_cut_for_caches_on_a_cpu_and_for_matmuls_elsewhere():
    """8 sequences of 2,048 tokens, 50,304 words: four blocks of 4,096 tokens."""
    shape = (8, 2048), 50304
    for platform, expected in (("cpu", 256), ("gpu", 4), ("tpu", 4)):
        with sharding_rules(None, types.SimpleNamespace(platform=platform)):
            assert cross_entropy.num_blocks(*shape) == expected
