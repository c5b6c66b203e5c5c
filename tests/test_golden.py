"""Routers and losses against worked examples of their papers, in float64 and in float32.

The files in golden/ were computed with numpy and scipy, apart from this code; routers are called
without the MoE layer (which works in float32), so that float64 goes in and comes out.
"""

import dataclasses

from goldens import golden, inputs_of, on_logits, same
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.dispatch import as_soft_slots
from routing import (
    BalanceLoss,
    BiasBalancer,
    Capacity,
    ExpertChoiceRouter,
    Hash,
    RouterStats,
    Sizes,
    SoftMoE,
    Switch,
    TokenChoice,
    TopK,
    ZLoss,
)
from routing.algorithms.top_k import in_best_groups

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("case", ["cf1", "cf1p25", "cf2"])
def test_switch(case, dtype):
    given, told = golden("03_switch")
    expected = told[case]
    router, inputs = on_logits(lambda s: Switch(s, jitter=0.0), given["logits"], dtype)
    routing, out = router.route(inputs), router(inputs)
    same(routing.score_GTE[0], expected["p"], dtype)
    same(out.decision.expert_GTK[0, :, 0], expected["idx"], dtype)
    same(out.decision.gate_GTK[0, :, 0], expected["gate"], dtype)
    same(given["alpha"] * out.losses["balance"], expected["loss"], dtype)
    # The example floors the capacity, T/E * cf = 2, 2.5 and 4 slots; ours is the ceiling.
    if case != "cf1p25":
        fitted = Capacity({"cf1": 1.0, "cf2": 2.0}[case]).fit(out.decision, inputs)
        assert fitted.capacity == expected["capacity"]
        np.testing.assert_array_equal(fitted.keep_GTK[0, :, 0], expected["kept"])
        kept = np.where(fitted.keep_GTK, fitted.gate_GTK, 0)[0, :, 0]
        same(kept.astype(dtype), expected["gate_after_drop"], dtype)


def test_switch_balance_gradient_and_its_floor(dtype):
    given, told = golden("03_switch")
    router, inputs = on_logits(
        lambda s: Switch(s, jitter=0.0, losses=(BalanceLoss(given["alpha"]),)),
        given["logits"],
        dtype,
    )

    def penalty(x_GTD):
        return router(dataclasses.replace(inputs, x_GTD=x_GTD)).auxiliary_loss

    # The weights are the identity, so that the gradient to x is the gradient to the logits.
    same(jax.grad(penalty)(inputs.x_GTD)[0], told["cf1"]["grad_loss_wrt_logits"], dtype)


def test_z_loss_and_its_gradient(dtype):
    given, told = golden("04_router_z_loss")
    router, inputs = on_logits(
        lambda s: TopK(s, losses=(ZLoss(given["coef"]),)), given["router_logits"], dtype
    )

    def z(x_GTD):
        out = router(dataclasses.replace(inputs, x_GTD=x_GTD))
        return out.losses["z"], out.auxiliary_loss

    loss, penalty = z(inputs.x_GTD)
    same(loss, told["z_loss_unweighted"], dtype)
    same(penalty, told["z_loss_weighted"], dtype)
    same(jax.grad(lambda x: z(x)[0])(inputs.x_GTD)[0], told["grad_unweighted"], dtype)


