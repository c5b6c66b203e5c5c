"""Routers against worked examples of their papers, continued: 01, 02, 06 to 10, 17."""

import dataclasses

from goldens import golden, inputs_of, on_logits, same
import jax
import jax.numpy as jnp
from marks import mainly
import numpy as np
import pytest

from layers.dispatch import as_soft_slots
from routing import (
    BASE,
    BalanceLoss,
    Capacity,
    DSelectK,
    GShard,
    Hash,
    ImportanceLoss,
    LoadLoss,
    NoisyTopK,
    ReMoE,
    RouterStats,
    Sinkhorn,
    Sizes,
    StrictlyBalanced,
    TopK,
)
from routing.algorithms.dselect_k import selectors, smooth_step
from routing.algorithms.hash import bigram_key, next_token, previous_token
from routing.algorithms.hierarchical import hierarchical_load
from routing.algorithms.noisy_top_k import chance_of_selection
from routing.algorithms.sinkhorn import transport_plan
from routing.algorithms.top_k import non_orthogonality
from routing.balance_losses import cv_squared
from routing.solvers.auction import balanced_assignment
from routing.solvers.dykstra import capped_plan
from routing.solvers.hash_tables import emptiest_first, spread

pytestmark = pytest.mark.smoke


def noisy(given, dtype, **values):
    router = NoisyTopK(Sizes(2, 4, 10), k=given["k"])
    router.weight_DE.set_value(values.get("weight", jnp.asarray(given["W_g"], dtype)))
    router.noise_DE.set_value(values.get("noise", jnp.asarray(given["W_noise"], dtype)))
    return router


def test_noisy_top_k(dtype):
    given, told = golden("01_noisy_topk")
    expected, inputs = told["noisy_topk"], inputs_of(given["x"], dtype)
    draw_GTE = jnp.asarray(given["eps"], dtype)[None]
    routing = noisy(given, dtype).with_noise(inputs.x_GTD, draw_GTE)
    decision = routing.decision
    same(routing.logits_GTE[0], expected["clean_logits"], dtype)
    np.testing.assert_array_equal(decision.expert_GTK[0], expected["topk_idx"])
    gate_TE = as_gates(decision, 4)
    same(gate_TE, expected["G"], dtype)
    same(routing.load_GTE[0], expected["P"], dtype)
    same(routing.load_GTE[0].sum(0), expected["load"], dtype)
    same(gate_TE.sum(0), expected["importance"], dtype)
    same(cv_squared(gate_TE.sum(0)), expected["cv2_importance"], dtype)
    same(cv_squared(routing.load_GTE[0].sum(0)), expected["cv2_load"], dtype)


def as_gates(decision, experts):
    hit_TKE = jax.nn.one_hot(decision.expert_GTK[0], experts, dtype=decision.gate_GTK.dtype)
    return jnp.einsum("tk,tke->te", decision.gate_GTK[0], hit_TKE)


@pytest.mark.parametrize(
    ("loss", "name"), [(LoadLoss(1.0), "load"), (ImportanceLoss(1.0), "importance")], ids=str
)
def test_noisy_top_k_gradients(loss, name, dtype):
    given, told = golden("01_noisy_topk")
    inputs = inputs_of(given["x"], dtype)
    draw_GTE = jnp.asarray(given["eps"], dtype)[None]

    def value(weight_DE, noise_DE):
        router = noisy(given, dtype, weight=weight_DE, noise=noise_DE)
        routing = router.with_noise(inputs.x_GTD, draw_GTE)
        nothing = jnp.zeros((), dtype)
        own = {loss.owner: loss.batch_sums(routing, inputs)}
        none_E, nothing_E = jnp.zeros(4, jnp.int32), jnp.zeros(4, dtype)
        stats = RouterStats(jnp.int32(0), none_E, none_E, nothing_E, nothing, nothing, own)
        return loss(routing, inputs, stats)

    weights = jnp.asarray(given["W_g"], dtype), jnp.asarray(given["W_noise"], dtype)
    by_gate, by_noise = jax.grad(value, (0, 1))(*weights)
    # By central differences in the file.
    near = {"rtol": 1e-5, "atol": 1e-8} if dtype == "float64" else {"rtol": 1e-4, "atol": 1e-6}
    expected = told["noisy_topk"]
    np.testing.assert_allclose(by_gate, expected[f"grad_cv2_{name}_wrt_Wg"], **near)
    if name == "load":
        np.testing.assert_allclose(by_noise, expected["grad_cv2_load_wrt_Wnoise"], **near)


