"""A block that only some of the tokens go through (Mixture-of-Depths, Raposo et al. 2024).

B batch, T tokens, D model width, C tokens that go through.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.block import Block
from layers.decoding import LayerCache, Prompt
from layers.dispatch import SlotGather
from layers.logical_axes import logical_constraint
from routing.inputs import RouterInputs, Tokens, named_key
from routing.records import Decision, ExpertChoice, TokenChoice
from routing.router import DepthRouter, Router


class DepthBlock(nnx.Module):
    """x + r * (block(x) - x) for the tokens that a router chooses; the others stay as they are.

    Attention in the block sees only the chosen tokens, at their positions in the text. In training
    these are gathered, so that the block computes them alone. At evaluation their number varies:
    the block runs on all tokens, and the others are masked like padding.

    Args:
        block: attention and feed-forward, dense or a mixture of experts.
        depth_router: a router with one expert, the block.
    """

    def __init__(self, block: Block, depth_router: DepthRouter):
        if not isinstance(depth_router, DepthRouter):
            raise ValueError(
                f"Transformer.depth_router makes a {type(depth_router).__name__}; it has to be a "
                "DepthRouter, such as MixtureOfDepths"
            )
        if block.router is not None and block.router.reads_previous_logits:
            raise ValueError(
                f"{type(block.router).__name__} reads the logits of the sparse layer before "
                "(TopK.residual), which tokens that pass by a Mixture-of-Depths don't have; leave "
                "it at False"
            )
        if block.attention.window is not None:
            raise ValueError(
                "Attention.window counts tokens that go through, not positions, inside a "
                "Mixture-of-Depths; leave it at None"
            )
        self.block, self.depth_router = block, depth_router

    @property
    def is_moe(self) -> bool:
        return self.block.is_moe

    @property
    def router(self) -> Router | None:
        """The router of the MoE layer in the block; None for a dense block."""
        return self.block.router

    def __call__(self, x_BTD: Float[Array, "B T D"], tokens: Tokens):
        """The output (B, T, D), the MoE router's output (or None) and the depth router's output."""
        depth = self.depth_router(self._depth_inputs(x_BTD, tokens))
        decision = depth.decision
        if isinstance(decision, ExpertChoice):
            y_BTD, output = self._gathered(x_BTD, tokens, decision)
        else:
            assert isinstance(decision, TokenChoice)
            y_BTD, output = self._masked(x_BTD, tokens, decision)
        return logical_constraint(y_BTD, "batch", "length", None), output, depth

    @property
    def recomputes(self) -> str | None:
        """Why decoding has to compute the whole text again for every token; or None."""
        return self.depth_router.recomputes or self.block.recomputes

    def prefill(self, x_BTD: Float[Array, "B T D"], tokens: Tokens, prompt: Prompt):
        """The output for prompts, the MoE router's output (or None), and what the layer keeps."""
        inputs = self._depth_inputs(x_BTD, tokens)
        state = self.depth_router.started(inputs, prompt.length_B, prompt.slots)
        decision = self.depth_router(inputs).decision
        assert isinstance(decision, TokenChoice)
        masked = self._only_through(tokens, decision)
        added_BTD, output, cache = self.block.prefill(x_BTD, masked, prompt, added=True)
        cache = dataclasses.replace(cache, depth=state)
        return self._with_added(x_BTD, added_BTD, decision), output, cache

    def step(self, x_B1D: Float[Array, "B 1 D"], tokens: Tokens, cache: LayerCache):
        """The output for one more token of each sequence, and the cache with it."""
        depth, state = self.depth_router.step(self._depth_inputs(x_B1D, tokens), cache.depth)
        assert isinstance(depth.decision, TokenChoice)
        masked = self._only_through(tokens, depth.decision)
        added_B1D, output, cache = self.block.step(x_B1D, masked, cache, added=True)
        cache = dataclasses.replace(cache, depth=state)
        return self._with_added(x_B1D, added_B1D, depth.decision), output, cache

    def _depth_inputs(self, x_BTD, tokens: Tokens) -> RouterInputs:
        depth_tokens = dataclasses.replace(tokens, key=named_key(tokens.key, "depth"))
        return RouterInputs.of(x_BTD, depth_tokens)

    def _gathered(self, x_BTD, tokens: Tokens, decision: ExpertChoice):
        """The output (B, T, D) and the MoE router's output, with the block on C gathered tokens."""
        token_BC, keep_BC = decision.token_GEC[:, 0], decision.keep_GEC[:, 0]

        def chosen(a_BT):
            return jnp.take_along_axis(a_BT, token_BC, axis=1)

        fewer = dataclasses.replace(
            tokens.with_previous_logits(None),
            token_BT=chosen(tokens.token_BT),
            segment_BT=jnp.where(keep_BC, chosen(tokens.segment_BT), 0),
            position_BT=chosen(tokens.position_BT),
        )
        x_1BCD = SlotGather().dispatch(x_BTD, decision)
        added_BCD, output = self.block.added(x_1BCD[0], fewer)
        if output is not None and output.policy is not None:
            raise ValueError("sampled routing can't learn by reward inside a Mixture-of-Depths")
        if output is not None:
            output = dataclasses.replace(output, decision=spread(output.decision, decision))
        return x_BTD + SlotGather().combine(added_BCD[None], decision), output

    def _masked(self, x_BTD, tokens: Tokens, decision: TokenChoice):
        """The same with the block on all T tokens, where those not chosen count as padding."""
        added_BTD, output = self.block.added(x_BTD, self._only_through(tokens, decision))
        return self._with_added(x_BTD, added_BTD, decision), output

    def _only_through(self, tokens: Tokens, decision: TokenChoice) -> Tokens:
        """The tokens, of which those that don't go through count as padding."""
        segment_BT = jnp.where(decision.keep_GTK[..., 0], tokens.segment_BT, 0)
        return dataclasses.replace(tokens, segment_BT=segment_BT)

    def _with_added(self, x_BTD, added_BTD, decision: TokenChoice) -> jax.Array:
        """x, with what the block adds to the tokens that go through."""
        through_BT1 = decision.keep_GTK
        gate_BT1 = jnp.where(through_BT1, decision.gate_GTK, 0).astype(x_BTD.dtype)
        return x_BTD + jnp.where(through_BT1, gate_BT1 * added_BTD, 0)


def spread(inner: Decision | None, outer: ExpertChoice) -> TokenChoice:
    """The MoE router's decision on the C chosen tokens, as a decision on all T tokens."""
    if not isinstance(inner, TokenChoice):
        raise ValueError(
            "inside a Mixture-of-Depths the experts' router has to choose for each token, as TopK "
            f"and Switch do; this one decides by {type(inner).__name__}"
        )
    token_BC = jnp.where(outer.keep_GEC[:, 0], outer.token_GEC[:, 0], outer.num_tokens)

    def one(token_C, a_CK):
        a_TK = jnp.zeros((outer.num_tokens, *a_CK.shape[1:]), a_CK.dtype)
        return a_TK.at[token_C].set(a_CK, mode="drop")

    def over_tokens(a_GNK):
        groups, _, k = a_GNK.shape
        spread_BTK = jax.vmap(one)(token_BC, a_GNK.reshape(*token_BC.shape, k))
        return spread_BTK.reshape(groups, -1, k)

    return jax.tree.map(over_tokens, inner)


def blocks_of(units) -> list[Block]:
    """The `Block`s of some layers, with or without a depth router."""
    return [layer.block if isinstance(layer, DepthBlock) else layer for layer in units]
