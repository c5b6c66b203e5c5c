"""One transformer block: attention and a feed-forward, dense or a mixture of experts."""

from collections.abc import Callable
import dataclasses

from flax import nnx
import gin
import jax
from jaxtyping import Array, Float

from layers.attention import Attention
from layers.experts.feed_forward import FeedForward
from layers.logical_axes import logical_constraint
from layers.moe_layer import MoELayer
from layers.norms import RMSNorm
from routing.inputs import Tokens
from routing.ranges import Count
from routing.records import RouterOutput, TokenChoice
from routing.router import Router


@gin.configurable
class Block(nnx.Module):
    """Pre-norm: x + attention(norm(x)), then x + ff(norm(x)); or both in parallel.

    Args:
        d_model: D.
        attention: a function (d_model) -> Attention.
        feed_forward: a function (d_model) -> FeedForward or MoELayer.
        norm: `RMSNorm`, `LayerNorm` or a class like them.
        parallel: attention and feed-forward read the same norm and are added at once
            (Chowdhery et al. 2022, section 2).
    """

    def __init__(
        self,
        d_model: Count,
        attention: Callable[[int], Attention],
        feed_forward: Callable[[int], FeedForward | MoELayer],
        norm: Callable[[int], nnx.Module] = RMSNorm,
        parallel: bool = False,
    ):
        self.parallel = parallel
        self.attention_norm = norm(d_model)
        self.attention = attention(d_model)
        self.feed_forward_norm = None if parallel else norm(d_model)
        self.feed_forward = feed_forward(d_model)

    @property
    def is_moe(self) -> bool:
        return self.router is not None

    @property
    def router(self) -> Router | None:
        """The router of an MoE layer; None for a dense block."""
        return self.feed_forward.router if isinstance(self.feed_forward, MoELayer) else None

    def __call__(
        self, x_BTD: Float[Array, "B T D"], tokens: Tokens
    ) -> tuple[Float[Array, "B T D"], RouterOutput | None]:
        """The block's output (B, T, D), and its router's output (None for a dense block)."""
        mixed_BTD, middle_BTD, y_BTD, output = self._branches(x_BTD, tokens)
        if self.parallel:
            y_BTD = mixed_BTD + y_BTD
        return logical_constraint(middle_BTD + y_BTD, "batch", "length", None), output

    def added(
        self, x_BTD: Float[Array, "B T D"], tokens: Tokens
    ) -> tuple[Float[Array, "B T D"], RouterOutput | None]:
        """block(x) - x, not rounded by the addition of x, and the router's output."""
        mixed_BTD, _, y_BTD, output = self._branches(x_BTD, tokens)
        return mixed_BTD + y_BTD, output

    def _branches(self, x_BTD, tokens: Tokens):
        """Attention's output, x before the feed-forward, its output, and the router's output."""
        h_BTD = self.attention_norm(x_BTD)  # pyright: ignore[reportCallIssue]
        with jax.named_scope("attention"):
            mixed_BTD = self.attention(h_BTD, tokens.position_BT, tokens.segment_BT)
        if self.feed_forward_norm is not None:
            x_BTD = logical_constraint(x_BTD + mixed_BTD, "batch", "length", None)
            h_BTD = self.feed_forward_norm(x_BTD)  # pyright: ignore[reportCallIssue]
        if isinstance(self.feed_forward, MoELayer):
            y_BTD, output = self.feed_forward(h_BTD, tokens)
            # Without slots, whose number varies by layer, outputs of all layers can be stacked.
            if isinstance(output.decision, TokenChoice):
                decision = dataclasses.replace(output.decision, slot_GTK=None, capacity=None)
                output = dataclasses.replace(output, decision=decision)
        else:
            with jax.named_scope("feed_forward"):
                y_BTD, output = self.feed_forward(h_BTD), None
        return mixed_BTD, x_BTD, y_BTD, output
