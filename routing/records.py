"""The records that pass between a router and the rest of the model.

Array fields are declared by `nnx.data()`: on Python 3.11, Flax does not detect traced arrays.

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
import numpy as np

from routing.training_text import TrainingText

AnyArray = jax.Array | np.ndarray  # on a device, or read from it
# What a router carries from token to token when text is generated, by name; groups lead.
DecodingState = dict[str, jax.Array]


class Causality(enum.Enum):
    """Whether a later token can change the output of an earlier one."""

    CAUSAL = "causal"
    CAUSAL_AT_EVALUATION = "causal at evaluation only"
    NEVER = "not causal"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that routers are built from. Restored models are built without the text."""

    d_model: int
    num_experts: int
    vocab_size: int
    text: TrainingText | None = None

    def training_text(self, who: str) -> TrainingText:
        """The training text; ValueError where there is none. who: the name in the message."""
        if self.text is None:
            raise ValueError(
                f"{who} is made from the training text: give Sizes(text=TrainingText(tokens, V))"
            )
        return self.text


@nnx.dataclass
class RouterStats(nnx.Pytree):
    """Sums over valid tokens of a batch, which are summed over micro-batches.

    Attributes:
        token_count: valid tokens.
        count_E: assignments to each expert, before drops.
        kept_E: assignments to each expert, after drops.
        score_sum_E: scores.
        entropy_sum: entropies of the scores, in nats.
        logit_square_sum: means over the experts of squared logits.
        batch_sums: further sums by owner and name; owners are "router" (of its `Routing`),
            "loss/<name>" and "companion/<name>".
    """

    token_count: Int[AnyArray, "*L"] = nnx.data()
    count_E: Int[AnyArray, "*L E"] = nnx.data()
    kept_E: Int[AnyArray, "*L E"] = nnx.data()
    score_sum_E: Float[AnyArray, "*L E"] = nnx.data()
    entropy_sum: Float[AnyArray, "*L"] = nnx.data()
    logit_square_sum: Float[AnyArray, "*L"] = nnx.data()
    batch_sums: dict[str, dict[str, Array]] = nnx.data(default_factory=dict)


@nnx.dataclass
class GlobalBatch(nnx.Pytree):
    """For a micro-batch: the statistics of the global batch, and its share of the tokens."""

    stats: RouterStats = nnx.data()
    share: Float[Array, "*L"] = nnx.data()


@nnx.dataclass
class TokenChoice(nnx.Pytree):
    """Each token chooses K experts.

    Attributes:
        expert_GTK: the chosen experts.
        gate_GTK: the weights of their outputs.
        keep_GTK: False for padding, and for assignments that are dropped.
        num_experts: E.
        slot_GTK: the slot in the expert's buffer, from the capacity policy.
        capacity: the slots of a buffer.
        unchosen_gate_GTE: the weights of experts that were not chosen, for `DefaultVectors`.
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
    """Each expert chooses C of its group's num_tokens tokens; keep_GEC is False in empty slots."""

    token_GEC: Int[Array, "G E C"] = nnx.data()
    gate_GEC: Float[Array, "G E C"] = nnx.data()
    keep_GEC: Bool[Array, "G E C"] = nnx.data()
    num_tokens: int = nnx.static()


@nnx.dataclass
class SoftSlots(nnx.Pytree):
    """Slots read weighted means of tokens (dispatch), tokens weighted sums of slots (combine).

    slot_GESD: in decoding, what slots have read of earlier tokens.
    """

    dispatch_GTES: Float[Array, "G T E S"] = nnx.data()
    combine_GTES: Float[Array, "G T E S"] = nnx.data()
    slot_GESD: Float[Array, "G E S D"] | None = nnx.data(default=None)

    def with_earlier(
        self, x_GTD: Float[Array, "G T D"]
    ) -> tuple["SoftSlots", Float[Array, "G N D"]]:
        """The same decision on E * S tokens that the slots read one each, followed by x_GTD."""
        assert self.slot_GESD is not None
        groups, experts, slots, width = self.slot_GESD.shape
        rows = experts * slots
        earlier_GRD = self.slot_GESD.reshape(groups, rows, width).astype(x_GTD.dtype)
        one_each_RES = jnp.eye(rows, dtype=self.dispatch_GTES.dtype).reshape(rows, experts, slots)
        read_GRES = jnp.broadcast_to(one_each_RES, (groups, *one_each_RES.shape))
        dispatch_GNES = jnp.concatenate([read_GRES, self.dispatch_GTES], axis=1)
        combine_GNES = jnp.concatenate([jnp.zeros_like(read_GRES), self.combine_GTES], axis=1)
        return SoftSlots(dispatch_GNES, combine_GNES), jnp.concatenate([earlier_GRD, x_GTD], axis=1)