def test_the_chance_of_selection_is_what_fresh_noise_gives():
    """One component's noise drawn 200,000 times, the others' kept: how often it is among the K."""
    given, _ = golden("01_noisy_topk")
    inputs = inputs_of(given["x"], "float32")
    draw_GTE = jnp.asarray(given["eps"], "float32")[None]
    routing = noisy(given, "float32").with_noise(inputs.x_GTD, draw_GTE)
    clean_E = np.asarray(routing.logits_GTE[0, 0])
    std_E = np.log1p(np.exp(np.asarray(given["x"][0]) @ np.asarray(given["W_noise"])))
    noisy_E = clean_E + std_E * np.asarray(given["eps"][0])
    for e in range(4):
        fresh_N = clean_E[e] + std_E[e] * np.random.default_rng(e).standard_normal(200_000)
        others = np.sort(np.delete(noisy_E, e))[::-1]
        share = (fresh_N > others[given["k"] - 1]).mean()
        assert float(routing.load_GTE[0, 0, e]) == pytest.approx(share, abs=0.005)


def test_noise_starts_at_log_2_for_every_expert():
    given, told = golden("01_noisy_topk")
    zero = jnp.zeros((2, 4))
    inputs, ones = inputs_of(given["x"], "float32"), jnp.ones((1, 3, 4))
    routing = noisy(given, "float32", weight=zero, noise=zero).with_noise(inputs.x_GTD, ones)
    np.testing.assert_array_equal(routing.logits_GTE, 0)
    half = chance_of_selection(*[jnp.zeros((1, 1, 4))] * 2, jnp.ones((1, 1, 4)), 2)
    np.testing.assert_allclose(half, 0.5)
    assert told["noisy_topk"]["zero_init"]["W_g_and_Wnoise_zero"]["noise_std"] == pytest.approx(
        float(jax.nn.softplus(0.0))
    )


def test_strictly_balanced(dtype):
    given, told = golden("01_noisy_topk")
    expected = told["strictly_balanced"]
    # m = k T / E tokens for each expert: 2 of 3 tokens and 4 experts make k = 8 / 3.
    router = StrictlyBalanced(Sizes(2, 4, 10), k=3)
    router.k = given["m_batchwise"] * 4 / 3
    router.weight_DE.set_value(jnp.asarray(given["W_g"], dtype))
    router.threshold_E.set_value(jnp.asarray(given["T_threshold"], dtype))
    inputs = inputs_of(given["x"], dtype)
    routing = router.route(inputs)
    same(routing.score_GTE[0], expected["softmax_gates"], dtype)
    soft = as_soft_slots(routing.decision)
    same(soft.dispatch_GTES[0].sum(-1), expected["M_batchwise"], dtype)
    same(soft.combine_GTES[0].sum(-1), expected["G_batchwise"], dtype)
    same(routing.terms["threshold"].sum(), expected["L_batchwise"], dtype)
    later = router.route(dataclasses.replace(inputs, train=False)).decision
    np.testing.assert_array_equal(later.keep_GTK[0], np.asarray(expected["M_threshold"]) == 1)
    same(later.gate_GTK[0], expected["G_threshold"], dtype)

    def term(threshold_E):
        fresh = StrictlyBalanced(Sizes(2, 4, 10), k=3)
        fresh.k, fresh.weight_DE = router.k, router.weight_DE
        fresh.threshold_E.set_value(threshold_E)
        return fresh.route(inputs).terms["threshold"].sum()

    same(jax.grad(term)(router.threshold_E[...]), expected["dL_dT"], dtype)
    good_E = jnp.asarray(expected["T_that_zeroes_the_loss"], dtype)
    assert abs(float(term(good_E))) < 1e-7


def test_hierarchical_load_and_importance(dtype):
    given, told = golden("01_noisy_topk")
    hier, expected = given["hier"], told["hierarchical"]
    primary_A = jnp.asarray(hier["Load_primary"], dtype)
    secondary_AB = jnp.asarray([hier["Load_1"], hier["Load_2"]], dtype)
    sizes_A = jnp.asarray(expected["X_sizes"], dtype)
    same(hierarchical_load(primary_A, secondary_AB, sizes_A), expected["Load_H"], dtype)
    outer_TA, inner_ATB = np.asarray(hier["G_primary"]), np.asarray([hier["G_1"], hier["G_2"]])
    same(np.einsum("ta,atb->ab", outer_TA, inner_ATB), expected["Importance_H"], "float64")


