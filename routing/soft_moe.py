"""Soft MoE: every slot reads a weighted mean of all tokens (Puigcerver et al. 2023).

G groups, T tokens per group, D model width, E experts, S slots per expert.
"""

from collections.abc import Sequence

import gin
import jax
import jax.numpy as jnp

from routing.losses import RouterLoss
from routing.parameters import ones, parameter, truncated_normal
from routing.records import Causality, RouterInputs, Routing, Sizes, SoftSlots
from routing.router import Router


@gin.configurable
class SoftMoE(Router):
    """Dispatch: softmax over tokens; combine: softmax over all slots (eq. 1-3, algorithm 2).

    Args:
        sizes: width, number of experts, vocabulary.
        slots_per_expert: S; dense FLOPs at E * S = T.
        normalise: unit-norm tokens and slot vectors with a learned scale (section 2.3).
        losses: none are needed.
    """

    causality = Causality.NEVER
    balanced = True
    decoding = "not possible: every slot mixes the whole sequence"

    def __init__(
        self,
        sizes: Sizes,
        slots_per_expert: int = 1,
        normalise: bool = True,
        losses: Sequence[RouterLoss] = (),
    ):
        if slots_per_expert < 1:
            raise ValueError(f"SoftMoE.slots_per_expert={slots_per_expert} must be at least 1")
        self.num_experts, self.losses = sizes.num_experts, tuple(losses)
        self.normalise = normalise
        shape = (sizes.d_model, sizes.num_experts, slots_per_expert)
        self.phi_DES = parameter(shape, ("embed", None, None), truncated_normal())
        self.scale = parameter((), (), ones) if normalise else None

    def route(self, inputs: RouterInputs) -> Routing:
        x_GTD, phi_DES = inputs.x_GTD, self.phi_DES[...]
        if self.scale is not None:
            x_GTD = unit(x_GTD, axis=-1)
            phi_DES = self.scale[...] * unit(phi_DES, axis=0)
        logits_GTES = jnp.einsum("gtd,des->gtes", x_GTD, phi_DES)
        valid_GT11 = inputs.valid_GT[..., None, None]
        masked_GTES = jnp.where(valid_GT11, logits_GTES, -1e30)
        dispatch_GTES = jnp.where(valid_GT11, jax.nn.softmax(masked_GTES, axis=1), 0)
        combine_GTES = jnp.where(valid_GT11, jax.nn.softmax(logits_GTES, axis=(2, 3)), 0)
        decision = SoftSlots(dispatch_GTES, combine_GTES)
        return Routing(decision, logits_GTES.mean(-1), combine_GTES.sum(-1))


def unit(x, axis: int):
    """x / (norm + 1e-6), as the paper divides; the gradient at zero is zero."""
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return x / (norm + 1e-6)
