"""Capacity: how many tokens an expert takes, and which assignments are dropped beyond that.

A policy apart from router and dispatcher: it returns a TokenChoice with slots, whose keep_GTK is
False for what was dropped.

G groups, T tokens per group, E experts, K experts per token, C slots per expert, N assignments.
"""

import dataclasses
from fractions import Fraction
from typing import Literal

from einops import rearrange
import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
import numpy as np

from routing.inputs import RouterInputs
from routing.ranges import Count, Positive
from routing.records import AnyArray, TokenChoice


def slots_per_expert(
    tokens, *, k: int, num_experts: int | Fraction, factor: float, multiple: int = 1
):
    """C = ceil(factor * k * tokens / experts), rounded up to a multiple, in exact arithmetic.

    tokens: an int, or an int64 NumPy array.
    """
    exact = Fraction(factor).limit_denominator(10_000) * k / num_experts
    slots = -(-tokens * exact.numerator // exact.denominator)
    return -(-slots // multiple) * multiple


def slots_for_valid(valid_GT: Bool[Array, "G T"], **size):
    """`slots_per_expert` of each group's valid tokens, so that padding counts for nothing: (G,)."""
    return _slots_for(valid_GT.sum(1, dtype=jnp.int32), valid_GT.shape[1], size)


def slots_so_far(valid_GT: Bool[Array, "G T"], **size):
    """`slots_per_expert` of the valid tokens up to each token: int32 (G, T).

    It depends on no later token, not even on how many there are.
    """
    return _slots_for(jnp.cumsum(valid_GT, axis=1, dtype=jnp.int32), valid_GT.shape[1], size)


def _slots_for(tokens, most: int, size: dict):
    """`slots_per_expert` of an array of numbers of tokens, which are at most `most`: int32.

    Read from a table: in int32 the arithmetic would overflow, such as for a factor of 1.3333 with
    30,000 tokens.
    """
    table = slots_per_expert(np.arange(most + 1, dtype=np.int64), **size)
    return jnp.asarray(table.astype(np.int32))[tokens]


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Capacity:
    """At most ceil(factor * K * T / E) tokens of a group for each expert.

    In training T is the number of the group's valid tokens. At evaluation it is, for each token,
    the number of valid tokens up to itself, so that the beginning of a text is routed in the same
    way however the text continues.

    Attributes:
        factor: in training; None keeps every token.
        eval_factor: at evaluation; None (the default) keeps every token.
        multiple: the number of slots is rounded up to a multiple of this.
        priority: the tokens that get slots first: "position" (earlier ones), "gate" (those with
            larger gates: batch-prioritised routing) or "random".
        order: "token-major" (all choices of a token, then those of the next) or "choice-major"
            (all first choices, then all second ones, so that a later token may displace an earlier
            one).
    """

    factor: Positive | None = 1.25
    eval_factor: Positive | None = None
    multiple: Count = 1
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
        """Whether a later token can change the output of an earlier one in training."""
        return self.factor is not None and not self._in_order

    @property
    def leaks_at_evaluation(self) -> bool:
        """Whether it can at evaluation, where by default nothing is dropped."""
        return self.eval_factor is not None and not self._in_order

    @property
    def _in_order(self) -> bool:
        return self.priority == "position" and self.order == "token-major"

    def keeps_all(self, train: bool) -> bool:
        """Whether every token is kept in training, or at evaluation."""
        return (self.factor if train else self.eval_factor) is None

    def fit(
        self, decision: TokenChoice, inputs: RouterInputs, choices: int | Fraction | None = None
    ) -> TokenChoice:
        """The decision with a slot for every assignment that fits; for others keep_GTK is False.

        choices: the number of experts that capacity is divided among; num_experts where None.
        """
        factor = self.factor if inputs.train else self.eval_factor
        _, tokens, k = decision.expert_GTK.shape
        experts = choices or decision.num_experts
        rank_GTK = self._rank(decision, inputs)
        if factor is None:
            # More than all tokens choose an expert only where one chooses it twice.
            keep_GTK = decision.keep_GTK & (rank_GTK < tokens)
            return self._with_slots(decision, rank_GTK, keep_GTK, tokens)
        size = {"k": k, "num_experts": experts, "factor": factor, "multiple": self.multiple}
        slots = min(slots_per_expert(tokens, **size), -(-tokens // self.multiple) * self.multiple)
        if not inputs.train and self._in_order:
            rank_GTK = rank_as_room_grows(decision, slots_so_far(inputs.valid_GT, **size))
            return self._with_slots(decision, rank_GTK, rank_GTK < slots, slots)
        limit_G = slots_for_valid(inputs.valid_GT, **size)
        keep_GTK = decision.keep_GTK & (rank_GTK < jnp.minimum(limit_G, slots)[:, None, None])
        return self._with_slots(decision, rank_GTK, keep_GTK, slots)

    def _with_slots(self, decision, rank_GTK, keep_GTK, slots: int) -> TokenChoice:
        slot_GTK = jnp.where(keep_GTK, rank_GTK, 0)
        return dataclasses.replace(decision, keep_GTK=keep_GTK, slot_GTK=slot_GTK, capacity=slots)

    def _rank(self, decision: TokenChoice, inputs: RouterInputs):
        """How many assignments to the same expert get slots before this one: int32 (G, T, K)."""
        expert_GTK, keep_GTK = decision.expert_GTK, decision.keep_GTK
        order_GT = self._token_order(decision, inputs)
        if order_GT is not None:
            expert_GTK, keep_GTK = (
                jnp.take_along_axis(a, order_GT[..., None], axis=1) for a in (expert_GTK, keep_GTK)
            )
        row = "(k t)" if self.order == "choice-major" else "(t k)"
        expert_GN, keep_GN = (rearrange(a, f"g t k -> g {row}") for a in (expert_GTK, keep_GTK))
        rank_GN = rank_within_expert(expert_GN, keep_GN, decision.num_experts)
        rank_GTK = rearrange(rank_GN, f"g {row} -> g t k", t=expert_GTK.shape[1])
        if order_GT is None:
            return rank_GTK
        return jnp.take_along_axis(rank_GTK, jnp.argsort(order_GT, axis=1)[..., None], axis=1)

    def _token_order(self, decision, inputs):
        """The tokens (G, T) in the order in which they get slots; None for that of the text."""
        if self.priority == "gate":
            best_GT = jnp.max(jax.lax.stop_gradient(decision.gate_GTK), axis=-1)
            return jnp.argsort(-best_GT, axis=1, stable=True)
        if self.priority == "random" and inputs.train:
            tokens = inputs.valid_GT.shape[1]
            draw = jax.vmap(lambda key: jax.random.uniform(key, (tokens,)))
            return jnp.argsort(draw(inputs.keys_G("priority")), axis=1)
        return None


def rank_within_expert(
    expert_GN: Int[AnyArray, "G N"], keep_GN: Bool[AnyArray, "G N"], num_experts: int
):
    """For each assignment, how many kept ones to the same expert precede it: int32 (G, N)."""
    hit_GEN = hits(expert_GN, keep_GN, num_experts)
    before_GEN = jnp.cumsum(hit_GEN, axis=-1) - hit_GEN
    return jnp.take_along_axis(before_GEN, expert_GN[:, None, :], axis=1)[:, 0]


def hits(expert_GN: Int[AnyArray, "G N"], keep_GN: Bool[AnyArray, "G N"], num_experts: int):
    """1 where an assignment is kept and to that expert: int32 (G, E, N)."""
    hit_GEN = expert_GN[:, None, :] == jnp.arange(num_experts)[None, :, None]
    return (hit_GEN & keep_GN[:, None, :]).astype(jnp.int32)


NO_ROOM = np.int32(2**30)


def rank_as_room_grows(decision: TokenChoice, room_GT: Int[AnyArray, "G T"]):
    """The slot of each assignment, where experts have room_GT slots at each token: (G, T, K).

    `NO_ROOM` for assignments without one; int32. Equivalent to: one after the other, an assignment
    takes its expert's next slot if that is below the room at its token, and else none. With H
    assignments to an expert so far and room C, which never shrinks, the slots taken are H minus the
    maximum over the past of (H - C).
    """
    groups, tokens, k = decision.expert_GTK.shape
    expert_GN, keep_GN = (a.reshape(groups, -1) for a in (decision.expert_GTK, decision.keep_GTK))
    hit_GEN = hits(expert_GN, keep_GN, decision.num_experts)
    count_GEN = jnp.cumsum(hit_GEN, axis=-1)
    room_G1N = jnp.repeat(room_GT, k, axis=1)[:, None]
    lost_GEN = jax.lax.cummax(jnp.maximum(count_GEN - room_G1N, 0), axis=2)
    is_lost_GEN = jnp.diff(lost_GEN, axis=-1, prepend=0) > 0
    taken_GEN = jnp.where((hit_GEN > 0) & ~is_lost_GEN, count_GEN - lost_GEN - 1, NO_ROOM)
    rank_GN = jnp.take_along_axis(taken_GEN, expert_GN[:, None, :], axis=1)[:, 0]
    return rank_GN.reshape(groups, tokens, k)
