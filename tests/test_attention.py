"""Attention's kernels: which one a platform takes, and that each is a slow loop over documents."""

import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.attention import Attention
from layers.kernels import attention
from layers.kernels.attention import Pattern, attend, choose, in_chunks, splash
from layers.logical_axes import device, per_device, platform, sharding_rules, splits_fully
from moe.model import sharding
from moe.model.transformer import Transformer
from moe.planning import compilers, wheels
from moe.planning.chips import DeviceKind
from moe.runs.summary import attention_of
from moe.training.abstract_model import Vocabulary
from moe.training.run_spec import RunSpec

B, T, H, N, K = 2, 256, 2, 1, 8
GPU, TPU = DeviceKind("gpu", "NVIDIA H100"), DeviceKind("tpu", "TPU")
# Three documents and padding; the second crosses a block of 128.
SEGMENT_BT = np.repeat([[1, 2, 3, 0], [1, 2, 3, 0]], [50, 150, 46, 10], axis=1).astype(np.int32)
PLACE_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
PATTERNS = {
    "causal": Pattern(),
    "window": Pattern(window=40),
    "both sides": Pattern(causal=False),
    "window on both sides": Pattern(causal=False, window=40),
}


def drawn(seed=0):
    """Queries, keys, values, and the gradients of the output."""
    shapes = (B, T, H, K), (B, T, N, K), (B, T, N, K), (B, T, H, K)
    random = np.random.default_rng(seed)
    return tuple(random.standard_normal(shape).astype(np.float32) for shape in shapes)


