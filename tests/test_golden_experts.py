"""Kinds of experts against worked examples of their papers: 06, 13, 17."""

from goldens import golden, inputs_of, on_logits, same
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.dispatch import OneHotEinsum
from layers.experts.base import LayerSizes, Routed
from layers.experts.default_vectors import DefaultVectors
from layers.experts.feed_forward_experts import FeedForwardExperts
from layers.experts.segmented import SegmentedExperts
from layers.experts.zero_computation import ZeroCopyConstant
from routing import (
    Capacity,
    ExpertMerge,
    MultiHash,
    RouterStats,
    Sizes,
    TopK,
)
from routing.algorithms.product_keys import best_pairs

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("case", ["smear", "smear_relu"])
def test_merged_experts(case, dtype):
    """One linear layer an expert: up is the example's matrix, down the identity."""
    given, told = golden("17_other_routers")
    example = given["smear"] if case == "smear" else told["smear_relu"]
    expected = told["smear"]["y"] if case == "smear" else told["smear_relu"]["y_merged"]
    experts = FeedForwardExperts(LayerSizes(2, 2, 4, "relu"))
    # relu(x) - relu(-x) = x: four hidden units make a linear expert of two.
    weight_EDF = np.asarray(example["experts"])
    both = np.concatenate([weight_EDF, -weight_EDF if case == "smear" else 0 * weight_EDF], 2)
    down_FD = np.concatenate([np.eye(2), -np.eye(2)])[None].repeat(2, 0)
    experts.up_EDF.set_value(jnp.asarray(both, dtype))
    experts.down_EFD.set_value(jnp.asarray(down_FD, dtype))
    weight_GSE = jnp.asarray(example["p"], dtype)[None, None]
    y_GTD = experts.merged(
        jnp.asarray(example["x"], dtype)[None, None],
        ExpertMerge(weight_GSE, jnp.ones((1, 1), jnp.int32), 1, 1),
    )
    same(y_GTD[0, 0], expected, dtype)


def test_moe_plus_plus_constant_expert(dtype):
    given, told = golden("17_other_routers")
    example, expected = given["moepp_const"], told["moepp_const"]
    companion = ZeroCopyConstant(LayerSizes(2, 2, 4), zero=1, copy=1, constant=1)
    companion.mix_DMX.set_value(jnp.asarray(example["Wc"], dtype)[:, None])
    companion.vector_MD.set_value(jnp.asarray(example["v"], dtype)[None])
    x_GTD = jnp.asarray(example["x"], dtype)[None, None]
    for weight_N, expected_D in (
        ([0.0, 0.0, 1.0], expected["y"]),
        ([1.0, 0.0, 0.0], [0.0, 0.0]),
        ([0.3, 0.5, 0.0], 0.5 * np.asarray(example["x"])),
    ):
        y_GTD = companion.weighted_sum(x_GTD, jnp.asarray(weight_N, dtype)[None, None])
        same(y_GTD[0, 0], expected_D, dtype)


def test_default_moe(dtype):
    """y = g E(x) of the chosen expert + g mean of the others; the mean follows the outputs."""
    given, told = golden("17_other_routers")
    example = given["default_moe"]
    gates_E = np.asarray(example["gates"])
    router, inputs = on_logits(lambda s: TopK(s, k=1, keep_rest=True), np.log(gates_E)[None], dtype)
    decision = router(inputs).decision
    np.testing.assert_array_equal(decision.expert_GTK[0, 0], example["active"])
    same(decision.unchosen_gate_GTE[0, 0], [0.0, *gates_E[1:]], dtype)
    defaults = DefaultVectors(LayerSizes(3, 2, 4), decay=0.9)
    defaults.mean_ED.set_value(jnp.asarray(example["ema_defaults"], dtype))
    active_D = jnp.asarray(example["expert_out_active"], dtype)
    added_GTD = defaults(Routed(inputs.x_GTD[..., :2], inputs, decision))
    y_D = decision.gate_GTK[0, 0, 0] * active_D + added_GTD[0, 0]
    same(y_D, told["default_moe"]["y"], dtype)
    nothing, count_E = jnp.zeros((), dtype), jnp.array([2, 0, 0], jnp.int32)
    own = {
        "companion/default_vectors": {
            "expert_output": jnp.zeros((3, 2), dtype).at[0].set(2 * active_D)
        }
    }
    defaults.update(
        RouterStats(jnp.int32(2), count_E, count_E, jnp.zeros(3, dtype), nothing, nothing, own)
    )
    expected_ED = np.asarray(example["ema_defaults"])
    expected_ED[0] = 0.9 * expected_ED[0] + 0.1 * np.asarray(example["expert_out_active"])
    np.testing.assert_allclose(defaults.mean_ED[...], expected_ED, rtol=1e-6)


