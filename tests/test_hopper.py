"""Experts on Hopper cards: the kernels, interpreted, give what one matmul per row gives.

From JAX 0.11 on, which interprets them; blocks of rows, loops over them, and the choice are tested
with every JAX. Broken on purpose, and seen: a room for results that is taken again too early (a
race), blocks that are not in use read by the backward pass, rows of an expert one block too low.
"""

import functools
import json
import math
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.dispatch import Sorted
from layers.kernels import grouped_matmul, hopper, row_blocks
from layers.logical_axes import sharding_rules
from layers.moe_layer import MoELayer
from moe.model import functional, sharding
from routing import Capacity, Tokens, TopK, initialize

# What this JAX can interpret: everything that is asked of the kernels is asked of the loops too.
MATMULS = {"loops": hopper.REFERENCE}
KERNELS_HERE = jax.__version_info__[:2] >= hopper.JAX_NEEDED
if KERNELS_HERE:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from layers.kernels import hopper_matmul, hopper_tiles

    INTERPRETED = {
        "multiprocessors": 2,
        "interpret": plgpu.InterpretGPUParams(detect_races=True),
    }
    MATMULS["kernels"] = hopper.mosaic(**INTERPRETED)

# Rows of each expert, D and F: tiles split by rows and by columns, one part and several.
COUNTS = {
    "empty experts, one row": ([130, 0, 1], 256, 128),
    "all on one": ([0, 137, 0, 0], 192, 130),
}
MORE_COUNTS = {
    "even": ([128, 128], 128, 128),
    "no row": ([0, 0], 128, 128),
    "one expert": ([19], 128, 128),
    "odd": ([7, 13, 1, 29, 300], 128, 128),
}
ON_A_CARD = types.SimpleNamespace(
    platform="gpu", compute_capability="9.0", device_kind="NVIDIA H100", core_count=132
)


def gated(up, gate):
    return up * jax.nn.silu(gate)