@pytest.mark.parametrize("case", ["policy_all", "policy_random_thr0p2", "paper_random_2g2"])
def test_gshard(case, dtype):
    given, told = golden("02_gshard_top2")
    expected = told[case]
    threshold = 0.2 if "0p2" in case else 0.5
    loss = BalanceLoss(1.0, choices="first")
    router, inputs = on_logits(
        lambda s: GShard(s, threshold=threshold, losses=(loss,)), given["logits"], dtype
    )
    draw_GT = None if case == "policy_all" else jnp.asarray(given["uniform_draws"], dtype)[None]
    routing = router.with_draws(inputs.x_GTD, draw_GT)
    decision = routing.decision
    same(routing.score_GTE[0], expected["probs"], dtype)
    np.testing.assert_array_equal(decision.expert_GTK[0, :, 0], expected["idx1"])
    np.testing.assert_array_equal(decision.expert_GTK[0, :, 1], expected["idx2"])
    same(decision.gate_GTK[0, :, 0], expected["gate1_norm"], dtype)
    same(decision.gate_GTK[0, :, 1], expected["gate2_norm"], dtype)
    np.testing.assert_array_equal(decision.keep_GTK[0, :, 1], expected["keep2"])
    # C = ceil(factor * 2 * 6 / 3) = 3.
    fitted = Capacity(0.75, order="choice-major").fit(decision, inputs)
    assert fitted.capacity == given["capacity"]
    combine_TEC = as_soft_slots(fitted).combine_GTES[0]
    same(combine_TEC, expected["combine"], dtype)
    same(router(inputs).losses["balance"], expected["aux_mean_fP_times_E2"], dtype)


def test_hash_tables_and_keys():
    given, told = golden("06_hash_layers")
    count_V = np.asarray(given["freq"])
    table_V = emptiest_first(count_V, 3)
    np.testing.assert_array_equal(table_V, told["balanced_hash"])
    np.testing.assert_array_equal(np.bincount(table_V, count_V), told["balanced_load"])
    clusters_V = np.asarray(given["clusters_of_token"])
    np.testing.assert_array_equal(spread(clusters_V, 3), told["dispersed_hash"])
    inputs = inputs_of(np.ones((6, 2)), "float32", ids=given["seq"])
    before_GT = previous_token(inputs)
    np.testing.assert_array_equal(next_token(inputs)[0], told["oracle_future_hash_targets"])
    key_GT = bigram_key(before_GT, inputs.token_id_GT, 10)
    np.testing.assert_array_equal(key_GT[0], told["bigram_key_prev_times_V_plus_cur"])
    for key, name in (("position", "position_hash"), ("previous", "previous_token_hash")):
        router = Hash(Sizes(2, 3, 10), key=key)
        if router.table_V is not None:
            router.table_V.set_value(jnp.asarray(table_V))
        found_T = router(inputs).decision.expert_GTK[0, :, 0]
        np.testing.assert_array_equal(found_T, told[name])


def test_base(dtype):
    given, told = golden("07_base_layers")
    scores = given["token_expert_scores"]
    valid_T = jnp.ones(4, bool)
    found_T = balanced_assignment(jnp.asarray(scores, dtype), valid_T)
    np.testing.assert_array_equal(found_T, told["optimal_assignment"])
    router, inputs = on_logits(BASE, scores, dtype)
    decision = router(inputs).decision
    np.testing.assert_array_equal(decision.expert_GTK[0, :, 0], told["optimal_assignment"])
    later = router(dataclasses.replace(inputs, train=False)).decision
    np.testing.assert_array_equal(later.expert_GTK[0, :, 0], told["test_time_greedy"])
    # One expert, whose centroid is w: the gate, and its slope.
    h_D, w_D = jnp.asarray(given["h"], dtype), jnp.asarray(given["w_e"], dtype)

    def gate(w_D):
        alone = BASE(Sizes(3, 1, 10))
        alone.weight_DE.set_value(w_D[:, None])
        return alone(inputs_of(h_D[None], dtype)).decision.gate_GTK[0, 0, 0]

    same(gate(w_D), told["alpha"], dtype)
    same(jax.grad(gate)(w_D), told["grad_alpha_wrt_h_dot_w"] * np.asarray(given["h"]), dtype)
    output_D = h_D + gate(w_D) * jnp.asarray(given["f_of_h"], dtype)
    same(output_D, told["output_paper_eq1"], dtype)


