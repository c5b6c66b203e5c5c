"""What passes between a router and the rest of the model.

Array fields say `nnx.data()`: on Python 3.11, Flax does not recognise a traced array by itself.

G groups (a group is one sequence unless configured otherwise), T tokens per group, D model width,
E experts, K experts per token, C slots per expert, S soft slots per expert (segments of a group in
an ExpertMerge), V vocabulary.
"""

import dataclasses
import enum
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from routing.training_text import TrainingText


class Causality(enum.Enum):
    """Can a later token change what an earlier one receives?"""

    CAUSAL = "causal"
    CAUSAL_AT_EVALUATION = "causal at evaluation only"
    NEVER = "not causal"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What every router is built from; the text is there when a model starts, not when it loads."""

    d_model: int
    num_experts: int
    vocab_size: int
    text: TrainingText | None = None

    def training_text(self, who: str) -> TrainingText:
        """The text; ValueError where there is none."""
        if self.text is None:
            raise ValueError(
                f"{who} is made from the training text: give Sizes(text=TrainingText(tokens, V))"
            )
        return self.text


@nnx.dataclass
class RouterStats(nnx.Pytree):
    """Sums over valid tokens: they add up over micro-batches and devices. Padding never counts.

    count_E is what the router chose, kept_E what was left after capacity; both count assignments.
    batch_sums holds further sums, by owner and then by name: those of "router" (its `Routing`), of
    "loss/<name>" and of "companion/<name>".
    """

    token_count: Int[Array, "*L"] = nnx.data()
    count_E: Int[Array, "*L E"] = nnx.data()
    kept_E: Int[Array, "*L E"] = nnx.data()
    score_sum_E: Float[Array, "*L E"] = nnx.data()
    entropy_sum: Float[Array, "*L"] = nnx.data()
    logit_square_sum: Float[Array, "*L"] = nnx.data()
    batch_sums: dict[str, dict[str, Array]] = nnx.data(default_factory=dict)


@nnx.dataclass
class GlobalBatch(nnx.Pytree):
    """For a micro-batch: the statistics of its whole step, and its share of the step's tokens."""

    stats: RouterStats = nnx.data()
    share: Float[Array, "*L"] = nnx.data()


@nnx.dataclass
class TokenChoice(nnx.Pytree):
    """Each token picked K experts. keep_GTK is False for padding and for what was dropped.

    The capacity policy adds slot_GTK, the place in the expert's buffer of `capacity` slots.
    unchosen_gate_GTE are the weights of the experts that were not chosen, where a layer has a use
    for them.
    """

    expert_GTK: Int[Array, "G T K"] = nnx.data()
    gate_GTK: Float[Array, "G T K"] = nnx.data()
    keep_GTK: Bool[Array, "G T K"] = nnx.data()
    num_experts: int = nnx.static()
    slot_GTK: Int[Array, "G T K"] | None = nnx.data(default=None)
    capacity: int | None = nnx.static(default=None)
    unchosen_gate_GTE: Float[Array, "G T E"] | None = nnx.data(default=None)


@nnx.dataclass
class ExpertChoice(nnx.Pytree):
    """Each expert picked C tokens of num_tokens. keep_GEC is False for an empty slot."""

    token_GEC: Int[Array, "G E C"] = nnx.data()
    gate_GEC: Float[Array, "G E C"] = nnx.data()
    keep_GEC: Bool[Array, "G E C"] = nnx.data()
    num_tokens: int = nnx.static()


@nnx.dataclass
class SoftSlots(nnx.Pytree):
    """Slot s of expert e reads dispatch-weighted tokens; token t reads combine-weighted slots."""

    dispatch_GTES: Float[Array, "G T E S"] = nnx.data()
    combine_GTES: Float[Array, "G T E S"] = nnx.data()


@nnx.dataclass
class ExpertMerge(nnx.Pytree):
    """No token moves: segment s of a group goes through one expert, the weighted mean of all.

    Every segment has `segment` tokens, tokens_GS of them valid; the last one may have fewer.
    """

    weight_GSE: Float[Array, "G S E"] = nnx.data()
    tokens_GS: Int[Array, "G S"] = nnx.data()
    segment: int = nnx.static()
    num_tokens: int = nnx.static()

    @property
    def weight_GTE(self) -> Float[Array, "G T E"]:
        """The weights of every token's segment."""
        return jnp.repeat(self.weight_GSE, self.segment, axis=-2)[..., : self.num_tokens, :]


Decision = TokenChoice | ExpertChoice | SoftSlots | ExpertMerge


