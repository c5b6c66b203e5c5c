"""`moe check`: the guide's router passes; every broken router fails where it is broken."""

import functools
import json
from pathlib import Path
import re
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from moe.cli import main as cli
from moe.conformance import properties
from routing import (
    BalanceLoss,
    Capacity,
    Causality,
    Router,
    Routing,
    TokenChoice,
    TopK,
    parameter,
)
from routing.balancers import StepState
from routing.parameters import router_state, truncated_normal, zeros
from routing.selection import top_k_indices

GUIDE = Path(__file__).parents[1] / "docs" / "writing_a_router.md"


class Passes(StepState):
    """How often a router was called: a side effect, which rematerialisation would double."""

    def __init__(self):
        self.count = router_state((), jnp.float32, (), zeros)

    def update(self, stats):
        pass


class Broken(Router):
    """Top-2 of softmax(x W), but for what a subclass gets wrong."""

    causality = Causality.CAUSAL
    decoding = "as in training"
    wrong = ""

    def __init__(self, sizes):
        self.num_experts = sizes.num_experts
        self.losses = (BalanceLoss(),) if self.wrong == "detached" else ()
        shape = (sizes.d_model, sizes.num_experts)
        self.weight_DE = parameter(shape, ("embed", None), truncated_normal(), role="router")
        self.passes = Passes() if self.wrong == "counter" else None

    def route(self, inputs):
        x_GTD, wrong = inputs.x_GTD, self.wrong
        asked = "default" if wrong == "low" else None
        logits_GTE = jnp.einsum("gtd,de->gte", x_GTD, self.weight_DE[...], precision=asked)
        if wrong == "leak":
            logits_GTE = logits_GTE + logits_GTE.mean(1, keepdims=True)
        if wrong == "random":
            logits_GTE += jax.random.normal(inputs.key, logits_GTE.shape)
        if wrong == "neighbours":
            logits_GTE += logits_GTE[:1, :1]
        if wrong == "padding":
            logits_GTE += inputs.x_GTD.shape[1] * jnp.arange(self.num_experts)[None, None] / 20
        if wrong == "half":
            logits_GTE = logits_GTE.astype(jnp.bfloat16)
        if wrong == "mesh":  # a draw for the whole micro-batch, not for each group
            logits_GTE += jax.random.normal(inputs.key, logits_GTE.shape) * inputs.train
        if wrong == "order":
            logits_GTE += inputs.position_GT[..., None] * jnp.arange(self.num_experts)[None, None]
        if wrong == "ids":
            logits_GTE += jax.nn.one_hot(inputs.token_id_GT % 4, self.num_experts)
        if wrong == "counter":
            self.passes.count[...] += 1
        prob_GTE = score_GTE = jax.nn.softmax(logits_GTE)
        if wrong == "shrinks":
            raw_GTE = jax.nn.sigmoid(logits_GTE)
            score_GTE = raw_GTE / (raw_GTE.sum(-1, keepdims=True) + 1e-20)
        if wrong == "detached":
            score_GTE = jax.lax.stop_gradient(score_GTE)
        expert_GTK = top_k_indices(jax.lax.stop_gradient(prob_GTE), 2)
        gate_GTK = jnp.take_along_axis(prob_GTE, expert_GTK, -1)
        if wrong == "starved":
            gate_GTK = jnp.ones_like(gate_GTK)
        if wrong == "nan":
            gate_GTK = jnp.where(inputs.position_GT[..., None] == 3, jnp.nan, gate_GTK)
        if wrong == "range":
            expert_GTK += 1
        if wrong == "twice":
            expert_GTK = jnp.repeat(expert_GTK[..., :1], 2, -1)
        if wrong == "negative":
            score_GTE = logits_GTE / logits_GTE.sum(-1, keepdims=True)
        keep_GTK = jnp.ones_like(expert_GTK, bool)
        decision = TokenChoice(expert_GTK, gate_GTK, keep_GTK, self.num_experts)
        if wrong == "shapes":  # afterwards, since these tests check types, which users don't
            decision.keep_GTK = keep_GTK[..., :1]
        return Routing(decision, logits_GTE, score_GTE)