@nnx.dataclass
class ExpertMerge(nnx.Pytree):
    """Each segment of a group goes through one expert, the weighted mean of all; no token moves.

    Attributes:
        weight_GSE: the weights of the experts' parameters.
        tokens_GS: the valid tokens of each segment.
        segment: tokens of a segment; the last one may have fewer.
        num_tokens: T.
    """

    weight_GSE: Float[Array, "G S E"] = nnx.data()
    tokens_GS: Int[Array, "G S"] = nnx.data()
    segment: int = nnx.static()
    num_tokens: int = nnx.static()

    @property
    def weight_GTE(self) -> Float[Array, "G T E"]:
        """For every token the weights of its segment."""
        return jnp.repeat(self.weight_GSE, self.segment, axis=-2)[..., : self.num_tokens, :]


Decision = TokenChoice | ExpertChoice | SoftSlots | ExpertMerge


@nnx.dataclass
class Policy(nnx.Pytree):
    """What the policy losses of a sampled decision need beside each token's reward.

    log_prob_GT: log-probability of the sampled choice. value_GT: the router's expected reward.
    """

    log_prob_GT: Float[Array, "*L G T"] = nnx.data()
    value_GT: Float[Array, "*L G T"] = nnx.data()


@nnx.dataclass
class Routing(nnx.Pytree):
    """What `Router.route` returns: a decision, and what losses and balancers read.

    Attributes:
        decision: which tokens go to which experts.
        logits_GTE: the router's logits.
        score_GTE: non-negative scores of all experts, chosen or not, that sum to 1 for each token.
        load_GTE: the probability that each expert is chosen, differentiable.
        terms: losses per token, for `TermLoss`; padding may hold anything.
        batch_sums: sums over valid tokens, for a `StepState`.
        policy: for routers that sample.
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
    """A router's decision, losses and statistics. A model's are stacked over its sparse layers.

    Attributes:
        decision: None in the metrics of a step.
        losses: unscaled, by name.
        auxiliary_loss: the scaled sum of the losses.
        stats: of the decision.
        policy: for routers that sample.
        logits_GTE: for the router of the next sparse layer, where it `reads_previous_logits`.
    """

    decision: Decision | None = nnx.data()
    losses: dict[str, Float[AnyArray, "*L"]] = nnx.data()
    auxiliary_loss: Float[AnyArray, "*L"] = nnx.data()
    stats: RouterStats = nnx.data()
    policy: Policy | None = nnx.data(default=None)
    logits_GTE: Float[Array, "G T E"] | None = nnx.data(default=None)


def gates_GTE(decision: Decision) -> Float[Array, "G T E"]:
    """The weight of each expert's output for every token, for any kind of decision."""
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
    """The number of assignments to each expert in each group.

    A soft slot counts as one if it reads any token; a token of a merged expert as one to the expert
    with the largest weight. kept_GTK: in place of decision.keep_GTK.
    """
    if isinstance(decision, TokenChoice):
        keep_GTK = decision.keep_GTK if kept_GTK is None else kept_GTK
        # Comparing every choice with every expert would be slower here.
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
    # The slots of a group that is all padding read no token.
    return jnp.sum(jnp.any(decision.dispatch_GTES != 0, axis=1), axis=-1, dtype=jnp.int32)
