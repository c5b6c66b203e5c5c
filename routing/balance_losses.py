"""Losses that balance the load of the experts.

G groups, T tokens per group, E experts, K experts per token; N groups, sequences or documents.
"""

import dataclasses
from typing import Literal

import gin
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Float

from routing.inputs import RouterInputs
from routing.losses import (
    RouterLoss,
    check_one_of,
    global_batch_sum,
    require_scores,
    token_weighted,
)
from routing.ranges import Count, Natural, NonNegative, SomeShare
from routing.records import AnyArray, Decision, Routing, TokenChoice, choices_GE, gates_GTE
from routing.selection import top_k_indices


class ScopedLoss(RouterLoss):
    """Abstract: a loss on sums over the tokens of its scope."""

    scope: str

    @property
    def uses_global_batch(self) -> bool:
        return self.scope == "global"


@gin.configurable
@dataclasses.dataclass(frozen=True)
class BalanceLoss(ScopedLoss):
    """E / K * sum_e f_e P_e (Shazeer 2017; Fedus 2021, eq. 4-6); 1.0 at perfect balance.

    f_e is the share of choices of expert e, before drops; P_e the mean of its scores over tokens.

    Attributes:
        scope: the tokens over which f and P are taken. "global": those of the optimizer step (Qiu
            et al. 2025); "group": of each group; "sequence": of each sequence (DeepSeek-V3, eq.
            17-20); "document": of each document of a packed sequence. The last three are
            averaged, weighted by their number of tokens.
        counts: the choices that f counts. "made": the router's, with its bias, noise and groups of
            experts (Fedus et al. 2021, eq. 5); "raw": the K largest scores (DeepSeek-V3, eq. 18).
            None: "raw" in the scopes "sequence" and "document" where tokens choose, else "made".
            They differ only for biased, noisy and group-limited routers.
        choices: "first": f counts only each token's first choice (GShard, algorithm 1).
        devices: balance devices instead of experts: E is divided into so many equal parts
            (DeepSeekMoE, eq. 15-17).
        zero_computation: how many of the last experts are zero-computation experts, whose terms
            are weighted by `zero_computation_weight`; perfect balance is then below 1.
        zero_computation_weight: tau of MoE++ (eq. 7), as `ZeroCopyConstant.share`.
    """

    coefficient: NonNegative = 0.01
    scope: Literal["global", "group", "sequence", "document"] = "global"
    counts: Literal["raw", "made"] | None = None
    choices: Literal["all", "first"] = "all"
    devices: Count | None = None
    zero_computation: Natural = 0
    zero_computation_weight: SomeShare = 0.75
    over_layers: Literal["sum", "mean"] = "sum"
    name: str = "balance"

    def __post_init__(self):
        check_one_of("BalanceLoss", self, scope=("global", "group", "sequence", "document"))
        check_one_of("BalanceLoss", self, counts=("raw", "made", None), choices=("all", "first"))
        if self.devices is not None and self.devices < 1:
            raise ValueError(f"BalanceLoss.devices={self.devices} must be at least 1, or None")
        if self.zero_computation < 0 or not 0 < self.zero_computation_weight <= 1:
            raise ValueError(
                f"BalanceLoss.zero_computation={self.zero_computation}, zero_computation_weight="
                f"{self.zero_computation_weight}: a number of experts, and a weight above 0 and at "
                "most 1"
            )
        if self.zero_computation and self.devices is not None:
            raise ValueError("BalanceLoss.zero_computation and devices exclude each other")

    def check_layer(self, zero_computation):
        if self.zero_computation not in (0, zero_computation):
            raise ValueError(
                f"BalanceLoss.zero_computation={self.zero_computation}, but the layer has "
                f"{zero_computation} of them (zero + copy + constant of a ZeroCopyConstant in "
                "MoELayer.companions: 4 unless set)"
            )

    def batch_sums(self, routing, inputs):
        counted = self._counted(routing, inputs)
        if self.scope != "global" or counted is routing.decision:
            return {}
        return {"counted": choices_GE(counted).sum(0)}

    def __call__(self, routing, inputs, stats):
        score_GTE = require_scores(routing, self.name)
        counted = self._counted(routing, inputs)
        if self.scope == "global":
            global_batch = inputs.context.global_batch
            all_stats = stats if global_batch is None else global_batch.stats
            same = counted is routing.decision
            count_E = all_stats.count_E if same else all_stats.batch_sums[self.owner]["counted"]
            score_E = global_batch_sum(stats, inputs, lambda stats: stats.score_sum_E)
            return self._balance(count_E, score_E)
        score_GTE = jnp.where(inputs.valid_GT[..., None], score_GTE, 0)
        if self.scope == "document":
            sums = by_document(counted, score_GTE, inputs)
        else:
            sums = by_group(counted, score_GTE, inputs, split=self.scope == "sequence")
        count_NE, score_NE, tokens_N = sums
        return token_weighted(jax.vmap(self._balance)(count_NE, score_NE), tokens_N)

    def _counted(self, routing: Routing, inputs: RouterInputs) -> Decision:
        """The decision whose choices f counts; `routing.decision` itself where it is that one."""
        decision, counts = routing.decision, self.counts
        if counts is None:
            by_tokens = isinstance(decision, TokenChoice)
            apart = self.scope in ("sequence", "document")
            counts = "raw" if apart and by_tokens else "made"
        if counts == "raw":
            decision = raw_choices(routing, inputs)
        return first_choices(decision) if self.choices == "first" else decision

    def _balance(self, count_E, score_sum_E):
        """E * sum_e w_e f_e P_e of counts (E,) and summed scores (E,); 0 without a token."""
        count_E, score_sum_E = self._by_device(count_E), self._by_device(score_sum_E)
        share_E = count_E / jnp.maximum(count_E.sum(), 1)
        # Scores sum to 1 over the experts, so their sum is the number of tokens.
        tokens = jax.lax.stop_gradient(score_sum_E.sum())
        mean_E = score_sum_E / jnp.where(tokens > 0, tokens, 1.0)
        experts = count_E.shape[0]
        is_free_E = jnp.arange(experts) >= experts - self.zero_computation
        weight_E = jnp.where(is_free_E, self.zero_computation_weight, 1)
        return experts * jnp.sum(weight_E * share_E * mean_E)

    def _by_device(self, sum_E):
        """Sums over the experts of each device, where the loss balances devices."""
        if self.devices is None:
            return sum_E
        if sum_E.shape[0] % self.devices:
            raise ValueError(
                f"BalanceLoss.devices={self.devices} does not divide the {sum_E.shape[0]} experts"
            )
        return sum_E.reshape(self.devices, -1).sum(-1)