BREAKAGES = [
    ("range", properties.decision, "expert 4 is chosen, and they are 0 to 3"),
    ("twice", properties.decision, "chose an expert twice, and repeats_experts=False is declared"),
    ("nan", properties.decision, "gate_GTK is not finite in "),
    ("negative", properties.decision, "entropy_sum is not finite in 1 of 1 places: are all scores"),
    ("leak", properties.causality, "leaks the future"),
    ("random", properties.determinism, "still random"),
    ("neighbours", properties.neighbours, "the other sequences change it"),
    ("padding", properties.padding, "counts padding"),
    ("starved", properties.gradients, "starves weight_DE"),
    ("half", properties.precision, "has bfloat16"),
    ("low", properties.precision, "3 of 3 are bfloat16 on a TPU"),
    ("order", properties.order, "they decide, and False is declared"),
    ("ids", properties.order, "they decide, and False is declared"),
    ("shrinks", properties.scale, "the balance loss goes"),
    ("detached", properties.coefficients, "a slope of 0, and of "),
    ("counter", properties.router_state, "a forward pass changes it in training"),
    pytest.param(
        *("mesh", properties.micro_batches, "four micro-batches are not one batch"),
        marks=pytest.mark.thorough,
    ),
]
NAMES = [getattr(row, "values", row)[0] for row in BREAKAGES]


@pytest.mark.parametrize(("wrong", "look", "said"), BREAKAGES, ids=NAMES)
def test_a_broken_router_fails_where_it_is_broken(wrong, look, said):
    made = type("Made", (Broken,), {"wrong": wrong})
    failed = [v for v in look(properties.Bench(made, 4)) if v.holds is False]
    assert failed and all(said in verdict.seen for verdict in failed), failed


def test_nothing_else_is_judged_where_a_decision_is_none():
    found = list(properties.check(type("Made", (Broken,), {"wrong": "range"})))
    assert [verdict.holds for verdict in found] == [False, False, None]


def test_arrays_of_a_choice_that_do_not_fit_are_named():
    made = type("Made", (Broken,), {"wrong": "shapes"})
    with pytest.raises(ValueError, match=r"Made\.route: expert_GTK is \(24, 11, 2\).*keep_GTK is"):
        list(properties.decision(properties.Bench(made, 4)))


FILE = """
import functools
from routing import TopK
import {module}

part = functools.partial(TopK, k=1)
three = 3

class Broken(TopK):
    def route(self, inputs):
        {line}
"""


