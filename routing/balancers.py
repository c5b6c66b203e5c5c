"""What balances the load without a gradient: state that changes once per optimizer step."""

import abc

from flax import nnx
import gin
import jax.numpy as jnp

from routing.parameters import router_state, zeros
from routing.records import RouterStats


class Balancer(nnx.Module):
    """Abstract: a bias on selection, and the rule that updates it from the step's statistics."""

    bias_E: nnx.Variable

    @abc.abstractmethod
    def update(self, stats: RouterStats) -> None:
        """Change the state in place, once per optimizer step, never at evaluation."""


@gin.configurable
class BiasBalancer(Balancer):
    """Loss-free balancing (Wang et al. 2024, algorithm 1): a bias that enters selection only.

    b_e += rate * sign(mean count - count_e): overloaded experts lose. `recentre` then takes the
    mean off, which changes no selection and keeps the bias from drifting.
    """

    def __init__(self, num_experts: int, rate: float = 1e-3, recentre: bool = True):
        self.rate = rate
        self.recentre = recentre
        self.bias_E = router_state((num_experts,), jnp.float32, (None,), zeros)

    def update(self, stats: RouterStats) -> None:
        # Integer arithmetic: counts beyond 2**24 would not be exact in float32.
        count_E, experts = stats.count_E, stats.count_E.shape[0]
        mean, rest = count_E.sum() // experts, count_E.sum() % experts
        under_E = jnp.where(count_E == mean, jnp.sign(rest), jnp.sign(mean - count_E))
        bias_E = self.bias_E[...] + self.rate * under_E.astype(jnp.float32)
        self.bias_E[...] = bias_E - bias_E.mean() if self.recentre else bias_E
