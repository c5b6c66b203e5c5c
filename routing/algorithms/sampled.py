"""Sampled routing: policy gradients, and the estimators of stochastic neurons.

G groups, T tokens per group, D model width, E experts, H hidden width of the value head.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import gin
import jax
import jax.numpy as jnp

from routing.balance_losses import BalanceLoss
from routing.inputs import RouterInputs
from routing.losses import RouterLoss, TermLoss
from routing.parameters import parameter, truncated_normal, zeros
from routing.ranges import Count, NonNegative, Positive
from routing.records import Causality, Policy, Routing, Sizes, TokenChoice
from routing.router import Router, check_k
from routing.selection import top_k
from routing.solvers import estimators

ONE = ("reinforce", "gumbel")
MANY = {
    "straight_through": estimators.straight_through,
    "straight_through_slope": estimators.straight_through_slope,
    "stochastic_times_smooth": estimators.stochastic_times_smooth,
    "noisy_rectifier": estimators.noisy_rectifier,
}
Estimator = Literal[
    "reinforce",
    "gumbel",
    "straight_through",
    "straight_through_slope",
    "stochastic_times_smooth",
    "noisy_rectifier",
    "unbiased",
]
ESTIMATORS = get_args(Estimator)


@gin.configurable
class Sampled(Router):
    """Experts are sampled in training; at evaluation the choice is greedy.

    "reinforce" draws one expert from softmax(x W), gate 1, with the token's log-likelihood as
    reward and a learned value as baseline (RL-R of Clark et al. 2022). "gumbel" draws one with the
    gradient of the softmax (Jang et al. 2017). The others draw every expert independently with
    probability sigmoid(x W) (Bengio et al. 2013): "straight_through", "straight_through_slope",
    "stochastic_times_smooth", "noisy_rectifier", and "unbiased", which is reinforce for every
    draw. A loss term makes their mean k experts per token; experts that are not drawn are not
    computed, so that their gates get no gradient.

    Args:
        sizes: width, number of experts, vocabulary.
        estimator: how the choice is drawn and learned, as described above.
        k: the target of experts per token, for independent draws.
        temperature: of "gumbel".
        policy_weight: of the policy gradient.
        value_weight: of the value's loss, half its squared error.
        value_width: H.
        losses: where None, balance for a single draw, sparsity for independent draws.
    """

    causality = Causality.CAUSAL
    needs_all_experts = None
    decoding = "greedy: the most likely expert, or the k most likely"

    def __init__(
        self,
        sizes: Sizes,
        estimator: Estimator = "reinforce",
        k: Count = 2,
        temperature: Positive = 1.0,
        policy_weight: NonNegative = 1e-2,
        value_weight: NonNegative = 1e-2,
        value_width: Count = 64,
        losses: Sequence[RouterLoss] | None = None,
    ):
        check_k("Sampled", k, sizes)
        if estimator not in ESTIMATORS:
            raise ValueError(f"Sampled.estimator={estimator!r}: one of {', '.join(ESTIMATORS)}")
        if not temperature > 0:
            raise ValueError(f"Sampled.temperature={temperature} must be above 0")
        self.num_experts, self.k, self.estimator = sizes.num_experts, k, estimator
        self.temperature = temperature
        self.experts_per_token = 1.0 if estimator in ONE else float(k)
        defaults = (BalanceLoss(),) if estimator in ONE else (TermLoss("sparsity", 0.1),)
        self.losses = defaults if losses is None else tuple(losses)
        shape, axes = (sizes.d_model, sizes.num_experts), ("embed", None)
        self.weight_DE = parameter(shape, axes, truncated_normal(), role="router")
        rewarded = estimator in ("reinforce", "unbiased")
        if rewarded:
            self.policy_losses = (("policy", policy_weight), ("value", value_weight))
        hidden = (sizes.d_model, value_width)
        self.value_DH = (
            parameter(hidden, axes, truncated_normal(), role="router") if rewarded else None
        )
        self.value_H = (
            parameter((value_width,), (None,), zeros, role="router") if rewarded else None
        )

    def route(self, inputs: RouterInputs) -> Routing:
        logits_GTE = jnp.einsum("gtd,de->gte", inputs.x_GTD, self.weight_DE[...])
        draw_GTE = None
        if inputs.train:
            shape, dtype = logits_GTE.shape[1:], logits_GTE.dtype
            draw = jax.vmap(lambda key: jax.random.uniform(key, shape, dtype, 1e-6, 1 - 1e-6))
            draw_GTE = draw(inputs.keys_G("sampling"))
        if self.estimator in ONE:
            return self._one(logits_GTE, draw_GTE, inputs)
        return self._many(logits_GTE, draw_GTE, inputs)

    def _one(self, logits_GTE, draw_GTE, inputs) -> Routing:
        noisy_GTE = logits_GTE if draw_GTE is None else logits_GTE + estimators.gumbel(draw_GTE)
        expert_GT1 = top_k(noisy_GTE, 1)
        gate_GT1 = jnp.ones(expert_GT1.shape, logits_GTE.dtype)
        prob_GTE, policy = jax.nn.softmax(logits_GTE), None
        if draw_GTE is not None and self.estimator == "gumbel":
            smooth_GTE = jax.nn.softmax(noisy_GTE / self.temperature)
            smooth_GT1 = jnp.take_along_axis(smooth_GTE, expert_GT1, -1)
            gate_GT1 = 1 + smooth_GT1 - jax.lax.stop_gradient(smooth_GT1)
        elif draw_GTE is not None:
            log_prob_GTE = jax.nn.log_softmax(logits_GTE)
            chosen_GT1 = jnp.take_along_axis(log_prob_GTE, expert_GT1, -1)
            policy = self._policy(chosen_GT1[..., 0], inputs)
        keep_GT1 = jnp.ones_like(expert_GT1, bool)
        decision = TokenChoice(expert_GT1, gate_GT1, keep_GT1, self.num_experts)
        return Routing(decision, logits_GTE, prob_GTE, policy=policy)

    def _many(self, logits_GTE, draw_GTE, inputs) -> Routing:
        prob_GTE, policy = jax.nn.sigmoid(logits_GTE), None
        fires_GTE = jnp.sqrt(prob_GTE) if self.estimator == "stochastic_times_smooth" else prob_GTE
        terms = {"sparsity": binary_divergence(self.k / self.num_experts, fires_GTE.mean(-1))}
        score_GTE = prob_GTE / prob_GTE.sum(-1, keepdims=True)
        if draw_GTE is None:
            # The k likeliest experts, with the mean of their gates given that they are drawn.
            expert_GTK = top_k(logits_GTE, self.k)
            mean_gates = {
                "stochastic_times_smooth": fires_GTE,
                "noisy_rectifier": jax.nn.softplus(logits_GTE) / prob_GTE,
            }
            gate_GTE = mean_gates.get(self.estimator, jnp.ones_like(prob_GTE))
            gate_GTK = jnp.take_along_axis(gate_GTE, expert_GTK, -1)
            keep_GTK = jnp.ones_like(expert_GTK, bool)
            decision = TokenChoice(expert_GTK, gate_GTK, keep_GTK, self.num_experts)
            return Routing(decision, logits_GTE, score_GTE, terms=terms)
        if self.estimator == "unbiased":
            gate_GTE, log_prob_GTE = estimators.bernoulli(logits_GTE, draw_GTE)
            policy = self._policy(log_prob_GTE.sum(-1), inputs)
        else:
            gate_GTE = MANY[self.estimator](logits_GTE, draw_GTE)
        numbers_E = jnp.arange(self.num_experts, dtype=jnp.int32)
        expert_GTE = jnp.broadcast_to(numbers_E, gate_GTE.shape)
        decision = TokenChoice(expert_GTE, gate_GTE, gate_GTE > 0, self.num_experts)
        return Routing(decision, logits_GTE, score_GTE, terms=terms, policy=policy)

    def _policy(self, log_prob_GT, inputs: RouterInputs) -> Policy:
        """The policy with the value head's prediction, without a gradient to the tokens."""
        assert self.value_DH is not None and self.value_H is not None
        x_GTD = jax.lax.stop_gradient(inputs.x_GTD)
        hidden_GTH = jax.nn.relu(jnp.einsum("gtd,dh->gth", x_GTD, self.value_DH[...]))
        value_GT = jnp.einsum("gth,h->gt", hidden_GTH, self.value_H[...])
        return Policy(log_prob_GT, value_GT)


def binary_divergence(target: float, mean) -> jax.Array:
    """KL(B(target) || B(mean)) in nats; 0 where the mean is the target."""
    mean = jnp.clip(mean, 1e-6, 1 - 1e-6)
    other = max(1 - target, 1e-6)
    return target * jnp.log(target / mean) + other * jnp.log(other / (1 - mean))
