"""Hash routing: the token's id alone names its expert (Roller et al. 2021).

G groups, T tokens per group, V vocabulary; K = 1.
"""

import gin
import jax
import jax.numpy as jnp

from routing.parameters import router_state
from routing.records import Causality, RouterInputs, Routing, Sizes, TokenChoice
from routing.router import Router


@gin.configurable
class RandomHash(Router):
    """expert = table[token id], drawn once and uniformly; gate 1; nothing is learned.

    The table is router state: it is saved and restored with the checkpoint.
    """

    causality = Causality.CAUSAL
    needs_token_ids = True
    decoding = "as in training"

    def __init__(self, sizes: Sizes):
        self.num_experts, self.losses = sizes.num_experts, ()

        def draw(key, shape, dtype):
            return jax.random.randint(key, shape, 0, sizes.num_experts, dtype)

        self.table_V = router_state((sizes.vocab_size,), jnp.int32, (None,), draw)

    def route(self, inputs: RouterInputs) -> Routing:
        expert_GT1 = self.table_V[...][inputs.token_id_GT][..., None]
        gate_GT1 = jnp.ones(expert_GT1.shape, jnp.float32)
        keep_GT1 = jnp.ones_like(expert_GT1, bool)
        return Routing(TokenChoice(expert_GT1, gate_GT1, keep_GT1, self.num_experts))
