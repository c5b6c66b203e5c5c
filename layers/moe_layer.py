"""The mixture-of-experts layer: router, capacity, dispatcher, experts and companions in turn.

B batch, T tokens, D model width, G groups, E experts, C slots per expert.
"""

from collections.abc import Callable, Sequence
import dataclasses

from flax import nnx
import gin
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.decoding import Prompt
from layers.dispatch import Dispatcher, Overflow, SlotGather
from layers.dispatch.few_rows import for_decoding
from layers.experts.base import ChosenCompanion, Companion, Experts, LayerSizes, Routed
from layers.experts.feed_forward import Activation, hidden_width
from layers.experts.feed_forward_experts import FeedForwardExperts
from layers.logical_axes import logical_constraint
from routing.balancers import StepState
from routing.capacity import Capacity
from routing.inputs import RouterInputs, Tokens
from routing.ranges import Count, Positive
from routing.records import (
    AnyArray,
    Decision,
    DecodingState,
    RouterOutput,
    Sizes,
    SoftSlots,
    TokenChoice,
    choices_GE,
)
from routing.router import Router
from routing.training_text import TrainingText


@gin.configurable
class MoELayer(nnx.Module):
    """A mixture-of-experts layer: a router chooses for every token which experts it goes through.

    Args:
        d_model: D.
        vocab_size: V, for routers that look at token ids.
        router: a class (or function) that makes a `Router` from `Sizes`.
        num_experts: E.
        d_ff: hidden width of one expert; that of a dense layer where None.
        activation: as in FeedForward.
        experts: a class that makes a kind of experts from `LayerSizes`: `FeedForwardExperts`;
            `LatentExperts`; `NeuronExperts`, of one hidden unit each; `SegmentedExperts`, where a
            token's choices make up one expert (MultiHash).
        companions: classes of modules whose outputs are added to the experts': `SharedExpert`;
            `ZeroCopyConstant`, which the router chooses like further experts; `DefaultVectors`,
            for experts that were not chosen.
        capacity: the most tokens that an expert takes; `Capacity()` where None.
        dispatcher: moves tokens to experts and back; `SlotGather()` where None.
        eval_dispatcher: the same at evaluation; `dispatcher` where None. Experts without a
            capacity would need a slot for every token with `SlotGather`, and none with `Sorted`.
        sequences_per_group: the sequences of a group, within which capacity is counted: in
            training so many, or the whole batch where that is smaller; at evaluation one.
        out_scale: variance scale of the output weights.
        text: the training text, for routers that count token ids in it.
        sparse_layers: how many the model has, for router losses that are averaged over them.

    Raises:
        ValueError: the router, experts, companions and dispatchers are incompatible.
    """

    def __init__(
        self,
        d_model: Count,
        vocab_size: Count,
        router: Callable[[Sizes], Router] = gin.REQUIRED,  # pyright: ignore[reportArgumentType]
        num_experts: Count = 8,
        d_ff: Count | None = None,
        activation: Activation = "swiglu",
        experts: Callable[[LayerSizes], Experts] = FeedForwardExperts,
        companions: Sequence[Callable[[LayerSizes], Companion]] = (),
        capacity: Capacity | None = None,
        dispatcher: Dispatcher | None = None,
        eval_dispatcher: Dispatcher | None = None,
        sequences_per_group: Count = 1,
        out_scale: Positive = 1.0,
        text: TrainingText | None = None,
        sparse_layers: Count = 1,
    ):
        for name, count in (
            ("num_experts", num_experts),
            ("sequences_per_group", sequences_per_group),
        ):
            if count < 1:
                raise ValueError(f"MoELayer.{name}={count} must be at least 1")
        d_ff = d_ff or hidden_width(d_model, activation)
        self.num_experts, self.sequences_per_group = num_experts, sequences_per_group
        self.capacity = Capacity() if capacity is None else capacity
        self.dispatcher = SlotGather() if dispatcher is None else dispatcher
        self.eval_dispatcher = self.dispatcher if eval_dispatcher is None else eval_dispatcher
        sizes = LayerSizes(num_experts, d_model, d_ff, activation, out_scale)
        self.experts = experts(sizes)
        self.companion_names = self._hold([make(sizes) for make in companions])
        choices = num_experts + self.num_zero_computation
        self.router = router(Sizes(d_model, choices, vocab_size, text))
        self.router.sparse_layers = sparse_layers
        check_fit(self)

    def _hold(self, companions: Sequence[Companion]) -> tuple[str, ...]:
        """Set each companion as an attribute under its name; return the names in order."""
        names = tuple(companion.name for companion in companions)
        if len(set(names)) < len(names):
            raise ValueError(f"MoELayer.companions has two of a kind: {', '.join(names)}")
        for companion in companions:
            setattr(self, companion.name, companion)
        return names

    @property
    def companions(self) -> list[Companion]:
        """The modules whose outputs are added to the experts', in order."""
        return [getattr(self, name) for name in self.companion_names]

    @property
    def chosen(self) -> ChosenCompanion | None:
        """The companion whose members the router chooses among, if there is one."""
        return next((c for c in self.companions if isinstance(c, ChosenCompanion)), None)

    @property
    def num_zero_computation(self) -> int:
        """The number of zero-computation experts, numbered after the experts."""
        return self.chosen.choices if self.chosen is not None else 0

    def __call__(
        self, x_BTD: Float[AnyArray, "B T D"], tokens: Tokens
    ) -> tuple[Float[Array, "B T D"], RouterOutput]:
        """The layer's output (B, T, D), and its router's decision, losses and statistics.

        Raises:
            ValueError: the experts or a companion don't take the router's kind of decision.
        """
        inputs = RouterInputs.of(x_BTD, tokens, self.sequences_per_group)
        return self._computed(x_BTD, inputs, self.router(inputs))

    @property
    def recomputes(self) -> str | None:
        """Why decoding has to compute the whole text again for every token; or None."""
        if self.experts.has_capacity and not self.capacity.keeps_all(train=False):
            return f"Capacity.eval_factor={self.capacity.eval_factor} drops by all earlier tokens"
        return self.router.recomputes

    def prefill(
        self, x_BTD: Float[AnyArray, "B T D"], tokens: Tokens, prompt: Prompt
    ) -> tuple[Float[Array, "B T D"], RouterOutput, DecodingState]:
        """The output for prompts, the router's output, and what the router keeps of them."""
        inputs = RouterInputs.of(x_BTD, tokens)
        state = self.router.started(inputs, prompt.length_B, prompt.slots)
        return *self._computed(x_BTD, inputs, self.router(inputs)), state

    def step(
        self, x_B1D: Float[AnyArray, "B 1 D"], tokens: Tokens, state: DecodingState
    ) -> tuple[Float[Array, "B 1 D"], RouterOutput, DecodingState]:
        """The output for one more token of each sequence, without drops, and the router's state.

        Only experts that were chosen are computed, wherever they can do without slots.
        """
        inputs = RouterInputs.of(x_B1D, tokens)
        output, state = self.router.step(inputs, state)
        shows_slots = self.experts.needs_slots(False) or any(c.needs_slots for c in self.companions)
        decision = self._accepted(output.decision)
        dispatcher = self.eval_dispatcher if shows_slots else for_decoding(decision)
        decision, own = self._fit(decision, inputs, dispatcher)
        x_G1D = inputs.x_GTD.astype(x_B1D.dtype)
        rows_GND = x_G1D
        if isinstance(decision, SoftSlots) and decision.slot_GESD is not None:
            decision, rows_GND = decision.with_earlier(x_G1D)
        y_GND, y_EGCD = self._experts(rows_GND, decision, inputs, dispatcher)
        y_B1D = y_GND[:, -1:]
        routed = Routed(x_G1D, inputs, decision, own, y_EGCD)
        for companion in self.companions:
            y_B1D = y_B1D + companion(routed).reshape(x_B1D.shape)
        return y_B1D, dataclasses.replace(output, decision=decision), state

    def _computed(self, x_BTD, inputs: RouterInputs, output: RouterOutput):
        """The layer's output (B, T, D), and the router's output after drops."""
        dispatcher = self.dispatcher if inputs.train else self.eval_dispatcher
        decision, own = self._fit(self._accepted(output.decision), inputs, dispatcher)
        within, overflow = dispatcher.split_overflow(decision)
        if overflow is None:  # assignments without room are dropped
            decision = within
        # Padding was set to zero, so that NaN in it reaches neither experts nor gradients.
        x_GTD = inputs.x_GTD.astype(x_BTD.dtype)
        y_GTD, y_EGCD = self._experts(x_GTD, within, inputs, dispatcher)
        if overflow is not None:
            y_GTD = y_GTD + self._overflow(x_GTD, overflow, inputs)
        y_BTD = logical_constraint(y_GTD, "batch", "length", None).reshape(x_BTD.shape)
        routed = Routed(x_GTD, inputs, decision, own, y_EGCD)
        batch_sums = dict(output.stats.batch_sums)
        for companion in self.companions:
            y_BTD = y_BTD + companion(routed).reshape(x_BTD.shape)
            if sums := companion.batch_sums(routed):
                batch_sums[f"companion/{companion.name}"] = sums
        kept_E = choices_GE(decision).sum(0)
        if own is not None:
            kept_E = jnp.concatenate([kept_E, choices_GE(own).sum(0)])
        stats = dataclasses.replace(output.stats, kept_E=kept_E, batch_sums=batch_sums)
        return y_BTD, dataclasses.replace(output, decision=decision, stats=stats)

    def _accepted(self, decision: Decision | None) -> Decision:
        """The decision; ValueError where experts or a companion don't take its kind."""
        assert decision is not None  # only the output of a whole model has none
        takers: list[tuple[object, tuple[type, ...]]] = [(self.experts, self.experts.accepts)]
        if self.chosen is not None:
            takers.append((self.chosen, (TokenChoice,)))
        for taker, accepts in takers:
            if not isinstance(decision, accepts):
                kinds = " or ".join(kind.__name__ for kind in accepts)
                raise ValueError(
                    f"{type(taker).__name__} as they are set take a {kinds}; "
                    f"{type(self.router).__name__} decides by {type(decision).__name__}"
                    + (": use a router that chooses for each token" if len(accepts) == 1 else "")
                )
        return decision

    def _fit(
        self, decision: Decision, inputs: RouterInputs, dispatcher: Dispatcher
    ) -> tuple[Decision, TokenChoice | None]:
        """The assignments to experts and to a chosen companion, within their capacity."""
        own, among, chosen = None, None, self.chosen
        limited = self.experts.has_capacity
        if chosen is not None:
            assert isinstance(decision, TokenChoice)
            decision, own = chosen.split(decision, self.num_experts)
            if limited:
                own = chosen.fit_capacity(own, self.capacity, inputs, self.num_experts)
            among = chosen.among(self.num_experts)
        fits = self.capacity.keeps_all(inputs.train) and not dispatcher.needs_slots
        if isinstance(decision, TokenChoice) and limited and not fits:
            decision = self.capacity.fit(decision, inputs, among)
        return _save_by_name(decision), own

    def _experts(self, x_GTD, decision, inputs, dispatcher: Dispatcher):
        with jax.named_scope(type(self.experts).__name__):
            return self.experts(x_GTD, decision, inputs, dispatcher)

    def _overflow(self, x_GTD, overflow: Overflow, inputs) -> jax.Array:
        """The gate-weighted outputs (G, T, D) for assignments that overflow the send buffer."""

        def compute(x_GTD):
            return self._experts(x_GTD, overflow.decision, inputs, overflow.dispatcher)[0]

        return jax.lax.cond(overflow.decision.keep_GTK.any(), compute, jnp.zeros_like, x_GTD)

    def step_states(self) -> list[StepState]:
        """The modules of the layer whose state is updated once per optimizer step."""
        return [module for _, module in nnx.iter_modules(self) if isinstance(module, StepState)]