def raw_choices(routing: Routing, inputs: RouterInputs) -> TokenChoice:
    """Each token's K experts of largest score, without bias, noise or groups of experts."""
    decision = routing.decision
    if not isinstance(decision, TokenChoice):
        raise ValueError('BalanceLoss.counts="raw" needs a router whose tokens choose')
    score_GTE = jax.lax.stop_gradient(require_scores(routing, "balance"))
    k = decision.expert_GTK.shape[-1]
    expert_GTK = checkpoint_name(top_k_indices(score_GTE, k), "routing")
    keep_GTK = jnp.broadcast_to(inputs.valid_GT[..., None], expert_GTK.shape)
    return TokenChoice(expert_GTK, decision.gate_GTK, keep_GTK, decision.num_experts)


def first_choices(decision: Decision) -> TokenChoice:
    """Each token's first choice alone: its kept choice with the largest gate."""
    if not isinstance(decision, TokenChoice):
        raise ValueError('BalanceLoss.choices="first" needs a router whose tokens choose')
    # Not every router returns its choices in order.
    gate_GTK = jnp.where(decision.keep_GTK, jax.lax.stop_gradient(decision.gate_GTK), -jnp.inf)
    best_GT1 = jnp.argmax(gate_GTK, axis=-1)[..., None]
    return dataclasses.replace(
        decision,
        expert_GTK=jnp.take_along_axis(decision.expert_GTK, best_GT1, -1),
        gate_GTK=jnp.take_along_axis(decision.gate_GTK, best_GT1, -1),
        keep_GTK=jnp.take_along_axis(decision.keep_GTK, best_GT1, -1),
    )


