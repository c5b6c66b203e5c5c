"""Mixture-of-Depths: which tokens go through a block at all (Raposo et al. 2024).

G groups (one sequence each), T tokens per group, D model width, H hidden width of the predictor,
C tokens that go through.
"""

from collections.abc import Sequence
from typing import Literal

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
import optax

from routing.algorithms.expert_choice import best_tokens
from routing.inputs import RouterInputs
from routing.losses import RouterLoss, TermLoss
from routing.parameters import parameter, truncated_normal, zeros
from routing.ranges import Count, SomeShare
from routing.records import Causality, ExpertChoice, Routing, Sizes, TokenChoice
from routing.router import DepthRouter


@gin.configurable
class MixtureOfDepths(DepthRouter):
    """The C = ceil(capacity * T) tokens with the largest r = w . x, in their order (eq. 1).

    r multiplies what the block adds to a token, so that the router gets a gradient. The choice
    depends on the whole sequence. At evaluation and in decoding a token goes through if the
    router's guess, which depends on that token alone, is that training would choose it.

    Args:
        sizes: width; one expert, the block.
        capacity: share of the tokens that go through.
        guess: by "predictor", a small network on the token, without a gradient to the model; or by
            "auxiliary", r itself, which a loss makes positive for chosen tokens (section 3.5).
        predictor_width: H.
        losses: the guess's cross entropy with 0.01 where None.
    """

    causality = Causality.CAUSAL_AT_EVALUATION
    decoding = "by a learned guess for each token"

    def __init__(
        self,
        sizes: Sizes,
        capacity: SomeShare = 0.125,
        guess: Literal["predictor", "auxiliary"] = "predictor",
        predictor_width: Count = 32,
        losses: Sequence[RouterLoss] | None = None,
    ):
        if sizes.num_experts != 1:
            raise ValueError(
                f"MixtureOfDepths has one expert, the block, not {sizes.num_experts}: it is the "
                "Transformer.depth_router, not a MoELayer's"
            )
        if not 0 < capacity <= 1:
            raise ValueError(f"MixtureOfDepths.capacity={capacity} must lie in (0, 1]")
        if guess not in ("predictor", "auxiliary"):
            raise ValueError(f"MixtureOfDepths.guess={guess!r}: predictor or auxiliary")
        self.num_experts, self.capacity = 1, capacity
        self.losses = (TermLoss("guess", 0.01),) if losses is None else tuple(losses)
        self.weight_D = parameter((sizes.d_model,), ("embed",), truncated_normal(), role="router")
        separate = guess == "predictor"
        shape, axes = (sizes.d_model, predictor_width), ("embed", None)
        self.hidden_DH = (
            parameter(shape, axes, truncated_normal(), role="router") if separate else None
        )
        self.guess_H = (
            parameter((predictor_width,), (None,), zeros, role="router") if separate else None
        )
        self.guess_bias = parameter((), (), zeros, role="router") if separate else None

    def route(self, inputs: RouterInputs) -> Routing:
        weight_GT = jnp.einsum("gtd,d->gt", inputs.x_GTD, self.weight_D[...])
        guess_GT = self._guess(inputs.x_GTD, weight_GT)
        tokens = inputs.valid_GT.shape[1]
        fixed_G1T = jax.lax.stop_gradient(weight_GT)[:, None]
        token_G1C, keep_G1C = best_tokens(fixed_G1T, inputs.valid_GT, self.capacity, 1)
        token_G1C, keep_G1C = in_order(token_G1C, keep_G1C, tokens)
        chosen_GT = jax.vmap(lambda token_C, keep_C: mask_of(token_C, keep_C, tokens))(
            token_G1C[:, 0], keep_G1C[:, 0]
        )
        cross_entropy = optax.sigmoid_binary_cross_entropy
        terms = {"guess": cross_entropy(guess_GT, chosen_GT.astype(guess_GT.dtype))}
        logits_GT1 = weight_GT[..., None]
        if inputs.train:
            gate_G1C = jnp.take_along_axis(weight_GT[:, None], token_G1C, -1)
            gate_G1C = jnp.where(keep_G1C, gate_G1C, 0)
            decision = ExpertChoice(token_G1C, gate_G1C, keep_G1C, tokens)
        else:
            expert_GT1 = jnp.zeros(logits_GT1.shape, jnp.int32)
            decision = TokenChoice(expert_GT1, logits_GT1, (guess_GT > 0)[..., None], 1)
        right_GT = (guess_GT > 0) == chosen_GT
        batch_sums = {"guessed": jnp.sum(right_GT & inputs.valid_GT, dtype=jnp.int32)}
        return Routing(decision, logits_GT1, terms=terms, batch_sums=batch_sums)

    def _guess(self, x_GTD, weight_GT):
        """The logits (G, T) of the guess that a token would be chosen."""
        if self.hidden_DH is None or self.guess_H is None or self.guess_bias is None:
            return weight_GT
        x_GTD = jax.lax.stop_gradient(x_GTD)
        hidden_GTH = jax.nn.relu(jnp.einsum("gtd,dh->gth", x_GTD, self.hidden_DH[...]))
        return jnp.einsum("gth,h->gt", hidden_GTH, self.guess_H[...]) + self.guess_bias[...]


def in_order(token_GEC: Int[Array, "G E C"], keep_GEC: Bool[Array, "G E C"], tokens: int):
    """The same tokens in the order of their positions; empty slots last."""
    token_GEC = jnp.sort(jnp.where(keep_GEC, token_GEC, tokens), axis=-1)
    return jnp.minimum(token_GEC, tokens - 1), token_GEC < tokens


def mask_of(token_C: Int[Array, " C"], keep_C: Bool[Array, " C"], tokens: int) -> jax.Array:
    """The mask of the tokens that are kept: bool (T,)."""
    spread_C = jnp.where(keep_C, token_C, tokens)
    return jnp.zeros(tokens, bool).at[spread_C].set(True, mode="drop")
