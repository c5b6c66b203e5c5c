"""Capacity: how many tokens an expert takes, and who goes without when there are more.

Neither the router's business nor the dispatcher's: a policy turns a TokenChoice into the one that
fits, and its keep_GTK reports what was dropped.
"""

import dataclasses
from fractions import Fraction
from typing import Literal

import gin
import jax
import jax.numpy as jnp
import numpy as np

from routing.records import RouterInputs, TokenChoice


def slots_per_expert(
    tokens, *, k: int, num_experts: int | Fraction, factor: float, multiple: int = 1
):
    """C = ceil(factor * k * tokens / experts), then up to a multiple; exact integer arithmetic.

    `tokens` may be a Python int or an int64 NumPy array.
    """
    exact = Fraction(factor).limit_denominator(10_000) * k / num_experts
    slots = -(-tokens * exact.numerator // exact.denominator)
    return -(-slots // multiple) * multiple


def slots_for_valid(valid_GT: jax.Array, **size):
    """slots_per_expert for the valid tokens of each group, so that padding changes nothing: int32.

    Read from a table of all numbers of tokens: the product in int32 would overflow for a factor
    such as 1.3333 with 30,000 tokens.
    """
    table_T = slots_per_expert(np.arange(valid_GT.shape[1] + 1, dtype=np.int64), **size)
    return jnp.asarray(table_T.astype(np.int32))[valid_GT.sum(1, dtype=jnp.int32)]


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Capacity:
    """At most ceil(factor * K * T / E) tokens of a group for each expert.

    Attributes:
        factor: in training; None keeps every token.
        eval_factor: at evaluation; None (the default) keeps every token.
        multiple: the number of slots is rounded up to a multiple of this.
        priority: who is served first: "position" (earlier tokens), "gate" (larger gates, batch
            prioritised), "random".
        order: "token-major" (all choices of a token, then the next token) or "choice-major" (all
            first choices, then all second ones; lets a later token evict an earlier one).
    """

    factor: float | None = 1.25
    eval_factor: float | None = None
    multiple: int = 1
    priority: Literal["position", "gate", "random"] = "position"
    order: Literal["token-major", "choice-major"] = "token-major"

    def __post_init__(self):
        for name in ("factor", "eval_factor"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(
                    f"Capacity.{name}={value} leaves no expert any token; give a positive number "
                    "(1.25 is usual) or None to keep every token"
                )
        if self.multiple < 1:
            raise ValueError(f"Capacity.multiple={self.multiple} must be at least 1")
        if self.priority not in ("position", "gate", "random"):
            raise ValueError(f"Capacity.priority={self.priority!r}: position, gate or random")
        if self.order not in ("token-major", "choice-major"):
            raise ValueError(f"Capacity.order={self.order!r}: token-major or choice-major")

    @property
    def leaks(self) -> bool:
        """In training, can a later token change what an earlier one receives?"""
        return self.factor is not None and not self._in_order

    @property
    def leaks_at_evaluation(self) -> bool:
        """The same at evaluation, where by default nothing is dropped."""
        return self.eval_factor is not None and not self._in_order

    @property
    def _in_order(self) -> bool:
        return self.priority == "position" and self.order == "token-major"

    def keeps_all(self, train: bool) -> bool:
        """Whether nothing is ever dropped."""
        return (self.factor if train else self.eval_factor) is None

    def fit(
        self, decision: TokenChoice, inputs: RouterInputs, choices: int | Fraction | None = None
    ) -> TokenChoice:
        """The decision with a slot for every assignment that fits; the rest has keep False.

        choices: among how many such experts the assignments are divided, where these are not all.
        """
        factor = self.factor if inputs.train else self.eval_factor
        _, tokens, k = decision.expert_GTK.shape
        experts = choices or decision.num_experts
        rank_GTK = self._rank(decision, inputs)
        if factor is None:
            return self._with_slots(decision, rank_GTK, decision.keep_GTK, tokens)
        size = {"k": k, "num_experts": experts, "factor": factor, "multiple": self.multiple}
        slots = min(slots_per_expert(tokens, **size), -(-tokens // self.multiple) * self.multiple)
        limit_G = slots_for_valid(inputs.valid_GT, **size)
        keep_GTK = decision.keep_GTK & (rank_GTK < jnp.minimum(limit_G, slots)[:, None, None])
        return self._with_slots(decision, rank_GTK, keep_GTK, slots)

    def _with_slots(self, decision, rank_GTK, keep_GTK, slots: int) -> TokenChoice:
        slot_GTK = jnp.where(keep_GTK, rank_GTK, 0)
        return dataclasses.replace(decision, keep_GTK=keep_GTK, slot_GTK=slot_GTK, capacity=slots)

    def _rank(self, decision: TokenChoice, inputs: RouterInputs):
        """How many assignments to the same expert are served before this one: int32 (G, T, K)."""
        expert_GTK, keep_GTK = decision.expert_GTK, decision.keep_GTK
        groups, tokens, k = expert_GTK.shape
        order_GT = self._token_order(decision, inputs)
        if order_GT is not None:
            expert_GTK, keep_GTK = (
                jnp.take_along_axis(a, order_GT[..., None], axis=1) for a in (expert_GTK, keep_GTK)
            )
        if self.order == "choice-major":
            expert_GTK, keep_GTK = (jnp.swapaxes(a, 1, 2) for a in (expert_GTK, keep_GTK))
        rank_GN = rank_within_expert(
            expert_GTK.reshape(groups, -1), keep_GTK.reshape(groups, -1), decision.num_experts
        )
        if self.order == "choice-major":
            rank_GTK = jnp.swapaxes(rank_GN.reshape(groups, k, tokens), 1, 2)
        else:
            rank_GTK = rank_GN.reshape(groups, tokens, k)
        if order_GT is None:
            return rank_GTK
        return jnp.take_along_axis(rank_GTK, jnp.argsort(order_GT, axis=1)[..., None], axis=1)

    def _token_order(self, decision, inputs):
        """The order in which tokens are served, or None for their own."""
        if self.priority == "gate":
            best_GT = jnp.max(jax.lax.stop_gradient(decision.gate_GTK), axis=-1)
            return jnp.argsort(-best_GT, axis=1, stable=True)
        if self.priority == "random" and inputs.train:
            tokens = inputs.valid_GT.shape[1]
            draw = jax.vmap(lambda key: jax.random.uniform(key, (tokens,)))
            return jnp.argsort(draw(inputs.keys_G(purpose=1)), axis=1)
        return None


def rank_within_expert(expert_GN, keep_GN, num_experts: int):
    """For each assignment in order: how many kept ones to the same expert came before. int32."""
    hit_GEN = expert_GN[:, None, :] == jnp.arange(num_experts)[None, :, None]
    hit_GEN = (hit_GEN & keep_GN[:, None, :]).astype(jnp.int32)
    before_GEN = jnp.cumsum(hit_GEN, axis=-1) - hit_GEN
    return jnp.take_along_axis(before_GEN, expert_GN[:, None, :], axis=1)[:, 0]