def values(counts, width, hidden, dtype, ups):
    """Rows in blocks, their combine weights, experts' weights, and gradients of outputs; NaN in
    blocks that are not in use."""
    rng = np.random.default_rng(0)
    experts, rows = len(counts), row_blocks.aligned_rows(sum(counts), len(counts))
    x, dy = np.full((2, rows, width), np.nan)
    start, real = 0, []
    for count in counts:
        end = start + -(-count // 128) * 128
        for a in (x, dy):
            a[start:end] = 0
            a[start : start + count] = rng.standard_normal((count, width)) / 3
        real.extend(range(start, start + count))
        start = end
    shapes = [*([(experts, width, hidden)] * ups), (experts, hidden, width)]
    *ups_, down = (jnp.asarray(rng.standard_normal(s) / 8, dtype) for s in shapes)
    combine = np.where(np.isnan(x[:, 0]), np.nan, rng.uniform(size=rows))
    x, dy = jnp.asarray(x, dtype), jnp.asarray(dy, dtype)
    return x, jnp.asarray(combine, "float32"), tuple(ups_), down, dy, np.asarray(real, int)


def slow(x_ND, combine_N, ups, down_EFD, counts, activate):
    """Each row by its own expert's weights."""
    expert_N = np.repeat(np.arange(len(counts)), counts)
    before = [jnp.einsum("nd,ndf->nf", x_ND, up[expert_N]) for up in ups]
    return combine_N[:, None] * jnp.einsum("nf,nfd->nd", activate(*before), down_EFD[expert_N])


def compare(counts, width, hidden, matmuls, dtype, activate=gated, ups=2):
    x, combine, ups, down, dy, real = values(counts, width, hidden, dtype, ups)
    wide_x, *wide, wide_dy = jax.tree.map(lambda a: a.astype("float32"), (x, ups, down, dy))
    slow_one = functools.partial(slow, counts=counts, activate=activate)
    y, pull = jax.vjp(slow_one, wide_x[real], combine[real], *wide)
    expected = y, pull(wide_dy[real])

    @jax.jit
    def step(x, combine, ups, down, count_E, dy):
        def fast(x, combine, ups, down):
            return hopper.feed_forward(x, combine, ups, down, count_E, activate, matmuls)

        y, pull = jax.vjp(fast, x, combine, ups, down)
        return y, pull(dy)

    y, (dx, dcombine, *dweights) = step(x, combine, ups, down, jnp.asarray(counts, jnp.int32), dy)
    dcombine = dcombine[real]
    found = y[real], (dx[real], dcombine, *dweights)
    limit = 1e-5 if dtype == "float32" else 3e-2
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert b.dtype == (dtype if b is not dcombine else "float32") and a.shape == b.shape
        error = np.linalg.norm(a - b.astype("float32"))
        assert error <= limit * np.linalg.norm(a) + 1e-12, (error, a.shape)


@pytest.mark.parametrize("matmuls", MATMULS)
@pytest.mark.parametrize("counts", COUNTS)
def test_output_and_gradients_are_the_slow_ones(counts, matmuls):
    compare(*COUNTS[counts], MATMULS[matmuls], "bfloat16")


@pytest.mark.parametrize("counts", COUNTS | MORE_COUNTS)
def test_blocks_of_rows_lose_none(counts):
    """One matmul before the activation here; two, with a gate, in the test above."""
    counts = (COUNTS | MORE_COUNTS)[counts]
    compare(*counts, hopper.REFERENCE, "float32", jax.nn.relu, ups=1)


if KERNELS_HERE:

    @pytest.mark.parametrize(
        ("tile", "transpose"),
        [
            (hopper_tiles.Tile(64, 128, cluster=2), False),
            (hopper_tiles.Tile(128, 64, by_rows=False, cluster=2), True),
        ],
        ids=["by rows", "by columns, transposed"],
    )
    def test_clusters_give_the_same(tile, transpose):
        x, _, (weight, _), _, _, real = values([130, 0, 1], 128, 256, "bfloat16", 2)
        blocks = row_blocks.blocks_of(jnp.asarray([130, 0, 1]), len(x))
        weight = jnp.swapaxes(weight, 1, 2) if transpose else weight
        args = x, weight, blocks, transpose
        found = hopper_matmul.matmul(*args, tile=tile, **INTERPRETED)[real]
        expected = row_blocks.matmul(*args)[real]
        np.testing.assert_allclose(*(np.asarray(a, "float32") for a in (found, expected)), 1e-2)

    def lowered(on_mesh, dtype="bfloat16", d_model=128, d_ff=256):
        """What is handed to the CUDA compiler for a layer's rematerialised forward and backward."""
        make = functools.partial(TopK, k=2)
        capacity, dispatcher = Capacity(None), Sorted("hopper")
        layer = MoELayer(
            d_model, 64, make, 8, d_ff, "swiglu", capacity=capacity, dispatcher=dispatcher
        )
        graph, params, state = functional.split(initialize(layer, 0))
        tokens = Tokens.of(jnp.zeros((8, 128), jnp.int32), train=True)
        saved = jax.checkpoint_policies.save_only_these_names("expert_matmuls")

        def total(params, x_BTD):
            def layers(x_BTD, _):
                y_BTD = graph.merge(params, state)(x_BTD, tokens)[0]
                return x_BTD + y_BTD.astype(x_BTD.dtype), None

            with sharding_rules(on_mesh):
                run = jax.checkpoint(layers, policy=saved)
                return jax.lax.scan(run, x_BTD, length=2)[0].astype(jnp.float32).sum()

        x_BTD = jax.ShapeDtypeStruct((8, 128, d_model), dtype)
        params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), params)
        traced = jax.jit(jax.grad(total, (0, 1))).trace(params, x_BTD)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    @pytest.mark.parametrize("mesh", ["one device", "experts"])
    def test_the_cuda_program_is_kernels_on_rows_in_blocks(mesh):
        """In a scan of rematerialised layers, under shard_map with its types checked."""
        on_mesh = sharding.rule(sharding.MeshShape(data=2, expert=4).build())
        text = lowered(None if mesh == "one device" else on_mesh)
        kernels = len(re.findall(r"custom_call @mosaic_gpu", text))
        assert kernels == 8, kernels  # gated and down; four for inputs' gradients and three more
        assert "ragged_dot" not in text
        shapes = [
            [int(n) for n in dims.split("x")[:-1]]
            for dims in re.findall(r"tensor<([\dx]+x[a-z]+\d+)>", text)
        ]
        # All rows of both layers: 2,048, or on each of eight devices four times 256 for 2 experts.
        one_device = row_blocks.aligned_rows(2048, 8)
        rows = one_device if mesh == "one device" else 8 * row_blocks.aligned_rows(4 * 256, 2)
        largest = max(math.prod(shape) for shape in shapes if shape)
        assert largest <= 2 * rows * 256, largest


