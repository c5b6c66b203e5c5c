"""Router state that is updated once per optimizer step, without a gradient.

G groups, T tokens per group, E experts, K experts per token.
"""

import abc

from flax import nnx
import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from routing.parameters import router_state, zeros
from routing.ranges import Count, LessThanOne, NonNegative
from routing.records import RouterStats
from routing.selection import top_k_indices


class StepState(nnx.Module):
    """Abstract: router state, and the rule that updates it from the statistics of a step."""

    @abc.abstractmethod
    def update(self, stats: RouterStats) -> None:
        """Update the state in place, once per optimizer step; never at evaluation."""


class Balancer(StepState):
    """Abstract: router state with a bias that enters selection, never the gates."""

    bias_E: nnx.Variable

    @abc.abstractmethod
    def batch_sums(
        self, score_GTE: Float[Array, "G T E"], valid_GT: Bool[Array, "G T"], k: int
    ) -> dict[str, jax.Array]:
        """Sums over valid tokens that `update` needs beside `count_E`, by name."""


@gin.configurable
class BiasBalancer(Balancer):
    """Loss-free balancing (Wang et al. 2024, algorithm 1): a bias that enters selection only.

    b_e += rate * sign(mean count - count_e).

    Args:
        num_experts: E.
        rate: how much a bias changes per optimizer step.
        recentre: subtract the mean bias afterwards, which keeps the bias from drifting and changes
            no selection.
    """

    def __init__(self, num_experts: Count, rate: NonNegative = 1e-3, recentre: bool = True):
        self.rate = rate
        self.recentre = recentre
        self.bias_E = router_state((num_experts,), jnp.float32, (None,), zeros)

    def batch_sums(
        self, score_GTE: Float[Array, "G T E"], valid_GT: Bool[Array, "G T"], k: int
    ) -> dict[str, jax.Array]:
        return {}

    def update(self, stats: RouterStats) -> None:
        # Integer arithmetic: counts beyond 2**24 would not be exact in float32.
        count_E, experts = stats.count_E, stats.count_E.shape[0]
        mean, remainder = count_E.sum() // experts, count_E.sum() % experts
        under_E = jnp.where(count_E == mean, jnp.sign(remainder), jnp.sign(mean - count_E))
        bias_E = self.bias_E[...] + self.rate * under_E.astype(jnp.float32)
        self.bias_E[...] = bias_E - bias_E.mean() if self.recentre else bias_E


@gin.configurable
class QuantileBalancer(Balancer):
    """The bias that would have balanced the last optimizer step (Megatron-LM's dual update).

    Selection takes the K largest of s + b. With alpha_t the (K+1)-th largest of a token's row, b_e
    becomes minus the (T K / E + 1)-th largest of s - alpha in the expert's column, so that T K / E
    tokens would choose e. Columns are taken group by group and averaged. For hundreds of experts,
    where a fixed rate of change is too slow.

    Args:
        num_experts: E.
        decay: of a running mean over optimizer steps; 0 takes the last step alone.
    """

    def __init__(self, num_experts: Count, decay: LessThanOne = 0.0):
        if not 0 <= decay < 1:
            raise ValueError(f"QuantileBalancer.decay={decay} must lie in [0, 1)")
        self.decay = decay
        self.bias_E = router_state((num_experts,), jnp.float32, (None,), zeros)

    def batch_sums(
        self, score_GTE: Float[Array, "G T E"], valid_GT: Bool[Array, "G T"], k: int
    ) -> dict[str, jax.Array]:
        experts = score_GTE.shape[-1]
        if k >= experts:
            raise ValueError(
                f"QuantileBalancer can't balance k={k} of {experts} experts: all are used"
            )
        score_GTE = jax.lax.stop_gradient(score_GTE)
        biased_GTE = score_GTE + self.bias_E[...][None, None]
        next_GT1 = top_k_indices(biased_GTE, k + 1)[..., k:]
        alpha_GT1 = jnp.take_along_axis(biased_GTE, next_GT1, -1)
        tokens_G = valid_GT.sum(1, dtype=jnp.int32)
        threshold_GE = exceeded_by(score_GTE - alpha_GT1, valid_GT, tokens_G * k // experts)
        has_tokens_G = tokens_G > 0
        return {
            "bar": jnp.where(has_tokens_G[:, None], threshold_GE, 0).sum(0),
            "groups": has_tokens_G.sum(dtype=jnp.int32),
        }

    def update(self, stats: RouterStats) -> None:
        sums, old_E = stats.batch_sums["router"], self.bias_E[...]
        groups = sums["groups"]
        found_E = -sums["bar"] / jnp.maximum(groups, 1)
        new_E = self.decay * old_E + (1 - self.decay) * (found_E - found_E.mean())
        self.bias_E[...] = jnp.where(groups > 0, new_E, old_E)


def exceeded_by(
    value_GTE: Float[Array, "G T E"],
    valid_GT: Bool[Array, "G T"],
    count_G: Int[Array, " G"],
) -> jax.Array:
    """The largest thresholds (G, E) that more than count_G valid tokens of a column exceed.

    Equivalent to: the (count + 1)-th largest of each column, or less by up to 2^-24 of its range.
    Found by bisection: sorting columns would cost more than everything else in a router.
    """
    valid_GT1 = valid_GT[..., None]
    low_GE = jnp.where(valid_GT1, value_GTE, jnp.inf).min(1)
    high_GE = jnp.where(valid_GT1, value_GTE, -jnp.inf).max(1)

    def bisect(_, bounds):
        low_GE, high_GE = bounds
        middle_GE = 0.5 * (low_GE + high_GE)
        count_GE = jnp.sum((value_GTE > middle_GE[:, None]) & valid_GT1, axis=1)
        many_GE = count_GE > count_G[:, None]
        return jnp.where(many_GE, middle_GE, low_GE), jnp.where(many_GE, high_GE, middle_GE)

    return jax.lax.fori_loop(0, 24, bisect, (low_GE, high_GE))[0]
