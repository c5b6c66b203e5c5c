"""On a GPU or TPU: its kernels give what the CPU gives, and a model trains. Skipped elsewhere.

JAX_PLATFORMS=cuda,cpu python -m pytest -m accelerator
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.dispatch import OneHotEinsum, SlotGather, Sorted
from layers.moe_layer import MoELayer
from moe.bench.routers import batch
from moe.data.batches import train_batch
from moe.model import functional
from moe.model.transformer import Transformer
from moe.training.abstract_model import Vocabulary
from moe.training.optimizer import AdamW
from moe.training.run_spec import RunSpec
from routing import Capacity, TopK, initialize

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(jax.default_backend() == "cpu", reason="no accelerator"),
]
T, D, E, F, V = 512, 128, 8, 256, 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "dispatcher",
    [
        OneHotEinsum(),
        SlotGather(),
        Sorted("ragged_dot"),
        Sorted("loop"),
        Sorted(),  # on a Hopper card, in bfloat16, our kernels
        *([Sorted("tokamax")] if importlib.util.find_spec("tokamax") else []),
    ],
    ids=str,
)
def test_kernels_give_what_the_cpu_gives(dispatcher, dtype):
    """Output and gradients of a layer, against float32 on the CPU, nothing dropped."""
    make = functools.partial(TopK, k=2)
    layer = MoELayer(D, V, make, E, F, capacity=Capacity(None), dispatcher=dispatcher)
    graph, params, state = functional.split(initialize(layer, 0))
    tokens = batch(T)
    x_BTD = np.random.default_rng(0).standard_normal((1, T, D)).astype(np.float32)

    def total(params, x_BTD):
        y_BTD = graph.merge(params, state)(x_BTD, tokens)[0]
        return jnp.sum(y_BTD.astype(jnp.float32) * x_BTD), y_BTD

    def found(device, dtype):
        args = jax.device_put((params, x_BTD.astype(dtype)), device)
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            (_, y), grads = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(*args)
        return jax.device_get((y, grads))

    cpu = jax.devices("cpu")[0]
    expected, real = found(cpu, "float32"), found(jax.devices()[0], dtype)
    limit = 1e-4 if dtype == "float32" else 3e-2
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(real), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= limit * np.linalg.norm(a)


def test_a_model_learns():
    """The loss of one batch falls by half in thirty steps, in bfloat16 with sorted experts."""
    moe = functools.partial(
        MoELayer, router=functools.partial(TopK, k=2), num_experts=E, d_ff=F, dispatcher=Sorted()
    )
    make = functools.partial(
        Transformer, d_model=D, num_layers=2, num_heads=2, moe=moe, compute_dtype="bfloat16"
    )
    optimizer = AdamW(learning_rate=1e-2)
    spec = RunSpec(None, make, None, optimizer, steps=30, batch_size=8, sequence_length=128)
    _, program = spec.build(Vocabulary(V), spec.build_mesh(jax.devices()[:1]))
    state, losses = program.init(0), []
    window_BW = np.random.default_rng(0).integers(0, V, (8, 129), np.int32)
    rows = train_batch(window_BW, np.arange(8, dtype=np.int32))
    for _ in range(30):
        state, measured = program.step(state, rows)
        losses.append(float(measured.loss))
    assert losses[-1] < losses[0] / 2, losses
