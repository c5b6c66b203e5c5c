"""What a config binds against the annotations: every mistake is a line, none a traceback."""

from collections.abc import Callable
import math
import typing

import pytest
from tiny import BASE

from moe.cli import config, configurables
from moe.errors import UserError
from moe.settings import check, types
from moe.settings.read import Reference
from routing.ranges import Range

assert configurables  # every configurable is registered


def refusal(binding: str) -> str:
    with pytest.raises(UserError) as caught:
        config.bind(["quickstart.gin"], [binding])
    return str(caught.value)


MISTAKES = {
    "train.optimizer = @AdamW": "write @AdamW(), not @AdamW",
    "train.mesh = @MeshShape": "write @MeshShape(), not @MeshShape",
    "train.objective = @NextToken": "write @NextToken(), not @NextToken",
    "train.data = @TextData": "write @TextData(), not @TextData",
    "AdamW.schedule = @Cosine": "write @Cosine(), not @Cosine",
    "MoELayer.dispatcher = @Sorted": "write @Sorted(), not @Sorted",
    "MoELayer.capacity = @Capacity": "write @Capacity(), not @Capacity",
    "TopK.losses = [@BalanceLoss]": "item 0: write @BalanceLoss(), not @BalanceLoss",
    "TopK.losses = @BalanceLoss()": "expected a list of ",
    "TopK.losses = [@AdamW()]": "item 0: expected @",
    "MoELayer.router = @TopK()": "write @TopK, not @TopK()",
    "MoELayer.router = @AdamW": "expected @",
    "MoELayer.router = 'Switch'": "'Switch' is text; write @Switch",
    "MoELayer.router = Switch": "Switch is no value (write @Switch, or @Switch()",
    "Attention.qk_norm = @AdamW": "expected True or False, got @AdamW",
    "TextData.corpus = @Bytes()": "expected @",
    "Transformer.moe = @FeedForward": "expected @MoELayer or None, got @FeedForward",
    "SharedExpert.count = 0": "expected a whole number of at least 1, got 0",
    "TextData.tokenizer = @Capacity()": "expected @Bytes() (or",  # it has a method `fit`, too
    "train.max_seconds = -1.0": "expected a number above 0 or None, got -1.0",
    "train.save_every = -1": "expected a whole number of at least 1 or None, got -1",
    "Transformer.num_heads = 0": "expected a whole number of at least 1 or None, got 0",
    "MoELayer.d_ff = 0": "expected a whole number of at least 1 or None, got 0",
    "MoELayer.d_ff = 1000000000000": "expected at most 2,147,483,647, got 1,000,000,000,000",
    "train.prompts = ('abc')": "'abc' is one text; write ('abc',)",
    "train.prompts = -1": "expected a list of text, got -1",
    "AdamW.b1 = 2.5": "expected a number of at least 0 and below 1, got 2.5",
    "AdamW.learning_rate = -1": "expected a number of at least 0, got -1",
    "AdamW.learning_rate = 1e999": "got inf",
    "TopK.gates = 'sofmax'": "expected 'softmax' or 'softmax_of_selected' or 'sigmoid'",
}


@pytest.mark.parametrize("binding", MISTAKES)
def test_a_binding_that_does_not_fit_its_annotation_is_one_line(binding):
    said = refusal(binding)
    assert MISTAKES[binding] in said and said.count("\n") == 0, said


def test_what_fits_is_taken():
    for binding in (
        "Hash.table = @BalancedTable()",
        "train.loggers = [@WandB()]",
        "TopK.losses = ()",
        "TextFiles.paths = ['a', 'b']",
        "Capacity.factor = 1",
        "Transformer.norm = @LayerNorm",
        "train.model = @Transformer",
        "MoELayer.router = @routing.ExpertChoice",
        "Transformer.moe = None",
    ):
        config.bind(["quickstart.gin"], [binding])


def every_parameter():
    """(name, annotation) of all that a config may set."""
    for selector, short in sorted(check.configurables().items()):
        if not selector.startswith(("moe.", "layers.", "routing.")):
            continue  # those of other tests
        for name, parameter in (check.parameters(selector) or {}).items():
            yield f"{short}.{name}", check.annotation_of(selector, parameter), parameter.default


def kinds(annotation):
    """The members of a union, or the annotation itself."""
    return typing.get_args(annotation) if types._is_union(annotation) else (annotation,)


def test_every_number_has_a_range_and_a_default_inside_it():
    missing = []
    for name, annotation, default in every_parameter():
        if any(kind in (int, float) for kind in kinds(annotation)):
            missing.append(name)
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert types.fits(default, annotation), (name, default)
    assert not missing


VALUES = (-1, 0, 10**12, math.nan, -math.inf, 0.5, "", "x", True, None, (), ("x",), {"a": 1})
VALUES += (Reference("AdamW", True), Reference("AdamW", False), [Reference("TopK", False)])


def test_no_value_of_any_kind_is_a_traceback():
    """Sixteen values for each parameter: taken, or refused in words."""
    taken = refused = 0
    for name, annotation, _ in every_parameter():
        for value in VALUES:
            said = types.mismatch(value, annotation)
            assert said is None or (said and "\n" not in said), name
            taken, refused = taken + (said is None), refused + (said is not None)
    assert taken > 300 and refused > 1500, (taken, refused)


def test_a_callable_that_does_not_say_what_it_makes_is_told_as_one():
    """As a user's own configurable may have it; a router's names what can be written."""
    told = "a class, or a function that makes an object"
    assert types.described(Callable) == types.described(Callable[..., object]) == told


@pytest.mark.parametrize("value", [1, 7])
def test_small_numbers_build_a_model_or_are_refused_in_words(value, tmp_path):
    """Every number of what the model is made of, one after the other."""
    from test_configs import parts

    config = tmp_path / "tiny.gin"
    one_layer = BASE.replace("num_layers = 2", "num_layers = 1")
    config.write_text(one_layer + "TextFiles.paths = 'none'\n")
    built = 0
    made_of = ("Transformer", "MoELayer", "Attention", "TopK", "Capacity", "FeedForward", "Experts")
    for name, annotation, _ in every_parameter():
        if name.split(".")[0] not in made_of or not types.fits(value, annotation):
            continue
        try:
            parts([config], [f"{name} = {value}"])
            built += 1
        except UserError as error:
            assert "\n" not in str(error), name
    assert built > 10


def test_a_model_that_fits_no_machine_is_refused_before_anything_is_compiled(tmp_path):
    from tiny import Runs

    runs = Runs(tmp_path)
    assert runs("huge", "MoELayer.d_ff = 2000000000") == 2


def test_ranges_say_what_holds():
    assert str(Range(low=0, below=1)) == "of at least 0 and below 1"
    assert Range(above=0).holds(1e-9) and not Range(above=0).holds(0)
    assert not Range().holds(math.nan) and not Range().holds(math.inf)