@pytest.mark.parametrize("case", ["K1C1_vanilla", "K1C1_bpr", "K2C2_vanilla", "K2C2_bpr"])
def test_batch_priority(case):
    """V-MoE serves first choices before second ones, in both of its orders."""
    given, told = golden("05_batch_priority_routing")
    expected = told[case]
    expert_GTK = jnp.asarray(expected["idx"], jnp.int32)[None]
    gate_GTK = jnp.asarray(expected["weights"], jnp.float32)[None]
    decision = TokenChoice(expert_GTK, gate_GTK, jnp.ones(gate_GTK.shape, bool), 3)
    k, slots = expert_GTK.shape[-1], int(case[3])
    # C = ceil(factor * K * 4 / 3): the factor that gives exactly this many slots.
    policy = Capacity(
        factor=3 * slots / (4 * k),
        priority="gate" if "bpr" in case else "position",
        order="choice-major",
    )
    fitted = policy.fit(decision, inputs_of(np.zeros((4, 2)), "float32"))
    assert fitted.capacity == slots
    kept = np.asarray(expected["kept"])
    np.testing.assert_array_equal(fitted.keep_GTK[0], kept)
    places = np.asarray(expected["buffer_index"])
    np.testing.assert_array_equal(np.asarray(fitted.slot_GTK[0])[kept], places[kept])


def test_hash_is_its_table_and_nothing_else():
    given, told = golden("06_hash_layers")
    router = Hash(Sizes(2, given["num_experts"], 10))
    for table, expected in (
        (told["balanced_hash"], told["token_hash_of_seq"]),
        (told["random_hash_parlai_seed42"], None),
    ):
        router.table_V.set_value(jnp.asarray(table, jnp.int32))
        inputs = inputs_of(np.ones((6, 2)), "float32", ids=given["seq"])
        decision = router(inputs).decision
        expected = [table[token] for token in given["seq"]] if expected is None else expected
        np.testing.assert_array_equal(decision.expert_GTK[0, :, 0], expected)
        np.testing.assert_array_equal(decision.gate_GTK, 1.0)


def slots_through_experts(decision, x_TD):
    """y of the golden examples' experts, f0(v) = 2v and f1(v) = -v."""
    soft = as_soft_slots(decision)
    slot_ESD = jnp.einsum("tes,td->esd", soft.dispatch_GTES[0], x_TD)
    out_ESD = slot_ESD * jnp.asarray([2.0, -1.0], x_TD.dtype)[:, None, None]
    return jnp.einsum("tes,esd->td", soft.combine_GTES[0], out_ESD)


def test_expert_choice(dtype):
    given, told = golden("10_expert_choice")
    router, inputs = on_logits(
        lambda s: ExpertChoiceRouter(s, capacity_factor=given["capacity_factor"]),
        given["logits"],
        dtype,
    )
    routing = router.route(inputs)
    decision = routing.decision
    same(routing.score_GTE[0], told["S"], dtype)
    np.testing.assert_array_equal(decision.token_GEC[0], told["I"])
    same(decision.gate_GEC[0], told["G"], dtype)
    assert decision.keep_GEC.shape[-1] == told["k"] and decision.keep_GEC.all()
    x_TD = jnp.asarray(given["x"], dtype)
    same(slots_through_experts(decision, x_TD), told["y"], dtype)


def test_expert_choice_leaves_tokens_out(dtype):
    told = golden("10_expert_choice")[1]["dropping_example"]
    router, inputs = on_logits(
        lambda s: ExpertChoiceRouter(s, capacity_factor=told["capacity_factor"]),
        told["logits"],
        dtype,
    )
    routing = router.route(inputs)
    token_GEC, score_TE = routing.decision.token_GEC, routing.score_GTE[0]
    # Tokens 2 and 4 tie (logits 0.1 apart): by rounding, either may be the second expert's second.
    expected_EC = np.asarray(told["I"])
    same(jnp.sort(routing.decision.gate_GEC[0])[:, ::-1], score_TE[expected_EC, [[0], [1]]], dtype)
    if dtype == "float64":
        np.testing.assert_array_equal(token_GEC[0], expected_EC)
        per_token = np.bincount(np.asarray(token_GEC).ravel(), minlength=6)
        np.testing.assert_array_equal(per_token, told["experts_per_token"])


