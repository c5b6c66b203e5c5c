"""MultiHash: several hashes of a token's id, one for each segment (Roller et al. 2021).

G groups, T tokens per group, V vocabulary, N hashes.
"""

import gin
import jax
import jax.numpy as jnp

from routing.inputs import RouterInputs
from routing.parameters import router_state
from routing.ranges import Count
from routing.records import Causality, Routing, Sizes, TokenChoice
from routing.router import Router


@gin.configurable
class MultiHash(Router):
    """Choice n is table n's entry for the token id, gate 1 (section 3.2); for `SegmentedExperts`.

    The tables, router state, are drawn uniformly.

    Args:
        sizes: width, number of experts, vocabulary.
        hashes: N.
    """

    causality = Causality.CAUSAL
    repeats_experts = True
    needs_token_ids = True
    unit_gates = True
    needs_all_experts = "its tables name experts by their numbers"
    decoding = "as in training"

    def __init__(self, sizes: Sizes, hashes: Count = 2):
        if hashes < 1:
            raise ValueError(f"MultiHash.hashes={hashes} must be at least 1")
        self.num_experts, self.losses = sizes.num_experts, ()

        def draw(key, shape, dtype):
            return jax.random.randint(key, shape, 0, sizes.num_experts, dtype)

        shape = (hashes, sizes.vocab_size)
        self.table_NV = router_state(shape, jnp.int32, (None, None), draw)

    def route(self, inputs: RouterInputs) -> Routing:
        expert_GTN = jnp.moveaxis(self.table_NV[...][:, inputs.token_id_GT], 0, -1)
        gate_GTN = jnp.ones(expert_GTN.shape, jnp.float32)
        keep_GTN = jnp.ones_like(expert_GTN, bool)
        return Routing(TokenChoice(expert_GTN, gate_GTN, keep_GTN, self.num_experts))
