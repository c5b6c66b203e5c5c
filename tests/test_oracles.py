"""Other people's programs as oracles: transformers' MoE blocks in torch, POT's Sinkhorn, and
tokamax's grouped products.

They need the extra `oracle` and run by `make test-oracles`, not with the other tests.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import B as ROWS
from rows import D as WIDTH
from rows import T as TOKENS
from rows import V, compiled, draw, same_tree, tokens, values_of

from layers.dispatch import Sorted
from layers.kernels.grouped_matmul import grouped_feed_forward
from layers.logical_axes import sharding_rules
from layers.moe_layer import MoELayer
from moe.cli import config
from moe.model import functional, sharding
from routing import Capacity
from routing.algorithms.sinkhorn import transport_plan

pytestmark = pytest.mark.oracle

B, T, D, F, E = 3, 17, 32, 24, 16
SMALL = (f"MoELayer.num_experts = {E}", f"MoELayer.d_ff = {F}")


def mixtral():
    """Router file and what to change in it, and transformers' block of the same form."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2
    )
    return "mixtral", (), MixtralSparseMoeBlock, config


def olmoe():
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    config = OlmoeConfig(hidden_size=D, intermediate_size=F, num_experts=E, num_experts_per_tok=8)
    return "olmoe", (), OlmoeSparseMoeBlock, config


def qwen3_moe():
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        num_experts=E,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
    return "mixtral", ("TopK.k = 8",), Qwen3MoeSparseMoeBlock, config


def deepseek_v3():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=F,
        n_routed_experts=E,
        num_experts_per_tok=4,
        n_shared_experts=1,
        n_group=8,
        topk_group=4,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    # A group's score is the sum of its best two there, whatever K / M is.
    return "deepseek_v3", ("TopK.k = 4", "TopK.group_best = 2"), DeepseekV3MoE, config


def qwen2_moe():
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = Qwen2MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        shared_expert_intermediate_size=F,
        num_experts=E,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    )
    return "gated_shared", (), Qwen2MoeSparseMoeBlock, config


def llama4():
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    config = Llama4TextConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=1
    )
    return "llama4", (), Llama4TextMoe, config


def theirs(block, config, x_BTD, weight_BTD):
    """Output, and gradients of sum(output * weight) by the names of our parameters."""
    import torch

    config._experts_implementation = "eager"
    made = block(config)
    for i, value in enumerate(made.state_dict().values()):  # biases too
        value.copy_(torch.from_numpy(draw(10 + i, *value.shape)) * 0.3)
    x = torch.from_numpy(x_BTD).requires_grad_()
    y = made(x)
    y = (y[0] if isinstance(y, tuple) else y).reshape(x.shape)
    (y * torch.from_numpy(weight_BTD)).sum().backward()
    values = {name: value.detach().numpy() for name, value in made.state_dict().items()}
    grads = {name: value.grad.numpy() for name, value in made.named_parameters()}
    return y.detach().numpy(), x.grad.numpy(), as_ours(values), as_ours(grads)


def as_ours(theirs):
    """Their arrays, which map columns to rows, by our names and the other way round."""
    both, down = theirs["experts.gate_up_proj"], theirs["experts.down_proj"]
    if both.shape[1] != D:  # but for Llama 4's, whose experts map rows to columns
        both, down = both.swapaxes(1, 2), down.swapaxes(1, 2)
    gate_EDF, up_EDF = np.split(both, 2, axis=2)
    router = theirs["gate.weight"] if "gate.weight" in theirs else theirs["router.weight"]
    ours = {
        "router.weight_DE": router.T,
        "experts.gate_EDF": gate_EDF,
        "experts.up_EDF": up_EDF,
        "experts.down_EFD": down,
    }
    for shared in ("shared_expert", "shared_experts"):
        if f"{shared}.gate_proj.weight" in theirs:
            ours["shared.gate_DF"] = theirs[f"{shared}.gate_proj.weight"].T
            ours["shared.up_DF"] = theirs[f"{shared}.up_proj.weight"].T
            ours["shared.down_FD"] = theirs[f"{shared}.down_proj.weight"].T
    if "shared_expert_gate.weight" in theirs:
        ours["shared.sigmoid_D"] = theirs["shared_expert_gate.weight"][0]
    if "gate.e_score_correction_bias" in theirs:
        ours["router.balancer.bias_E"] = theirs["gate.e_score_correction_bias"]
    return ours


