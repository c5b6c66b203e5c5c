"""Gates that multiply an expert's input, not its output (Llama 4), for any dispatcher.

G groups, T tokens per group, D model width, E experts, K experts per token, C slots per expert.
"""

import dataclasses

from einops import rearrange
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.dispatch.base import Dispatcher
from layers.kernels.grouped_matmul import SortedRows
from routing.records import Decision, ExpertChoice, TokenChoice

GATED_DECISIONS = (TokenChoice, ExpertChoice)  # in which a gate belongs to one row of one expert


def dispatch_gated(
    dispatcher: Dispatcher, x_GTD: Float[Array, "G T D"], decision: Decision
) -> jax.Array | SortedRows:
    """The rows of `dispatcher.dispatch`, each multiplied by the gate of its assignment."""
    if isinstance(decision, ExpertChoice):
        x_EGCD = dispatcher.dispatch(x_GTD, decision)
        assert isinstance(x_EGCD, jax.Array)
        return x_EGCD * jnp.swapaxes(decision.gate_GEC, 0, 1)[..., None].astype(x_GTD.dtype)
    assert isinstance(decision, TokenChoice)
    # Every assignment becomes a token that made one choice.
    x_GTKD = x_GTD[:, :, None] * decision.gate_GTK[..., None].astype(x_GTD.dtype)

    def apart(a_GTK):
        return None if a_GTK is None else rearrange(a_GTK, "g t k -> g (t k) 1")

    each = dataclasses.replace(
        decision,
        expert_GTK=apart(decision.expert_GTK),
        gate_GTK=apart(jnp.ones_like(decision.gate_GTK)),
        keep_GTK=apart(decision.keep_GTK),
        slot_GTK=apart(decision.slot_GTK),
        unchosen_gate_GTE=None,
    )
    return dispatcher.dispatch(rearrange(x_GTKD, "g t k d -> g (t k) d"), each)


def without_gates(decision: Decision) -> Decision:
    """The same assignments with gates of 1."""
    if isinstance(decision, ExpertChoice):
        return dataclasses.replace(decision, gate_GEC=jnp.ones_like(decision.gate_GEC))
    assert isinstance(decision, TokenChoice)
    return dataclasses.replace(decision, gate_GTK=jnp.ones_like(decision.gate_GTK))