@pytest.mark.parametrize("case", ["unnormalised", "normalised_scale1", "normalised_scale3"])
def test_soft_moe(case, dtype):
    given, told = golden("11_soft_moe")
    expected = told[case]
    normalise = case != "unnormalised"
    router = SoftMoE(Sizes(2, 2, 10), slots_per_expert=2, normalise=normalise)
    router.phi_DES.set_value(jnp.asarray(given["Phi"], dtype).reshape(2, 2, 2))
    if normalise:
        router.scale.set_value(jnp.asarray(float(case[-1]), dtype))
    inputs = inputs_of(given["X"], dtype)
    decision = router(inputs).decision
    same(decision.dispatch_GTES.reshape(3, 4), expected["dispatch_D"], dtype)
    same(decision.combine_GTES.reshape(3, 4), expected["combine_C"], dtype)
    same(slots_through_experts(decision, inputs.x_GTD[0]), expected["Y"], dtype)


def test_soft_moe_is_not_causal(dtype):
    given, told = golden("11_soft_moe")
    told = told["causality_violation"]
    router = SoftMoE(Sizes(2, 2, 10), slots_per_expert=2, normalise=False)
    router.phi_DES.set_value(jnp.asarray(given["Phi"], dtype).reshape(2, 2, 2))
    for x_TD, first in (
        (given["X"], told["Y_token0_before"]),
        (told["X_with_last_token_changed"], told["Y_token0_after"]),
    ):
        inputs = inputs_of(x_TD, dtype)
        found = slots_through_experts(router(inputs).decision, inputs.x_GTD[0])
        same(found[0], first, dtype)


@pytest.mark.parametrize("bias", ["no_bias", "with_bias"])
def test_deepseek_v3_selects_with_the_bias_and_weighs_without_it(bias, dtype):
    given, told = golden("15_deepseek_moe_v3")
    router, inputs = on_logits(
        lambda s: TopK(s, given["K"], "sigmoid", renormalise=True, balancer=BiasBalancer),
        given["router_logits"],
        dtype,
    )
    if bias == "with_bias":
        router.balancer.bias_E.set_value(jnp.asarray(given["bias"], dtype))
    out, expected = router(inputs), told[bias]
    np.testing.assert_array_equal(out.decision.expert_GTK[0], expected["idx"])
    same(out.decision.gate_GTK[0], expected["gates"], dtype)
    np.testing.assert_array_equal(out.stats.count_E, expected["load"])


def test_deepseek_v3_bias_update(dtype):
    given, told = golden("15_deepseek_moe_v3")
    balancer = BiasBalancer(4, rate=given["u"], recentre=False)
    balancer.bias_E.set_value(jnp.asarray(given["bias"], dtype))
    load_E = jnp.asarray(told["with_bias"]["load"], jnp.int32)
    nothing = jnp.zeros((), dtype)
    balancer.update(RouterStats(jnp.int32(4), load_E, load_E, jnp.zeros(4), nothing, nothing))
    # The step is float32 in both: rate * sign is rounded once.
    np.testing.assert_allclose(balancer.bias_E[...], told["bias_after_update"], rtol=1e-6)


def test_deepseek_v3_sequence_balance(dtype):
    given, told = golden("15_deepseek_moe_v3")
    loss = BalanceLoss(given["alpha_seq"], "sequence")
    router, inputs = on_logits(
        lambda s: TopK(s, given["K"], "sigmoid", losses=(loss,)), given["router_logits"], dtype
    )
    out = router(inputs)
    same(out.stats.score_sum_E / 4, told["seq_balance"]["P"], dtype)
    same(out.losses["balance"], told["seq_balance"]["loss_alpha1"], dtype)
    same(out.auxiliary_loss, told["seq_balance"]["loss"], dtype)


def test_deepseek_v1_and_olmoe_gates(dtype):
    given, told = golden("15_deepseek_moe_v3")
    router, inputs = on_logits(lambda s: TopK(s, 2), given["router_logits"], dtype)
    decision = router(inputs).decision
    np.testing.assert_array_equal(decision.expert_GTK[0], told["softmax_topk_v1"]["idx"])
    same(decision.gate_GTK[0], told["softmax_topk_v1"]["gates_unnormalised"], dtype)


