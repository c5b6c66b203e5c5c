"""Hash routing: a fixed function of token ids names the expert (Roller et al. 2021).

G groups, T tokens per group, V vocabulary, E experts; K = 1.
"""

from typing import Literal

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Int

from routing.inputs import RouterInputs
from routing.parameters import router_state
from routing.records import AnyArray, Causality, DecodingState, Routing, Sizes, TokenChoice
from routing.router import Router
from routing.solvers.hash_tables import RandomTable, Table, hash_bits

KEYS = ("token", "previous", "bigram", "position", "future", "predicted")


@gin.configurable
class Hash(Router):
    """expert = table[key], gate 1. The table is router state: saved and restored with the model.

    Args:
        sizes: width, number of experts, vocabulary; the training text for tables made from it.
        key: "token"; "previous" token; "bigram" of both; "position" in the document (no table);
            "predicted": the token that most often follows this one in the training text;
            "future": the next token itself, an oracle that shows what routing could gain.
        table: `RandomTable()` where None, `BalancedTable()`, `ClusteredTable(embeddings)` or
            `DispersedTable(embeddings)`.
    """

    causality = Causality.CAUSAL
    needs_token_ids = True
    unit_gates = True
    steps = True
    needs_all_experts = "its table names experts by their numbers"
    decoding = "as in training"

    def __init__(
        self,
        sizes: Sizes,
        key: Literal["token", "previous", "bigram", "position", "future", "predicted"] = "token",
        table: Table | None = None,
    ):
        if key not in KEYS:
            raise ValueError(f"Hash.key={key!r}: one of {', '.join(KEYS)}")
        if key == "future":
            self.causality = Causality.NEVER
            self.decoding = "not possible: it reads the token that is to be predicted"
        self.order_matters = key not in ("token", "predicted")
        self.needs_token_ids = key != "position"
        self.num_experts, self.vocab_size, self.losses = sizes.num_experts, sizes.vocab_size, ()
        self.key = key

        if table is not None and key in ("position", "bigram"):
            raise ValueError(f"Hash.key={key!r} reads no table; leave Hash.table out")
        table = RandomTable() if table is None else table

        def start(key, shape, dtype):
            return jnp.asarray(table(key, sizes), dtype)

        def predict(key, shape, dtype):
            return jnp.asarray(sizes.training_text("Hash.key='predicted'").next_V, dtype)

        def salt(key, shape, dtype):
            return jax.random.randint(key, shape, 0, 2**31 - 1, dtype)

        size, axes = (sizes.vocab_size,), (None,)
        has_table = key not in ("position", "bigram")
        self.table_V = router_state(size, jnp.int32, axes, start) if has_table else None
        self.next_V = router_state(size, jnp.int32, axes, predict) if key == "predicted" else None
        self.salt = router_state((), jnp.int32, (), salt) if key == "bigram" else None

    def route(self, inputs: RouterInputs) -> Routing:
        return self._routing(inputs, previous_token(inputs))

    def start(self, inputs, length_G, slots) -> DecodingState:
        last_G1 = jnp.maximum(length_G - 1, 0)[:, None]
        return {"previous_G1": jnp.take_along_axis(inputs.token_id_GT, last_G1, axis=1)}

    def route_next(self, inputs, state):
        routing = self._routing(inputs, state["previous_G1"])
        return routing, {"previous_G1": inputs.token_id_GT}

    def _routing(self, inputs: RouterInputs, previous_GT) -> Routing:
        expert_GT1 = self._experts_GT(inputs, previous_GT)[..., None]
        gate_GT1 = jnp.ones(expert_GT1.shape, jnp.float32)
        keep_GT1 = jnp.ones_like(expert_GT1, bool)
        return Routing(TokenChoice(expert_GT1, gate_GT1, keep_GT1, self.num_experts))

    def _experts_GT(self, inputs: RouterInputs, previous_GT) -> jax.Array:
        token_GT = inputs.token_id_GT
        if self.key == "position":
            return inputs.position_GT % self.num_experts
        if self.salt is not None:
            pair_GT = bigram_key(previous_GT, token_GT, self.vocab_size)
            hash_GT = hash_bits(pair_GT ^ self.salt[...].astype(jnp.uint32))
            return (hash_GT % self.num_experts).astype(jnp.int32)
        if self.key == "previous":
            token_GT = previous_GT
        elif self.key == "future":
            token_GT = jnp.maximum(next_token(inputs), 0)
        elif self.next_V is not None:
            token_GT = self.next_V[...][token_GT]
        assert self.table_V is not None
        return self.table_V[...][token_GT]


def previous_token(inputs: RouterInputs) -> jax.Array:
    """The previous token of the document, id 0 for the first one: (G, T)."""
    before_GT = jnp.roll(inputs.token_id_GT, 1, axis=1)
    return jnp.where(inputs.position_GT > 0, before_GT, 0)


def next_token(inputs: RouterInputs) -> jax.Array:
    """The next token of the document, -1 for the last one: (G, T)."""
    after_GT = jnp.roll(inputs.token_id_GT, -1, axis=1)
    follows_GT = jnp.roll(inputs.position_GT, -1, axis=1) == inputs.position_GT + 1
    follows_GT &= jnp.roll(inputs.valid_GT, -1, axis=1)
    return jnp.where(follows_GT, after_GT, -1)


def bigram_key(
    previous_GT: Int[AnyArray, "G T"], token_GT: Int[AnyArray, "G T"], vocab_size: int
) -> jax.Array:
    """previous * V + token, modulo 2^32: uint32."""
    return previous_GT.astype(jnp.uint32) * jnp.uint32(vocab_size) + token_GT.astype(jnp.uint32)