@pytest.mark.parametrize("iterations", [3, 200])
def test_sinkhorn(iterations, dtype):
    given, told = golden("08_sinkhorn_rl_routed_scaling")
    logits_GTE = jnp.asarray(given["logits"], dtype)[None]
    plan_TE = jnp.exp(transport_plan(logits_GTE, jnp.ones((1, 4), bool), iterations))[0]
    if iterations == 200:
        same(plan_TE, told["sinkhorn_plan_converged"], dtype)
        same(plan_TE.sum(1), told["row_sums"], dtype)
        same(plan_TE.sum(0), told["col_sums"], dtype)
    router, inputs = on_logits(lambda s: Sinkhorn(s, iterations=iterations), given["logits"], dtype)
    decision = router(inputs).decision
    np.testing.assert_array_equal(decision.expert_GTK[0, :, 0], told["sinkhorn_argmax"])
    later = router(dataclasses.replace(inputs, train=False)).decision
    np.testing.assert_array_equal(later.expert_GTK[0, :, 0], told["plain_argmax"])
    for gates, name in (("sigmoid", "gate_sigmoid_megatron"), ("softmax", "gate_softmax")):
        router, _ = on_logits(lambda s, g=gates: Sinkhorn(s, gates=g), given["logits"], dtype)
        same(router(inputs).decision.gate_GTK[0, :, 0], told[name], dtype)


@pytest.mark.parametrize("size", mainly([10], [1, 3, 10]))
def test_sinkhorn_chooses_by_the_converged_plan_whatever_the_size_of_the_logits(size):
    """Eight fixed rounds left 6 to 8 % of the choices different at a standard deviation of 10."""
    router, plan_of = Sinkhorn(Sizes(2, 16, 7)), jax.jit(transport_plan, static_argnums=(2, 3))
    for groups, tokens, experts in ((4, 256, 16), (2, 512, 8)):
        draw_GTE = np.random.default_rng(1).standard_normal((groups, tokens, experts))
        logits_GTE = jnp.asarray(size * draw_GTE, jnp.float32)
        valid_GT = jnp.ones((groups, tokens), bool)
        converged = plan_of(logits_GTE, valid_GT, 20_000, 1e-7).argmax(-1)
        found = plan_of(logits_GTE, valid_GT, router.iterations, router.tolerance).argmax(-1)
        np.testing.assert_array_equal(found, converged)
    # A group's plan doesn't depend on its neighbours.
    alone = plan_of(logits_GTE[:1], valid_GT[:1], router.iterations, router.tolerance)
    together = plan_of(logits_GTE, valid_GT, router.iterations, router.tolerance)
    np.testing.assert_allclose(alone[0], together[0], rtol=1e-5, atol=1e-5)


def test_sinkhorn_stands_logits_of_a_thousand():
    plan = transport_plan(jnp.array([[[1000.0, 0.0], [900.0, -1000.0]]]), jnp.ones((1, 2), bool), 8)
    assert np.isfinite(plan).all()


def test_dselect_k(dtype):
    given, told = golden("09_dselect_k")
    t = jnp.asarray(given["smoothstep_t"], dtype)
    same(smooth_step(t, 1.0), told["smoothstep"], dtype)
    slope = jax.vmap(jax.grad(lambda t: smooth_step(t, 1.0)))(t)
    same(slope, np.asarray(told["smoothstep_derivative"], float), dtype)
    for experts, case in ((4, "E4"), (3, "E3_not_power_of_2")):
        expected = told[case]
        router = DSelectK(Sizes(2, experts, 10), k=2, per_token=False)
        router.code_KM.set_value(jnp.asarray(given[f"z_E{experts}"], dtype))
        router.mix_K.set_value(jnp.asarray(given["w"], dtype))
        routing = router.route(inputs_of(np.zeros((1, 2)), dtype))
        step_KM = smooth_step(router.code_KM[...], 1.0)
        same(step_KM, expected["smooth_step"], dtype)
        same(selectors(step_KM, np.asarray(router.codes_EM, bool)), expected["selectors"], dtype)
        same(routing.decision.gate_GTK[0, 0], expected["q"], dtype)
        kept = np.asarray(routing.decision.keep_GTK[0, 0])
        np.testing.assert_array_equal(kept, np.asarray(expected["q"]) > 0)
        same(routing.terms["selector_entropy"][0, 0], expected["entropy_reg_sum"], dtype)
        same(routing.terms["unreachable"][0, 0], expected["nonpow2_penalty"], dtype)


