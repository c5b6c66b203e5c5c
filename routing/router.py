"""The interface of every routing algorithm: `route` decides; the base class does the book-keeping.

To write a router, subclass `Router`, set the class attributes that declare its properties, build
parameters in `__init__(self, sizes, ...)`, and return a `Routing` from `route`. It never moves
data, knows no mesh, and gets its losses, statistics and padding rules from here.

G groups, T tokens per group, D model width, E experts.
"""

import abc
from collections.abc import Sequence
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from routing.inputs import RouterInputs
from routing.losses import RouterLoss
from routing.records import (
    Causality,
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
        causality: whether a later token can change what an earlier one receives.
        order_matters: whether permuting the tokens of a group changes the decision of each.
        needs_token_ids: whether the decision depends on token ids.
        balanced: whether every expert gets the same load by construction.
        whole_sequences: whether a group has to be one sequence (it mixes the tokens of a group).
        repeats_experts: whether a token may name one expert several times.
        unit_gates: whether every gate is 1, so that experts may leave them out.
        decoding: how it decides when text is generated one token at a time, in a few words.
    """

    causality: Causality
    order_matters: bool = False
    needs_token_ids: bool = False
    balanced: bool = False
    whole_sequences: bool = False
    repeats_experts: bool = False
    unit_gates: bool = False
    decoding: str

    num_experts: int
    losses: tuple[RouterLoss, ...]
    sparse_layers: int = 1  # of the model; the layer that the router stands in sets it
    # Whether `route` itself reads the statistics of the whole step, which micro-batches then need.
    reads_global_batch: bool = False
    # Whether `route` reads the logits of the sparse layer before: `inputs.context.previous_logits`.
    reads_previous_logits: bool = False
    # How many experts work on a token in the mean, where a decision has room for more choices.
    experts_per_token: float | None = None
    # Names and weights of the losses that the objective completes, for routers with a policy.
    policy_losses: tuple[tuple[str, float], ...] = ()

    @abc.abstractmethod
    def route(self, inputs: RouterInputs) -> Routing:
        """Decide who goes where. Deterministic when `inputs.train` is False.

        Float32 throughout: it is called with matmuls in the highest precision, which a plain
        `x @ w` or `jnp.einsum` takes on, so that no router has to ask for it.
        """

    def __call__(self, inputs: RouterInputs) -> RouterOutput:
        """The decision with padding struck out, its losses and its statistics."""
        # Else a TPU would multiply in bfloat16 and a GPU in TF32, here and in the backward pass.
        float32 = jax.default_matmul_precision("highest")
        with jax.named_scope(type(self).__name__), float32:
            routing = strike_padding(self.route(inputs), inputs)
            check_names(self.losses)
            stats = statistics(routing, inputs, self.num_experts)
            for loss in self.losses:
                if own := loss.batch_sums(routing, inputs):
                    stats.batch_sums[loss.owner] = own
            losses = {loss.name: loss(routing, inputs, stats) for loss in self.losses}
            auxiliary_loss = sum(
                (self.weight_of(loss) * losses[loss.name] for loss in self.losses), jnp.float32(0)
            )
        logits_GTE = routing.logits_GTE if self.reads_previous_logits else None
        return RouterOutput(
            routing.decision, losses, auxiliary_loss, stats, routing.policy, logits_GTE
        )

    def weight_of(self, loss: RouterLoss) -> float:
        """What this layer's value of a loss is multiplied with in the objective."""
        if loss.over_layers not in ("sum", "mean"):
            raise ValueError(f"{type(loss).__name__}.over_layers={loss.over_layers!r}: sum or mean")
        shared = self.sparse_layers if loss.over_layers == "mean" else 1
        return loss.coefficient / shared

    @property
    def needs_global_batch(self) -> bool:
        """Whether micro-batches must all run forward before the first gradient."""
        return self.reads_global_batch or any(loss.uses_global_batch for loss in self.losses)


class DepthRouter(Router):
    """Abstract: decides which tokens go through a block at all, the one expert there is.

    In training `route` returns an ExpertChoice of ceil(capacity * T) tokens in the order of their
    positions, at evaluation a TokenChoice that keeps the tokens that go through.

    Attributes:
        capacity: share of the tokens that go through in training.
    """

    capacity: float


def strike_padding(routing: Routing, inputs: RouterInputs) -> Routing:
    """No assignment of a padded token stands, whatever the router said."""
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
        decision = SoftSlots(dispatch_GTES, combine_GTES)
    if isinstance(decision, TokenChoice):
        valid_GT1 = inputs.valid_GT[..., None]
        decision = dataclasses.replace(decision, keep_GTK=decision.keep_GTK & valid_GT1)
        if decision.unchosen_gate_GTE is not None:
            unchosen_gate_GTE = jnp.where(valid_GT1, decision.unchosen_gate_GTE, 0)
            decision = dataclasses.replace(decision, unchosen_gate_GTE=unchosen_gate_GTE)
    return dataclasses.replace(routing, decision=decision)


def statistics(routing: Routing, inputs: RouterInputs, num_experts: int) -> RouterStats:
    """Sums over the valid tokens of all groups; no gradient flows but through score_sum_E."""
    valid_GT1 = inputs.valid_GT[..., None]
    count_E = choices_GE(routing.decision).sum(0)
    nothing = jnp.float32(0)
    score_sum_E, entropy_sum, logit_square_sum = jnp.zeros(num_experts), nothing, nothing
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
    """Raise ValueError where two losses would be told under one name."""
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
