"""The interface of routing algorithms: `route` decides; the base class adds losses and statistics.

To write a router, subclass `Router`, set the class attributes that declare its properties, build
parameters in `__init__(self, sizes, ...)`, and return a `Routing` from `route`. A router never
moves data and knows no mesh; masking of padding, losses and statistics are done here.

G groups, T tokens per group, D model width, E experts.
"""

import abc
from collections.abc import Sequence
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from routing.inputs import RouterInputs
from routing.losses import RouterLoss
from routing.records import (
    AnyArray,
    Causality,
    Decision,
    DecodingState,
    ExpertChoice,
    RouterOutput,
    RouterStats,
    Routing,
    Sizes,
    SoftSlots,
    TokenChoice,
    choices_GE,
)


class Router(nnx.Module):
    """Abstract. A subclass sets `num_experts` and `losses` in its constructor.

    Declared by the class (or by an instance whose options change it), and tested by the
    conformance suite:
        causality: whether a later token can change the output of an earlier one.
        order_matters: whether permuting the tokens of a group changes the decision for each.
        needs_token_ids: whether the decision depends on token ids.
        balanced: whether every expert gets the same load by construction.
        whole_sequences: whether a group has to be one sequence, since its tokens are mixed.
        repeats_experts: whether a token may choose one expert several times.
        unit_gates: whether every gate is 1, so that experts need not apply them.
        needs_all_experts: why none of its experts can be taken away (`moe prune`), in a few words;
            None where a token's choice compares scores of which each is one expert's own.
        decoding: how it decides when text is generated one token at a time, in a few words.
        steps: whether it decides for one further token though `order_matters`: by its position, or
            by what `start` and `route_next` carry from token to token.
        reads_global_batch: whether `route` reads the statistics of the global batch.
        reads_previous_logits: whether `route` reads `inputs.context.previous_logits`.
        experts_per_token: the mean number of experts per token, where a decision has more choices.
        policy_losses: names and weights of the policy losses, for routers that sample.
    """

    causality: Causality
    order_matters: bool = False
    needs_token_ids: bool = False
    balanced: bool = False
    whole_sequences: bool = False
    repeats_experts: bool = False
    unit_gates: bool = False
    needs_all_experts: str | None = "it doesn't declare that each expert has a score of its own"
    decoding: str = "as in training"
    steps: bool = False

    num_experts: int
    losses: tuple[RouterLoss, ...]
    sparse_layers: int = 1  # of the model; set by the MoE layer
    reads_global_batch: bool = False
    reads_previous_logits: bool = False
    experts_per_token: float | None = None
    policy_losses: tuple[tuple[str, float], ...] = ()

    @abc.abstractmethod
    def route(self, inputs: RouterInputs) -> Routing:
        """Decide which tokens go to which experts; deterministic when `inputs.train` is False.

        In float32: it is called with the highest matmul precision as the default, so that a plain
        `x @ w` or `jnp.einsum` has it.
        """

    @property
    def recomputes(self) -> str | None:
        """Why decoding has to route the whole text again for every token; None where it hasn't.

        A causal router that doesn't care about the order of tokens decides for each of them alone,
        since any token could be the first.
        """
        if self.causality is Causality.NEVER:
            return f"{type(self).__name__} is not causal at evaluation"
        if (self.order_matters or self.whole_sequences) and not self.steps:
            return f"{type(self).__name__} depends on earlier tokens and has no rule for one more"
        return None

    def start(self, inputs: RouterInputs, length_G: Int[Array, " G"], slots: int) -> DecodingState:
        """What later tokens' decisions need of these tokens; the group is the leading axis.

        length_G: tokens of each sequence; those behind them are padding.
        slots: the most tokens that a sequence will have.
        """
        return {}

    def route_next(
        self, inputs: RouterInputs, state: DecodingState
    ) -> tuple[Routing, DecodingState]:
        """The routing of one further token of each sequence, T = 1, and the state after it.

        It decides as `route` would at evaluation, given all the tokens.
        """
        return self.route(inputs), state

    def started(
        self, inputs: RouterInputs, length_G: Int[Array, " G"], slots: int
    ) -> DecodingState:
        """`start`, in float32."""
        with jax.default_matmul_precision("highest"):
            return self.start(inputs, length_G, slots)

    def step(
        self, inputs: RouterInputs, state: DecodingState
    ) -> tuple[RouterOutput, DecodingState]:
        """The output for one further token of each sequence, and the state after it."""
        with jax.named_scope(type(self).__name__), jax.default_matmul_precision("highest"):
            routing, state = self.route_next(inputs, state)
            return self._output(routing, inputs), state

    def __call__(self, inputs: RouterInputs) -> RouterOutput:
        """The decision without assignments of padding, its losses and its statistics."""
        # Otherwise TPUs would multiply in bfloat16 and GPUs in TF32, in the backward pass too.
        float32 = jax.default_matmul_precision("highest")
        with jax.named_scope(type(self).__name__), float32:
            found: object = self.route(inputs)
            if not isinstance(found, Routing):
                who, kind = type(self).__name__, type(found).__name__
                raise TypeError(f"{who}.route returned {kind}, expected a Routing")
            check_shapes(found.decision, inputs, type(self).__name__)
            return self._output(found, inputs)

    def _output(self, found: Routing, inputs: RouterInputs) -> RouterOutput:
        routing = mask_padding(found, inputs)
        check_names(self.losses)
        stats = statistics(routing, inputs, self.num_experts)
        for loss in self.losses:
            if sums := loss.batch_sums(routing, inputs):
                stats.batch_sums[loss.owner] = sums
        losses: dict[str, AnyArray] = {
            loss.name: loss(routing, inputs, stats) for loss in self.losses
        }
        auxiliary_loss = sum(
            (self.given_weight(loss, inputs) * losses[loss.name] for loss in self.losses),
            jnp.float32(0),
        )
        logits_GTE = routing.logits_GTE if self.reads_previous_logits else None
        return RouterOutput(
            routing.decision, losses, auxiliary_loss, stats, routing.policy, logits_GTE
        )

    def weight_of(self, loss: RouterLoss) -> float:
        """The factor of this layer's value of a loss in the training loss."""
        if loss.over_layers not in ("sum", "mean"):
            raise ValueError(f"{type(loss).__name__}.over_layers={loss.over_layers!r}: sum or mean")
        layers = self.sparse_layers if loss.over_layers == "mean" else 1
        return loss.coefficient / layers

    def key_of(self, loss_name: str) -> str:
        """The key of a loss in `Context.loss_weights`."""
        return f"{type(self).__name__}/{loss_name}"

    def weights(self) -> dict[str, float]:
        """The factors of the losses, of policy losses too, by `key_of`."""
        named = [(loss.name, self.weight_of(loss)) for loss in self.losses]
        return {self.key_of(name): weight for name, weight in (*named, *self.policy_losses)}

    def given_weight(self, loss: RouterLoss, inputs: RouterInputs) -> AnyArray | float:
        """The factor of a loss: the one that the inputs give, or else the loss's own."""
        given = inputs.context.loss_weights or {}
        return given.get(self.key_of(loss.name), self.weight_of(loss))

    @property
    def needs_global_batch(self) -> bool:
        """Whether all micro-batches have to run forward before the first gradient."""
        return self.reads_global_batch or any(loss.uses_global_batch for loss in self.losses)


