"""Experts on a GPU: slots and blocks give what one matmul per row gives; the program is small."""

import functools
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
from marks import mainly
import numpy as np
import pytest

from layers.dispatch import Sorted
from layers.kernels import grouped_matmul
from layers.kernels.slot_blocks import BLOCK_ROWS, slots_of
from layers.logical_axes import sharding_rules
from layers.moe_layer import MoELayer
from moe.model import functional, sharding
from routing import Capacity, Tokens, TopK, initialize

D, F = 8, 12
# Rows of each expert, and rows of padding behind them.
COUNTS = {
    "even": ([16, 16, 16, 16], 0),
    "empty experts": ([0, 23, 0, 0, 9, 0], 3),
    "one row": ([0, 1, 0], 0),
    "no row": ([0, 0, 0], 5),
    "all on the first": ([37, 0, 0, 0], 0),
    "all on the last": ([0, 0, 0, 37], 5),
    "odd": ([7, 13, 1, 29, 3], 11),
    "blocks beyond the slots": ([3, 2 * BLOCK_ROWS + 401, 5, 700, 0, 1, 0, 0], 0),
    "one expert": ([19], 2),
}
KEPT = ("empty experts", "no row", "odd", "blocks beyond the slots")


def gated(up, gate):
    return up * jax.nn.silu(gate)


def values(counts, padding, dtype, ups):
    rng = np.random.default_rng(0)
    rows = sum(counts) + padding
    shapes = [(rows, D), *([(len(counts), D, F)] * ups), (len(counts), F, D), (rows, D)]
    x, *ups_, down, dy = (jnp.asarray(rng.standard_normal(s) / 3, dtype) for s in shapes)
    combine = jnp.asarray(rng.uniform(size=rows), "float32")
    return x, combine, tuple(ups_), down, dy.at[sum(counts) :].set(0)


def slow(x_ND, combine_N, ups, down_EFD, counts, activate):
    """Each row by its own expert's weights; 0 past the counts."""
    expert_N = np.repeat(np.arange(len(counts)), counts)
    before = [jnp.einsum("nd,ndf->nf", x_ND[: len(expert_N)], up[expert_N]) for up in ups]
    y_ND = jnp.einsum("nf,nfd->nd", activate(*before), down_EFD[expert_N])
    y_ND = y_ND * combine_N[: len(expert_N), None]
    return jnp.pad(y_ND, ((0, len(x_ND) - len(y_ND)), (0, 0)))


def with_gradients(feed_forward, *args):
    *given, dy = args
    y, pull = jax.vjp(feed_forward, *given)
    return y, pull(dy)


@pytest.mark.parametrize("dtype", mainly(["float32"], ["float32", "bfloat16"]))
@pytest.mark.parametrize("counts", mainly(KEPT, COUNTS))
def test_output_and_gradients_are_the_slow_ones(counts, dtype):
    counts, padding = COUNTS[counts]
    for activate, ups in ((gated, 2), (jax.nn.relu, 1)):
        args = values(counts, padding, dtype, ups)
        wide = jax.tree.map(lambda a: a.astype("float32"), args)
        expected = with_gradients(functools.partial(slow, counts=counts, activate=activate), *wide)

        def fast(*given, activate=activate):
            given = *given, jnp.asarray(counts, jnp.int32), activate
            return grouped_matmul.grouped_feed_forward(*given, "slot_blocks")

        found = jax.jit(functools.partial(with_gradients, fast))(*args)
        limit = 1e-5 if dtype == "float32" else 3e-2
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            assert b.dtype == (dtype if b.ndim > 1 else "float32")
            error = np.linalg.norm(a - b.astype("float32"))
            assert error <= limit * np.linalg.norm(a) + 1e-12, (error, a.shape)


@pytest.mark.thorough
def test_padding_is_never_read():
    """NaN in rows and in output gradients past the counts reaches no result."""
    counts, padding = COUNTS["odd"]
    x, combine, ups, down, dy = values(counts, padding, "float32", 2)
    bad_x, bad_combine, bad_dy = (a.at[sum(counts) :].set(jnp.nan) for a in (x, combine, dy))

    def fast(*given):
        return grouped_matmul.slot_blocks(*given, jnp.asarray(counts, jnp.int32), gated)

    expected = with_gradients(fast, x, combine, ups, down, dy)
    found = with_gradients(fast, bad_x, bad_combine, ups, down, bad_dy)
    jax.tree.map(np.testing.assert_array_equal, expected, found)


