"""How far a model's activations move in its first steps, by width, with and without µP.

    python benchmarks/coordinate_check.py --json=benchmarks/results/coordinate_check.json

With a parametrization that lets learning rates transfer, the moves of hidden states, logits and
router logits don't grow with the width (Yang et al. 2022, arXiv 2203.03466, appendix D.1). All
widths grow together, from `BASE_WIDTH`; the text is random, since moves at the start need no other.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moe.cli import config
from moe.data.batch import Batch
from moe.model.sharding import MeshShape
from moe.training.abstract_model import Vocabulary

BASE_WIDTH, WIDTHS, STEPS, RATE = 32, (32, 64, 128, 256), 3, 3e-3
SHAPE = (8, 32)
SETTINGS = f"""
train.data = None
train.model = @Transformer
Transformer.num_layers = 1
Transformer.moe = @MoELayer
MoELayer.num_experts = 4
MoELayer.router = @TopK
TopK.k = 2
train.optimizer = @AdamW()
AdamW.learning_rate = {RATE}
AdamW.schedule = @Linear()
Linear.warmup = 0.0
Linear.final = 1.0
train.batch_size = {SHAPE[0]}
train.sequence_length = {SHAPE[1]}
"""


def moves(width: int, base_width: int | None) -> dict[str, float]:
    """Root mean squares of what `STEPS` steps of training change.

    width: of the model; heads are 16 wide. base_width: `Transformer.base_width`.
    """
    sizes = {"d_model": width, "num_heads": width // 16, "base_width": base_width}
    settings = [f"Transformer.{name} = {value}" for name, value in sizes.items()]
    spec = config.load([], [*SETTINGS.split("\n"), *settings, f"MoELayer.d_ff = {width}"])
    mesh = MeshShape(data=1).build(jax.devices()[:1])
    model, program = spec.build(Vocabulary(64), mesh)
    batch = random_batch()

    @jax.jit
    def activations(state):
        module = model.graph.merge(state.params, state.router_state)
        out = module(batch.token_BT)
        square = out.routers.stats.logit_square_sum.mean() / batch.token_BT.size
        return out.hidden_BTD, module.logits(out.hidden_BTD), jnp.sqrt(square)

    state = program.init(0)
    hidden_BTD, logits_BTV, router_logit = activations(state)
    for _ in range(STEPS):
        state, metrics = program.step(state, batch)
    after_BTD, after_BTV, _ = activations(state)
    return {
        "hidden": size(after_BTD - hidden_BTD),
        "logits": size(after_BTV - logits_BTV),
        "first_router_logit": float(router_logit),
        "loss": float(metrics.loss),
    }


def random_batch() -> Batch:
    """Sequences of random tokens without padding."""
    token_BT = np.random.default_rng(0).integers(0, 64, SHAPE, dtype=np.int32)
    ones_BT = np.ones(SHAPE, np.int32)
    position_BT = np.arange(SHAPE[1], dtype=np.int32) * ones_BT
    target_BT = np.roll(token_BT, -1, axis=1)
    index_B = np.arange(SHAPE[0], dtype=np.int32)
    return Batch(token_BT, target_BT, ones_BT, position_BT, ones_BT > 0, index_B)


def size(values) -> float:
    """The root mean square."""
    return float(jnp.sqrt(jnp.mean(jnp.square(values))))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name, base_width in (("standard", None), ("µP", BASE_WIDTH)):
        for width in WIDTHS:
            rows.append({"parametrization": name, "width": width} | moves(width, base_width))
            print(rows[-1], flush=True)
    if options.json:
        about = {"steps": STEPS, "learning_rate": RATE, "base_width": BASE_WIDTH}
        options.json.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