def check_shapes(decision: Decision, inputs: RouterInputs, who: str) -> None:
    """ValueError where the arrays of a choice don't have one shape, or not that of the tokens."""
    groups, tokens = inputs.x_GTD.shape[:2]
    if isinstance(decision, TokenChoice):
        names, first = ("expert_GTK", "gate_GTK", "keep_GTK"), (groups, tokens)
    elif isinstance(decision, ExpertChoice):
        names, first = ("token_GEC", "gate_GEC", "keep_GEC"), (groups,)
    else:
        return
    shapes = [getattr(decision, name).shape for name in names]
    if len(set(shapes)) > 1 or len(shapes[0]) != 3 or shapes[0][: len(first)] != first:
        told = ", ".join(f"{name} is {shape}" for name, shape in zip(names, shapes, strict=True))
        raise ValueError(
            f"{who}.route: {told}; they must have one shape of three axes, the first {first}: "
            f"x_GTD is {inputs.x_GTD.shape}"
        )


class DepthRouter(Router):
    """Abstract: decides which tokens go through a block, which is its one expert.

    In training `route` returns an ExpertChoice of ceil(capacity * T) tokens in the order of their
    positions; at evaluation a TokenChoice that keeps the tokens that go through.

    Attributes:
        capacity: share of the tokens that go through in training.
    """

    capacity: float