def cuda_program(kernel, rows, experts):
    """The text that is handed to the CUDA compiler for a layer's forward and backward pass."""

    def step(x, combine, ups, down, count_E, dy):
        def feed_forward(*given):
            return grouped_matmul.grouped_feed_forward(*given, count_E, gated, kernel)

        return with_gradients(feed_forward, x, combine, ups, down, dy)

    combine = jax.ShapeDtypeStruct((rows,), "float32")
    x = jax.ShapeDtypeStruct((rows, D), "bfloat16")
    up = jax.ShapeDtypeStruct((experts, D, F), "bfloat16")
    down = jax.ShapeDtypeStruct((experts, F, D), "bfloat16")
    count = jax.ShapeDtypeStruct((experts,), "int32")
    traced = jax.jit(step).trace(x, combine, (up, up), down, count, x)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_cuda_program_has_no_ragged_dot_and_no_buffer_of_all_rows_for_each_expert():
    rows, experts = 4096, 16
    text = cuda_program("slot_blocks", rows, experts)
    assert "ragged_dot" in cuda_program("ragged_dot", rows, experts)  # what is looked for is seen
    assert "ragged_dot" not in text
    shapes = [
        [int(n) for n in dims.split("x")[:-1]]
        for dims in re.findall(r"tensor<([\dx]+x[a-z]+\d+)>", text)
    ]
    largest = max(math.prod(shape) for shape in shapes)
    assert largest == experts * slots_of(rows, experts) * F
    assert largest <= 1.25 * rows * F + 8 * experts * F


@pytest.mark.thorough
def test_a_mesh_gives_what_the_loop_gives():
    """Output and gradients of a layer whose rows travel to four devices that hold experts."""
    tokens = Tokens.of(jnp.tile(jnp.arange(128, dtype=jnp.int32), (8, 1)) % 64, train=True)
    # Nearly equal tokens choose one expert, which overflows its slots.
    x_BTD = 1 + np.random.default_rng(1).standard_normal((8, 128, 16)).astype(np.float32) / 10
    on_mesh = sharding.rule(sharding.MeshShape(data=2, expert=4).build())

    def found(kernel):
        make = functools.partial(TopK, k=1)
        layer = MoELayer(16, 64, make, 8, 24, capacity=Capacity(None), dispatcher=Sorted(kernel))
        graph, params, state = functional.split(initialize(layer, 0))

        def total(params, x_BTD):
            with sharding_rules(on_mesh):
                y_BTD = graph.merge(params, state)(x_BTD, tokens)[0]
            return jnp.sum(y_BTD * x_BTD), y_BTD

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, x_BTD)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    expected = found("loop")
    jax.tree.map(close, expected, found("slot_blocks"))
    jax.tree.map(close, expected, found("hopper"))  # its blocks of rows, by loops


@pytest.mark.thorough
@pytest.mark.accelerator  # or the wheels of its compiler
@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins.xla_cuda13") is None
    if importlib.util.find_spec("jax_plugins")
    else True,
    reason="needs the CUDA compiler: jax-cuda13-pjrt, nvidia-cuda-nvcc",
)
def test_the_cuda_compiler_keeps_the_buffers_small():
    """A layer of OLMoE's shape for an H100: 2.5 GiB of temporaries at most (ragged_dot: 48)."""
    program = pathlib.Path(__file__).with_name("cuda_layer.py")  # it may abort: its own process
    sizes = ("65536", "64", "2048", "1024")
    found = subprocess.run(
        [sys.executable, program, "slot_blocks", *sizes],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not found.returncode, found.stderr
    figures = json.loads(found.stdout.splitlines()[-1])
    assert figures["temporaries"] <= 2.5 * 2**30, figures
    assert figures["largest"] <= 1.3 * 65536 * 2048, figures
