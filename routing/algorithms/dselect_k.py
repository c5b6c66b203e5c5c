"""DSelect-k: K smooth selectors over binary codes of the experts (Hazimeh et al. 2021).

G groups, T tokens per group, D model width, E experts, K selectors, M bits of a code.
"""

from collections.abc import Sequence
import math

import gin
import jax
import jax.numpy as jnp
import numpy as np

from routing.balancers import StepState
from routing.inputs import RouterInputs
from routing.losses import RouterLoss, TermLoss
from routing.parameters import parameter, router_state, truncated_normal, uniform, zeros
from routing.ranges import Count, Positive
from routing.records import Causality, RouterStats, Routing, Sizes, TokenChoice
from routing.router import Router, check_k


@gin.configurable
class DSelectK(Router):
    """q = sum_k softmax(a)_k r(z_k), where r(z)_i = prod_bits S(z_j) or 1 - S(z_j) (eq. 5-6).

    S is a cubic ramp (the paper's smooth-step function), exactly 0 and 1 outside (-gamma / 2,
    gamma / 2): every selector converges to one expert, and only experts with a weight above zero
    are computed.

    Args:
        sizes: width, number of experts, vocabulary.
        k: selectors.
        per_token: whether z and a are linear in the token; otherwise they are parameters.
        gamma: width of the ramp.
        ramp_steps: the coefficient of the entropy loss grows linearly to its full value over so
            many optimizer steps, so that selectors explore before they converge; None: full at
            once.
        losses: the selectors' entropy with 1e-6 and, where E is no power of two, with 1 the loss
            "unreachable" on codes of no expert.
    """

    causality = Causality.CAUSAL
    needs_all_experts = "its selectors are codes over all experts"
    decoding = "as in training"

    def __init__(
        self,
        sizes: Sizes,
        k: Count = 2,
        per_token: bool = True,
        gamma: Positive = 1.0,
        ramp_steps: Count | None = None,
        losses: Sequence[RouterLoss] | None = None,
    ):
        check_k("DSelectK", k, sizes)
        if not gamma > 0:
            raise ValueError(f"DSelectK.gamma={gamma} must be above 0")
        experts = sizes.num_experts
        if experts < 2:
            raise ValueError("DSelectK needs at least 2 experts to select among")
        bits = math.ceil(math.log2(experts))
        self.num_experts, self.k, self.gamma = experts, k, gamma
        self.experts_per_token = float(k)  # once the selectors have converged
        self.codes_EM = tuple(
            tuple(i >> (bits - 1 - j) & 1 for j in range(bits)) for i in range(experts)
        )
        defaults = [TermLoss("selector_entropy", 1e-6)]
        if 2**bits != experts:
            defaults.append(TermLoss("unreachable", 1.0))
        self.losses = tuple(defaults) if losses is None else tuple(losses)
        self.ramp = None if ramp_steps is None else Ramp(ramp_steps)
        if per_token:
            shape, axes = (sizes.d_model, k, bits), ("embed", None, None)
            # z starts close to 0, the middle of the ramp, where all experts get a gradient.
            self.code_DKM = parameter(shape, axes, truncated_normal(1e-4 * gamma**2), role="router")
            self.mix_DK = parameter(
                (sizes.d_model, k), ("embed", None), truncated_normal(2.5e-3), role="router"
            )
            self.code_KM = self.mix_K = None
        else:
            self.code_KM = parameter((k, bits), (None, None), uniform(gamma / 100), role="router")
            self.mix_K = parameter((k,), (None,), uniform(0.05), role="router")
            self.code_DKM = self.mix_DK = None

    def route(self, inputs: RouterInputs) -> Routing:
        code_GTKM, mix_GTK = self._codes(inputs.x_GTD)
        chosen_GTKE = selectors(smooth_step(code_GTKM, self.gamma), np.asarray(self.codes_EM, bool))
        share_GTK = jax.nn.softmax(mix_GTK)
        gate_GTE = jnp.einsum("gtk,gtke->gte", share_GTK, chosen_GTKE)
        expert_GTE = jnp.broadcast_to(jnp.arange(self.num_experts, dtype=jnp.int32), gate_GTE.shape)
        decision = TokenChoice(expert_GTE, gate_GTE, gate_GTE > 0, self.num_experts)
        reach_GTK = chosen_GTKE.sum(-1)
        entropy_GT = -jnp.sum(chosen_GTKE * jnp.log(chosen_GTKE + 1e-6), axis=(-2, -1))
        terms = {
            "selector_entropy": entropy_GT * (1.0 if self.ramp is None else self.ramp.weight[...]),
            "unreachable": jnp.sum(1 / jnp.maximum(reach_GTK, 1e-3), axis=-1),
        }
        score_GTE = gate_GTE / jnp.maximum(gate_GTE.sum(-1, keepdims=True), 1e-20)
        return Routing(decision, None, score_GTE, terms=terms)

    def _codes(self, x_GTD):
        """z (G, T, K, M) and the selectors' logits (G, T, K)."""
        if self.code_DKM is not None and self.mix_DK is not None:
            code_GTKM = jnp.einsum("gtd,dkm->gtkm", x_GTD, self.code_DKM[...])
            return code_GTKM, jnp.einsum("gtd,dk->gtk", x_GTD, self.mix_DK[...])
        assert self.code_KM is not None and self.mix_K is not None
        where = x_GTD.shape[:2]
        code_GTKM = jnp.broadcast_to(self.code_KM[...], (*where, *self.code_KM.shape))
        return code_GTKM, jnp.broadcast_to(self.mix_K[...], (*where, *self.mix_K.shape))


class Ramp(StepState):
    """A weight that grows linearly from 0 to 1 over so many optimizer steps."""

    def __init__(self, steps: int):
        if steps < 1:
            raise ValueError(f"DSelectK.ramp_steps={steps} must be at least 1")
        self.steps = steps
        self.weight = router_state((), jnp.float32, (), zeros)

    def update(self, stats: RouterStats) -> None:
        self.weight[...] = jnp.minimum(self.weight[...] + 1 / self.steps, 1)


def smooth_step(t, gamma: float) -> jax.Array:
    """0 below -gamma / 2, 1 above gamma / 2, a cubic with continuous slope between (eq. 4)."""
    inside = jnp.clip(t, -gamma / 2, gamma / 2)
    cubic = -2 / gamma**3 * inside**3 + 3 / (2 * gamma) * inside + 0.5
    return jnp.where(t <= -gamma / 2, 0, jnp.where(t >= gamma / 2, 1, cubic))


def selectors(smooth, code_EM: np.ndarray) -> jax.Array:
    """r (..., E) from smooth bits (..., M), of which the first is the most significant (eq. 6)."""
    codes = code_EM.reshape((1,) * (smooth.ndim - 1) + code_EM.shape)
    smooth = smooth[..., None, :]
    return jnp.prod(jnp.where(codes, smooth, 1 - smooth), axis=-1)