def by_group(
    counted: Decision, score_GTE: Float[AnyArray, "G T E"], inputs: RouterInputs, split: bool
):
    """Choices (N, E), summed scores (N, E) and valid tokens (N,) of each group or sequence.

    split: by sequence, where a group has several.
    """
    valid_GT, times = inputs.valid_GT, inputs.sequences if split else 1
    if times > 1:
        if not isinstance(counted, TokenChoice):
            raise ValueError(
                f'BalanceLoss.scope="sequence" in groups of {times} sequences needs a router whose '
                "tokens choose; set MoELayer.sequences_per_group = 1"
            )

        def apart(a):
            return a.reshape(a.shape[0] * times, a.shape[1] // times, *a.shape[2:])

        score_GTE, valid_GT = apart(score_GTE), apart(valid_GT)
        counted = TokenChoice(
            apart(counted.expert_GTK),
            apart(counted.gate_GTK),
            apart(counted.keep_GTK),
            counted.num_experts,
        )
    return choices_GE(counted), score_GTE.sum(1), valid_GT.sum(1)


def by_document(counted: Decision, score_GTE: Float[AnyArray, "G T E"], inputs: RouterInputs):
    """The same for each document. N is an upper bound of their number; most are empty."""
    if not isinstance(counted, TokenChoice) or inputs.segment_GT is None:
        raise ValueError('BalanceLoss.scope="document" needs a router whose tokens choose')
    hit_GTKE = jax.nn.one_hot(counted.expert_GTK, counted.num_experts, dtype=bool)
    hit_GTE = jnp.sum(hit_GTKE & counted.keep_GTK[..., None], axis=2, dtype=jnp.int32)
    groups, tokens = inputs.valid_GT.shape
    shape = (groups * inputs.sequences, tokens // inputs.sequences)
    # Padding (0) inside a document doesn't end it, and numbers may skip.
    segment_BT = jax.lax.cummax(inputs.segment_GT.reshape(shape), axis=1)
    first_B = segment_BT[:, :1]
    document_BT = jnp.cumsum(jnp.diff(segment_BT, axis=1, prepend=first_B) != 0, axis=1)

    def summed(a):
        def one(a_T, document_T):
            return jax.ops.segment_sum(a_T, document_T, num_segments=shape[1])

        sums = jax.vmap(one)(a.reshape(*shape, *a.shape[2:]), document_BT)
        return sums.reshape(-1, *a.shape[2:])

    return summed(hit_GTE), summed(score_GTE), summed(inputs.valid_GT.astype(jnp.int32))


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ImportanceLoss(ScopedLoss):
    """CV^2 over the experts of their summed gates (Shazeer et al. 2017, eq. 6-7).

    Attributes:
        of: "gates" of the chosen experts, or "scores" of all experts (V-MoE, appendix A).
        scope: "global": sums over the optimizer step (Shazeer et al.: the batch); "group": over
            each group, averaged (as in V-MoE's code).
    """

    coefficient: NonNegative = 0.1
    of: Literal["gates", "scores"] = "gates"
    scope: Literal["global", "group"] = "global"
    over_layers: Literal["sum", "mean"] = "sum"
    name: str = "importance"

    def __post_init__(self):
        check_one_of("ImportanceLoss", self, of=("gates", "scores"), scope=("global", "group"))

    def batch_sums(self, routing, inputs):
        if self.of == "scores" or self.scope == "group":
            return {}
        gate_GTE = jnp.where(inputs.valid_GT[..., None], gates_GTE(routing.decision), 0)
        return {"gates": gate_GTE.sum((0, 1))}

    def __call__(self, routing, inputs, stats):
        if self.scope == "group":
            value_GTE = gates_GTE(routing.decision)
            if self.of == "scores":
                value_GTE = require_scores(routing, self.name)
            return cv_squared_of_groups(value_GTE, inputs)
        if self.of == "scores":
            require_scores(routing, self.name)
            return cv_squared(global_batch_sum(stats, inputs, lambda stats: stats.score_sum_E))
        sum_E = global_batch_sum(stats, inputs, lambda s: s.batch_sums[self.owner]["gates"])
        return cv_squared(sum_E)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class LoadLoss(ScopedLoss):
    """CV^2 over the experts of their smooth expected load (Shazeer et al. 2017, eq. 10-11).

    For routers with noise, which know the probability that each expert is chosen.

    Attributes:
        scope: "global": sums over the optimizer step; "group": over each group, averaged.
    """

    coefficient: NonNegative = 0.1
    scope: Literal["global", "group"] = "global"
    over_layers: Literal["sum", "mean"] = "sum"
    name: str = "load"

    def __post_init__(self):
        check_one_of("LoadLoss", self, scope=("global", "group"))

    def batch_sums(self, routing, inputs):
        if routing.load_GTE is None:
            raise ValueError(
                "LoadLoss needs a router that estimates its load (NoisyTopK, VMoE); Hierarchical "
                "has HierarchicalLoadLoss, others BalanceLoss and ImportanceLoss"
            )
        if self.scope == "group":
            return {}
        return {"load": jnp.where(inputs.valid_GT[..., None], routing.load_GTE, 0).sum((0, 1))}

    def __call__(self, routing, inputs, stats):
        if self.scope == "group":
            assert routing.load_GTE is not None  # as batch_sums has seen
            return cv_squared_of_groups(routing.load_GTE, inputs)
        sum_E = global_batch_sum(stats, inputs, lambda s: s.batch_sums[self.owner]["load"])
        return cv_squared(sum_E)


def cv_squared_of_groups(value_GTE: Float[AnyArray, "G T E"], inputs: RouterInputs) -> jax.Array:
    """CV^2 of each group's sums, averaged over groups by their number of tokens."""
    sum_GE = jnp.where(inputs.valid_GT[..., None], value_GTE, 0).sum(1)
    return token_weighted(jax.vmap(cv_squared)(sum_GE), inputs.valid_GT.sum(1))


def cv_squared(sum_E: Float[AnyArray, " E"]) -> jax.Array:
    """Biased variance over squared mean; 0 where the mean is."""
    mean = sum_E.mean()
    return jnp.square(sum_E - mean).mean() / jnp.where(mean == 0, 1.0, jnp.square(mean))
