"""The mixture-of-experts layer: a router decides, a policy fits, a dispatcher moves, experts work.

B batch, T tokens, D model width, G groups, E experts, C slots per expert.
"""

from collections.abc import Callable
import dataclasses

from flax import nnx
import gin
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from layers.constrain import constrain
from layers.dispatch import Dispatcher, Overflow, SlotGather
from layers.experts.feed_forward import Activation, Experts, FeedForward, hidden_width
from layers.experts.neurons import NeuronExperts
from layers.experts.segmented import SegmentedExperts
from layers.experts.zero_computation import DefaultVectors, ZeroCopyConstant
from layers.tokens import Tokens
from routing.algorithms.multi_hash import MultiHash
from routing.balancers import StepState
from routing.capacity import Capacity
from routing.ranges import Count, LessThanOne, Natural, Positive
from routing.records import (
    ExpertMerge,
    RouterInputs,
    RouterOutput,
    Sizes,
    TokenChoice,
    TrainingText,
    choices_GE,
    gates_GTE,
)
from routing.router import Router


@gin.configurable
class MoELayer(nnx.Module):
    """A feed-forward of which every token uses a part.

    Args:
        d_model: D.
        vocab_size: V, for routers that look at token ids.
        router: a class (or function) that makes a `Router` from `Sizes`.
        num_experts: E.
        d_ff: hidden width of one expert; that of a dense layer where None.
        activation: as in FeedForward.
        capacity: what an expert takes at most; `Capacity()` where None.
        dispatcher: how tokens move; `SlotGather()` where None.
        eval_dispatcher: the same at evaluation, where experts that may take every token would
            have a slot for each with `SlotGather`, and `Sorted` has none; `dispatcher` where None
            (and where segmented experts or default vectors need slots).
        shared_experts: this many further experts of the same width that every token uses.
        neurons: `NeuronExperts` for experts of one hidden unit each, in place of feed-forwards;
            d_ff, activation, capacity and dispatcher then have no meaning.
        segmented: `SegmentedExperts`, in which a token's choices make up one expert (MultiHash);
            capacity then has no meaning: nothing is dropped.
        cheap_experts: a class such as `ZeroCopyConstant`, whose members the router chooses like
            experts of their own.
        default_vectors: a class such as `DefaultVectors`, for experts that were not chosen.
        expert_dropout: share of the experts' hidden units that is dropped in training, for
            fine-tuning (Switch: 0.4).
        sequences_per_group: in training a group, within which capacity is counted, is this many
            sequences, or the whole batch where that is smaller; at evaluation it is one.
        out_scale: variance scale of the output weights.
        text: the training text, for routers that count in it before they start.
        sparse_layers: of the model, for router losses that are averaged over them.
    """

    def __init__(
        self,
        d_model: Count,
        vocab_size: Count,
        router: Callable[[Sizes], Router] = gin.REQUIRED,  # pyright: ignore[reportArgumentType]
        num_experts: Count = 8,
        d_ff: Count | None = None,
        activation: Activation = "swiglu",
        capacity: Capacity | None = None,
        dispatcher: Dispatcher | None = None,
        eval_dispatcher: Dispatcher | None = None,
        shared_experts: Natural = 0,
        neurons: Callable[..., NeuronExperts] | None = None,
        segmented: Callable[..., SegmentedExperts] | None = None,
        cheap_experts: Callable[[int], ZeroCopyConstant] | None = None,
        default_vectors: Callable[[int, int], DefaultVectors] | None = None,
        expert_dropout: LessThanOne = 0.0,
        sequences_per_group: Count = 1,
        out_scale: Positive = 1.0,
        text: TrainingText | None = None,
        sparse_layers: Count = 1,
    ):
        if num_experts < 1:
            raise ValueError(f"MoELayer.num_experts={num_experts} must be at least 1")
        if sequences_per_group < 1:
            raise ValueError(f"MoELayer.sequences_per_group={sequences_per_group}: at least 1")
        d_ff = d_ff or hidden_width(d_model, activation)
        self.capacity = Capacity() if capacity is None else capacity
        self.dispatcher = SlotGather() if dispatcher is None else dispatcher
        self.eval_dispatcher = self.dispatcher if eval_dispatcher is None else eval_dispatcher
        if not 0 <= expert_dropout < 1:
            raise ValueError(f"MoELayer.expert_dropout={expert_dropout} must lie in [0, 1)")
        self.expert_dropout = expert_dropout
        self.sequences_per_group = sequences_per_group
        self.cheap = cheap_experts(d_model) if cheap_experts else None
        self.defaults = default_vectors(num_experts, d_model) if default_vectors else None
        choices = num_experts + (self.cheap.count if self.cheap else 0)
        self.num_experts = num_experts
        self.router = router(Sizes(d_model, choices, vocab_size, text))
        self.router.sparse_layers = sparse_layers
        if expert_dropout and (neurons or segmented):
            raise ValueError(
                "MoELayer.expert_dropout is for feed-forwards, not neurons or segments"
            )
        check_slots(self.dispatcher, expert_dropout, segmented, default_vectors)
        if (segmented or default_vectors) and not self.eval_dispatcher.needs_slots:
            self.eval_dispatcher = self.dispatcher
        check_fit(self.router, sequences_per_group, neurons, segmented, self.cheap, default_vectors)
        if neurons is not None:
            self.experts = neurons(num_experts, d_model, out_scale=out_scale)
        else:
            make = Experts if segmented is None else segmented
            self.experts = make(num_experts, d_model, d_ff, activation, out_scale)
        shared = None
        if shared_experts:
            shared = FeedForward(d_model, shared_experts * d_ff, activation, out_scale)
        self.shared = shared  # once: Flax takes an attribute that was None for static

    def __call__(self, x_BTD: jax.Array, tokens: Tokens) -> tuple[jax.Array, RouterOutput]:
        """The layer's output (B, T, D) and what its router said."""
        inputs = self._group(x_BTD, tokens)
        output = self.router(inputs)
        decision, cheap, among = output.decision, None, None
        assert decision is not None  # only whole models leave it out
        if self.cheap is not None:
            decision, cheap = self.cheap.split(self._each_token_chose(decision), self.num_experts)
            if isinstance(self.experts, Experts):
                cheap = self.cheap.fit_capacity(cheap, self.capacity, inputs, self.num_experts)
            among = self.cheap.choices(self.num_experts)
        mover = self.dispatcher if inputs.train else self.eval_dispatcher
        fits = self.capacity.keeps_all(inputs.train) and not mover.needs_slots
        if isinstance(decision, TokenChoice) and isinstance(self.experts, Experts) and not fits:
            decision = self.capacity.fit(decision, inputs, among)
        decision = _save_by_name(decision)
        admitted, overflow = mover.split_overflow(decision)
        if overflow is None:  # what was not admitted is dropped
            decision = admitted
        # Padding is zero here, so NaN in it reaches neither the experts nor their gradients.
        x_GTD = inputs.x_GTD.astype(x_BTD.dtype)
        y_GTD, batch_sums = self._experts(x_GTD, admitted, inputs, mover)
        if overflow is not None:
            y_GTD = y_GTD + self._overflowing(x_GTD, overflow, inputs)
        kept_E = choices_GE(decision).sum(0)
        if self.cheap is not None and cheap is not None:
            y_GTD = y_GTD + self.cheap(x_GTD, gates_GTE(cheap))
            kept_E = jnp.concatenate([kept_E, choices_GE(cheap).sum(0)])
        y_BTD = constrain(y_GTD, "batch", "length", None).reshape(x_BTD.shape)
        if self.shared is not None:
            with jax.named_scope("shared_experts"):
                y_BTD = y_BTD + self.shared(x_GTD.reshape(x_BTD.shape))
        batch_sums = output.stats.batch_sums | batch_sums
        stats = dataclasses.replace(output.stats, kept_E=kept_E, batch_sums=batch_sums)
        return y_BTD, dataclasses.replace(output, decision=decision, stats=stats)

    def _overflowing(self, x_GTD, overflow: Overflow, inputs) -> jax.Array:
        """What the experts make of the assignments that the first exchange had no room for."""

        def compute(x_GTD):
            return self._experts(x_GTD, overflow.decision, inputs, overflow.dispatcher)[0]

        return jax.lax.cond(overflow.decision.keep_GTK.any(), compute, jnp.zeros_like, x_GTD)

    def _each_token_chose(self, decision) -> TokenChoice:
        """The decision, if it is of the kind that cheap experts need."""
        if not isinstance(decision, TokenChoice):
            raise ValueError(
                "MoELayer.cheap_experts need a router that chooses for each token, as TopK and "
                f"Switch do; {type(self.router).__name__} decides by {type(decision).__name__}"
            )
        return decision

    def _experts(
        self, x_GTD, decision, inputs, mover: Dispatcher
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """What the experts make of the tokens, home again (G, T, D), and sums of the batch."""
        if self.defaults is not None and getattr(decision, "unchosen_gate_GTE", None) is None:
            raise ValueError(
                "MoELayer.default_vectors need the gates of experts that were not chosen: use TopK "
                "with keep_rest=True"
            )
        if not isinstance(self.experts, Experts):
            if not isinstance(decision, TokenChoice):
                raise ValueError(
                    f"{type(self.experts).__name__} need a router that chooses for each token; "
                    f"{type(self.router).__name__} decides by {type(decision).__name__}"
                )
            with jax.named_scope(type(self.experts).__name__):
                if isinstance(self.experts, NeuronExperts):
                    return self.experts(x_GTD, decision), {}
                return self.experts(x_GTD, decision, inputs, mover), {}
        if isinstance(decision, ExpertMerge):
            if self.expert_dropout:
                raise ValueError("MoELayer.expert_dropout has no meaning for merged experts")
            with jax.named_scope("merged_experts"):
                return self.experts.merged(x_GTD, decision), {}
        with jax.named_scope("dispatch"):
            x_EGCD = mover.dispatch(x_GTD, decision)
        with jax.named_scope("experts"):
            key_G = inputs.keys_G(purpose=3) if inputs.train and self.expert_dropout else None
            y_EGCD = self.experts(x_EGCD, key_G, self.expert_dropout)
        with jax.named_scope("combine"):
            y_GTD = mover.combine(y_EGCD, decision)
        if self.defaults is None:
            return y_GTD, {}
        return y_GTD + self.defaults(
            decision.unchosen_gate_GTE, x_GTD.dtype
        ), self.defaults.batch_sums(y_EGCD)

    def step_states(self) -> list[StepState]:
        """Every part of it whose state changes between optimizer steps."""
        return [module for _, module in nnx.iter_modules(self) if isinstance(module, StepState)]

    def _group(self, x_BTD, tokens: Tokens) -> RouterInputs:
        """The router's inputs: groups of whole sequences, float32, padding set to zero.

        At evaluation a group is one sequence: no router there lets one change another.
        """
        batch, length, width = x_BTD.shape
        per_group = min(self.sequences_per_group, batch) if tokens.train else 1
        if batch % per_group:
            raise ValueError(
                f"a batch of {batch} sequences does not divide into groups of "
                f"MoELayer.sequences_per_group={per_group}"
            )
        shape = (batch // per_group, per_group * length)
        valid_GT = (tokens.segment_BT > 0).reshape(shape)
        x_GTD = x_BTD.reshape(*shape, width).astype(jnp.float32)
        before_GTE = None
        if self.router.reads_logits_before and tokens.logits_BTE is not None:
            before_GTE = tokens.logits_BTE.reshape(*shape, self.router.num_experts)
            before_GTE = jnp.where(valid_GT[..., None], before_GTE, 0)
        return RouterInputs(
            x_GTD=jnp.where(valid_GT[..., None], x_GTD, 0),
            valid_GT=valid_GT,
            token_id_GT=tokens.token_BT.reshape(shape),
            position_GT=tokens.position_BT.reshape(shape),
            index_G=tokens.index_B[::per_group],
            key=tokens.key,
            train=tokens.train,
            global_batch=tokens.global_batch,
            logits_before_GTE=before_GTE,
            segment_GT=tokens.segment_BT.reshape(shape),
            sequences=per_group,
        )


def check_slots(dispatcher: Dispatcher, expert_dropout, segmented, default_vectors) -> None:
    """Raise ValueError where something needs slots and the dispatcher has none."""
    needing = {
        "expert_dropout": expert_dropout,
        "segmented": segmented,
        "default_vectors": default_vectors,
    }
    for name, value in needing.items():
        if value and not dispatcher.needs_slots:
            raise ValueError(
                f"MoELayer.dispatcher = @{type(dispatcher).__name__}() has no slots for "
                f"MoELayer.{name}; use @SlotGather() with it"
            )


def check_fit(router: Router, per_group, neurons, segmented, cheap, defaults) -> None:
    """Raise ValueError where a router, its groups and the kinds of experts don't go together."""
    name = type(router).__name__
    if router.whole_sequences and per_group != 1:
        raise ValueError(
            f"{name} mixes the tokens of a group, so that a group has to be one sequence; set "
            f"MoELayer.sequences_per_group = 1 (it is {per_group})"
        )
    if neurons and segmented:
        raise ValueError("MoELayer.neurons and MoELayer.segmented exclude each other")
    if router.repeats_experts and not (neurons or segmented):
        raise ValueError(
            f"{name} may name one expert several times for a token, which feed-forwards have no "
            "room for; set MoELayer.neurons = @NeuronExperts (or, for MultiHash, "
            "MoELayer.segmented = @SegmentedExperts)"
        )
    if segmented and not isinstance(router, MultiHash):
        raise ValueError(f"MoELayer.segmented is for MultiHash, whose gates are 1, not for {name}")
    for loss in router.losses:
        own, there = getattr(loss, "cheap", 0), cheap.count if cheap else 0
        if own and own != there:
            raise ValueError(
                f"BalanceLoss.cheap={own}, but MoELayer.cheap_experts has {there} of them "
                "(zero + copy + constant of ZeroCopyConstant: 4 unless set)"
            )
    if defaults and (neurons or segmented or cheap):
        raise ValueError(
            "MoELayer.default_vectors stand beside plain experts: leave neurons, segmented and "
            "cheap_experts out"
        )


def _save_by_name(decision):
    """Name the decision's integers, so that rematerialisation keeps them and never routes again."""
    if not isinstance(decision, TokenChoice) or decision.slot_GTK is None:
        return decision
    return dataclasses.replace(
        decision,
        slot_GTK=checkpoint_name(decision.slot_GTK, "routing"),
        keep_GTK=checkpoint_name(decision.keep_GTK, "routing"),
    )