def test_mixtral(dtype):
    given, told = golden("16_mixtral_gating")
    upstream_K = jnp.asarray(given["upstream_dL_dgate"], dtype)
    for options, gates, gradient in (
        ({"gates": "softmax_of_selected"}, "softmax_over_topk", "softmax_over_topk"),
        ({}, "full_softmax_truncated", "full_softmax_truncated"),
        ({"renormalise": True}, "softmax_over_topk", "softmax_over_topk"),
    ):
        router, inputs = on_logits(
            lambda s, o=options: TopK(s, 2, losses=(), **o), [given["logits"]], dtype
        )
        decision = router(inputs).decision
        np.testing.assert_array_equal(decision.expert_GTK[0, 0], told["idx"])
        same(decision.gate_GTK[0, 0], told[f"gates_{gates}"], dtype)

        def weighed(x_GTD, router=router, inputs=inputs):
            changed = dataclasses.replace(inputs, x_GTD=x_GTD)
            return jnp.sum(upstream_K * router(changed).decision.gate_GTK[0, 0])

        found = jax.grad(weighed)(inputs.x_GTD)[0, 0]
        # By central differences in the file.
        np.testing.assert_allclose(found, told[f"grad_logits_{gradient}"], rtol=1e-5, atol=1e-7)


def test_deepseek_v3_groups(dtype):
    """Sigmoid scores 0.9, 0.1, ...; 2 of 4 groups by the sum of their two best; route scale 2.5."""
    given, told = golden("15_deepseek_moe_v3")
    example, expected = given["group_example"], told["group_limited"]
    score_TE = np.asarray(example["scores"])
    router, _ = on_logits(
        lambda s: TopK(
            s,
            example["topk"],
            "sigmoid",
            renormalise=True,
            scale=example["route_scale"],
            balancer=BiasBalancer,
            expert_groups=example["n_groups"],
            groups_per_token=example["topk_groups"],
        ),
        score_TE,
        dtype,
    )
    inputs = inputs_of(np.log(score_TE / (1 - score_TE)), dtype)
    decision = router(inputs).decision
    np.testing.assert_array_equal(decision.expert_GTK[0], expected["idx"])
    same(decision.gate_GTK[0], expected["weights"], dtype)
    limited_E = in_best_groups(jnp.asarray(score_TE, dtype)[None], 4, 2, 2)[0, 0]
    allowed = np.isfinite(limited_E).reshape(4, 2).all(1)
    np.testing.assert_array_equal(np.flatnonzero(allowed), expected["selected_groups"][0])


def test_a_group_is_scored_by_the_sum_of_its_k_over_m_best():
    """DeepSeek-V3, section 2.1.2: M groups for K experts. V2, without a bias, takes the best."""
    score_GTE = jnp.asarray([[[0.9, 0.2, 0.2, 0.1, 0.6, 0.6, 0.1, 0.0, 0.5, 0.5, 0.5, 0.3]]])

    def group(**options):
        router = TopK(Sizes(2, 12, 7), expert_groups=3, **options)
        return np.flatnonzero(np.isfinite(router._preference(score_GTE)[0, 0])) // 4

    # Sums of the best 1, 2, 3: 0.9, 1.1, 1.3 of the first group; 0.6, 1.2, 1.3; 0.5, 1.0, 1.5.
    for k, best in ((1, 0), (2, 1), (3, 2)):
        assert set(group(k=k, groups_per_token=1)) == {best}
        assert set(group(k=3, groups_per_token=1, group_best=k)) == {best}
    assert set(group(k=3, groups_per_token=2)) == {0, 1}  # 3 / 2, rounded up: by two
    for best in (0, -1, 5):
        with pytest.raises(ValueError, match="between 1 and the number of experts in a group"):
            group(k=2, groups_per_token=1, group_best=best)
    with pytest.raises(ValueError, match="has no meaning where a token may use all groups"):
        group(k=2, groups_per_token=3, group_best=1)