@nnx.dataclass
class Policy(nnx.Pytree):
    """What a sampled decision needs of the objective, which alone knows each token's reward.

    log_prob_GT: of what was sampled; value_GT: the reward that the router expects.
    """

    log_prob_GT: Float[Array, "*L G T"] = nnx.data()
    value_GT: Float[Array, "*L G T"] = nnx.data()


@nnx.dataclass
class Routing(nnx.Pytree):
    """What `Router.route` returns: a decision and what losses and balancers may ask for.

    score_GTE are non-negative with rows that sum to 1: every expert's share, chosen or not.
    load_GTE is the chance that an expert is chosen, where the router can differentiate it.
    terms are per-token losses of the router's own, for `TermLoss`; padding may hold anything.
    batch_sums are over the valid tokens, for what changes between optimizer steps.
    """

    decision: Decision = nnx.data()
    logits_GTE: Float[Array, "G T E"] | None = nnx.data(default=None)
    score_GTE: Float[Array, "G T E"] | None = nnx.data(default=None)
    load_GTE: Float[Array, "G T E"] | None = nnx.data(default=None)
    terms: dict[str, Float[Array, "G T"]] = nnx.data(default_factory=dict)
    batch_sums: dict[str, Array] = nnx.data(default_factory=dict)
    policy: Policy | None = nnx.data(default=None)


@nnx.dataclass
class RouterOutput(nnx.Pytree):
    """A decision, its losses (unscaled, by name), their scaled sum, and its statistics.

    For a whole model everything is stacked over its sparse layers; a step keeps no decision.
    logits_GTE are on their way to the next sparse layer, where the router `reads_previous_logits`.
    """

    decision: Decision | None = nnx.data()
    losses: dict[str, Float[Array, "*L"]] = nnx.data()
    auxiliary_loss: Float[Array, "*L"] = nnx.data()
    stats: RouterStats = nnx.data()
    policy: Policy | None = nnx.data(default=None)
    logits_GTE: Float[Array, "G T E"] | None = nnx.data(default=None)


def gates_GTE(decision: Decision) -> Float[Array, "G T E"]:
    """How much of each expert's output every token receives, whatever the decision's kind."""
    if isinstance(decision, TokenChoice):
        dtype = decision.gate_GTK.dtype
        expert_GTKE = jax.nn.one_hot(decision.expert_GTK, decision.num_experts, dtype=dtype)
        gate_GTK = jnp.where(decision.keep_GTK, decision.gate_GTK, 0)
        return jnp.einsum("gtke,gtk->gte", expert_GTKE, gate_GTK)
    if isinstance(decision, ExpertChoice):
        dtype = decision.gate_GEC.dtype
        token_GECT = jax.nn.one_hot(decision.token_GEC, decision.num_tokens, dtype=dtype)
        gate_GEC = jnp.where(decision.keep_GEC, decision.gate_GEC, 0)
        return jnp.einsum("gect,gec->gte", token_GECT, gate_GEC)
    if isinstance(decision, ExpertMerge):
        return decision.weight_GTE
    return decision.combine_GTES.sum(-1)


def choices_GE(decision: Decision, *, kept_GTK: Array | None = None) -> Int[Array, "G E"]:
    """How many assignments each expert has in each group.

    A soft slot that reads is one; a token of a merged expert is one of the heaviest in its mixture.
    """
    if isinstance(decision, TokenChoice):
        keep_GTK = decision.keep_GTK if kept_GTK is None else kept_GTK
        # Counted one by one, where comparing every choice with every expert is slower.
        if decision.num_experts * decision.expert_GTK.shape[-1] > 1024:
            flat = (keep_GTK.shape[0], -1)
            count = functools.partial(jnp.bincount, length=decision.num_experts)
            return jax.vmap(count)(
                decision.expert_GTK.reshape(flat), keep_GTK.reshape(flat).astype(jnp.int32)
            )
        hit_GTKE = jax.nn.one_hot(decision.expert_GTK, decision.num_experts, dtype=bool)
        return jnp.sum(hit_GTKE & keep_GTK[..., None], axis=(1, 2), dtype=jnp.int32)
    if isinstance(decision, ExpertChoice):
        return jnp.sum(decision.keep_GEC, axis=2, dtype=jnp.int32)
    if isinstance(decision, ExpertMerge):
        heaviest_GS = jnp.argmax(decision.weight_GSE, axis=-1)
        hit_GSE = jax.nn.one_hot(heaviest_GS, decision.weight_GSE.shape[-1], dtype=jnp.int32)
        return jnp.sum(hit_GSE * decision.tokens_GS[..., None], axis=1)
    # The slots of a group of nothing but padding read nothing.
    return jnp.sum(jnp.any(decision.dispatch_GTES != 0, axis=1), axis=-1, dtype=jnp.int32)