def test_product_keys_find_the_best_of_all(dtype):
    given, told = golden("17_other_routers")
    example, expected = given["peer"], told["peer"]
    half_1N = np.asarray(example["keys1"]) @ np.asarray(example["q1"])
    half_2N = np.asarray(example["keys2"]) @ np.asarray(example["q2"])
    score_XN = jnp.asarray(np.stack([half_1N, half_2N]), dtype)[None, None]
    expert_K, sum_K = best_pairs(score_XN, example["topk"])
    np.testing.assert_array_equal(expert_K[0, 0], expected["topk_product"])
    np.testing.assert_array_equal(expected["topk_full"], expected["topk_product"])
    same(jax.nn.softmax(sum_K[0, 0]), expected["gates_softmax"], dtype)
    # And on random scores, against a full sort of all 81.
    score_XN = jnp.asarray(np.random.default_rng(0).standard_normal((5, 7, 2, 9)), dtype)
    every = (score_XN[..., 0, :, None] + score_XN[..., 1, None, :]).reshape(5, 7, 81)
    full_K = np.argsort(-np.asarray(every), -1)[..., :4]
    np.testing.assert_array_equal(best_pairs(score_XN, 4)[0], full_K)


def test_multi_hash(dtype):
    """Hidden [-1, 1] of expert 1 and [2, -2] of expert 0; after the ReLU 1 + 2 and 1."""
    given, told = golden("06_hash_layers")
    example = given["multihash"]
    up_NEFD = np.asarray(example["first_layer_segments_m_bucket"])
    down_NEFD = np.asarray(example["second_layer_segments_m_bucket"])
    up_ENDF = up_NEFD.transpose(1, 0, 3, 2)
    down_ENFD = down_NEFD.transpose(1, 0, 2, 3)
    x_TD = np.asarray([example["x"]])
    router = MultiHash(Sizes(2, 2, 1), hashes=2)
    router.table_NV.set_value(jnp.asarray(example["hash_values"], jnp.int32)[:, None])
    inputs = inputs_of(x_TD, dtype)
    decision = router(inputs).decision
    np.testing.assert_array_equal(decision.expert_GTK[0, 0], example["hash_values"])
    experts = SegmentedExperts(LayerSizes(2, 2, 4, "relu"), segments=2)
    experts.up_ENDF.set_value(jnp.asarray(up_ENDF, dtype))
    experts.down_ENFD.set_value(jnp.asarray(down_ENFD, dtype))
    y_GTD, _ = experts(inputs.x_GTD, decision, inputs, OneHotEinsum())
    same(y_GTD[0, 0], told["multihash_output"], dtype)


@pytest.mark.parametrize("renormalise", [False, True])
def test_experts_that_are_copies_of_the_dense_layer(renormalise, dtype):
    """The layer with renormalised gates is the dense one; without, the chosen scores' sum of it."""
    given, told = golden("13_sparse_upcycling")
    x_D = np.asarray(given["x"])
    router = TopK(Sizes(3, given["E"], 10), k=given["K"], renormalise=renormalise)
    logits_E = np.asarray(given["router_logits"])
    router.weight_DE.set_value(jnp.asarray(np.outer(x_D, logits_E) / (x_D @ x_D), dtype))
    experts = FeedForwardExperts(LayerSizes(given["E"], 3, 2, "relu"))
    for weight, name in ((experts.up_EDF, "W1"), (experts.down_EFD, "W2")):
        copies = np.broadcast_to(np.asarray(given[name]), (given["E"], *np.shape(given[name])))
        weight.set_value(jnp.asarray(copies, dtype))
    inputs = inputs_of([x_D], dtype)
    decision = Capacity(None).fit(router(inputs).decision, inputs)
    np.testing.assert_array_equal(decision.expert_GTK[0, 0], told["top2"])
    y_GTD, _ = experts(inputs.x_GTD, decision, inputs, OneHotEinsum())
    expected = told["moe_out_normalised" if renormalise else "moe_out_unnormalised"]
    same(y_GTD[0, 0], expected, dtype)
    if not renormalise:
        same(decision.gate_GTK.sum(), told["scale_drop_unnormalised"], dtype)