def mask_padding(routing: Routing, inputs: RouterInputs) -> Routing:
    """The routing without assignments of padding."""
    decision = routing.decision
    if isinstance(decision, ExpertChoice):
        token_GN = decision.token_GEC.reshape(decision.token_GEC.shape[0], -1)
        real_GN = jnp.take_along_axis(inputs.valid_GT, token_GN, axis=1)
        keep_GEC = decision.keep_GEC & real_GN.reshape(decision.token_GEC.shape)
        decision = dataclasses.replace(decision, keep_GEC=keep_GEC)
    if isinstance(decision, SoftSlots):
        valid_GT11 = inputs.valid_GT[..., None, None]
        dispatch_GTES = jnp.where(valid_GT11, decision.dispatch_GTES, 0)
        combine_GTES = jnp.where(valid_GT11, decision.combine_GTES, 0)
        decision = dataclasses.replace(
            decision, dispatch_GTES=dispatch_GTES, combine_GTES=combine_GTES
        )
    if isinstance(decision, TokenChoice):
        valid_GT1 = inputs.valid_GT[..., None]
        decision = dataclasses.replace(decision, keep_GTK=decision.keep_GTK & valid_GT1)
        if decision.unchosen_gate_GTE is not None:
            unchosen_gate_GTE = jnp.where(valid_GT1, decision.unchosen_gate_GTE, 0)
            decision = dataclasses.replace(decision, unchosen_gate_GTE=unchosen_gate_GTE)
    return dataclasses.replace(routing, decision=decision)


def statistics(routing: Routing, inputs: RouterInputs, num_experts: int) -> RouterStats:
    """Sums over the valid tokens of all groups; only score_sum_E has a gradient."""
    valid_GT1 = inputs.valid_GT[..., None]
    count_E = choices_GE(routing.decision).sum(0)
    score_sum_E = jnp.zeros(num_experts)
    entropy_sum = logit_square_sum = jnp.float32(0)
    if routing.score_GTE is not None:
        score_GTE = jnp.where(valid_GT1, routing.score_GTE, 0)
        score_sum_E = score_GTE.sum((0, 1))
        entropy_sum = jax.lax.stop_gradient(-jax.scipy.special.xlogy(score_GTE, score_GTE).sum())
    if routing.logits_GTE is not None:
        logits_GTE = jax.lax.stop_gradient(jnp.where(valid_GT1, routing.logits_GTE, 0))
        logit_square_sum = jnp.sum(jnp.square(logits_GTE)) / num_experts
    return RouterStats(
        token_count=inputs.valid_GT.sum(dtype=jnp.int32),
        count_E=count_E,
        kept_E=count_E,
        score_sum_E=score_sum_E,
        entropy_sum=entropy_sum,
        logit_square_sum=logit_square_sum,
        batch_sums={"router": dict(routing.batch_sums)} if routing.batch_sums else {},
    )


def check_names(losses: Sequence[RouterLoss]) -> None:
    """Raise ValueError where two losses have the same name."""
    names = [loss.name for loss in losses]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{names.count(name)} router losses are named {name!r}; give each its own, "
                'such as BalanceLoss.name = "balance_sequence"'
            )


def check_k(name: str, k: int, sizes: Sizes) -> None:
    """Raise ValueError unless 1 <= k <= number of experts."""
    if not 1 <= k <= sizes.num_experts:
        raise ValueError(
            f"{name}.k={k} experts per token, but there are {sizes.num_experts} experts; "
            f"choose k between 1 and {sizes.num_experts}"
        )
