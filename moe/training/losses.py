"""What a step's loss is made of: the task's, the routers' auxiliary losses, and policy losses.

B batch, T tokens, L sparse layers.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.kernels.cross_entropy import cross_entropy_of_each, cross_entropy_sums
from moe.data.batch import Batch
from moe.model.transformer import ModelOutput, Transformer
from routing import Policy, RouterOutput


@nnx.dataclass
class Losses(nnx.Pytree):
    """Nats per scored token, by where they come from; a gradient is that of their sum.

    task: of the tokens to be predicted, which is what a run reports as its loss. auxiliary: the
    routers' own losses, weighted and summed over layers. policy: those that only the objective can
    complete, for routers with a policy; weighted and summed too.
    """

    task: Float[Array, ""] = nnx.data()
    auxiliary: Float[Array, ""] = nnx.data()
    policy: Float[Array, ""] = nnx.data()

    @property
    def total(self) -> Float[Array, ""]:
        return self.task + self.auxiliary + self.policy


@nnx.dataclass
class Measured(nnx.Pytree):
    """What a micro-batch measured, as its part of the batch: these parts are added up.

    text_nats: of scored tokens of text, summed. routers: the sparse layers' losses and statistics.
    depths: losses and counts, as shares of the tokens, of Mixture-of-Depths routers, by layer.
    """

    losses: Losses = nnx.data()
    text_nats: Float[Array, ""] = nnx.data()
    routers: RouterOutput | None = nnx.data()
    depths: dict[str, Array] | None = nnx.data()


def measure(
    model: Transformer, out: ModelOutput, batch: Batch, text_BT: jax.Array, scored, valid
) -> Measured:
    """The losses of a micro-batch, of `scored` scored and `valid` valid tokens in the whole batch.

    text_BT: which of the scored tokens are text.
    """
    nats, text_nats = cross_entropy_sums(
        model.head(), out.hidden_BTD, batch.target_BT, batch.scored_BT, text_BT
    )
    share = (batch.segment_BT > 0).sum() / valid
    auxiliary, policy, depths = jnp.float32(0), jnp.float32(0), None
    if out.depths is not None:
        depths = {name: share * value for name, value in out.depths.losses.items()}
        counts = out.depths.stats.batch_sums.get("router", {})
        depths |= {name: value / valid for name, value in counts.items()}
        auxiliary += share * out.depths.auxiliary_loss.sum()
    routers = out.routers
    if routers is not None:
        losses = {name: share * value for name, value in routers.losses.items()}
        auxiliary_L = share * routers.auxiliary_loss
        auxiliary += auxiliary_L.sum()
        if routers.policy is not None:
            completed = completed_by_likelihood(model, out, batch, scored)
            weights = dict(model.moe_layers_of_units()[0].router.policy_losses)
            policy = sum((weights[n] * value_L.sum() for n, value_L in completed.items()), policy)
            losses |= completed
        routers = RouterOutput(None, losses, auxiliary_L, routers.stats)
    return Measured(Losses(nats / scored, auxiliary, policy), text_nats, routers, depths)


def completed_by_likelihood(
    model: Transformer, out: ModelOutput, batch: Batch, scored
) -> dict[str, jax.Array]:
    """The unweighted losses (L,) of routers whose choices each token's likelihood rewards."""
    assert out.routers is not None and out.routers.policy is not None
    nats_BT = cross_entropy_of_each(model.head(), out.hidden_BTD, batch.target_BT)
    sums = policy_losses(out.routers.policy, nats_BT, jnp.asarray(batch.scored_BT))
    return {name: value_L / scored for name, value_L in sums.items()}


def policy_losses(policy: Policy, nats_BT: jax.Array, scored_BT: jax.Array) -> dict:
    """REINFORCE with a learned value, summed over scored tokens, for each layer (L,).

    A token's reward is its own log-likelihood R = -nats. "policy": -(R - V) log p of the choice;
    "value": half of (R - V)^2. No gradient flows through the reward or, in the first, the value.
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