def check_fit(layer: MoELayer) -> None:
    """Raise ValueError where router, experts, companions and dispatchers are incompatible."""
    router, experts = layer.router, layer.experts
    name, kind = type(router).__name__, type(experts).__name__
    if router.whole_sequences and layer.sequences_per_group != 1:
        raise ValueError(
            f"{name} mixes the tokens of a group, so that a group has to be one sequence; set "
            f"MoELayer.sequences_per_group = 1 (it is {layer.sequences_per_group})"
        )
    if router.repeats_experts and not experts.takes_repeats:
        raise ValueError(
            f"{name} may name one expert several times for a token, which {kind} have no room for; "
            "set MoELayer.experts = @NeuronExperts (or, for MultiHash, @SegmentedExperts)"
        )
    if experts.ignores_gates and not router.unit_gates:
        raise ValueError(
            f"{kind} leave gates out, so that the router's have to be 1, as MultiHash's are; "
            f"{name}'s are not"
        )
    for loss in router.losses:
        loss.check_layer(layer.num_zero_computation)
    chosen = [c for c in layer.companions if isinstance(c, ChosenCompanion)]
    if len(chosen) > 1:
        names = " and ".join(type(companion).__name__ for companion in chosen)
        raise ValueError(f"MoELayer.companions: the router can't choose among both {names}")
    for companion in layer.companions:
        if companion.needs_slots and (chosen or not experts.shows_slots):
            raise ValueError(
                f"{type(companion).__name__} read the experts' outputs slot by slot: they stand "
                f"beside FeedForwardExperts without ZeroCopyConstant, not beside "
                f"{type(chosen[0] if chosen else experts).__name__}"
            )
    check_slots(layer)


def check_slots(layer: MoELayer) -> None:
    """Raise ValueError where experts or a companion need slots and a dispatcher has none."""
    needs = [type(c).__name__ for c in layer.companions if c.needs_slots]
    for setting, dispatcher, train in (
        ("dispatcher", layer.dispatcher, True),
        ("eval_dispatcher", layer.eval_dispatcher, False),
    ):
        kinds = [type(layer.experts).__name__] if layer.experts.needs_slots(train) else []
        for who in (*kinds, *needs):
            if not dispatcher.needs_slots:
                raise ValueError(
                    f"MoELayer.{setting} = @{type(dispatcher).__name__}() has no slots, which "
                    f"{who} as they are set need; use @SlotGather()"
                )


def _save_by_name(decision):
    """Name slots and kept flags, so that rematerialisation saves them and never routes again."""
    if not isinstance(decision, TokenChoice) or decision.slot_GTK is None:
        return decision
    return dataclasses.replace(
        decision,
        slot_GTK=checkpoint_name(decision.slot_GTK, "routing"),
        keep_GTK=checkpoint_name(decision.keep_GTK, "routing"),
    )
