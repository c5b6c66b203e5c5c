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
from layers.dispatch import Dispatcher, SlotGather
from layers.feed_forward import Activation, Experts, FeedForward, hidden_width
from layers.tokens import Tokens
from routing.capacity import Capacity
from routing.records import (
    ExpertMerge,
    RouterInputs,
    RouterOutput,
    Sizes,
    TokenChoice,
    TrainingText,
    choices_GE,
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
        shared_experts: this many further experts of the same width that every token uses.
        sequences_per_group: a group, within which capacity is counted, is this many sequences, or
            the whole batch where that is smaller.
        out_scale: variance scale of the output weights.
        text: the training text, for routers that count in it before they start.
    """

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        router: Callable[[Sizes], Router] = gin.REQUIRED,  # pyright: ignore[reportArgumentType]
        num_experts: int = 8,
        d_ff: int | None = None,
        activation: Activation = "swiglu",
        capacity: Capacity | None = None,
        dispatcher: Dispatcher | None = None,
        shared_experts: int = 0,
        sequences_per_group: int = 1,
        out_scale: float = 1.0,
        text: TrainingText | None = None,
    ):
        if num_experts < 1:
            raise ValueError(f"MoELayer.num_experts={num_experts} must be at least 1")
        if sequences_per_group < 1:
            raise ValueError(f"MoELayer.sequences_per_group={sequences_per_group}: at least 1")
        d_ff = d_ff or hidden_width(d_model, activation)
        self.capacity = Capacity() if capacity is None else capacity
        self.dispatcher = SlotGather() if dispatcher is None else dispatcher
        self.sequences_per_group = sequences_per_group
        self.router = router(Sizes(d_model, num_experts, vocab_size, text))
        self.experts = Experts(num_experts, d_model, d_ff, activation, out_scale)
        shared = None
        if shared_experts:
            shared = FeedForward(d_model, shared_experts * d_ff, activation, out_scale)
        self.shared = shared  # once: Flax takes an attribute that was None for static

    def __call__(self, x_BTD: jax.Array, tokens: Tokens) -> tuple[jax.Array, RouterOutput]:
        """The layer's output (B, T, D) and what its router said."""
        inputs = self._group(x_BTD, tokens)
        output = self.router(inputs)
        decision = output.decision
        assert decision is not None  # only whole models leave it out
        if isinstance(decision, TokenChoice):
            decision = self.capacity.fit(decision, inputs)
        decision = _save_by_name(decision)
        # Padding is zero here, so NaN in it reaches neither the experts nor their gradients.
        x_GTD = inputs.x_GTD.astype(x_BTD.dtype)
        y_GTD = self._experts(x_GTD, decision)
        y_BTD = constrain(y_GTD, "batch", None, None).reshape(x_BTD.shape)
        if self.shared is not None:
            with jax.named_scope("shared_experts"):
                y_BTD = y_BTD + self.shared(x_GTD.reshape(x_BTD.shape))
        stats = dataclasses.replace(output.stats, kept_E=choices_GE(decision).sum(0))
        return y_BTD, dataclasses.replace(output, decision=decision, stats=stats)

    def _experts(self, x_GTD, decision):
        """What the experts make of the tokens, home again (G, T, D)."""
        if isinstance(decision, ExpertMerge):
            with jax.named_scope("merged_experts"):
                return self.experts.merged(x_GTD, decision)
        with jax.named_scope("dispatch"):
            x_EGCD = self.dispatcher.dispatch(x_GTD, decision)
        with jax.named_scope("experts"):
            y_EGCD = self.experts(x_EGCD)
        with jax.named_scope("combine"):
            return self.dispatcher.combine(y_EGCD, decision)

    def _group(self, x_BTD, tokens: Tokens) -> RouterInputs:
        """The router's inputs: groups of whole sequences, float32, padding set to zero."""
        batch, length, width = x_BTD.shape
        per_group = min(self.sequences_per_group, batch)
        if batch % per_group:
            raise ValueError(
                f"a batch of {batch} sequences does not divide into groups of "
                f"MoELayer.sequences_per_group={per_group}"
            )
        shape = (batch // per_group, per_group * length)
        valid_GT = (tokens.segment_BT > 0).reshape(shape)
        x_GTD = x_BTD.reshape(*shape, width).astype(jnp.float32)
        return RouterInputs(
            x_GTD=jnp.where(valid_GT[..., None], x_GTD, 0),
            valid_GT=valid_GT,
            token_id_GT=tokens.token_BT.reshape(shape),
            position_GT=tokens.position_BT.reshape(shape),
            index_G=tokens.index_B[::per_group],
            key=tokens.key,
            train=tokens.train,
            step=tokens.step,
        )


def _save_by_name(decision):
    """Name the decision's integers, so that rematerialisation keeps them and never routes again."""
    if not isinstance(decision, TokenChoice):
        return decision
    return dataclasses.replace(
        decision,
        slot_GTK=checkpoint_name(decision.slot_GTK, "routing"),
        keep_GTK=checkpoint_name(decision.keep_GTK, "routing"),
    )