@pytest.mark.parametrize(
    ("what", "line", "module", "said"),
    [
        ("Broken", "return {}['x']", "json", "KeyError: 'x' (mine.py:11: return {}['x'])"),
        ("Broken", "assert False", "json", "AssertionError: AssertionError (mine.py:11: assert"),
        (
            "three",
            "pass",
            "json",
            "mine.py:three is of type int; expected a class or function that",
        ),
        ("part", "pass", "nowhere", "No module named 'nowhere' (mine.py:4: import nowhere)"),
        ("part", "else", "json", "mine can't be imported: invalid syntax (mine.py:11)"),
    ],
)
def test_mistakes_in_a_routers_file_are_told_with_their_line(
    what, line, module, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(FILE.format(line=line, module=module))
    assert cli.main(["check", f"mine.py:{what}"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_what_makes_no_router_is_told(capsys):
    assert cli.main(["check", "BalanceLoss"]) == 2
    assert "TypeError: it makes a BalanceLoss, expected a Router" in capsys.readouterr().err


def test_a_part_of_a_router_is_one(tmp_path, monkeypatch, capsys):
    """Its name is that which was given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(FILE.format(line="pass", module="json"))
    monkeypatch.setattr(properties, "check", lambda make, experts: iter(()))
    assert cli.main(["check", "mine.py:part"]) == 0
    assert capsys.readouterr().out.startswith("mine.py:part with 4 experts")


def test_a_capacity_that_counts_the_whole_text_leaks_its_length():
    bench = properties.Bench(functools.partial(TopK, k=2), 4)
    (verdict,) = properties.length(bench)
    assert verdict.holds
    leak = Capacity(eval_factor=0.5, priority="gate")
    bench = properties.Bench(functools.partial(TopK, k=2), 4, {"capacity": leak})
    (verdict,) = properties.length(bench)
    assert verdict.holds is False and "leaks the future's length" in verdict.seen


def test_a_leak_that_is_declared_and_not_there_fails():
    made = type("Made", (TopK,), {"causality": Causality.NEVER})
    verdicts = list(properties.causality(properties.Bench(made, 4)))
    assert all(v.holds is False and "declares a leak" in v.seen for v in verdicts)


def test_the_guides_router_passes_within_a_minute(tmp_path, monkeypatch, capsys):
    """The file of the guide, as a user would save and check it; it has some forty lines."""
    monkeypatch.chdir(tmp_path)
    guide = GUIDE.read_text()
    code = re.search(r"```python\n(.*?)```", guide, re.DOTALL)[1]
    assert code.count("\n") <= 45
    Path("my_router.py").write_text(code)
    started = time.monotonic()
    assert cli.main(["check", "my_router.py:CosineTopK", "--json=found.json"]) == 0
    assert time.monotonic() - started < 60
    said = capsys.readouterr().out
    shown = re.search(r"```text\n(.*?)  \.\.\.", guide, re.DOTALL)[1]
    assert said.startswith(shown) and said.splitlines()[-1].startswith("all hold; ")
    found = json.loads(Path("found.json").read_text())
    held = {v["property"] for v in found if v["holds"]}
    assert {"mesh", "micro-batches", "movement", "rematerialisation", "reported loss"} <= held
    assert {v["property"] for v in found} - held == {"load", "router state"}
    # And it trains: by one line of gin.
    config = re.search(r"printf '(.*?)' > cosine.gin", guide)[1].replace("\\n", "\n")
    assert "MoELayer.router = @CosineTopK" in config and "import my_router" in config


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check"], "moe check needs one MODULE:ROUTER"),
        (["check", "routing:TopKey"], "routing has no 'TopKey'; did you mean 'TopK'"),
        (["check", "nowhere:Router"], "no module 'nowhere'"),
        (["check", "missing.py:Router"], "missing.py: no such file"),
        (["check", "TopK", "--experts=1"], "can't be checked: ValueError: TopK.k=2"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("pass", "TypeError: Bad.route returned NoneType, expected a Routing"),
        ("return jnp.zeros(3) + jnp.zeros(4)", "bad.py:11: return jnp.zeros(3) + jnp.zeros(4))"),
    ],
)
def test_an_unfinished_router_is_one_line_with_its_place(
    body, expected, tmp_path, capsys, monkeypatch
):
    (tmp_path / "bad.py").write_text(
        "import jax.numpy as jnp\nfrom routing import Causality, Router\n\n"
        "class Bad(Router):\n    causality = Causality.CAUSAL\n    decoding = 'as in training'\n"
        "    def __init__(self, sizes):\n        self.num_experts, self.losses = 4, ()\n\n"
        f"    def route(self, inputs):\n        {body}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("bad", None)
    assert cli.main(["check", "bad.py:Bad"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bad.py:Bad can't be checked" in error and expected in error


def test_a_file_without_a_class_is_told_what_to_name(capsys):
    assert cli.main(["check", "my_router.py"]) == 2
    assert "name a class, as my_router.py:MyRouter" in capsys.readouterr().err
