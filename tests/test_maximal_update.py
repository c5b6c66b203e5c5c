"""µP: which weights get which rate and first values, and that moves don't grow with the width.

Broken on purpose, once each: no rates (hidden states move 1.9 times as far at eight times the
width), the head as in the standard parametrization, routers as hidden weights.
"""

import importlib
from pathlib import Path

from flax import nnx
import jax.numpy as jnp
import pytest

from moe.errors import UserError
from moe.model import maximal_update
from moe.model.functional import split
from moe.training.optimizer import AdamW, Muon
from routing.parameters import normal, parameter

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("axes", "kind"),
    [
        (("embed", "heads", None), "hidden"),
        (("heads", None, "embed"), "hidden"),
        (("expert", "embed", "mlp"), "hidden"),
        (("expert", "segment", "mlp", "embed"), "hidden"),
        (("embed", None), "output"),
        (("embed", "vocab"), "output"),
        (("embed",), "output"),
        (("vocab", "embed"), "other"),
        ((None, "embed"), "other"),
        ((None,), "other"),
        ((), "other"),
    ],
)
def test_a_weight_is_of_a_kind(axes, kind):
    assert maximal_update.kind_of(axes) == kind


def test_experts_of_one_neuron_are_refused():
    with pytest.raises(ValueError, match="single neurons"):
        maximal_update.kind_of(("expert", "embed"))


class Weights(nnx.Module):
    """A hidden weight, an output weight and a vector."""

    def __init__(self):
        self.hidden = parameter((4, 4), ("embed", "mlp"), normal(1.0), role="feed_forward")
        self.output = parameter((4, 2), ("embed", None), normal(1.0), role="router")
        self.vector = parameter((4,), (None,), normal(1.0), role="norm")


def test_directions_are_divided_by_the_width_and_decay_is_not():
    module = Weights()
    maximal_update.parametrize(module, 4.0)
    graph, params, _ = split(module)
    declared = graph.declared
    assert {name: d.rate for name, d in declared.items()} == {
        "hidden": 0.25,
        "output": 0.25,
        "vector": 1.0,
    }
    ones = {name: jnp.ones(value.shape) for name, value in params.items()}
    for decay in (0.0, 0.5):
        optimizer = AdamW(1.0, weight_decay=decay, clip_norm=None).build(declared)
        updates, _ = optimizer.update(ones, optimizer.init(ones), ones, rate=1.0)
        found = {name: round(float(-update.mean()), 5) for name, update in updates.items()}
        assert found == {"hidden": 0.25 + decay, "output": 0.25 + decay, "vector": 1.0}


def test_muon_is_refused():
    module = Weights()
    maximal_update.parametrize(module, 4.0)
    with pytest.raises(UserError, match="those of Adam, not of Muon"):
        Muon().build(split(module)[0].declared)


@pytest.mark.thorough
def test_moves_do_not_grow_with_the_width(monkeypatch):
    """The coordinate check: the same steps at eight times the width."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    check = importlib.import_module("coordinate_check")
    narrow, wide = (check.moves(width, 32) for width in (32, 256))
    assert wide["hidden"] == pytest.approx(narrow["hidden"], rel=0.1)
    assert wide["logits"] < 1.1 * narrow["logits"]
    assert wide["first_router_logit"] == pytest.approx(
        narrow["first_router_logit"] / 8**0.5, rel=0.1
    )