def test_dselect_k_gradient(dtype):
    given, told = golden("09_dselect_k")

    def second_gate(code_KM):
        router = DSelectK(Sizes(2, 4, 10), k=2, per_token=False)
        router.code_KM.set_value(code_KM)
        router.mix_K.set_value(jnp.asarray(given["w"], dtype))
        return router.route(inputs_of(np.zeros((1, 2)), dtype)).decision.gate_GTK[0, 0, 1]

    found_KM = jax.grad(second_gate)(jnp.asarray(given["z_E4"], dtype))
    expected = told["E4"]["grad_q1_wrt_z"]
    np.testing.assert_allclose(found_KM, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found_KM[0], 0)  # saturated bits


def test_capped_expert_choice(dtype):
    given, told = golden("10_expert_choice")
    capped = given["capped"]
    score_GET = jnp.asarray(capped["scores_S"], dtype).T[None]
    if np.asarray(capped["scores_S"]).shape[0] == 3:
        score_GET = jnp.asarray(capped["scores_S"], dtype)[None]
    valid_GT, slots_G = jnp.ones((1, 6), bool), jnp.asarray([capped["k"]])
    plan_ET = capped_plan(score_GET, valid_GT, slots_G, capped["b"], capped["lam"], 3000)[0]
    same(plan_ET, told["capped_A_dykstra_lam0p1"], dtype)
    same(plan_ET.sum(1), np.full(3, 2.0), dtype)
    assert (plan_ET.sum(0) < 1 + 1e-6).all() and (plan_ET <= 1).all()
    best_EC = np.argsort(-np.asarray(plan_ET), 1, kind="stable")[:, :2]
    np.testing.assert_array_equal(best_EC, told["capped_topk_idx_lam0p1"])


def test_remoe(dtype):
    given, told = golden("17_other_routers")
    example, expected = given["remoe"], told["remoe"]
    router, inputs = on_logits(
        lambda s: ReMoE(s, k=example["k"], factor=example["alpha"]), example["logits"], dtype
    )
    router.penalty.weight.set_value(jnp.asarray(1.0, dtype))
    routing, output = router.route(inputs), router(inputs)
    same(routing.decision.gate_GTK[0], expected["R"], dtype)
    # The file averages over tokens and experts, the paper (eq. 9) sums over the experts.
    experts = example["E"]
    same(routing.terms["sparsity"].mean() / experts, expected["L_reg_lb"] / experts, dtype)
    np.testing.assert_array_equal(output.stats.batch_sums["router"]["active"], [2, 2, 2, 1])
    router.penalty.weight.set_value(jnp.asarray(example["lambda0"], dtype))
    router.penalty.update(output.stats)
    # Target 1 - 1/4, found 5/12: too dense, so lambda grows.
    assert float(router.penalty.weight[...]) == pytest.approx(expected["lambda_next"], rel=1e-6)


def test_orthogonality(dtype):
    given, told = golden("17_other_routers")
    weight_DE = jnp.asarray(given["simbal"]["R_columns_are_experts"], dtype)
    same(non_orthogonality(weight_DE), told["simbal"]["l1"], dtype)


def test_global_balance_is_one_where_each_micro_batch_is_pure(dtype):
    """Two micro-batches of one domain each: 1.24 apart, 1.0 with counts of the whole step."""
    given, told = golden("17_other_routers")
    f_MB = np.asarray(given["lbl"]["f_per_microbatch"])
    p_MB = np.asarray(given["lbl"]["P_per_microbatch"])
    apart = np.mean([2 * (f * p).sum() for f, p in zip(f_MB, p_MB, strict=True)])
    assert apart == pytest.approx(told["lbl"]["micro_batch_mean_loss"])
    logits_GTE = jnp.asarray(np.log(p_MB)[:, None].repeat(10, 1), dtype)
    router = TopK(Sizes(2, 2, 10), k=1, losses=())
    router.weight_DE.set_value(jnp.eye(2, dtype=dtype))
    whole = inputs_of(logits_GTE.reshape(20, 2), dtype)
    routing = router.route(whole)
    expert_T = np.concatenate([np.arange(10) >= 10 * f[0] for f in f_MB]).astype(np.int32)
    decision = dataclasses.replace(
        routing.decision, expert_GTK=jnp.asarray(expert_T)[None, :, None]
    )
    routing = dataclasses.replace(routing, decision=decision)
    nothing = jnp.zeros((), dtype)
    count_E = jnp.bincount(expert_T, length=2)
    score_E = routing.score_GTE.sum((0, 1))
    stats = RouterStats(jnp.int32(20), count_E, count_E, score_E, nothing, nothing)
    same(BalanceLoss()(routing, whole, stats), told["lbl"]["global_batch_loss"], dtype)
