"""Hierarchical gating: a primary gate chooses groups of experts, whose gates choose experts.

G groups, T tokens per group, D model width, A groups of experts, Y experts of each, E = A * Y.
"""

from collections.abc import Sequence
import dataclasses

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from routing.algorithms.noisy_top_k import chance_of_selection, standard_normal
from routing.balance_losses import ImportanceLoss, cv_squared
from routing.inputs import RouterInputs
from routing.losses import RouterLoss, global_batch_sum
from routing.parameters import parameter, zeros
from routing.ranges import Count, NonNegative
from routing.records import Causality, Routing, Sizes, TokenChoice
from routing.router import Router
from routing.selection import top_k


@gin.configurable
@dataclasses.dataclass(frozen=True)
class HierarchicalLoadLoss(RouterLoss):
    """CV^2 of Load_H[i, j] = Load_primary[i] * Load_i(X_i)[j] / |X_i| (Shazeer 2017, eq. 14).

    Dividing by |X_i| leaves the primary gate its gradient. For `Hierarchical` alone.
    """

    coefficient: NonNegative = 0.1
    name: str = "load"

    @property
    def uses_global_batch(self) -> bool:
        return True

    def __call__(self, routing, inputs, stats):
        if "primary_load" not in stats.batch_sums.get("router", {}):
            raise ValueError("HierarchicalLoadLoss is for Hierarchical; NoisyTopK has LoadLoss")
        primary_A, secondary_AY, size_A = (
            global_batch_sum(stats, inputs, lambda s, name=name: s.batch_sums["router"][name])
            for name in ("primary_load", "secondary_load", "group_tokens")
        )
        return cv_squared(hierarchical_load(primary_A, secondary_AY, size_A).ravel())


def hierarchical_load(
    primary_A: Float[Array, " A"],
    secondary_AY: Float[Array, "A Y"],
    size_A: Float[Array, " A"],
) -> jax.Array:
    """Load_H (A, Y); 0 for groups that no token chose."""
    size_A1 = jnp.maximum(size_A, 1)[:, None]
    return primary_A[:, None] * secondary_AY / size_A1


@gin.configurable
class Hierarchical(Router):
    """Noisy top-k twice: among A groups, then inside each chosen one (Shazeer et al. 2017, app. B).

    Args:
        sizes: width, number of experts, vocabulary.
        branches: A, the number of groups; must divide the number of experts.
        k: the groups that a token uses, and the experts in each of them: k * k experts.
        losses: importance and hierarchical load where None.
    """

    causality = Causality.CAUSAL
    needs_all_experts = "experts lie in groups of equal size"
    decoding = "as in training, without noise"

    def __init__(
        self,
        sizes: Sizes,
        branches: Count = 4,
        k: Count = 2,
        losses: Sequence[RouterLoss] | None = None,
    ):
        experts = sizes.num_experts
        if branches < 1 or experts % branches:
            raise ValueError(f"Hierarchical.branches={branches} must divide the {experts} experts")
        if not 2 <= k <= min(branches, experts // branches):
            raise ValueError(
                f"Hierarchical.k={k} must lie between 2 and both the number of branches "
                f"({branches}) and that of experts in each ({experts // branches})"
            )
        self.num_experts, self.branches, self.k = experts, branches, k
        defaults = (ImportanceLoss(), HierarchicalLoadLoss())
        self.losses = defaults if losses is None else tuple(losses)
        axes = ("embed", None)
        self.primary_DA = parameter((sizes.d_model, branches), axes, zeros, role="router")
        self.primary_noise_DA = parameter((sizes.d_model, branches), axes, zeros, role="router")
        self.weight_DE = parameter((sizes.d_model, experts), axes, zeros, role="router")
        self.noise_DE = parameter((sizes.d_model, experts), axes, zeros, role="router")

    def route(self, inputs: RouterInputs) -> Routing:
        x_GTD, a, b = inputs.x_GTD, self.branches, self.num_experts // self.branches
        clean_GTA = jnp.einsum("gtd,da->gta", x_GTD, self.primary_DA[...])
        clean_GTE = jnp.einsum("gtd,de->gte", x_GTD, self.weight_DE[...])
        std_GTA = jax.nn.softplus(jnp.einsum("gtd,da->gta", x_GTD, self.primary_noise_DA[...]))
        std_GTE = jax.nn.softplus(jnp.einsum("gtd,de->gte", x_GTD, self.noise_DE[...]))
        noisy_GTA, noisy_GTE = clean_GTA, clean_GTE
        if inputs.train:
            draws = standard_normal(inputs, a + self.num_experts)
            noisy_GTA = clean_GTA + std_GTA * draws[..., :a]
            noisy_GTE = clean_GTE + std_GTE * draws[..., a:]
        branch_GTK = top_k(noisy_GTA, self.k)
        outer_GTK = jax.nn.softmax(jnp.take_along_axis(noisy_GTA, branch_GTK, -1))
        clean_GTAY, noisy_GTAY, std_GTAY = (
            value.reshape(*value.shape[:2], a, b) for value in (clean_GTE, noisy_GTE, std_GTE)
        )
        # The gates of all groups, of which those of the chosen groups are kept.
        inside_GTAK = top_k(noisy_GTAY, self.k)
        inner_GTAK = jax.nn.softmax(jnp.take_along_axis(noisy_GTAY, inside_GTAK, -1))
        chosen = branch_GTK[..., None]
        inside_GTKK = jnp.take_along_axis(inside_GTAK, chosen, 2)
        gate_GTKK = outer_GTK[..., None] * jnp.take_along_axis(inner_GTAK, chosen, 2)
        flat = (*x_GTD.shape[:2], self.k * self.k)
        expert_GTK = (chosen * b + inside_GTKK).reshape(flat)
        decision = TokenChoice(
            expert_GTK, gate_GTKK.reshape(flat), jnp.ones(flat, bool), self.num_experts
        )
        score_GTAY = jax.nn.softmax(clean_GTA)[..., None] * jax.nn.softmax(clean_GTAY)
        valid_GT1 = inputs.valid_GT[..., None]
        used_GTA = jax.nn.one_hot(branch_GTK, a, dtype=bool).any(-2) & valid_GT1
        outer_load_GTA = chance_of_selection(clean_GTA, noisy_GTA, std_GTA, self.k)
        inner_load_GTAY = chance_of_selection(clean_GTAY, noisy_GTAY, std_GTAY, self.k)
        batch_sums = {
            "primary_load": jnp.where(valid_GT1, outer_load_GTA, 0).sum((0, 1)),
            "secondary_load": jnp.where(used_GTA[..., None], inner_load_GTAY, 0).sum((0, 1)),
            "group_tokens": used_GTA.sum((0, 1)).astype(clean_GTA.dtype),
        }
        # There are two levels of logits, so none are returned for losses.
        return Routing(decision, None, score_GTAY.reshape(clean_GTE.shape), batch_sums=batch_sums)
