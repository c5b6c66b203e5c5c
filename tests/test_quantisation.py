"""Weights in few bits: what is rounded, to what, and what `moe eval --weights` says of it."""

import contextlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Runs, quick

from moe.cli import main as cli
from moe.errors import UserError
from moe.model.functional import Declared
from moe.training.few_bits import FORMATS
from moe.training.quantisation import Quantisation, matrices_shape

DECLARED = {
    "up": Declared(("layer", "expert", "embed", "mlp"), "expert"),
    "out": Declared(("layer", "heads", None, "embed"), "attention"),
    "table": Declared(("vocab", "embed"), "embedding"),
    "route": Declared(("layer", "embed", None), "router"),
    "scale": Declared(("layer", None), "norm"),
    "neurons": Declared(("layer", "expert", "embed"), "expert"),
}
SHAPES = {
    "up": (2, 4, 16, 24),
    "out": (2, 3, 8, 16),
    "table": (9, 16),
    "route": (2, 16, 4),
    "scale": (2, 16),
    "neurons": (2, 5, 16),
}


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(0)
    return {n: jnp.asarray(draw.normal(size=s), jnp.float32) for n, s in SHAPES.items()}


def test_rows_are_what_a_product_sums_over():
    found = {name: matrices_shape(SHAPES[name], DECLARED[name]) for name in SHAPES}
    assert found["up"] == (8, 16, 24) and found["out"] == (2, 24, 16)
    assert found["table"] == (9, 16, 1) and found["route"] == (2, 16, 4)
    assert found["neurons"] == (10, 16, 1)


@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("name", FORMATS)
def test_values_are_the_nearest_of_a_format(name, block, params):
    found = Quantisation(name, block)(params, DECLARED)
    assert not [n for n in ("table", "route", "scale") if (found[n] != params[n]).any()]
    for weight in ("up", "out", "neurons"):
        shape = matrices_shape(SHAPES[weight], DECLARED[weight])
        rows = block or shape[1]
        blocked = shape[0], shape[1] // rows, rows, shape[2]
        before, after = (np.asarray(p[weight]).reshape(blocked) for p in (params, found))
        for s, b, c in np.ndindex(shape[0], shape[1] // rows, shape[2]):
            levels = np.unique(after[s, b, :, c])
            assert len(levels) <= 2 ** FORMATS[name]
            # None of the block's values is nearer to another level that it uses, but for the
            # rounding of its scale to a bfloat16.
            off = np.abs(before[s, b, :, c, None] - levels).min(1)
            scale = np.abs(before[s, b, :, c]).max() * 2**-7
            np.testing.assert_allclose(np.abs(before - after)[s, b, :, c], off, atol=scale)
    error = jnp.abs(found["up"] - params["up"]).max() / jnp.abs(params["up"]).max()
    assert error < {"int8": 0.006, "fp8": 0.04, "int4": 0.08, "nf4": 0.16, "int2": 0.6}[name]


def test_a_blocks_scale_is_its_own(params):
    larger = params | {"up": params["up"].at[:, :, 8:].mul(1024.0)}
    some, others = (Quantisation("int4", 8)(p, DECLARED)["up"] for p in (params, larger))
    np.testing.assert_array_equal(some[:, :, :8], others[:, :, :8])
    np.testing.assert_array_equal(1024 * some[:, :, 8:], others[:, :, 8:])


def test_bytes_are_counted_with_scales(params):
    rest = sum(params[name].size * 4 for name in ("out", "table", "route", "scale"))
    found = Quantisation("int4", 8, ("expert",)).size(params, DECLARED)
    assert found.bits_per_weight == 4 + 16 / 8
    assert found.bytes == rest + (2 * 4 * 16 * 24 + 2 * 5 * 16) * 6 // 8
    tables = Quantisation("int8", None, ("embedding", "router"))
    assert (tables(params, DECLARED)["table"] != params["table"]).any()
    assert tables.size(params, DECLARED).bits_per_weight == 8 + 16 / 16


@pytest.mark.parametrize(
    ("text", "roles", "said"),
    [
        ("int5", None, "no such format; did you mean"),
        ("int4:x", None, "expected FORMAT:BLOCK, such as int4:32"),
        ("int4:0", None, "blocks of 0 weights"),
        ("int4:7", None, "blocks of 7 don't divide the 16 rows of up; a divisor"),
        ("int4", "experts", "no parameters have this role; did you mean 'expert'?"),
        ("int4", "head", "the model has no matrices of head"),
    ],
)
def test_what_can_not_be_is_told(text, roles, said, params):
    with pytest.raises(UserError, match=r".") as caught:
        Quantisation.read(text, roles).check(params, DECLARED)
    assert said in str(caught.value)


def test_the_commands_measure_and_generate_with_rounded_weights(tmp_path, capsys):
    run = Runs(tmp_path).done("run", "AdamW.learning_rate = 0.02", "train.optimizer = @AdamW()")

    def measured(*flags: str) -> dict:
        target = tmp_path / "found.json"
        words = ["eval", f"--workdir={run}", *flags, f"--json={target}"]
        with quick(), contextlib.redirect_stdout(io.StringIO()):
            assert cli.main(words) == 0
        return json.loads(target.read_text())

    plain, eight, two = (measured(*f) for f in ([], ["--weights=int8"], ["--weights=int2:8"]))
    assert abs(eight["bits_per_byte"] - plain["bits_per_byte"]) < 0.02
    assert abs(two["bits_per_byte"] - plain["bits_per_byte"]) > 0.02
    assert "weights" not in plain and eight["weights"].startswith("int8 in channels: attention")
    assert two["parameter_bytes"] < eight["parameter_bytes"]
    said = measured("--weights=nf4:8", "--weights_of=expert")
    assert said["bits_per_weight"] == 6 and said["weights"] == "nf4 in blocks of 8: expert"
    with quick():
        words = [f"--workdir={run}", "--tokens=2", "--weights=int4"]
        assert cli.main(["generate", *words]) == 0
        assert cli.main(["eval", words[0], "--weights_of=expert"]) == 2
    assert "--weights_of=expert needs --weights=FORMAT" in capsys.readouterr().err
    jax.clear_caches()
