"""What each expert does for calibration text: the tokens that choose it, and what it adds to them.

G groups, T tokens per group, D model width, E experts, K experts per token, C slots of an expert,
L sparse layers.
"""

from collections.abc import Iterable
import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from layers.dispatch import SlotGather
from layers.experts.base import Companion, Routed
from layers.logical_axes import sharding_rules
from layers.moe_layer import MoELayer
from moe.data.batch import Batch
from moe.data.text import PreparedData
from moe.model import sharding
from moe.training import objective as objectives
from moe.training.abstract_model import AbstractModel
from moe.training.evaluate import Values
from moe.training.train_step import to_devices
from routing.records import TokenChoice, choices_GE
from routing.router import Router

SEQUENCES = 8  # of a calibration batch, or as many as the mesh has shards


@dataclasses.dataclass(frozen=True)
class Measured:
    """Sums over the tokens of calibration text, by layer; all float64.

    Attributes:
        count_LE: the tokens that each expert computes.
        norm_LE: for these tokens, the summed lengths of what the expert adds to them.
        logits_LEE: sums over all tokens of the products of two experts' router logits.
        tokens: of the text.
    """

    count_LE: np.ndarray
    norm_LE: np.ndarray
    logits_LEE: np.ndarray
    tokens: int

    @property
    def saliency_LE(self) -> np.ndarray:
        """The mean over an expert's tokens of gate * ||output||_2; 0 for one without tokens.

        That is S_j of REAP (Lasby et al. 2025, arXiv 2510.13999): the mean over the tokens for
        which the expert is active, not over all.
        """
        return self.norm_LE / np.maximum(self.count_LE, 1)

    @property
    def similarity_LEE(self) -> np.ndarray:
        """The cosine of two experts' router logits over all tokens.

        By these M-SMoE groups experts (Li et al. 2023, arXiv 2310.01334, section 3.2).
        """
        length_LE = np.sqrt(np.maximum(np.einsum("lee->le", self.logits_LEE), 1e-30))
        return self.logits_LEE / (length_LE[:, :, None] * length_LE[:, None, :])


class Measure(Companion):
    """Adds nothing to a layer's output; its sums are what `Measured` holds.

    Args:
        router: of the layer.
        gated: whether gates multiply the experts' outputs; else they have them in their inputs.
    """

    name = "measure"
    needs_slots = True

    def __init__(self, router: Router, gated: bool):
        self.router, self.gated = router, gated

    def __call__(self, routed: Routed) -> jax.Array:
        return jnp.zeros_like(routed.x_GTD)

    def batch_sums(self, routed: Routed) -> dict[str, jax.Array]:
        decision, y_EGCD = routed.decision, routed.y_EGCD
        assert isinstance(decision, TokenChoice) and decision.slot_GTK is not None
        assert y_EGCD is not None
        length_EGC = jnp.linalg.norm(y_EGCD.astype(jnp.float32), axis=-1)
        group_G11 = jnp.arange(length_EGC.shape[1])[:, None, None]
        length_GTK = length_EGC[decision.expert_GTK, group_G11, decision.slot_GTK]
        if self.gated:
            length_GTK = length_GTK * jnp.abs(decision.gate_GTK)
        length_GTK = jnp.where(decision.keep_GTK, length_GTK, 0)
        norm_E = jnp.zeros(decision.num_experts).at[decision.expert_GTK].add(length_GTK)
        with jax.default_matmul_precision("highest"):
            logits_GTE = self.router.route(routed.inputs).logits_GTE
            assert logits_GTE is not None
            logits_GTE = jnp.where(routed.inputs.valid_GT[..., None], logits_GTE, 0)
            logits_EE = jnp.einsum("gte,gtf->ef", logits_GTE, logits_GTE)
        return {"count": choices_GE(decision).sum(0), "norm": norm_E, "logits": logits_EE}


def watch(layer: MoELayer) -> None:
    """Have a layer measure its experts; in place. Every assignment then has a slot."""
    gated = getattr(layer.experts, "gates_on", "output") == "output"
    setattr(layer, Measure.name, Measure(layer.router, gated))
    layer.companion_names = (*layer.companion_names, Measure.name)
    layer.eval_dispatcher = SlotGather()


def measured(
    model: AbstractModel, values: Values, mesh: Mesh, batches: Iterable[Batch], batch_size: int
) -> Measured:
    """The experts' sums over batches of text, where routers decide as at evaluation."""
    num_bytes_2V = jnp.asarray(model.num_bytes_2V)

    @jax.jit
    def sums(params, router_state, batch, key):
        module = model.graph.merge(params, router_state)
        for layer in module.moe_layers_of_units():
            watch(layer)
        batch = objectives.prepared(model.objective, batch, key, num_bytes_2V)
        with sharding_rules(sharding.rule(mesh), mesh.devices.flat[0]):
            out = module(objectives.tokens_of(batch, key, train=False))
        return out.routers.stats.batch_sums[f"companion/{Measure.name}"]

    where, total, tokens = sharding.by_batch(mesh), None, 0
    for i, batch in enumerate(batches):
        tokens += int(np.sum(batch.segment_BT > 0))
        key = objectives.step_key(i, objectives.EVALUATION)
        placed = to_devices(batch, where, batch_size)
        found = jax.device_get(sums(values.params, values.router_state, placed, key))
        found = {name: np.asarray(a, np.float64) for name, a in found.items()}
        total = found if total is None else {n: total[n] + a for n, a in found.items()}
    assert total is not None
    return Measured(total["count"], total["norm"], total["logits"], tokens)


def measured_on_text(
    model: AbstractModel, values: Values, mesh: Mesh, data: PreparedData, num_bytes: int, seed: int
) -> Measured:
    """The same on windows of the training text, about `num_bytes` of it, drawn by the seed.

    No window is read twice.
    """
    shards = sharding.batch_shards(mesh)
    batch_size = -(-SEQUENCES // shards) * shards
    batches = data.train_batches(batch_size, model.sequence_length, seed)
    per_batch = batch_size * model.sequence_length * data.info.bytes_per_token
    count = min(round(num_bytes / per_batch), batches.windows_per_epoch // batch_size)
    chosen = (batches.batch(i) for i in range(max(1, count)))
    return measured(model, values, mesh, chosen, batch_size)
