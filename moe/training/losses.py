"""The training loss: the task's loss, the routers' auxiliary losses, and policy losses.

B batch, T tokens, L sparse layers.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from layers.kernels.cross_entropy import cross_entropy_of_each, cross_entropy_sums
from layers.kernels.divergence import divergence_sum
from moe.data.batch import Batch
from moe.model.transformer import ModelOutput, Transformer
from routing import Policy, RouterOutput


@nnx.dataclass
class Losses(nnx.Pytree):
    """The parts of the training loss; gradients are those of their sum.

    Attributes:
        task: cross entropy in nats per scored token, which a run reports as its loss.
        auxiliary: the routers' losses, weighted and summed over layers.
        policy: for routers with a policy, the losses that need each token's cross entropy; weighted
            and summed over layers.
        distillation: temperature^2 * KL(teacher || student) per scored token; None without one.
    """

    task: Float[Array, ""] = nnx.data()
    auxiliary: Float[Array, ""] = nnx.data()
    policy: Float[Array, ""] = nnx.data()
    distillation: Float[Array, ""] | None = nnx.data(default=None)

    @property
    def total(self) -> Float[Array, ""]:
        return self.task + self.auxiliary + self.policy

    def distilled(self, weight) -> Float[Array, ""]:
        """The sum with a teacher, whose term has this share of the task's place."""
        assert self.distillation is not None
        taught = (1 - weight) * self.task + weight * self.distillation
        return taught + self.auxiliary + self.policy


@nnx.dataclass
class Measured(nnx.Pytree):
    """The losses and statistics of a micro-batch, scaled so that they sum to those of the batch.

    Attributes:
        losses: divided by the scored tokens of the whole batch.
        text_nats: cross entropy summed over scored tokens of text.
        routers: losses and statistics of the MoE layers' routers; without a decision.
        mod: of the Mixture-of-Depths routers, by name: losses, and counts divided by the batch's
            tokens (L,).
    """

    losses: Losses = nnx.data()
    text_nats: Float[Array, ""] = nnx.data()
    routers: RouterOutput | None = nnx.data()
    mod: dict[str, Array] | None = nnx.data()


def measure(
    model: Transformer,
    out: ModelOutput,
    batch: Batch,
    text_BT: Bool[Array, "B T"],
    scored,
    valid,
    loss_weights: dict[str, Array] | None = None,
    taught: tuple | None = None,
) -> Measured:
    """The losses and statistics of a micro-batch.

    Args:
        model: with the parameters that gradients are taken of.
        out: its output for the micro-batch.
        batch: the micro-batch.
        text_BT: which of its scored tokens are text.
        scored: the scored tokens of the whole batch.
        valid: the tokens of the whole batch that are not padding.
        loss_weights: as `Context.loss_weights`.
        taught: a teacher's output weights and representations, and the temperature.
    """
    nats, text_nats = cross_entropy_sums(
        model.head(), out.hidden_BTD, batch.target_BT, batch.scored_BT, text_BT
    )
    share = (batch.segment_BT > 0).sum() / valid
    auxiliary, policy, mod = jnp.float32(0), jnp.float32(0), None
    if out.mod_routers is not None:
        mod = {name: share * value for name, value in out.mod_routers.losses.items()}
        counts = out.mod_routers.stats.batch_sums.get("router", {})
        mod |= {name: value / valid for name, value in counts.items()}
        auxiliary += share * out.mod_routers.auxiliary_loss.sum()
    routers = out.routers
    if routers is not None:
        losses = {name: share * value for name, value in routers.losses.items()}
        auxiliary_L = share * routers.auxiliary_loss
        auxiliary += auxiliary_L.sum()
        if routers.policy is not None:
            policy_values = rewarded_by_likelihood(model, out, batch, scored)
            router = model.moe_layers_of_units()[0].router
            weights = router.weights() | (loss_weights or {})
            for name, value_L in policy_values.items():
                policy += weights[router.key_of(name)] * value_L.sum()
            losses |= policy_values
        routers = RouterOutput(None, losses, auxiliary_L, routers.stats)
    losses = Losses(nats / scored, auxiliary, policy)
    if taught is not None:
        weight_DV, hidden_BTD, temperature = taught
        total = divergence_sum(
            model.head(), out.hidden_BTD, weight_DV, hidden_BTD, batch.scored_BT, temperature
        )
        losses = dataclasses.replace(losses, distillation=total / scored)
    return Measured(losses, text_nats, routers, mod)


def rewarded_by_likelihood(
    model: Transformer, out: ModelOutput, batch: Batch, scored
) -> dict[str, jax.Array]:
    """The unweighted policy losses (L,) by name, with each token's log-likelihood as reward."""
    assert out.routers is not None and out.routers.policy is not None
    nats_BT = cross_entropy_of_each(model.head(), out.hidden_BTD, batch.target_BT)
    sums = policy_losses(out.routers.policy, nats_BT, jnp.asarray(batch.scored_BT))
    return {name: value_L / scored for name, value_L in sums.items()}


def policy_losses(
    policy: Policy, nats_BT: Float[Array, "B T"], scored_BT: Bool[Array, "B T"]
) -> dict:
    """REINFORCE with a learned value, summed over scored tokens: two losses (L,) by name.

    A token's reward is its log-likelihood R = -nats. "policy" is -(R - V) log p of the choice,
    "value" is (R - V)^2 / 2. No gradient flows through R, or in "policy" through V.
    """
    layers = policy.value_GT.shape[0]
    reward_LN = jax.lax.stop_gradient(-nats_BT).reshape(1, -1)
    scored_LN = scored_BT.reshape(1, -1)
    value_LN, log_prob_LN = (a.reshape(layers, -1) for a in (policy.value_GT, policy.log_prob_GT))
    advantage_LN = jax.lax.stop_gradient(reward_LN - value_LN)
    each = {
        "policy": -advantage_LN * log_prob_LN,
        "value": 0.5 * jnp.square(reward_LN - value_LN),
    }
    return {name: jnp.where(scored_LN, a, 0).sum(1) for name, a in each.items()}