def slow_loop(query_BTHK, key_BTNK, value_BTNK, pattern):
    """One query at a time, one head at a time."""
    y_BTHK = np.zeros_like(query_BTHK)
    for b, t, h in np.ndindex(B, T, H):
        seen = [s for s in range(T) if SEGMENT_BT[b, s] == SEGMENT_BT[b, t]]
        seen = [s for s in seen if s <= t or not pattern.causal]
        seen = [s for s in seen if abs(s - t) < (pattern.window or T)]
        score = key_BTNK[b, seen, h * N // H] @ query_BTHK[b, t, h] / np.sqrt(K)
        weight = np.exp(score - score.max())
        y_BTHK[b, t, h] = weight / weight.sum() @ value_BTNK[b, seen, h * N // H]
    return y_BTHK


def as_chunks(query, key, value, segment, pattern):
    return in_chunks(query, key, value, PLACE_BT, segment, pattern, 100, "xla")


def as_cudnn(query, key, value, segment, pattern):
    """What cuDNN is asked for, in chunks of 128 instead of 4,096 queries, computed by XLA."""
    return in_chunks(query, key, value, PLACE_BT, segment, pattern, 128, "xla", attention.BLOCK)


WAYS = {
    "chunks": as_chunks,
    "cudnn": as_cudnn,
    "splash": functools.partial(splash, interpret=True),
}
CASES = [
    (way, name)
    for way in WAYS
    for name, pattern in PATTERNS.items()
    if way != "cudnn" or pattern.causal or pattern.window is None
]


@pytest.mark.parametrize(("way", "name"), CASES)
def test_every_kernel_is_the_slow_loop(way, name):
    """Forward, and the gradients of all scores at once."""
    pattern, (query, key, value, dy) = PATTERNS[name], drawn()

    def with_gradients(function, query, key, value, dy):
        y, pull = jax.vjp(lambda *a: function(*a, SEGMENT_BT, pattern), query, key, value)
        return y, pull(dy)

    def at_once(query, key, value, segment, pattern):
        return in_chunks(query, key, value, PLACE_BT, segment, pattern, None, "xla")

    run = jax.jit(with_gradients, static_argnums=0)
    found = run(WAYS[way], query, key, value, dy)
    np.testing.assert_allclose(found[0], slow_loop(query, key, value, pattern), atol=2e-5)
    for a, b in zip(
        *map(jax.tree.leaves, (found, run(at_once, query, key, value, dy))), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize("way", WAYS)
def test_documents_never_see_each_other(way):
    """Other values in the second document, huge ones too, leave every bit of the others."""
    run = jax.jit(functools.partial(WAYS[way], pattern=Pattern()))
    one = drawn()[:3]
    two = tuple(np.where((SEGMENT_BT == 2)[..., None, None], 1e3 * a, a) for a in one)
    found, other = (
        np.asarray(run(*arrays, segment_BT))
        for arrays, segment_BT in ((one, SEGMENT_BT), (two, SEGMENT_BT))
    )
    outside = SEGMENT_BT != 2
    np.testing.assert_array_equal(found[outside], other[outside])
    assert (found[~outside] != other[~outside]).any()


def query(length=2048, width=128, dtype="bfloat16", heads=16):
    return jax.ShapeDtypeStruct((8, length, heads, width), dtype)


@pytest.mark.parametrize(
    ("on", "given", "pattern", "kernel", "why"),
    [
        (GPU, query(), Pattern(), "cudnn", "never holds the scores"),
        (GPU, query(), Pattern(window=500), "cudnn", "never holds the scores"),
        (GPU, query(length=32768), Pattern(), "cudnn", "never holds the scores"),
        (GPU, query(length=100), Pattern(), "chunks", "cudnn needs a length that 128 divides"),
        (GPU, query(dtype="float32"), Pattern(), "chunks", "cudnn computes in bfloat16"),
        (GPU, query(width=20), Pattern(), "chunks", "cudnn is refused: The head dim must be"),
        (GPU, query(), Pattern(False, 9), "chunks", "cudnn has windows for causal models only"),
        (GPU, query(), Pattern(alibi=True), "chunks", "cudnn would hold ALiBi's bias"),
        (DeviceKind("gpu", "AMD MI300"), query(), Pattern(), "chunks", "cudnn needs an NVIDIA GPU"),
        (TPU, query(), Pattern(), "splash", "never holds the scores"),
        (TPU, query(dtype="float32"), Pattern(False, 9), "splash", "never holds the scores"),
        (TPU, query(length=100), Pattern(), "chunks", "splash needs a length that 128 divides"),
        (TPU, query(), Pattern(alibi=True), "chunks", "splash has no ALiBi"),
        (None, query(), Pattern(), "chunks", "there is no kernel for a cpu"),
    ],
)
def test_the_platform_chooses_and_says_why(on, given, pattern, kernel, why):
    with sharding_rules(None, on), compilers.assuming_cudnn():
        found = choose("auto", pattern, given)
        assert found.kernel == kernel and why in found.reason, found
        assert choose("chunks", pattern, given) == ("chunks", "as set")
    assert platform() == "cpu" and device() == jax.devices()[0]


def test_without_cudnn_there_are_chunks():
    """JAX itself says what is missing."""
    with sharding_rules(None, GPU):
        found = choose("auto", Pattern(), query())
    assert found == ("chunks", "cudnn is refused: cuDNN is not detected")


@pytest.mark.parametrize(
    ("kernel", "part"),
    [("cudnn", "'cudnn' needs an NVIDIA GPU, not cpu"), ("splash", "'splash' needs a TPU")],
)
def test_a_kernel_of_another_platform_is_refused(kernel, part):
    with pytest.raises(ValueError, match=part):
        choose(kernel, Pattern(), query())


def test_on_a_mesh_splash_gets_each_devices_part():
    """Sequences over four devices, heads over two; what they don't split goes by chunks."""
    mesh = sharding.MeshShape(data=1, fsdp=4, tensor=2).build()
    wide = ("batch", None, "heads", None)
    with sharding_rules(sharding.rule(mesh), TPU):
        assert splits_fully(wide, (8, 4, 2, 1)) and not splits_fully(wide, (8, 4, 3, 1))
        x_BTHK = np.random.default_rng(0).standard_normal((8, 4, 2, 1)).astype(np.float32)
        parts = []

        def double(part):
            parts.append(part.shape)
            return 2 * part

        y_BTHK = jax.jit(lambda x: per_device(double, (x,), (wide,)))(x_BTHK)
        np.testing.assert_array_equal(y_BTHK, 2 * x_BTHK)
        assert parts == [(2, 4, 1, 1)]
        assert choose("auto", Pattern(), query()).kernel == "chunks"  # the rule's devices are CPUs


def test_a_run_says_what_computes_attention():
    """A reason for each kind of block, once; of the mesh's devices."""
    windows = functools.partial(Attention, num_heads=2, implementation="chunks")
    for make, expected in ((Attention, "there is no kernel for a cpu"), (windows, "as set")):
        model = functools.partial(Transformer, d_model=16, num_layers=2, attention=make)
        spec = RunSpec(None, model, steps=1, batch_size=8, sequence_length=16)
        mesh = spec.build_mesh()
        abstract, _ = spec.build(Vocabulary(32), mesh)
        assert attention_of(abstract, mesh) == f"chunks ({expected})"


@functools.cache
def cuda_text(length):
    """The text that is handed to the CUDA compiler for attention with documents."""
    shape = jax.ShapeDtypeStruct((1, length, 2, 64), "bfloat16")
    ids = jax.ShapeDtypeStruct((1, length), "int32")

    def gradients(*arrays):
        def total(*three):
            y = attend(*three, *arrays[3:], Pattern(), "cudnn")
            return jnp.sum(y.astype(jnp.float32))

        return jax.grad(total, (0, 1, 2))(*arrays[:3])

    with compilers.assuming_cudnn():
        traced = jax.jit(gradients).trace(shape, shape, shape, ids, ids)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_cudnn_is_handed_the_documents_and_no_square_of_a_long_sequence():
    """Up to 4,096 tokens one mask; in 12,288 each of three chunks has its own."""
    assert "1x1x4096x4096xbf16" in cuda_text(4096)
    assert "12288x12288" not in cuda_text(12288)
    assert "1x1x4096x12288xbf16" in cuda_text(12288)


def compiled(topology, kernel, length):
    """What the compiler says of attention, in a process of its own, which it may abort."""
    program = pathlib.Path(__file__).with_name("attention_program.py")
    words = [sys.executable, program, topology, kernel, str(length)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.thorough
@pytest.mark.accelerator  # or the package of its compiler
@pytest.mark.skipif(wheels.hint(gpu=True) is not None, reason="needs the extra plan-cuda")
@pytest.mark.parametrize("topology", ["h100:1", "h100:8", "b200:8"])
@pytest.mark.parametrize("length", [2048, 16384])
def test_cudnn_compiles_for_its_cards(topology, length):
    """0.4 GiB a device beside arguments; all scores of the shorter sequences would take 2.5."""
    found = compiled(topology, "auto", length)
    assert found["kernel"] == "cudnn" and found["cudnn"] >= 2
    assert found["temporaries"] < 0.5 * 2**30 and not found["collectives"], found


@pytest.mark.thorough
@pytest.mark.accelerator
@pytest.mark.skipif(wheels.hint(gpu=False) is not None, reason="needs the extra plan")
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:2x2x1"])
def test_splash_compiles_for_tpus(topology):
    found = compiled(topology, "auto", 2048)
    assert found["kernel"] == "splash" and found["pallas"] >= 3
    assert found["temporaries"] < 0.5 * 2**30 and not found["collectives"], found


def test_chunks_compile_for_a_cpu():
    """Not one array of all scores, forward or backward."""
    shape = jax.ShapeDtypeStruct((1, 4096, 2, 16), "float32")
    ids = jax.ShapeDtypeStruct((1, 4096), "int32")

    def gradients(*arrays):
        def total(*three):
            return jnp.sum(attend(*three, *arrays[3:], Pattern(), "chunks", 1024))

        return jax.grad(total, (0, 1, 2))(*arrays[:3])

    text = jax.jit(gradients).lower(shape, shape, shape, ids, ids).compile().as_text()
    assert "4096,4096]" not in text and "1024,4096]" in text
