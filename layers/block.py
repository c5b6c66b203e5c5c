"""One transformer block: attention and a feed-forward, dense or a mixture of experts."""

from collections.abc import Callable
import dataclasses

from flax import nnx
import gin
import jax
from jaxtyping import Array, Float

from layers.attention import Attention
from layers.decoding import LayerCache, Prompt
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

    @property
    def recomputes(self) -> str | None:
        """Why decoding has to compute the whole text again for every token; or None."""
        return self.feed_forward.recomputes if isinstance(self.feed_forward, MoELayer) else None

    def __call__(
        self, x_BTD: Float[Array, "B T D"], tokens: Tokens
    ) -> tuple[Float[Array, "B T D"], RouterOutput | None]:
        """The block's output (B, T, D), and its router's output (None for a dense block)."""
        return self._plain(x_BTD, tokens, added=False)

    def added(
        self, x_BTD: Float[Array, "B T D"], tokens: Tokens
    ) -> tuple[Float[Array, "B T D"], RouterOutput | None]:
        """block(x) - x, not rounded by the addition of x, and the router's output."""
        return self._plain(x_BTD, tokens, added=True)

    def prefill(
        self, x_BTD: Float[Array, "B T D"], tokens: Tokens, prompt: Prompt, added: bool = False
    ) -> tuple[Float[Array, "B T D"], RouterOutput | None, LayerCache]:
        """The output for prompts, the router's output, and what the block keeps of them.

        added: block(x) - x instead, as with `step`.
        """

        def attend(h_BTD):
            return self.attention.prefill(h_BTD, tokens.position_BT, tokens.segment_BT, prompt)

        def feed(layer, h_BTD):
            return layer.prefill(h_BTD, tokens, prompt)

        y_BTD, output, kept = self._branches(x_BTD, attend, feed, added)
        return y_BTD, output, LayerCache(*kept)

    def step(
        self, x_B1D: Float[Array, "B 1 D"], tokens: Tokens, cache: LayerCache, added: bool = False
    ) -> tuple[Float[Array, "B 1 D"], RouterOutput | None, LayerCache]:
        """The output for one more token of each sequence, and the cache with it."""

        def attend(h_B1D):
            place = tokens.position_BT, tokens.segment_BT
            return self.attention.step(h_B1D, *place, cache.attention)

        def feed(layer, h_B1D):
            return layer.step(h_B1D, tokens, cache.router)

        y_B1D, output, kept = self._branches(x_B1D, attend, feed, added)
        return y_B1D, output, LayerCache(*kept)

    def _plain(self, x_BTD, tokens: Tokens, added: bool):
        def attend(h_BTD):
            return self.attention(h_BTD, tokens.position_BT, tokens.segment_BT), None

        def feed(layer, h_BTD):
            return *layer(h_BTD, tokens), {}

        y_BTD, output, _ = self._branches(x_BTD, attend, feed, added)
        return y_BTD, output

    def _branches(self, x_BTD, attend, feed, added: bool):
        """The block's output, its router's output, and what attention and router keep.

        attend: h -> attention's output, and what it keeps.
        feed: an MoE layer, h -> its output, its router's output, and what the router keeps.
        """
        h_BTD = self.attention_norm(x_BTD)  # pyright: ignore[reportCallIssue]
        with jax.named_scope("attention"):
            mixed_BTD, keys = attend(h_BTD)
        middle_BTD = x_BTD
        if self.feed_forward_norm is not None:
            middle_BTD = logical_constraint(x_BTD + mixed_BTD, "batch", "length", None)
            h_BTD = self.feed_forward_norm(middle_BTD)  # pyright: ignore[reportCallIssue]
        if isinstance(self.feed_forward, MoELayer):
            y_BTD, output, state = feed(self.feed_forward, h_BTD)
            # Without slots, whose number varies by layer, outputs of all layers can be stacked.
            if isinstance(output.decision, TokenChoice):
                decision = dataclasses.replace(output.decision, slot_GTK=None, capacity=None)
                output = dataclasses.replace(output, decision=decision)
        else:
            with jax.named_scope("feed_forward"):
                y_BTD, output, state = self.feed_forward(h_BTD), None, {}
        if self.parallel or added:
            y_BTD = mixed_BTD + y_BTD
        if not added:
            y_BTD = logical_constraint(middle_BTD + y_BTD, "batch", "length", None)
        return y_BTD, output, (keys, state)