def test_the_layer_is_that_of_the_loop():
    """Rows sorted into blocks, half of them dropped: output and gradients, K = E."""
    tokens = Tokens.of(jnp.arange(96, dtype=jnp.int32).reshape(2, 48) % 64, train=True)
    x_BTD = np.random.default_rng(1).standard_normal((2, 48, 8)).astype(np.float32)

    def found(kernel):
        make = functools.partial(TopK, k=3)
        layer = MoELayer(8, 64, make, 3, 12, capacity=Capacity(0.5), dispatcher=Sorted(kernel))
        graph, params, state = functional.split(initialize(layer, 0))

        def total(params, x_BTD):
            y_BTD = graph.merge(params, state)(x_BTD, tokens)[0]
            return jnp.sum(y_BTD * x_BTD), y_BTD

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, x_BTD)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    jax.tree.map(close, found("loop"), found("hopper"))


def card(**changes):
    return types.SimpleNamespace(**(vars(ON_A_CARD) | changes))


@pytest.mark.parametrize(
    ("on", "dtype", "width", "kernel", "reason"),
    [
        (types.SimpleNamespace(platform="cpu"), "float32", 8, "loop", "CPU's cache"),
        (types.SimpleNamespace(platform="tpu"), "bfloat16", 128, "ragged_dot", "TPU's compiler"),
        (card(compute_capability="8.0"), "bfloat16", 128, "slot_blocks", "capability 8.0"),
        (card(compute_capability="10.0"), "bfloat16", 128, "slot_blocks", "capability 10.0"),
        (card(), "float32", 128, "slot_blocks", "float32, not bfloat16"),
        (card(), "bfloat16", 100, "slot_blocks", "width 100"),
        (card(), "bfloat16", 64, "slot_blocks", "width 64"),
        (card(), "bfloat16", 192, "hopper", "NVIDIA H100, bfloat16, width 192, JAX 0."),
    ],
)
def test_the_device_chooses(monkeypatch, on, dtype, width, kernel, reason):
    """What is replaced is the device, which this machine has not got, and the newest JAX."""
    monkeypatch.setattr(grouped_matmul, "device", lambda: on)
    monkeypatch.setattr(grouped_matmul, "platform", lambda: on.platform)
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    choice = grouped_matmul.choose("auto", dtype, width)
    assert choice.kernel == kernel and reason in choice.reason, choice
    assert grouped_matmul.choose("loop", dtype, width) == ("loop", "as set")
    if on.platform == "gpu" and kernel != "hopper":
        with pytest.raises(
            ValueError, match=f"Sorted.kernel='hopper' can't serve here: .*{reason}"
        ):
            grouped_matmul.choose("hopper", dtype, width)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    if on.platform == "gpu":
        choice = grouped_matmul.choose("auto", dtype, width)
        assert choice.kernel == "slot_blocks" and "older than 0.11" in choice.reason


def has_cuda_compiler():
    try:
        import jax_cuda13_plugin  # noqa: F401
        import jax_plugins.xla_cuda13  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.thorough
@pytest.mark.accelerator  # or the wheels of its compiler
@pytest.mark.skipif(
    not has_cuda_compiler(),
    reason="needs the CUDA compiler: jax-cuda13-pjrt, jax-cuda13-plugin, nvidia-cuda-nvcc",
)
@pytest.mark.parametrize("sizes", [(65536, 64, 2048, 1024), (16384, 8, 4096, 14336)], ids=str)
def test_the_cuda_compiler_spills_no_register(sizes):
    """Layers of OLMoE's and Mixtral's shapes, for an H100: what they compute lies in registers."""
    program = pathlib.Path(__file__).with_name("cuda_layer.py")  # it may abort: its own process
    found = subprocess.run(
        [sys.executable, program, "hopper", *map(str, sizes)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not found.returncode, found.stderr
    figures = json.loads(found.stdout.splitlines()[-1])
    rows, experts, width, hidden = sizes
    assert figures["kernels"] and not figures["spilled"], figures
    weights = experts * width * hidden
    largest = row_blocks.aligned_rows(rows, experts) * max(width, hidden)
    assert figures["largest"] <= max(weights, largest), figures