def ours(router, bindings, values, x_BTD, weight_BTD):
    """Output and gradients of the layer that a shipped file describes, with these values."""
    config.bind([f"routers/{router}.gin"], (*SMALL, *bindings))
    layer = MoELayer(D, vocab_size=V)
    graph, params, state = functional.split(layer)
    assert set(values) == set(params) | set(state)
    params = {name: jnp.asarray(values[name]) for name in params}
    state = {name: jnp.asarray(values[name]) for name in state}
    batch = tokens(B, T, train=False)

    def total(params, x_BTD):
        y_BTD, _ = graph.merge(params, state)(x_BTD, batch)
        return jnp.sum(y_BTD * weight_BTD), y_BTD

    run = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    (grads, dx_BTD), y_BTD = run(params, jnp.asarray(x_BTD))
    return y_BTD, dx_BTD, grads


def close(found, expected, name):
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * size, err_msg=name)


@pytest.mark.parametrize("family", [mixtral, olmoe, qwen3_moe, qwen2_moe, deepseek_v3, llama4])
def test_transformers_block_with_the_same_weights(family):
    """Output, and gradients to x, the router, the experts and the shared ones: to 1e-5."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        router, bindings, block, config = family()
        x_BTD, weight_BTD = draw(0, B, T, D), draw(1, B, T, D)
        y_BTD, dx_BTD, values, grads = theirs(block, config, x_BTD, weight_BTD)
    found_BTD, found_dx_BTD, found_grads = ours(router, bindings, values, x_BTD, weight_BTD)
    close(found_BTD, y_BTD, "output")
    close(found_dx_BTD, dx_BTD, "x")
    for name, grad in found_grads.items():
        close(grad, grads[name], name)


@pytest.mark.parametrize("shape", [(64, 8), (50, 7)], ids=str)
def test_the_transport_plan_is_pots(shape):
    """POT's log-domain Sinkhorn, to convergence; rows 1 / T, columns 1 / E."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ot

    count, experts = shape
    logits_TE = draw(2, count, experts)
    rows, columns = np.full(count, 1 / count), np.full(experts, 1 / experts)
    expected = ot.bregman.sinkhorn_log(rows, columns, -logits_TE, 1.0, stopThr=1e-12)
    log_GTE = transport_plan(jnp.asarray(logits_TE)[None], jnp.ones((1, count), bool), 50)
    np.testing.assert_allclose(np.exp(log_GTE[0]), expected, rtol=2e-5)


@pytest.mark.parametrize("name", ["top2", "switch"])
def test_tokamax_multiplies_as_the_loop_does(name):
    """Output and gradients of a layer; on a CPU tokamax hands over to the compiler."""
    batch, x_BTD = tokens(), draw(0, ROWS, TOKENS, WIDTH)
    weight_BTD = draw(1, ROWS, TOKENS, WIDTH)
    found = [
        compiled(name, Sorted(kernel=kernel), Capacity(None))(
            values_of(name)[0], x_BTD, batch, weight_BTD
        )
        for kernel in ("loop", "tokamax")
    ]
    same_tree(found[1], found[0])


def test_tokamax_is_refused_on_a_mesh():
    rule = sharding.rule(sharding.MeshShape().build())
    rows_ND, up_EDF, down_EFD = jnp.ones((8, 4)), jnp.ones((2, 4, 3)), jnp.ones((2, 3, 4))
    with sharding_rules(rule), pytest.raises(ValueError, match="is for one device"):
        counts = jnp.array([4, 4])
        weights = (up_EDF,), down_EFD
        grouped_feed_forward(rows_ND, jnp.ones(8), *weights, counts, jax.nn.relu, "tokamax")
